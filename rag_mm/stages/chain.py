"""The chain of stages: what each is made from, and running them in order."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath
from jax.sharding import Mesh

from rag_mm.core import compilation_cache, configuration, progress, reuse, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import multiprocess
from rag_mm.stages.ra_cm3 import (
    copy_probe,
    evaluate,
    few_shot,
    generate_samples,
    train_decoder,
    write_report,
)
from rag_mm.stages.reco import draw_toy_pairs, embed_documents, embed_pairs, train_fusion
from rag_mm.stages.shared import (
    build_memory,
    find_neighbors,
    train_retriever,
    train_tokenizer,
    world_config,
)
from rag_mm.worlds import concepts


@dataclasses.dataclass(frozen=True)
class Stage:
    """A function of (config, run, stage_dir) that returns metrics, its config's class, and its inputs.

    `shares` names other stages' slices that its config holds; `reports_on_others` says that its metrics
    are nested by the stages they speak of; `worlds` are those that it works in. `mesh` makes what it trains
    on, or refuses a batch that does not fit the devices. Several processes all call the function of a stage
    that trains or `is_shared`; process 0 alone calls that of any other.
    """

    config: type
    inputs: tuple[str, ...]
    function: Callable[[Any, run_folder.Run, epath.Path], Mapping[str, Any]]
    shares: tuple[str, ...] = ()
    reports_on_others: bool = False
    worlds: tuple[type, ...] = (world_config.EmojiWorld, world_config.OwnImages)
    mesh: Callable[[Any], Mesh] | None = None
    is_shared: bool = False


SCENES = (world_config.EmojiWorld,)  # Emoji scenes alone tell facts to score by.
TOYS = (concepts.ConceptWorld,)
EVERY = (world_config.EmojiWorld, world_config.OwnImages, concepts.ConceptWorld)
STAGES = {
    "tokenizer": Stage(
        train_tokenizer.TokenizerStageConfig,
        train_tokenizer.INPUTS,
        train_tokenizer.run,
        mesh=train_tokenizer.make_mesh,
    ),
    "retriever": Stage(
        train_retriever.RetrieverStageConfig,
        train_retriever.INPUTS,
        train_retriever.run,
        mesh=train_retriever.make_mesh,
    ),
    "memory": Stage(
        build_memory.MemoryStageConfig, build_memory.INPUTS, build_memory.run, is_shared=True
    ),
    "neighbors": Stage(
        find_neighbors.NeighborsStageConfig,
        find_neighbors.INPUTS,
        find_neighbors.run,
        reports_on_others=True,
        is_shared=True,
    ),
    "decoder": Stage(
        train_decoder.DecoderStageConfig,
        train_decoder.INPUTS,
        train_decoder.run,
        mesh=train_decoder.make_mesh,
    ),
    "control": Stage(
        train_decoder.DecoderStageConfig,
        train_decoder.CONTROL_INPUTS,
        train_decoder.run,
        mesh=train_decoder.make_mesh,
    ),
    "copy_probe": Stage(
        copy_probe.CopyProbeStageConfig,
        copy_probe.INPUTS,
        copy_probe.run,
        worlds=SCENES,
        mesh=train_decoder.make_mesh,
    ),
    "few_shot": Stage(few_shot.FewShotStageConfig, few_shot.INPUTS, few_shot.run, worlds=SCENES),
    "pairs": Stage(
        embed_pairs.PairsStageConfig, embed_pairs.INPUTS, embed_pairs.run, worlds=SCENES
    ),
    "toy_pairs": Stage(
        draw_toy_pairs.ToyPairsStageConfig, draw_toy_pairs.INPUTS, draw_toy_pairs.run, worlds=TOYS
    ),
    "document_pairs": Stage(
        embed_documents.DocumentPairsStageConfig,
        embed_documents.INPUTS,
        embed_documents.run,
        worlds=EVERY,
    ),
    **{
        f"{kind}fusion": Stage(
            train_fusion.FusionStageConfig,
            (f"{kind}pairs",),
            partial(train_fusion.run, source=f"{kind}pairs"),
            worlds=EVERY,
            mesh=train_fusion.make_mesh,
        )
        for kind in ("", "toy_", "document_")
    },
    "generation": Stage(
        generate_samples.GenerationStageConfig,
        generate_samples.INPUTS,
        generate_samples.run,
        worlds=SCENES,
    ),
    "evaluation": Stage(
        evaluate.EvaluationStageConfig, evaluate.INPUTS, evaluate.run, ("generation",), True, SCENES
    ),
    "report": Stage(
        write_report.ReportStageConfig,
        write_report.INPUTS,
        write_report.run,
        ("generation",),
        worlds=SCENES,
    ),
}


def stage_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Each stage's frozen config, in the order of `config["stages"]`.

    Raises:
        UserError: no stage or an unknown one, or a value that a stage refuses.
    """
    for key in ("stages", "seed", "world"):
        if key not in config:
            raise UserError(f"The config has no {key!r}, which every chain needs.")
    if not config["stages"]:
        raise UserError(f"The config has no stages; stages are {', '.join(STAGES)}.")
    if config["seed"] < 0:
        raise UserError(f"The config's seed is {config['seed']}; give 0 or more.")
    unknown = [name for name in config["stages"] if name not in STAGES]
    if unknown:
        raise UserError(f"There is no stage {unknown[0]!r}; stages are {', '.join(STAGES)}.")
    world = world_config.make(config["world"])
    _check_world(world, config["stages"])
    configs = {name: _stage_config(config, name, world) for name in config["stages"]}
    _check_agreement(configs)
    return configs


