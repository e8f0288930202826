"""One of several processes that find a run's neighbors: RUN OUT HOST:PORT NUM ID."""

import sys

from etils import epath

from rag_mm.core import config as config_lib
from rag_mm.core import processes
from rag_mm.core import run as run_lib
from rag_mm.stages import chain, neighbors

if __name__ == "__main__":
    workdir, out, address, count, number = sys.argv[1:]
    if int(count) > 1:
        processes.join(address, int(count), int(number))
    page = config_lib.load_config("configs/quickstart.py:tiny")
    config = chain.stage_configs(config_lib.to_dict(page))["neighbors"]
    neighbors.run(config, run_lib.open_run(workdir), epath.Path(out))
