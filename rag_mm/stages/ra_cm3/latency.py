"""What looking things up costs beside drawing, measured with programs that are compiled already.

Times differ between two runs of the same bits, so they are no stage's metrics: they stand with the costs.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from rag_mm.core import files, run_folder
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy
from rag_mm.stages.ra_cm3 import generate_samples
from rag_mm.stages.shared import build_memory, find_neighbors

BATCH_SIZE = 64  # rows that generation samples at once
_MOST_REPEATS = 9
_BUDGET_SECONDS = 3.0  # for the repeats of one measurement


def measure(
    config: generate_samples.GenerationStageConfig,
    run: run_folder.Run,
    bench: generate_samples.EvalContext,
) -> dict[str, float]:
    """One batch of held-out captions, retrieved for and drawn as `generation` does.

    Returns:
        `retrieval_ms` a caption: encoding it, search, selection; `generation_ms` a picture: after
        reading the most documents, with its way back from codes to pixels; `retrieval_share` of
        the sum.
    """
    test = bench.tests["held_out"]
    size = min(BATCH_SIZE, len(test.captions))
    retrieval = _median_seconds(_make_retrieval(run, bench, test.captions[:size])) / size
    drawing = _median_seconds(_make_drawing(config, bench, test, size)) / size
    return {
        "retrieval_ms": round(1000 * retrieval, 4),
        "generation_ms": round(1000 * drawing, 3),
        "retrieval_share": round(retrieval / (retrieval + drawing), 5),
    }


def _make_retrieval(
    run: run_folder.Run, bench: generate_samples.EvalContext, captions: list[str]
) -> Callable[[], object]:
    memory = build_memory.open_memory(run)
    rules = files.read_json(run.finished_stage("neighbors") / find_neighbors.POLICY)
    vectors, search = memory.embeddings("mixed"), memory.index("mixed").search
    unknown = np.full(len(memory), policy.NO_KEY)

    def retrieve() -> object:
        asked, counts = policy.split_queries(captions, rules.get("split_phrases", False))
        return policy.find_neighbors(
            search,
            bench.encoder.encode_text(asked),
            vectors,
            num_neighbors=bench.decoder.layout.max_docs,
            max_similarity=rules["max_similarity"],
            query_rows=np.full(len(captions), -1),
            query_keys=np.full(len(captions), policy.NO_KEY),
            row_keys=unknown,
            counts=counts,
        )

    return retrieve


def _make_drawing(
    config: generate_samples.GenerationStageConfig,
    bench: generate_samples.EvalContext,
    test: generate_samples.TestSet,
    size: int,
) -> Callable[[], object]:
    sampling = Sampling(config.temperature, config.top_p)
    texts = [main.text for main in test.mains[:size]]
    found = test.hits[:size, : bench.decoder.layout.max_docs]
    seeds = tasks.make_seeds(config.seed, size)

    def draw() -> object:
        docs = bench.docs(found)
        codes = tasks.generate_codes(bench.decoder, texts, docs, seeds, sampling, BATCH_SIZE).codes
        return bench.image_tokenizer.decode(codes)

    return draw


def _median_seconds(call: Callable[[], object]) -> float:
    """After one call that does not count: what it loads and compiles is done once a process."""
    call()
    seconds: list[float] = []
    while not seconds or (len(seconds) < _MOST_REPEATS and sum(seconds) < _BUDGET_SECONDS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
