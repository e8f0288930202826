"""Table of CM3Leon's stages: what measures its ways of decoding, and its instruction tuning."""

from rag_mm.stages.cm3leon import (
    decoding_settings,
    measure_decoding,
    tune_decoder,
    write_decoding_page,
    write_tuning_page,
)
from rag_mm.stages.stage import SCENES, Stage

STAGES = {
    "decoding": Stage(
        decoding_settings.DecodingStageConfig,
        measure_decoding.INPUTS,
        measure_decoding.run,
        SCENES,
        needs_own_memory=True,
        finish=write_decoding_page.finish,
        page=write_decoding_page.PAGE,
    ),
    "sft": Stage(
        tune_decoder.TuningStageConfig,
        tune_decoder.INPUTS,
        tune_decoder.run,
        SCENES,
        mesh=tune_decoder.make_mesh,
        more_inputs=lambda config: (config.start_stage,),
        finish=write_tuning_page.finish,
        page=write_tuning_page.PAGE,
    ),
}