def run_chain(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    only: str | None = None,
    overwrite: bool = False,
    reuse_from: Sequence[epath.PathLike] = (),
) -> run_folder.Run:
    """Runs the stages of a config in order, or one of them; finished ones are passed over.

    Several processes call it alike and on one folder (`stages.team`).

    Args:
        config: nested plain dicts, as `core.config.to_dict` gives.
        workdir: the run; made if it does not exist.
        only: one stage's name.
        overwrite: rebuild stages that would be refused.
        reuse_from: runs whose finished stages are copied where they are what would be made here.

    Raises:
        UserError: the config, the devices or the run do not fit; nothing has been touched then.
    """
    run = run_folder.Run(epath.Path(workdir))
    configs = stage_configs(config)
    if only is not None and only not in configs:
        raise UserError(f"The config has no stage {only!r}; it has {', '.join(configs)}.")
    chosen = list(configs) if only is None else [only]
    multiprocess.agree({"config": config, "only": only, "overwrite": overwrite})
    for name in chosen:
        _check_mesh(name, configs[name])
    if not multiprocess.is_leader():
        compilation_cache.keep_programs(run.workdir)
        multiprocess.follow(
            run, {name: partial(_call, run, name, configs[name]) for name in chosen}
        )
        return run
    if "memory" in chosen and "://" in str(run.workdir):
        raise UserError(
            f"A memory is built in a folder of a file system, not in {run.workdir}; mount it, or build the "
            "stages up to the memory elsewhere."
        )
    _check_inputs(run, chosen)
    with multiprocess.leading(), run.locked():
        compilation_cache.keep_programs(run.workdir)
        for name in configs:
            # config.json speaks of every stage, so all must fit it, or be about to be rebuilt.
            if not overwrite:
                run_folder.check_stage(run, name, slice_of(configs[name]), STAGES[name].inputs)
        run.save_config(config)
        sources = [run_folder.Run(epath.Path(source)) for source in reuse_from]
        has_worked = [_run_stage(run, name, configs[name], overwrite, sources) for name in chosen]
        is_missing = not (run.workdir / write_report.PAGE).exists()
        if "report" in chosen and (any(has_worked) or is_missing):
            made = [name for name in configs if run.manifest(name) is not None]
            write_report.finish(configs["report"], run, made)
    return run


