"""Several processes as one program: how they find one another, and how soon they miss one that is gone."""

import jax

# A process that is not heard of for so long is gone, and all others end: within a minute, network and all.
HEARTBEAT_SECONDS = 30


def join(
    address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several, before any device is used; all call it, and wait for each other.

    Args:
        address: host:port of process 0, where they meet; None where jax finds out by itself (TPU pods,
            Slurm, Kubernetes).
        num_processes, process_id: how many there are and which one this is, from 0; None as above.
    """
    # `train.preemption` hears SIGTERM and lets all agree; jax's own service would take the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
