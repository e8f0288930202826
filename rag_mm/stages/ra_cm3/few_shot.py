"""Stage `few_shot`: pictures of classes never seen, captioned after examples that RICES or the lot chose.

The examples of a prompt are documents of the memory, caption and picture, and the picture that is asked
about comes last (docs/papers/ra_cm3.md; RICES: Yang et al. 2022, arXiv 2109.05014). Compared are the views in
which a picture looks for its examples, and examples drawn by lot.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from etils import epath

from rag_mm.core import files, progress, run_folder
from rag_mm.data import sequences
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import cider, statistics
from rag_mm.memory import model_protocols, retrieval_memory, rices
from rag_mm.memory.index import protocol
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import build_memory, coded_corpus, train_tokenizer, world_config
from rag_mm.worlds.emoji import art, emoji_scenes

INPUTS = ("tokenizer", "retriever", "memory", "decoder")
RANDOM = "random"
PER_DOCUMENT = "per_document.json"


@dataclasses.dataclass(frozen=True)
class FewShotStageConfig:
    """What is asked.

    Attributes:
        seed: of random examples.
        world: where the test documents come from.
        shots: numbers of examples, each at most the decoder's `max_docs`.
        views: in which the memory is searched with the picture's embedding: `image` compares it with
            pictures, `text` with captions, `mixed` with both.
        order: see `memory.rices.select_examples`.
        num_test: pictures of held-out classes.
        temperature: of the captions; 0 takes the likeliest token.
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
            raise ValueError(f"shots are {self.shots}, give one count or more, from 0 on")
        for view in self.views:
            model_protocols.check_view(view)
        if self.order not in get_args(rices.Order):
            known = ", ".join(get_args(rices.Order))
            raise ValueError(f"there is no order {self.order!r}, choose from {known}")
        if self.num_test < 2:
            raise ValueError(f"num_test is {self.num_test}, give at least 2")
        Sampling(self.temperature)


def run(config: FewShotStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """{selection: {figure: {"shotsK": value}}}, a selection being a view or `random`.

    Figures are `cider` and `names`, the share of captions that name every entity shown. Writes
    `SELECTION_shotsK.json` with the captions, and `per_document.json`.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, "decoder", image_tokenizer)
    memory = build_memory.open_memory(run)
    examples = coded_corpus.Corpus(generator.layout, image_tokenizer).memory(memory)
    source = config.world.scenes("test", *world_config.HELD_OUT)
    asked = world_config.sample_rows(source, config.num_test, config.seed)
    pictures = world_config.images(source, asked)
    codes, queries = image_tokenizer.encode(pictures), memory.encode(image=pictures)
    summary: dict[str, Any] = {}
    values: dict[str, Any] = {}
    jobs = [(name, shots) for name in (*config.views, RANDOM) for shots in config.shots]
    with progress.track("few_shot", total=len(jobs)) as bar:
        for done, (selection, shots) in enumerate(jobs, start=1):
            chosen = select(config, memory, queries, selection, shots)
            docs = [[examples[i] for i in ids if i != protocol.MISSING] for ids in chosen.ids]
            path = stage_dir / f"{selection}_shots{shots}.json"
            written = _write(config, generator, codes, docs, path)
            found = _measure(source, asked, written)
            values.setdefault(selection, {})[f"shots{shots}"] = {
                name: each.tolist() for name, each in found.items()
            }
            figures = summary.setdefault(selection, {"cider": {}, "names": {}})
            figures["cider"][f"shots{shots}"] = statistics.mean(found["cider"])
            figures["names"][f"shots{shots}"] = statistics.accuracy(found["names"])
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
    """The examples of each query [Q, shots] in the prompt's order, by a view or by lot."""
    rng = np.random.default_rng((config.seed, 5, shots))
    if selection == RANDOM:
        drawn = [rng.permutation(len(memory))[:shots] for _ in queries]
        ids = np.stack(drawn).astype(np.int32)
        return protocol.Neighbors(ids, np.zeros(ids.shape, np.float32))
    search = memory.index(selection).search
    return rices.select_examples(search, queries, shots, order=config.order, rng=rng)


def _write(
    config: FewShotStageConfig,
    generator: tasks.Generator,
    codes: np.ndarray,
    docs: Sequence[Sequence[sequences.Example]],
    path: epath.Path,
) -> list[str]:
    """Captions, read where an earlier run of the stage wrote them."""
    if not path.exists():
        seeds, sampling = tasks.make_seeds(config.seed, len(codes)), Sampling(config.temperature)
        captions, _ = tasks.generate_captions(generator, codes, docs, seeds, sampling)
        files.write_json(path, {"captions": captions})
    return files.read_json(path)["captions"]


def _measure(
    source: emoji_scenes.Scenes, asked: np.ndarray, captions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Figures by test picture, float [Q]."""
    names = art.load_art().names
    shown = [
        [names[entity.class_id] for entity in source.facts(int(row)).entities] for row in asked
    ]
    references = [[source.full_caption(int(row))] for row in asked]
    return {
        "cider": cider.cider(captions, references),
        "names": cider.are_named(captions, shown).astype(float),
    }
