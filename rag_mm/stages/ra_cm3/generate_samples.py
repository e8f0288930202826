"""Stage `generation`: pictures and captions for test documents, asked in every way that is compared.

Every piece lies in a file of its own, so a killed stage goes on with the next one.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from rag_mm.core import files, progress, run_folder
from rag_mm.data import sequences
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.stages.ra_cm3 import document_ablations, train_decoder
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    find_neighbors,
    frozen,
    train_retriever,
    train_tokenizer,
    world_config,
)
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("tokenizer", "retriever", "memory", "neighbors", "decoder", "control")


@dataclasses.dataclass(frozen=True)
class GenerationStageConfig:
    """How many test documents of each split are generated, and how.

    Attributes:
        seed: of sampling, and of random documents.
        world: where the test documents come from.
        num_held_out: test documents of held-out classes.
        num_seen: test documents of seen classes.
        temperature: of image codes.
        top_p: probability mass that image codes are sampled from.
        caption_temperature: of captions; 0 takes the most likely token.
        num_candidates: images generated per caption, of which the one nearest to it in the retriever's
            space is kept.
        document_ablations: further documents to generate from, see `stages.ra_cm3.document_ablations`.
    """

    seed: int
    world: world_config.EmojiWorld
    num_held_out: int = 256
    num_seen: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    caption_temperature: float = 0.0
    num_candidates: int = 1
    document_ablations: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.document_ablations:
            if name not in document_ablations.ABLATIONS:
                known = ", ".join(document_ablations.ABLATIONS)
                raise ValueError(f"there is no document ablation {name!r}, choose from {known}")
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
class Variant:
    """One way to ask: a model, and for each of Q test documents what to read first.

    `by_text` stands before a caption to draw, `by_image` before a picture to describe; None asks
    for no captions. `wanted` is what a picture should show, where that is not what its caption says.
    """

    name: str
    model: tasks.Generator
    by_text: list[tasks.Docs]
    by_image: list[tasks.Docs] | None = None
    wanted: list[emoji_scenes.Facts] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TestSet:
    """The test documents of one split, and the ways in which they are asked for.

    `facts` and `levels` are those of the scenes; `hits` is what their captions retrieve: rows of the
    memory, int32 [Q, K], best first, -1 missing.
    """

    class_ids: np.ndarray
    facts: list[emoji_scenes.Facts]
    levels: list[emoji_scenes.Level]
    pictures: np.ndarray
    captions: list[str]
    mains: list[sequences.Example]
    hits: np.ndarray
    variants: list[Variant]


@dataclasses.dataclass(frozen=True, eq=False)
class EvalContext:
    """Everything that generation and evaluation read: two models, a memory as examples, test sets."""

    decoder: tasks.Generator
    control: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    memory: list[sequences.Example]
    tests: dict[str, TestSet]

    def docs(self, ids: np.ndarray) -> list[tasks.Docs]:
        """The documents of each query, the best next to the prompt."""
        return _docs(self.memory, ids)


def run(config: GenerationStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes `SPLIT_VARIANT_codes.npy` and `SPLIT_VARIANT_captions.json`."""
    bench = open_eval_context(config, run)
    jobs = [
        (split, test, variant) for split, test in bench.tests.items() for variant in test.variants
    ]
    with progress.track("generation", total=len(jobs)) as bar:
        for done, (split, test, variant) in enumerate(jobs, start=1):
            _draw(config, bench, stage_dir / f"{split}_{variant.name}_codes.npy", test, variant)
            _caption(
                config, bench, stage_dir / f"{split}_{variant.name}_captions.json", test, variant
            )
            bar.update(done)
    return {split: len(test.facts) for split, test in bench.tests.items()}


