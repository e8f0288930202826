"""Table of RECO's stages: embedded pairs from three sources, and the fusion trained on each."""

from functools import partial

from rag_mm.stages.reco import draw_toy_pairs, embed_documents, embed_pairs, train_fusion
from rag_mm.stages.stage import EVERY_WORLD, SCENES, Stage
from rag_mm.worlds import concepts

STAGES = {
    "pairs": Stage(embed_pairs.PairsStageConfig, embed_pairs.INPUTS, embed_pairs.run, SCENES),
    "toy_pairs": Stage(
        draw_toy_pairs.ToyPairsStageConfig,
        draw_toy_pairs.INPUTS,
        draw_toy_pairs.run,
        (concepts.ConceptWorld,),
    ),
    "document_pairs": Stage(
        embed_documents.DocumentPairsStageConfig,
        embed_documents.INPUTS,
        embed_documents.run,
        EVERY_WORLD,
    ),
    **{
        f"{source}fusion": Stage(
            train_fusion.FusionStageConfig,
            (f"{source}pairs",),
            partial(train_fusion.run, source=f"{source}pairs"),
            EVERY_WORLD,
            mesh=train_fusion.make_mesh,
        )
        for source in ("", "toy_", "document_")
    },
}
