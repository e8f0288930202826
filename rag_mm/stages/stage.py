"""What a stage is: a function of a run, the dataclass of its config, and the stages it reads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from rag_mm.core import run_folder
from rag_mm.stages.shared import world_config
from rag_mm.worlds import concepts

# File of a measuring stage: {split: {variant: {metric: one value per test document}}}.
PER_DOCUMENT = "per_document.json"
SCENES = (world_config.EmojiWorld,)  # Only emoji scenes come with facts to score by.
IMAGES = (world_config.EmojiWorld, world_config.OwnImages)
EVERY_WORLD = (*IMAGES, concepts.ConceptWorld)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One named step of a chain. Of several processes, the leader alone runs a stage unless it is shared.

    Attributes:
        config: frozen dataclass, the first argument of `function`.
        inputs: names of the stages that it reads.
        function: (config, run, stage_dir) -> metrics.
        worlds: classes of worlds that it works in.
        mesh: config -> the mesh that it trains on, so that a batch that does not fit is refused early;
            None for a stage that does not train. All processes run a stage that trains.
        is_shared: all processes run it although it does not train.
        holds: other stages whose configs its config contains, as fields of those names.
        section: dataclass of its part of a config page, where that is not `config` itself.
        resolve: (page, section's values) -> values of `config`, where there is a `section`.
        reports_on_others: its metrics are nested by the stages that they belong to.
        finish: (config, run, finished stages) -> None, called when a chain that includes the stage ends
            and did anything.
        page: file of the run that `finish` writes; it is called when the file is missing, too.
    """

    config: type
    inputs: tuple[str, ...]
    function: Callable[[Any, run_folder.Run, epath.Path], Mapping[str, Any]]
    worlds: tuple[type, ...] = IMAGES
    mesh: Callable[[Any], Mesh] | None = None
    is_shared: bool = False
    holds: tuple[str, ...] = ()
    section: type | None = None
    resolve: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    reports_on_others: bool = False
    finish: Callable[[Any, run_folder.Run, Sequence[str]], Any] | None = None
    page: str = ""
