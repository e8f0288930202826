"""Stage `generation`: generates images and captions of the test documents with every compared variant.

Each variant of each split has its own files, so an interrupted stage resumes with the next one.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder
from rag_mm.data import token_documents
from rag_mm.decode import reranking, tasks
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
    """How many images and captions are generated, and how they are sampled.

    Attributes:
        seed: seed of sampling, random documents and document ablations.
        world: world of the test documents.
        num_held_out: number of test documents of held-out classes.
        num_seen: number of test documents of seen classes.
        temperature: sampling temperature of image codes.
        top_p: probability mass that image codes are sampled from.
        caption_temperature: sampling temperature of captions; 0 takes the most likely token.
        num_candidates: images generated per caption; the one most similar to it for the retriever is kept.
        document_ablations: names of document ablations to generate with; see
            `stages.ra_cm3.document_ablations`.
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
                raise ValueError(f"unknown document ablation {name!r}; choose from {known}")
        Sampling(self.temperature, self.top_p)
        Sampling(self.caption_temperature)
        # A confidence interval needs two documents.
        checks.at_least(self, 2, "num_held_out", "num_seen")
        checks.at_least(self, 1, "num_candidates")

    def count(self, split: str) -> int:
        """The number of test documents of a split, `held_out` or `seen`."""
        return {"held_out": self.num_held_out, "seen": self.num_seen}[split]


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A model, and the documents that it reads for each of the Q test documents.

    Attributes:
        name: name in files and metrics.
        model: the decoder or the baseline.
        by_text: documents to generate an image with, retrieved by caption unless the variant replaces them.
        by_image: documents to generate a caption with, retrieved by image; None generates no captions.
        expected: facts that the images should show, if not those of the captions.
    """

    name: str
    model: tasks.Generator
    by_text: list[tasks.Docs]
    by_image: list[tasks.Docs] | None = None
    expected: list[emoji_scenes.Facts] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TestSet:
    """The Q test documents of one split.

    Attributes:
        class_ids: class of each, int [Q].
        facts: facts of the scenes.
        levels: levels of the scenes.
        images: uint8 [Q, H, W, 3].
        captions: full captions.
        mains: the documents as examples.
        hits: memory rows that the captions retrieve, int32 [Q, K], best first, -1 for a missing one.
        variants: the variants that are compared.
    """

    class_ids: np.ndarray
    facts: list[emoji_scenes.Facts]
    levels: list[emoji_scenes.Level]
    images: np.ndarray
    captions: list[str]
    mains: list[token_documents.Example]
    hits: np.ndarray
    variants: list[Variant]


@dataclasses.dataclass(frozen=True, eq=False)
class EvalContext:
    """Everything that generation and evaluation read.

    Attributes:
        decoder: the trained decoder.
        baseline: the decoder without retrieval, of the stage `control`.
        image_tokenizer: their image tokenizer.
        encoder: the retriever.
        memory: the memory rows as examples.
        tests: the test set of each split.
    """

    decoder: tasks.Generator
    baseline: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    encoder: frozen.FrozenRetriever
    memory: list[token_documents.Example]
    tests: dict[str, TestSet]

    def docs(self, ids: np.ndarray) -> list[tasks.Docs]:
        """The documents of memory rows `ids` int32 [Q, K] (-1 is skipped), best last."""
        return [coded_corpus.pick(self.memory, rows) for rows in ids]


def run(config: GenerationStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes `SPLIT_VARIANT_codes.npy`, int32 [Q, N], and `SPLIT_VARIANT_captions.json`.

    Returns:
        The number of test documents of each split.
    """
    context = open_eval_context(config, run)
    jobs = [
        (split, test, variant) for split, test in context.tests.items() for variant in test.variants
    ]
    with progress.track("generation", total=len(jobs)) as bar:
        for done, (split, test, variant) in enumerate(jobs, start=1):
            _generate_images(
                config, context, stage_dir / f"{split}_{variant.name}_codes.npy", test, variant
            )
            _generate_captions(
                config, stage_dir / f"{split}_{variant.name}_captions.json", test, variant
            )
            bar.update(done)
    return {split: len(test.facts) for split, test in context.tests.items()}