def _check_mesh(name: str, config: Any) -> None:
    """Refuses what would not go through the devices, before an earlier stage has taken its time."""
    make_mesh = STAGES[name].mesh
    try:
        if make_mesh is not None:
            make_mesh(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check_inputs(run: run_folder.Run, chosen: list[str]) -> None:
    """Refuses where a stage reads one that neither lies there nor is made before it."""
    for place, name in enumerate(chosen):
        for needed in STAGES[name].inputs:
            if needed not in chosen[:place]:
                run.finished_stage(needed)


def _run_stage(
    run: run_folder.Run, name: str, config: Any, overwrite: bool, sources: Sequence[run_folder.Run]
) -> bool:
    """Whether there was anything to do."""
    stage = STAGES[name]
    before = run.manifest(name)
    is_shared = stage.is_shared or stage.mesh is not None

    def work(*_: Any) -> Mapping[str, Any]:
        if is_shared:
            multiprocess.share(name)
        elif multiprocess.has_others():
            progress.say(f"{name}: process 0 alone, the others wait")
        return _call(run, name, config)

    if before is not None:
        progress.say(f"{name}: {'done before, checking' if before.is_done else 'going on'}")
    else:
        wanted = (run, name, slice_of(config), stage.inputs)
        lender = next((each for each in sources if reuse.reuse_stage(*wanted, each)), None)
        progress.say(f"{name}: {f'taken over from {lender.workdir}' if lender else 'begins'}")
    after = run_folder.run_stage(
        run,
        name,
        slice_of(config),
        stage.inputs,
        work,
        overwrite=overwrite,
        reports_on_others=stage.reports_on_others,
    )
    return before != after


def _call(run: run_folder.Run, name: str, config: Any) -> Mapping[str, Any]:
    return STAGES[name].function(config, run, run.stage_dir(name))


def _check_world(world: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(world, STAGES[name].worlds):
            raise UserError(
                f"The stage {name} does not work in the config's world, {world_config.KINDS[type(world)]}; "
                "leave it out of the config's stages."
            )


def _stage_config(config: Mapping[str, Any], name: str, world: Any) -> Any:
    shared: dict[str, Any] = {"seed": config["seed"], "world": world}
    if "generation" in STAGES[name].shares:
        shared["generation"] = {**config.get("generation", {}), **shared}
    own = config.get(name, {})
    if name == "control":  # The decoder in everything but what it reads, and for how long.
        num_steps = own.get("num_steps")
        own = {**config.get("decoder", {}), "is_vanilla": True}
        if num_steps is not None:
            own["loop"] = {**own["loop"], "num_steps": num_steps}
    return configuration.make(STAGES[name].config, {**shared, **own}, name)


def _check_agreement(configs: Mapping[str, Any]) -> None:
    """Refuses counts of one stage that another cannot serve."""
    neighbors, readers = (
        configs.get("neighbors"),
        [
            ("decoder", "captions_per_image", "captions_per_image"),
            ("decoder", "max_docs", "num_neighbors"),
            ("generation", "num_held_out", "num_test"),
            ("generation", "num_seen", "num_test"),
        ],
    )
    for stage, wants, has in readers:
        if neighbors is None or stage not in configs:
            continue
        wanted, found = getattr(configs[stage], wants), getattr(neighbors, has)
        if wanted > found or (wants == has and wanted != found):
            raise UserError(
                f"{stage}.{wants} is {wanted}, but neighbors.{has} is {found}; make them agree."
            )


def slice_of(config: Any) -> dict[str, Any]:
    """A stage's config as its manifest has it."""
    fields = dataclasses.asdict(config)
    loop = fields.get("loop")
    if loop is not None and loop["guard"] is None:
        del loop["guard"]  # What was made before there were guards was made from this.
    return fields
