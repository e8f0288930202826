"""Table of RECO's stages: embedded pairs from three sources, and the fusion trained on one of them."""

from rag_mm.stages.reco import draw_toy_pairs, embed_documents, embed_pairs, train_fusion
from rag_mm.stages.stage import EVERY_WORLD, SCENES, Stage
from rag_mm.worlds import concepts

STAGES = {
    "pairs": Stage(
        embed_pairs.PairsStageConfig,
        embed_pairs.INPUTS,
        embed_pairs.run,
        SCENES,
        needs_own_memory=True,
    ),
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
        is_shared=True,
        needs_disk=lambda config: True,
    ),
    "fusion": Stage(
        train_fusion.FusionStageConfig,
        (),
        train_fusion.run,
        EVERY_WORLD,
        mesh=train_fusion.make_mesh,
        more_inputs=lambda config: (config.pairs,),
    ),
}
