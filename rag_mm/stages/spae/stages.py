"""Table of SPAE's stages: words of a language model, those that fit each image, the autoencoder, clips."""

from rag_mm.stages.spae import (
    build_codebook,
    rank_words,
    train_autoencoder,
    train_video,
    write_words_page,
)
from rag_mm.stages.stage import SCENES, Stage

STAGES = {
    "language_codebook": Stage(
        build_codebook.LanguageCodebookStageConfig,
        (),
        build_codebook.run,
        more_inputs=build_codebook.inputs,
    ),
    "word_pools": Stage(rank_words.WordPoolsStageConfig, rank_words.INPUTS, rank_words.run),
    "spae": Stage(
        train_autoencoder.SPAEStageConfig,
        (),
        train_autoencoder.run,
        mesh=train_autoencoder.make_mesh,
        more_inputs=train_autoencoder.inputs,
        finish=write_words_page.finish,
        page=write_words_page.PAGE,
    ),
    "spae_video": Stage(
        train_video.VideoStageConfig,
        (),
        train_video.run,
        worlds=SCENES,
        mesh=train_video.make_mesh,
        more_inputs=train_video.inputs,
    ),
}