def open_eval_context(config: GenerationStageConfig, run: run_folder.Run) -> EvalContext:
    """Loads the models, the memory and the test sets of a run.

    Raises:
        UserError: a stage is missing, unfinished or edited.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    decoder = train_decoder.load_generator(run, "decoder", image_tokenizer)
    baseline = train_decoder.load_generator(run, "control", image_tokenizer)
    corpus = coded_corpus.Corpus(decoder.layout, image_tokenizer)
    memory = corpus.memory(build_memory.open_memory(run))
    encoder = train_retriever.load_encoder(run.workdir)
    context = EvalContext(decoder, baseline, image_tokenizer, encoder, memory, tests={})
    tests = {
        split: _open_test_set(config, run, context, split) for split in find_neighbors.TEST_SPLITS
    }
    return dataclasses.replace(context, tests=tests)


def _open_test_set(
    config: GenerationStageConfig, run: run_folder.Run, context: EvalContext, split: str
) -> TestSet:
    source = config.world.scenes("test", *find_neighbors.TEST_SPLITS[split])
    arrays = load_neighbors(run, split, config.count(split))
    rows = [int(row) for row in arrays["rows"]]
    facts = [source.facts(row) for row in rows]
    captions = [source.full_caption(row) for row in rows]
    images = world_config.images(source, arrays["rows"])
    codes = context.image_tokenizer.encode(images)
    corpus = coded_corpus.Corpus(context.decoder.layout, context.image_tokenizer)
    # Both functions sample from one generator, in this order.
    rng = np.random.default_rng((config.seed, 4, config.count(split)))
    variants = [
        *_retrieval_variants(context, arrays, rng),
        *_ablation_variants(config, context, facts, arrays["text"], rng),
    ]
    return TestSet(
        class_ids=source.class_ids[rows],
        facts=facts,
        levels=[source.levels[row] for row in rows],
        images=images,
        captions=captions,
        mains=[corpus.example(*pair) for pair in zip(captions, codes, strict=True)],
        hits=arrays["text"],
        variants=variants,
    )


def load_neighbors(run: run_folder.Run, split: str, count: int) -> dict[str, np.ndarray]:
    """The stage `neighbors`' arrays of a split, by name, for at most `count` documents, evenly spaced."""
    folder = run.finished_stage("neighbors")
    arrays = {
        name: files.read_array(folder / f"{split}_{name}.npy")
        for name in ("rows", *find_neighbors.QUERIES)
    }
    chosen = world_config.evenly_spaced(np.arange(len(arrays["rows"])), count)
    return {name: array[chosen] for name, array in arrays.items()}


def _retrieval_variants(
    context: EvalContext, neighbors: Mapping[str, np.ndarray], rng: np.random.Generator
) -> list[Variant]:
    """0 to max_docs documents, the baseline, random documents, and no documents of held-out classes."""
    decoder, max_docs = context.decoder, context.decoder.layout.max_docs
    by_text, by_image = (
        [context.docs(neighbors[query][:, :count]) for count in range(max_docs + 1)]
        for query in ("text", "image")
    )
    random_rows = rng.integers(len(context.memory), size=(len(neighbors["rows"]), max_docs))
    without_held_out = neighbors["text_of_seen"][:, :max_docs]
    return [
        *(Variant(f"docs{k}", decoder, by_text[k], by_image[k]) for k in range(max_docs + 1)),
        Variant("control", context.baseline, by_text[0], by_image[0]),
        Variant("random_documents", decoder, context.docs(random_rows)),
        Variant("held_out_removed", decoder, context.docs(without_held_out)),
    ]


def _ablation_variants(
    config: GenerationStageConfig,
    context: EvalContext,
    facts: list[emoji_scenes.Facts],
    neighbors: np.ndarray,
    rng: np.random.Generator,
) -> list[Variant]:
    """The document ablations that the config names, from neighbors int32 [Q, K]."""
    if not config.document_ablations:
        return []
    inputs = document_ablations.AblationInputs(
        facts,
        context.docs(neighbors[:, : context.decoder.layout.max_docs]),
        context.memory,
        find_neighbors.memory_facts(config.world),
        context.image_tokenizer,
    )
    variants = []
    for name in config.document_ablations:
        docs, expected = document_ablations.ABLATIONS[name](inputs, rng)
        variants.append(Variant(name, context.decoder, docs, expected=expected))
    return variants


def _generate_images(
    config: GenerationStageConfig,
    context: EvalContext,
    path: epath.Path,
    test: TestSet,
    variant: Variant,
) -> None:
    """Writes the codes of the best of `num_candidates` images of every caption, unless they exist."""
    if path.exists():
        return
    sampling = Sampling(config.temperature, config.top_p)
    texts = [main.text for main in test.mains]
    captions = context.encoder.encode_text(test.captions)

    def generate(seeds: np.ndarray) -> np.ndarray:
        return tasks.generate_codes(variant.model, texts, variant.by_text, seeds, sampling).codes

    def score(codes: np.ndarray) -> np.ndarray:
        images = context.encoder.encode_image(context.image_tokenizer.decode(codes))
        return (images * captions).sum(axis=1)

    drawn = reranking.best_of(generate, score, len(texts), config.num_candidates, config.seed)
    files.write_array(path, drawn.best)


def _generate_captions(
    config: GenerationStageConfig, path: epath.Path, test: TestSet, variant: Variant
) -> None:
    """Writes a caption of every image, unless they exist or the variant has none."""
    if path.exists() or variant.by_image is None:
        return
    codes = np.stack([main.codes for main in test.mains])
    docs = variant.by_image
    seeds = tasks.make_seeds(config.seed, len(codes))
    sampling = Sampling(config.caption_temperature)
    captions, _ = tasks.generate_captions(variant.model, codes, docs, seeds, sampling)
    files.write_json(path, {"captions": captions})
