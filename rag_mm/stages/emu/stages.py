"""Table of Emu's stages: what it trains on, the models, their figures and their pages."""

from rag_mm.stages.emu import (
    measure_emu,
    measure_visual,
    prepare_data,
    store_rollouts,
    train_emu,
    train_visual_decoder,
    tune_emu,
    write_emu_page,
    write_visual_page,
)
from rag_mm.stages.stage import SCENES, Stage

STAGES = {
    "emu_data": Stage(
        prepare_data.EmuDataStageConfig,
        prepare_data.INPUTS,
        prepare_data.run,
        needs_disk=lambda config: True,
    ),
    "emu": Stage(
        train_emu.EmuStageConfig,
        train_emu.INPUTS,
        train_emu.run,
        mesh=train_emu.make_mesh,
        more_inputs=train_emu.inputs,
        holds=("emu_data",),
    ),
    "rollouts": Stage(
        store_rollouts.RolloutsStageConfig,
        store_rollouts.INPUTS,
        store_rollouts.run,
        needs_disk=lambda config: True,
        more_inputs=store_rollouts.inputs,
        holds=("emu_data",),
    ),
    "emu_figures": Stage(
        measure_emu.EmuFiguresStageConfig,
        measure_emu.INPUTS,
        measure_emu.run,
        SCENES,
        needs_own_memory=True,
        finish=write_emu_page.finish,
        page=write_emu_page.PAGE,
    ),
    "emu_sft": Stage(
        tune_emu.EmuTuningStageConfig,
        tune_emu.INPUTS,
        tune_emu.run,
        SCENES,
        mesh=tune_emu.make_mesh,
        needs_own_memory=True,
    ),
    "visual_decoder": Stage(
        train_visual_decoder.VisualDecoderStageConfig,
        train_visual_decoder.INPUTS,
        train_visual_decoder.run,
        mesh=train_visual_decoder.make_mesh,
        holds=("emu_data",),
    ),
    "visual_control": Stage(
        train_visual_decoder.VisualDecoderStageConfig,
        train_visual_decoder.INPUTS,
        train_visual_decoder.run,
        mesh=train_visual_decoder.make_mesh,
        holds=("emu_data",),
        section=train_visual_decoder.VisualControlSection,
        resolve=train_visual_decoder.resolve_control,
    ),
    "visual_figures": Stage(
        measure_visual.VisualFiguresStageConfig,
        measure_visual.INPUTS,
        measure_visual.run,
        SCENES,
        more_inputs=measure_visual.inputs,
        needs_own_memory=True,
        finish=write_visual_page.finish,
        page=write_visual_page.PAGE,
    ),
}
