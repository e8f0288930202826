"""The definition of a stage: its function, the dataclass of its config, and the stages it reads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from rag_mm.core import run_folder
from rag_mm.stages.shared import world_config
from rag_mm.worlds import concepts

# File that a stage with metrics per document writes: {split: {variant: {metric: one value per test
# document}}}.
PER_DOCUMENT = "per_document.json"
SCENES = (world_config.EmojiWorld,)  # Only emoji scenes have the facts that scoring needs.
IMAGES = (world_config.EmojiWorld, world_config.OwnImages)
WITH_CORPORA = (*IMAGES, world_config.CorpusWorld)
EVERY_WORLD = (*IMAGES, concepts.ConceptWorld)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a chain. With several processes, only the leader runs a stage unless it is shared.

    Attributes:
        config: frozen dataclass, the first argument of `function`.
        inputs: names of the stages that it reads.
        function: (config, run, stage_dir) -> metrics.
        worlds: classes of the worlds that it supports.
        mesh: config -> the mesh that it trains on, so that a batch that does not fit is rejected early;
            None for a stage that does not train. All processes run a stage that trains.
        is_shared: all processes run it although it does not train.
        more_inputs: config -> further stages that it reads with this config, such as one that it starts from.
        needs_disk: config -> whether its files are read through the machine's file system, such as mapped
            into memory, so that it cannot be in a remote run.
        needs_own_memory: it takes facts of the memory's rows from the world, so that the memory must be built
            from the world's documents.
        holds: other stages whose configs its config contains, in fields of the same names.
        section: dataclass of its part of a config page, if that differs from `config`.
        resolve: (page, values of the section) -> values of `config`; given with `section`.
        reports_on_others: its metrics are nested by the stages that they belong to.
        finish: (config, run, finished stages) -> None, called at the end of a chain that includes the
            stage, if any stage ran.
        page: file of the run that `finish` writes; `finish` is also called if it is missing.
    """

    config: type
    inputs: tuple[str, ...]
    function: Callable[[Any, run_folder.Run, epath.Path], Mapping[str, Any]]
    worlds: tuple[type, ...] = IMAGES
    mesh: Callable[[Any], Mesh] | None = None
    is_shared: bool = False
    more_inputs: Callable[[Any], tuple[str, ...]] = lambda config: ()
    needs_disk: Callable[[Any], bool] = lambda config: False
    needs_own_memory: bool = False
    holds: tuple[str, ...] = ()
    section: type | None = None
    resolve: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    reports_on_others: bool = False
    finish: Callable[[Any, run_folder.Run, Sequence[str]], Any] | None = None
    page: str = ""

    def inputs_for(self, config: Any) -> tuple[str, ...]:
        """The names of the stages that it reads with this config."""
        return (*self.inputs, *self.more_inputs(config))
