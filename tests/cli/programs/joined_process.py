"""One of several processes inside `process_args.joined`: HOST:PORT NUM ID WHAT FOLDER."""

import argparse
import pathlib
import sys
import time

from rag_mm.cli import process_args
from rag_mm.core import processes
from rag_mm.core.errors import UserError

if __name__ == "__main__":
    address, count, me, what, folder = sys.argv[1:]
    args = argparse.Namespace(coordinator=address, num_processes=int(count), process_id=int(me))
    process_args.check_arguments(args)
    with process_args.joined(args):
        (pathlib.Path(folder) / f"here-{me}").write_text(
            processes.broadcast_from_leader(f"from {me}")
        )
        if what == "mistake" and me == "0":
            raise UserError("The page is wrong.")
        if what == "bug" and me == "1":
            raise KeyError("nothing")
        if what != "nothing":
            time.sleep(200)
