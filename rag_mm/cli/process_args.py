"""Commands that several processes share: the arguments by which they find one another, and one end."""

import argparse
import contextlib
import traceback
from collections.abc import Iterator

from rag_mm.cli import main
from rag_mm.core.errors import UserError

AUTO = "auto"
_TOGETHER = "--coordinator=HOST:PORT, --num-processes and --process-id go together."


def add_arguments(parser: argparse.ArgumentParser, what_for: str) -> None:
    """Adds the three arguments; `what_for` ends the sentence that begins with "several processes"."""
    several = parser.add_argument_group("several processes", what_for)
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"where they meet: at process 0; {AUTO}: jax finds all by itself (TPU pods, Slurm, GKE)",
    )
    several.add_argument("--num-processes", type=int, help="how many there are")
    several.add_argument("--process-id", type=int, help="which one this is, from 0")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what does not describe several processes.

    Raises:
        UserError: they contradict one another.
    """
    address, count, number = args.coordinator, args.num_processes, args.process_id
    if address is None:
        if count is not None or number is not None:
            raise UserError(_TOGETHER)
        return
    if address == AUTO:
        if count is not None or number is not None:
            raise UserError(
                f"--coordinator={AUTO} finds --num-processes and --process-id itself; leave them out."
            )
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(
            f"--coordinator={address} is no place to meet; write HOST:PORT, such as 10.0.0.1:1234, "
            f"or {AUTO}."
        )
    if count is None or number is None:
        raise UserError(_TOGETHER)
    if not 0 <= number < count:
        raise UserError(f"--process-id={number} is none of --num-processes={count}; count from 0.")


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """The body as one of the processes that the arguments describe, or alone where they describe none.

    What ends one, an error or SIGTERM, ends all others with the same exit code. Arguments were checked, and
    no device has been used yet.

    Raises:
        UserError: they do not find one another.
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
    told = lambda: processes.abort_all(preemption.EXIT_CODE, "it was told to.")
    with processes.watch_others() as heard, preemption.listen(told):
        try:
            yield
            processes.broadcast_from_leader()  # Until here the end of another would be one's own.
        except (Exception, KeyboardInterrupt) as error:
            code = main.explain(error)
            if code is None and (other := heard()) is not None:
                processes.end_with(other)  # What broke here was the connection to it.
            if code is None:
                traceback.print_exc()
            # Whatever it was, the work is not done: not even where a reader of stdout has left.
            processes.abort_all(code or 1, f"{error}" or type(error).__name__)
