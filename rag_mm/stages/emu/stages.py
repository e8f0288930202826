"""Table of Emu's stages: what it trains on, the model, its figures and its page."""

from rag_mm.stages.emu import measure_emu, prepare_data, train_emu, write_emu_page
from rag_mm.stages.stage import SCENES, Stage

STAGES = {
    "emu_data": Stage(prepare_data.EmuDataStageConfig, prepare_data.INPUTS, prepare_data.run),
    "emu": Stage(
        train_emu.EmuStageConfig,
        train_emu.INPUTS,
        train_emu.run,
        mesh=train_emu.make_mesh,
        more_inputs=train_emu.inputs,
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
}
