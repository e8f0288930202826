"""Multi-process flags (--coordinator, --num-processes, --process-id) and coordinated shutdown."""

import argparse
import contextlib
import traceback
from collections.abc import Iterator

from rag_mm.cli import main
from rag_mm.core.errors import UserError

AUTO = "auto"
_GIVE_ALL = "--coordinator=HOST:PORT, --num-processes and --process-id must be given together."


def add_arguments(parser: argparse.ArgumentParser, description: str) -> None:
    """Adds the three options as a group of their own; `description` says what the processes share."""
    group = parser.add_argument_group("several processes", description)
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"address of process 0; {AUTO}: jax detects all three values (TPU pods, Slurm, GKE)",
    )
    group.add_argument("--num-processes", type=int, help="number of processes")
    group.add_argument("--process-id", type=int, help="index of this process, from 0")


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the three options against each other.

    Raises:
        UserError: one is missing, malformed or out of range.
    """
    address, count, process_id = args.coordinator, args.num_processes, args.process_id
    if address is None:
        if count is not None or process_id is not None:
            raise UserError(_GIVE_ALL)
        return
    if address == AUTO:
        if count is not None or process_id is not None:
            raise UserError(
                f"--coordinator={AUTO} detects --num-processes and --process-id; leave them out."
            )
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(
            f"--coordinator={address} is not an address; write HOST:PORT, such as 10.0.0.1:1234, "
            f"or {AUTO}."
        )
    if count is None or process_id is None:
        raise UserError(_GIVE_ALL)
    if count < 1:
        raise UserError(f"--num-processes={count}; give at least 1.")
    if not 0 <= process_id < count:
        raise UserError(
            f"--process-id={process_id} is out of range; with --num-processes={count} give 0 to {count - 1}."
        )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Runs the body as one of several processes, or as the only one without --coordinator.

    An error or SIGTERM in one process ends all of them with the same exit code. Call `check_arguments`
    first, and enter before any device is used.

    Raises:
        UserError: the processes cannot connect.
    """
    if args.coordinator is None:
        yield
        return
    from rag_mm.core import processes
    from rag_mm.train import preemption

    if args.coordinator == AUTO:
        processes.join()
    else:
        processes.join(args.coordinator, args.num_processes, args.process_id)
    on_sigterm = lambda: processes.abort_all(preemption.EXIT_CODE, "it received SIGTERM.")
    with processes.watch_others() as get_failure, preemption.listen(on_sigterm):
        try:
            yield
            # Followers wait here for the leader, so until it gets here its failure is theirs too.
            processes.broadcast_from_leader()
        except (Exception, KeyboardInterrupt) as error:
            code = main.explain(error)
            if code is None and (failure := get_failure()) is not None:
                processes.end_with(failure)  # The error here was the lost connection to it.
            if code is None:
                traceback.print_exc()
            # The work is unfinished in every case, so the exit code is never 0, not even for a closed stdout.
            processes.abort_all(code or 1, f"{error}" or type(error).__name__)