def open_eval_context(config: GenerationStageConfig, run: run_folder.Run) -> EvalContext:
    """Loads what is compared.

    Raises:
        UserError: a stage is missing, unfinished or edited.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    decoder = train_decoder.load_generator(run, "decoder", image_tokenizer)
    control = train_decoder.load_generator(run, "control", image_tokenizer)
    corpus = coded_corpus.Corpus(decoder.layout, image_tokenizer)
    memory = corpus.memory(build_memory.open_memory(run))
    folder = run.finished_stage("neighbors")
    encoder = train_retriever.load_encoder(run.workdir)
    tests = {}
    for split, names in find_neighbors.TEST_SPLITS.items():
        source, count = config.world.scenes("test", *names), config.count(split)
        found = {
            kind: files.read_array(folder / f"{split}_{kind}.npy")
            for kind in ("rows", *find_neighbors.QUERIES)
        }
        few = world_config.evenly_spaced(np.arange(len(found["rows"])), count)
        found = {kind: array[few] for kind, array in found.items()}
        chosen = [int(row) for row in found["rows"]]
        captions = [source.full_caption(row) for row in chosen]
        pictures = world_config.images(source, found["rows"])
        codes = image_tokenizer.encode(pictures)
        facts = [source.facts(row) for row in chosen]
        rng = np.random.default_rng((config.seed, 4, count))
        variants = _variants(found, decoder, control, rng, memory)
        if config.document_ablations:
            asked = document_ablations.AblationInputs(
                facts,
                _docs(memory, found["text"][:, : decoder.layout.max_docs]),
                memory,
                find_neighbors.memory_facts(config.world),
                image_tokenizer,
            )
            for name in config.document_ablations:
                docs, wanted = document_ablations.ABLATIONS[name](asked, rng)
                variants.append(Variant(name, decoder, docs, wanted=wanted))
        tests[split] = TestSet(
            source.class_ids[chosen],
            facts,
            [source.levels[row] for row in chosen],
            pictures,
            captions,
            [corpus.example(text, own) for text, own in zip(captions, codes, strict=True)],
            found["text"],
            variants,
        )
    return EvalContext(decoder, control, image_tokenizer, encoder, memory, tests)


def _docs(memory: list[sequences.Example], ids: np.ndarray) -> list[tasks.Docs]:
    return [coded_corpus.pick(memory, found) for found in ids]


def _variants(
    found: Mapping[str, np.ndarray],
    decoder: tasks.Generator,
    control: tasks.Generator,
    rng: np.random.Generator,
    memory: list[sequences.Example],
) -> list[Variant]:
    """0 to K documents; without retrieval; by lot; from the memory without held-out classes."""
    most = decoder.layout.max_docs
    by_text, by_image = (
        [_docs(memory, found[kind][:, :count]) for count in range(most + 1)]
        for kind in ("text", "image")
    )
    by_lot = rng.integers(len(memory), size=(len(found["rows"]), most))
    return [
        *(Variant(f"docs{k}", decoder, by_text[k], by_image[k]) for k in range(most + 1)),
        Variant("control", control, by_text[0], by_image[0]),
        Variant("random_documents", decoder, _docs(memory, by_lot)),
        Variant("held_out_removed", decoder, _docs(memory, found["text_of_seen"][:, :most])),
    ]


def _draw(
    config: GenerationStageConfig,
    bench: EvalContext,
    path: epath.Path,
    test: TestSet,
    variant: Variant,
) -> None:
    if path.exists():
        return
    sampling = Sampling(config.temperature, config.top_p)
    docs = variant.by_text
    texts = [main.text for main in test.mains]
    wanted = bench.encoder.encode_text(test.captions)

    def draw(seeds: np.ndarray) -> tasks.SampledCodes:
        return tasks.generate_codes(variant.model, texts, docs, seeds, sampling)

    def score(codes: np.ndarray) -> np.ndarray:
        return (bench.encoder.encode_image(bench.image_tokenizer.decode(codes)) * wanted).sum(
            axis=1
        )

    codes = tasks.best_of(draw, score, len(texts), config.num_candidates, config.seed)
    files.write_array(path, codes)


def _caption(
    config: GenerationStageConfig,
    bench: EvalContext,
    path: epath.Path,
    test: TestSet,
    variant: Variant,
) -> None:
    if path.exists() or variant.by_image is None:
        return
    codes = np.stack([main.codes for main in test.mains])
    docs = variant.by_image
    seeds = tasks.make_seeds(config.seed, len(codes))
    sampling = Sampling(config.caption_temperature)
    captions, _ = tasks.generate_captions(variant.model, codes, docs, seeds, sampling)
    files.write_json(path, {"captions": captions})
