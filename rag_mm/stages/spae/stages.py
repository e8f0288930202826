"""Table of SPAE's stages: the words of a language model, the words that fit each image, the autoencoder."""

from rag_mm.stages.spae import build_codebook, rank_words, train_autoencoder
from rag_mm.stages.stage import Stage

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
    ),
}
