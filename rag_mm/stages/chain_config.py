"""Turns the values of a config page into the frozen config of each stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from rag_mm.core import configuration, manifest_values, renames
from rag_mm.core.configuration import Section
from rag_mm.core.errors import UserError
from rag_mm.perf.plan import chain_sizes
from rag_mm.stages import ablation_plan
from rag_mm.stages.cm3leon import stages as cm3leon_stages
from rag_mm.stages.emu import stages as emu_stages
from rag_mm.stages.ra_cm3 import stages as ra_cm3_stages
from rag_mm.stages.reco import stages as reco_stages
from rag_mm.stages.shared import stages as shared_stages
from rag_mm.stages.shared import world_config
from rag_mm.stages.spae import stages as spae_stages
from rag_mm.stages.stage import Stage

STAGES: dict[str, Stage] = {
    **shared_stages.STAGES,
    **ra_cm3_stages.STAGES,
    **cm3leon_stages.STAGES,
    **reco_stages.STAGES,
    **spae_stages.STAGES,
    **emu_stages.STAGES,
}


@dataclasses.dataclass(frozen=True)
class ChainSettings:
    """Settings of every chain.

    Attributes:
        stages: names of the stages, in the order in which they run.
        seed: seed of every stage, and of the world unless it has its own.
    """

    stages: tuple[str, ...]
    seed: int = 0


def load(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a page with defaults and overrides, as plain values; see `configuration.load_config`.

    Raises:
        UserError: an unknown page, preset, stage or setting, or a value of the wrong type.
    """
    return configuration.to_dict(configuration.load_config(name, overrides, sections))


def sections(config: Mapping[str, Any]) -> dict[str, Section]:
    """The dataclasses that define a chain's config, by the config's keys ("" for the top level).

    Raises:
        UserError: there are no stages, one is unknown, or `seed` or `world` is missing.
    """
    if "family" in config and "stages" not in config:
        raise UserError(
            "The config is one model's sizes, for rag-mm plan; to train, give one with stages."
        )
    if not config.get("stages"):
        raise UserError(f"The config has no stages; stages are {', '.join(STAGES)}.")
    unknown = [name for name in config["stages"] if name not in STAGES]
    if unknown:
        hint = renames.hint(unknown[0]) or f"; stages are {', '.join(STAGES)}"
        raise UserError(f"There is no stage {unknown[0]!r}{hint}.")
    for key in ("seed", "world"):
        if key not in config:
            raise UserError(f"The config has no {key!r}, which every chain needs.")
    result = {
        "": Section(ChainSettings),
        "world": Section(world_config.world_class(config["world"])),
    }
    for name, stage in STAGES.items():
        if name in config or name in config["stages"]:
            excluded = () if stage.section else ("seed", "world", *stage.holds)
            result[name] = Section(stage.section or stage.config, excluded)
    if chain_sizes.KEY in config:
        result[chain_sizes.KEY] = Section(chain_sizes.ChainSizes)
    if ablation_plan.KEY in config:
        result[ablation_plan.KEY] = Section(ablation_plan.AblationPlan)
    return result


def stage_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen config of each stage, in the order of `config["stages"]`.

    Raises:
        UserError: there are no stages, one is unknown, or a stage rejects a value.
    """
    config = configuration.fill(config, sections)
    if config["seed"] < 0:
        raise UserError(f"The config's seed is {config['seed']}; give 0 or more.")
    world = world_config.make(config["world"], config["seed"])
    _check_world(world, config["stages"])
    configs = {name: _stage_config(config, name, world) for name in config["stages"]}
    for name, made in configs.items():
        if name in STAGES[name].inputs_for(made):
            raise UserError(f"{name}.start_from is {name!r}, the stage itself; name another stage.")
    _check_memory(configs)
    ra_cm3_stages.check_agreement(configs)
    return configs


def override(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config with overrides and defaults, as plain values; see `configuration.apply_overrides`."""
    filled = configuration.fill(config, sections)
    changed = ml_collections.ConfigDict(filled, allow_dotted_keys=True)
    configuration.apply_overrides(changed, overrides)
    return configuration.to_dict(configuration.fill(configuration.to_dict(changed), sections))


def slice_of(config: Any) -> dict[str, Any]:
    """A stage's config as its manifest records it, nested plain values.

    Of a group that a page fills from another dataclass (`configuration.part_of`) only what differs from the
    defaults is recorded, as of a field that is `manifest_values.ADDED_LATER`: so a new field does not make
    finished runs look edited.
    """
    values = manifest_values.recorded(config)
    for field in dataclasses.fields(config):
        group = configuration.group_of(field)
        if group is not None and values[field.name] is not None:
            values[field.name] = configuration.without_defaults(group, values[field.name])
    return manifest_values.under_older_names(config, values)


def _stage_config(config: Mapping[str, Any], name: str, world: Any) -> Any:
    stage = STAGES[name]
    shared: dict[str, Any] = {"seed": config["seed"], "world": world}
    nested: dict[str, Any] = {
        other: configuration.make(STAGES[other].config, {**config.get(other, {}), **shared}, other)
        for other in stage.holds
    }
    values = config[name]
    if stage.resolve is not None:
        values = stage.resolve(config, values)
    return configuration.make(stage.config, {**shared, **nested, **values}, name)


def _check_memory(configs: Mapping[str, Any]) -> None:
    """Rejects what needs the facts of the memory's rows where the memory is given."""
    if "memory" not in configs or configs["memory"].folder is None:
        return
    for name in configs:
        if STAGES[name].needs_own_memory:
            raise UserError(
                f"The stage {name} needs the facts of the memory's rows, which are unknown for "
                "memory.folder; remove it from the config's stages."
            )
    if "neighbors" in configs and configs["neighbors"].min_same_class > 0:
        raise UserError(
            "neighbors.min_same_class needs the facts of the memory's rows, which are unknown for "
            "memory.folder; set it to 0."
        )


def _check_world(world: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(world, STAGES[name].worlds):
            raise UserError(
                f"The stage {name} does not support the config's world, "
                f"{world_config.NAMES[type(world)]}; remove it from the config's stages."
            )
