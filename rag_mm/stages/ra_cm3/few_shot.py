"""Stage `few_shot`: captions images of unseen classes after examples chosen by RICES or at random.

A prompt consists of examples, which are documents of the memory, followed by the image to caption
(docs/papers/ra_cm3.md#generation; RICES: Yang et al. 2022, arXiv 2109.05014). The stage compares the views in
which examples are retrieved, and random examples.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder
from rag_mm.data import token_documents
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import cider, statistics
from rag_mm.memory import model_protocols, retrieval_memory, rices
from rag_mm.memory.index import protocol
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import build_memory, coded_corpus, train_tokenizer, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji import art, emoji_scenes

INPUTS = ("tokenizer", "retriever", "memory", "decoder")
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class FewShotStageConfig:
    """Which prompts are compared, and how many images are captioned.

    Attributes:
        seed: seed of the random examples, the choice of test images and sampling.
        world: world of the test documents.
        shots: numbers of examples in the prompt, each at most the decoder's `max_docs`.
        views: views in which the memory is searched with the image's embedding: `image` compares it with
            images, `text` with captions, `mixed` with both.
        order: order of the examples; see `memory.rices.select_examples`.
        num_test: number of test images of held-out classes.
        temperature: sampling temperature of the captions; 0 takes the most likely token.
    """

    seed: int
    world: world_config.EmojiWorld
    shots: tuple[int, ...] = (0, 1, 2)
    views: tuple[str, ...] = model_protocols.VIEWS
    order: rices.Order = "nearest_last"
    num_test: int = 128
    temperature: float = 0.0

    def __post_init__(self):
        if not self.shots or min(self.shots) < 0:
            raise ValueError(f"shots are {self.shots}; give one or more counts of at least 0")
        for view in self.views:
            model_protocols.check_view(view)
        if self.order not in get_args(rices.Order):
            known = ", ".join(get_args(rices.Order))
            raise ValueError(f"unknown order {self.order!r}; choose from {known}")
        checks.at_least(self, 2, "num_test")
        Sampling(self.temperature)


def run(config: FewShotStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Captions the test images with every selection of examples, which is a view or `random`.

    Writes `SELECTION_shotsK.json` with the captions, and `per_document.json`.

    Returns:
        {selection: {figure: {"shotsK": value}}} with the figures `cider` (0 to 10) and `names`, the share of
        captions that name every entity of the image.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, "decoder", image_tokenizer)
    memory = build_memory.open_memory(run)
    examples = coded_corpus.Corpus(generator.layout, image_tokenizer).memory(memory)
    source = config.world.scenes("test", *world_config.TEST)
    rows = world_config.sample_rows(source, config.num_test, config.seed)
    images = world_config.images(source, rows)
    codes, queries = image_tokenizer.encode(images), memory.encode(image=images)
    summary: dict[str, Any] = {}
    values: dict[str, Any] = {}
    jobs = [(name, shots) for name in (*config.views, RANDOM) for shots in config.shots]
    with progress.track("few_shot", total=len(jobs)) as bar:
        for done, (selection, shots) in enumerate(jobs, start=1):
            neighbors = select(config, memory, queries, selection, shots)
            docs = [[examples[i] for i in ids if i != protocol.MISSING] for ids in neighbors.ids]
            path = stage_dir / f"{selection}_shots{shots}.json"
            captions = _load_or_generate(config, generator, codes, docs, path)
            scores = _score(source, rows, captions)
            values.setdefault(selection, {})[f"shots{shots}"] = {
                name: array.tolist() for name, array in scores.items()
            }
            figures = summary.setdefault(selection, {"cider": {}, "names": {}})
            figures["cider"][f"shots{shots}"] = statistics.mean(scores["cider"])
            figures["names"][f"shots{shots}"] = statistics.accuracy(scores["names"])
            bar.update(done)
    files.write_json(stage_dir / PER_DOCUMENT, values)
    return summary


def select(
    config: FewShotStageConfig,
    memory: retrieval_memory.Memory,
    queries: np.ndarray,
    selection: str,
    shots: int,
) -> protocol.Neighbors:
    """The examples of each query, memory rows [Q, shots] in prompt order, by a view or at random."""
    rng = np.random.default_rng((config.seed, 5, shots))
    if selection == RANDOM:
        rows = [rng.permutation(len(memory))[:shots] for _ in queries]
        ids = np.stack(rows).astype(np.int32)
        return protocol.Neighbors(ids, np.zeros(ids.shape, np.float32))
    search = memory.index(selection).search
    return rices.select_examples(search, queries, shots, order=config.order, rng=rng)


def _load_or_generate(
    config: FewShotStageConfig,
    generator: tasks.Generator,
    codes: np.ndarray,
    docs: Sequence[Sequence[token_documents.Example]],
    path: epath.Path,
) -> list[str]:
    """The captions in `path`, generated first unless an interrupted run has written them."""
    if not path.exists():
        seeds, sampling = tasks.make_seeds(config.seed, len(codes)), Sampling(config.temperature)
        captions, _ = tasks.generate_captions(generator, codes, docs, seeds, sampling)
        files.write_json(path, {"captions": captions})
    return files.read_object(path, captions=list)["captions"]


def _score(
    source: emoji_scenes.Scenes, rows: np.ndarray, captions: Sequence[str]
) -> dict[str, np.ndarray]:
    """The figures of each test image, float [Q]."""
    names = art.load_art().names
    entity_names = [
        [names[entity.class_id] for entity in source.facts(int(row)).entities] for row in rows
    ]
    references = [[source.full_caption(int(row))] for row in rows]
    return {
        "cider": cider.cider(captions, references),
        "names": cider.are_named(captions, entity_names).astype(float),
    }
