"""Table of the stages that several systems share: image tokenizer, retriever, memory and neighbors."""

from rag_mm.stages.shared import build_memory, find_neighbors, train_retriever, train_tokenizer
from rag_mm.stages.stage import WITH_CORPORA, Stage

STAGES = {
    "tokenizer": Stage(
        train_tokenizer.TokenizerStageConfig,
        train_tokenizer.INPUTS,
        train_tokenizer.run,
        WITH_CORPORA,
        mesh=train_tokenizer.make_mesh,
    ),
    "retriever": Stage(
        train_retriever.RetrieverStageConfig,
        (),
        train_retriever.run,
        WITH_CORPORA,
        mesh=train_retriever.make_mesh,
        more_inputs=train_retriever.inputs,
    ),
    "memory": Stage(
        build_memory.MemoryStageConfig,
        build_memory.INPUTS,
        build_memory.run,
        WITH_CORPORA,
        is_shared=True,
        needs_disk=lambda config: config.folder is None,
    ),
    "neighbors": Stage(
        find_neighbors.NeighborsStageConfig,
        find_neighbors.INPUTS,
        find_neighbors.run,
        is_shared=True,
        reports_on_others=True,
    ),
}
