"""`python -m rag_mm.cli.probes jax|scann|commands`: starts libraries in a process that they may end.

`rag-mm doctor` runs these in subprocesses: an unknown XLA flag, or ScaNN with the wrong TensorFlow, ends
the process without an exception.
"""

import importlib
import json
import pkgutil
import sys

# Of the extra [explore]; the other extras' libraries are imported inside functions.
OPTIONAL = ("anyio", "h11", "starlette", "uvicorn")


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


def import_commands() -> None:
    """Imports all modules of the package, as the commands do; prints those that fail, module -> why, as JSON.

    A module that lacks an extra is not broken. Each is named on stderr, in case its import ends the process.
    """
    import rag_mm

    broken = {}
    for module in pkgutil.walk_packages(rag_mm.__path__, "rag_mm.", onerror=lambda name: None):
        if module.name in ("rag_mm.cli.probes", "rag_mm.__main__"):
            continue
        print(f"the import of {module.name} ended Python", file=sys.stderr, flush=True)
        try:
            importlib.import_module(module.name)
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name not in OPTIONAL:
                broken[module.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(broken))


if __name__ == "__main__":
    {"jax": start_jax, "scann": start_scann, "commands": import_commands}[sys.argv[1]]()
