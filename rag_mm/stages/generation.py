"""Stage `generation`: pictures and captions for test documents, with 0 to K documents, and the control's.

Every piece lies in a file of its own, so a killed stage goes on with the next one.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from etils import epath

from rag_mm.core import files, progress
from rag_mm.core import run as run_lib
from rag_mm.data import rows
from rag_mm.decode import modes
from rag_mm.decode.sampler import Sampling
from rag_mm.stages import corpus as corpus_lib
from rag_mm.stages import decoder as decoder_stage
from rag_mm.stages import frozen, retriever, tokenizer
from rag_mm.stages import memory as memory_stage
from rag_mm.stages import neighbors as neighbors_stage
from rag_mm.stages import world as world_lib

INPUTS = ("tokenizer", "retriever", "memory", "neighbors", "decoder", "control")


@dataclasses.dataclass(frozen=True)
class Config:
    """How many test documents of each split are drawn, and how.

    `num_candidates` above 1 keeps the picture that the retriever finds nearest to its caption.
    """

    seed: int
    world: world_lib.World
    num_held_out: int = 256
    num_seen: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    caption_temperature: float = 0.0
    num_candidates: int = 1

    def __post_init__(self):
        Sampling(self.temperature, self.top_p)
        Sampling(self.caption_temperature)
        # Of one document no interval can be told.
        for name, least in (("num_held_out", 2), ("num_seen", 2), ("num_candidates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least {least}")

    def count(self, split: str) -> int:
        """Test documents drawn of a split."""
        return {"held_out": self.num_held_out, "seen": self.num_seen}[split]


@dataclasses.dataclass(frozen=True, eq=False)
class TestSet:
    """The test documents of one split and what retrieval gives them.

    `docs_by_text` and `docs_by_image` are int32 [Q, K], -1 missing; `random_docs` int32 [Q, K].
    """

    scene_rows: np.ndarray
    pictures: np.ndarray
    captions: list[str]
    mains: list[rows.Example]
    docs_by_text: np.ndarray
    docs_by_image: np.ndarray
    random_docs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """Everything that generation and evaluation read: two models, a memory as examples, test sets."""

    decoder: modes.Generator
    control: modes.Generator
    codec: frozen.Tokenizer
    encoder: frozen.Retriever
    memory: list[rows.Example]
    tests: dict[str, TestSet]

    def variants(self) -> Iterator[tuple[str, modes.Generator, int]]:
        """Name, model and number of documents of every way to ask."""
        for count in range(self.decoder.layout.max_docs + 1):
            yield f"docs{count}", self.decoder, count
        yield "control", self.control, 0

    def docs(self, ids: np.ndarray, count: int) -> list[list[rows.Example]]:
        """For each query at most `count` documents, the best next to the prompt."""
        return [corpus_lib.pick(self.memory, found, count) for found in ids]


def run(config: Config, run: run_lib.Run, stage_dir: epath.Path) -> dict:
    """Writes `SPLIT_VARIANT_codes.npy` and `SPLIT_VARIANT_captions.json`."""
    bench = open_bench(config, run)
    jobs = [(split, *variant) for split in bench.tests for variant in bench.variants()]
    most = bench.decoder.layout.max_docs
    with progress.track("generation", total=2 * len(jobs) + len(bench.tests)) as bar:
        done = 0
        for split, name, model, count in jobs:
            test = bench.tests[split]
            docs = bench.docs(test.docs_by_text, count)
            _draw(config, bench, stage_dir / f"{split}_{name}_codes.npy", model, test, docs)
            docs = bench.docs(test.docs_by_image, count)
            _caption(config, stage_dir / f"{split}_{name}_captions.json", model, test, docs)
            done += 2
            bar.update(done)
        for split, test in bench.tests.items():
            path = stage_dir / f"{split}_random_documents_codes.npy"
            docs = bench.docs(test.random_docs, most)
            _draw(config, bench, path, bench.decoder, test, docs)
            done += 1
            bar.update(done)
    return {split: len(test.scene_rows) for split, test in bench.tests.items()}


def open_bench(config: Config, run: run_lib.Run) -> Bench:
    """Loads what is compared.

    Raises:
        UserError: a stage is missing, unfinished or edited.
    """
    codec = tokenizer.load_tokenizer(run.workdir)
    decoder = decoder_stage.load_generator(run, "decoder", codec)
    control = decoder_stage.load_generator(run, "control", codec)
    corpus = corpus_lib.Corpus(decoder.layout, codec)
    memory = corpus.memory(memory_stage.open_memory(run))
    folder = run.finished_stage("neighbors")
    tests = {}
    for split, names in neighbors_stage.TEST_SPLITS.items():
        source, count = config.world.scenes("test", *names), config.count(split)
        chosen = files.read_array(folder / f"{split}_rows.npy")[:count]
        captions = [neighbors_stage.full_caption(source, row) for row in chosen]
        pictures = world_lib.images(source, chosen)
        codes = codec.encode(pictures)
        by_text, by_image = (
            files.read_array(folder / f"{split}_{kind}.npy")[:count] for kind in ("text", "image")
        )
        rng = np.random.default_rng((config.seed, 4, count))
        tests[split] = TestSet(
            chosen,
            pictures,
            captions,
            [corpus.example(text, own) for text, own in zip(captions, codes, strict=True)],
            by_text,
            by_image,
            rng.integers(len(memory), size=by_text.shape).astype(np.int32),
        )
    encoder = retriever.load_encoder(run.workdir)
    return Bench(decoder, control, codec, encoder, memory, tests)


def _draw(
    config: Config,
    bench: Bench,
    path: epath.Path,
    model: modes.Generator,
    test: TestSet,
    docs: list[list[rows.Example]],
) -> None:
    if path.exists():
        return
    sampling = Sampling(config.temperature, config.top_p)
    texts = [main.text for main in test.mains]
    wanted = bench.encoder.encode_text(test.captions)

    def draw(seeds: np.ndarray) -> modes.Drawn:
        return modes.draw_codes(model, texts, docs, seeds, sampling)

    def score(codes: np.ndarray) -> np.ndarray:
        return (bench.encoder.encode_image(bench.codec.decode(codes)) * wanted).sum(axis=1)

    codes = modes.best_of(draw, score, len(texts), config.num_candidates, config.seed)
    files.write_array(path, codes)


def _caption(
    config: Config,
    path: epath.Path,
    model: modes.Generator,
    test: TestSet,
    docs: list[list[rows.Example]],
) -> None:
    if path.exists():
        return
    codes = np.stack([main.codes for main in test.mains])
    seeds = modes.row_seeds(config.seed, len(codes))
    sampling = Sampling(config.caption_temperature)
    captions, _ = modes.write_captions(model, codes, docs, seeds, sampling)
    files.write_json(path, {"captions": captions})
