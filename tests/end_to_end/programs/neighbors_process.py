"""One of several processes that find a run's neighbors: RUN OUT HOST:PORT NUM ID."""

import sys

from etils import epath

from rag_mm.core import processes, run_folder
from rag_mm.stages import chain_config
from rag_mm.stages.shared import find_neighbors

if __name__ == "__main__":
    workdir, out, address, count, number = sys.argv[1:]
    if int(count) > 1:
        processes.join(address, int(count), int(number))
    page = chain_config.load("configs/quickstart.py:tiny")
    config = chain_config.stage_configs(page)["neighbors"]
    find_neighbors.run(config, run_folder.open_run(workdir), epath.Path(out))
