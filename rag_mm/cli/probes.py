"""`python -m rag_mm.cli.probes jax|scann`: starts one library, in a process that it may kill.

`rag-mm doctor` runs these in subprocesses: an unknown XLA flag, or ScaNN with the wrong TensorFlow, ends
the process without an exception.
"""

import json
import sys


def start_jax() -> None:
    """Prints the default backend and the names of its devices, as JSON."""
    import jax

    names = [f"{device.device_kind} {device.id}" for device in jax.devices()]
    print(json.dumps({"backend": jax.default_backend(), "devices": names}))


def start_scann() -> None:
    """Builds a ScaNN index of eight rows."""
    import numpy as np

    from rag_mm.memory.index import scann

    scann.ScannIndex().build(np.eye(8, dtype=np.float32))


if __name__ == "__main__":
    {"jax": start_jax, "scann": start_scann}[sys.argv[1]]()
