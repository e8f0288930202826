"""Measures the time of retrieval compared with generation, excluding compilation.

Times differ between runs of the same bits, so they are recorded with the costs, not with a stage's metrics.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from rag_mm.core import run_folder
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy
from rag_mm.stages.ra_cm3 import generate_samples
from rag_mm.stages.shared import build_memory, find_neighbors

BATCH_SIZE = 64  # Images generated at once.
_MAX_REPEATS = 9
_MAX_SECONDS = 3.0  # Time limit for the repeats of one measurement.


def measure(
    config: generate_samples.GenerationStageConfig,
    run: run_folder.Run,
    context: generate_samples.EvalContext,
) -> dict[str, float]:
    """Times retrieval and generation for one batch of held-out captions, with the settings of `generation`.

    Returns:
        `retrieval_ms`: per caption, for encoding, search and selection;
        `generation_ms`: per image, with the maximum number of documents, including decoding codes to pixels;
        `retrieval_share`: share of retrieval in the sum, in [0, 1].
    """
    test = context.tests["held_out"]
    size = min(BATCH_SIZE, len(test.captions))
    retrieval = median_seconds(_make_retrieval(run, context, test.captions[:size])) / size
    generation = median_seconds(_make_generation(config, context, test, size)) / size
    return {
        "retrieval_ms": round(1000 * retrieval, 4),
        "generation_ms": round(1000 * generation, 3),
        "retrieval_share": round(retrieval / (retrieval + generation), 5),
    }


def _make_retrieval(
    run: run_folder.Run, context: generate_samples.EvalContext, captions: list[str]
) -> Callable[[], object]:
    memory = build_memory.open_memory(run)
    rules = find_neighbors.load_policy(run)
    vectors, search = memory.embeddings("mixed"), memory.index("mixed").search
    row_keys, bounds = np.full(len(memory), policy.NO_KEY), rules.bounds(memory.read_codes)

    def retrieve() -> object:
        queries, counts = policy.split_queries(captions, rules.split_phrases)
        return policy.find_neighbors(
            search,
            context.encoder.encode_text(queries),
            vectors,
            num_neighbors=context.decoder.layout.max_docs,
            query_rows=np.full(len(captions), -1),
            query_keys=np.full(len(captions), policy.NO_KEY),
            row_keys=row_keys,
            counts=counts,
            **bounds,
        )

    return retrieve


def _make_generation(
    config: generate_samples.GenerationStageConfig,
    context: generate_samples.EvalContext,
    test: generate_samples.TestSet,
    size: int,
) -> Callable[[], object]:
    sampling = Sampling(config.temperature, config.top_p)
    texts = [main.text for main in test.mains[:size]]
    hits = test.hits[:size, : context.decoder.layout.max_docs]
    seeds = tasks.make_seeds(config.seed, size)

    def generate() -> object:
        docs = context.docs(hits)
        codes = tasks.generate_codes(
            context.decoder, texts, docs, seeds, sampling, BATCH_SIZE
        ).codes
        return context.image_tokenizer.decode(codes)

    return generate


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of several calls, after a first one that loads and compiles."""
    call()
    seconds: list[float] = []
    while not seconds or (len(seconds) < _MAX_REPEATS and sum(seconds) < _MAX_SECONDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
