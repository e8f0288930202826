"""Suites of `rag-mm eval` about instructions: public data, or scenes, whose scores are exact."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import image_files, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import (
    captioned_documents,
    instruction_files,
    instruction_items,
    instruction_templates,
    token_documents,
)
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.memory import policy, retrieval_memory
from rag_mm.stages.cm3leon import (
    instruction_sequences,
    measure_tasks,
    scene_instructions,
    suite_scores,
)
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    find_neighbors,
    frozen,
    train_tokenizer,
)
from rag_mm.worlds.emoji import emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.scene_tasks import Output

# The tasks that a suite asks; those of scenes have exact scores.
SUITES = {
    "vqa": ("question", "what", "where", "which_color", "how_many"),
    "caption": ("caption",),
    "edit": ("edit", "recolor", "move", "swap"),
    "boxes": ("boxes", "draw_boxes"),
    "structure": ("structure", "from_silhouette", "from_edges"),
}
_DRAWN = SUITES["boxes"] + SUITES["structure"]  # Their documents are found by the text.
_BOX = re.compile(r" at \d+ \d+ to \d+ \d+")
SCENES = "scenes:"
DECODERS = ("sft", "decoder")  # The first that a run has finished is asked.
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """How a run is asked.

    Attributes:
        stage: stage whose decoder is asked; None for `sft` or else `decoder`.
        docs: retrieved documents, found by the picture that is asked about, or by the text of one that is to
            be drawn; edits have none.
        limit: number of items, the first ones; None for all.
        temperature: of sampled pictures; texts are the likeliest.
        seed: of sampling.
    """

    stage: str | None = None
    docs: int = 1
    limit: int | None = None
    temperature: float = 0.4
    seed: int = 0

    def __post_init__(self):
        if self.limit is not None and self.limit < 2:
            raise UserError(f"limit is {self.limit}; give at least 2.")
        if self.docs < 0:
            raise UserError(f"docs is {self.docs}; give at least 0.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}; give a finite number of at least 0."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Asker:
    """A decoder with all that it needs to be asked; `docs` is 0 without a memory."""

    generator: tasks.Generator
    image_tokenizer: frozen.FrozenTokenizer
    memory: retrieval_memory.Memory | None
    rules: policy.Rules
    docs: int

    def ask(self, items: Sequence[InstructionItem], sampling: Sampling, seed: int) -> list[Output]:
        """What the decoder answers to items that all want a text, or all a picture."""
        tokenizer = self.image_tokenizer
        coded = list(instruction_sequences.encode(items, tokenizer.encode, tokenizer.image_size))
        documents: list[list[token_documents.Example]] = [[] for _ in items]
        if reads_documents(items[0]) and self.docs:
            self._check_room(len(items[0].given))
            documents = self._retrieve(items, np.stack([item.codes for item in coded]))
        asked = [
            measure_tasks.word(self.generator, item, docs)
            for item, docs in zip(coded, documents, strict=True)
        ]
        return measure_tasks.answer(self.generator, tokenizer, asked, sampling, seed)

    def _check_room(self, num_given: int) -> None:
        most = self.generator.layout.max_docs - num_given
        if self.docs > most:
            raise UserError(
                f"docs is {self.docs}, but beside what is given the decoder reads {most}; give at most that."
            )

    def _retrieve(
        self, items: Sequence[InstructionItem], codes: np.ndarray
    ) -> list[list[token_documents.Example]]:
        """Documents found by pictures of codes int32 [B, N], or by texts, best last."""
        assert self.memory is not None
        if not items[0].wants_text:
            return self.find(self.memory.encode(text=[query(item) for item in items]))
        size = self.image_tokenizer.image_size
        pictures = np.stack([image_files.fit(item.picture, size) for item in items])
        return self.find(self.memory.encode(image=pictures), codes)

    def find(
        self, queries: np.ndarray, codes: np.ndarray | None = None
    ) -> list[list[token_documents.Example]]:
        """Documents that embeddings float32 [B, D] find, best last; of pictures also their codes [B, N]."""
        memory = self.memory
        assert memory is not None
        found = policy.find_neighbors(
            memory.index("mixed").search,
            queries,
            memory.embeddings("mixed"),
            num_neighbors=self.docs,
            query_rows=np.full(len(queries), -1),
            query_keys=np.full(len(queries), policy.NO_KEY),
            row_keys=np.full(len(memory), policy.NO_KEY),
            **self.rules.bounds(memory.read_codes, codes),
        )
        corpus = coded_corpus.Corpus(self.generator.layout, self.image_tokenizer)
        rows = [[int(row) for row in ids[::-1] if row >= 0] for ids in found.ids]
        texts = {row: memory.document(row).text for row in {row for ids in rows for row in ids}}
        all_codes = memory.codes
        assert all_codes is not None
        return [[corpus.example(texts[row], all_codes[row]) for row in ids] for ids in rows]


def reads_documents(item: InstructionItem) -> bool:
    """Whether a decoder reads retrieved documents with an item; edits have none."""
    return item.wants_text or item.task in _DRAWN


def query(item: InstructionItem) -> str:
    """What documents of a picture that is to be drawn are found by: its text without the boxes."""
    text = instruction_templates.TEMPLATES[item.task][0].text
    return _BOX.sub("", instruction_items.fill(text, item.fields))


def evaluate(
    workdir: epath.PathLike, suite: str, spec: str, config: SuiteConfig = SuiteConfig()
) -> dict[str, Any]:
    """Asks a run's decoder every question, caption or edit of some data.

    Args:
        workdir: the run.
        suite: one of `SUITES`.
        spec: `LAYOUT:PATH` of `instruction_files.LAYOUTS`, or `scenes:LEVEL/SPLIT[+SPLIT]/ROLE[/SEED]`; of
            `caption` also any source as for `rag-mm memory build`, such as a folder with captions.jsonl.
        config: how it is asked.

    Returns:
        `vqa`: `accuracy` (0..1) with `ci95` and `n`, and the same by `answer_type`, or by task for scenes.
        `caption`: `cider`, and `right` for scenes. `edit`: `compliance`, `fidelity` and `joint`, exact for
        scenes and else as `edit_agreement.agreement` by the run's retriever. `boxes` and `structure`: which
        facts are exact for scenes, else `similarity`, the retriever's cosine of picture and target. All with
        `answers`, the id and text of each item, `rejected`, the name and reason of each bad record, `stage`
        and `docs`.

    Raises:
        UserError: there is no such run, stage or data, the data is of another suite, or fewer than two items
            are good.
    """
    source = _open(spec, suite)
    run = run_folder.open_run(workdir)
    stage = config.stage or _finished_decoder(run)
    asker = open_asker(run, stage, config.docs)
    found: list[suite_scores.Asked] = []
    outputs: list[Output] = []
    items = itertools.islice(_items(source, suite, asker.image_tokenizer.image_size), config.limit)
    with progress.track(suite, total=0) as bar:
        while chunk := list(itertools.islice(items, _BATCH)):
            seed = config.seed + len(found)
            outputs += asker.ask([item for item, _ in chunk], Sampling(config.temperature), seed)
            found += chunk
            bar.update(len(found))
    rejects = [] if isinstance(source, emoji_scenes.Scenes) else source.rejects
    if len(found) < 2:
        first = f"; the first bad one is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
        raise UserError(f"{spec} has {len(found)} good items, but 2 are needed{first}")
    return {
        **suite_scores.score(suite, found, outputs, run),
        "answers": [
            [item.id, scene_tasks.text_of(output)]
            for (item, _), output in zip(found, outputs, strict=True)
        ],
        "rejected": [[reject.name, reject.detail] for reject in rejects],
        "stage": stage,
        "docs": asker.docs if reads_documents(found[0][0]) else 0,
    }


def _finished_decoder(run: run_folder.Run) -> str:
    """The first of `DECODERS` that is finished; the last if none is, which is then refused."""
    for name in DECODERS[:-1]:
        manifest = run.manifest(name)
        if manifest is not None and manifest.is_done:
            return name
    return DECODERS[-1]


_Files = instruction_files.InstructionFiles | captioned_documents.CaptionedDocuments
Source = _Files | emoji_scenes.Scenes


def _open(spec: str, suite: str) -> Source:
    if spec.startswith(SCENES):
        return emoji_scenes.open_documents(spec.removeprefix(SCENES))
    source = captioned_documents.open_items(spec, SUITES[suite])
    if isinstance(source, instruction_files.InstructionFiles) and source.task not in SUITES[suite]:
        fitting = [name for name, each in instruction_files.TASKS.items() if each in SUITES[suite]]
        raise UserError(
            f"{source.layout} has items of the task {source.task!r}, which the suite {suite} does not ask; "
            f"give {' or '.join(fitting)}."
        )
    return source


def open_asker(run: run_folder.Run, stage: str, docs: int) -> Asker:
    """A finished run's decoder of a stage, with its memory if it is to read documents.

    Raises:
        UserError: a stage is missing or unfinished, or the decoder reads fewer documents.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, stage, image_tokenizer)
    if docs > generator.layout.max_docs:
        raise UserError(f"docs is {docs}, but the decoder reads {generator.layout.max_docs}.")
    memory = build_memory.open_memory(run) if docs else None
    rules = find_neighbors.load_policy(run, stage) if docs else policy.Rules()
    return Asker(generator, image_tokenizer, memory, rules, docs)


def _items(source: Source, suite: str, image_size: int) -> Iterator[suite_scores.Asked]:
    """The items of a suite; of scenes, all tasks in turn, with their facts."""
    if not isinstance(source, emoji_scenes.Scenes):
        yield from ((item, None) for item in source.read(image_size))
        return
    tasks_of_scenes = [
        scene_instructions.SceneInstructions(task, source)
        for name in SUITES[suite]
        if (task := scene_instructions.TASKS.get(name)) is not None
        and any(map(task.scene_task.is_defined, source.levels))
    ]
    if not tasks_of_scenes:
        raise UserError(f"The suite {suite} has no question about these scenes; give others.")
    for number in range(max(map(len, tasks_of_scenes))):
        for instructions in tasks_of_scenes:
            if number < len(instructions):
                asked = instructions[number]
                yield asked.item, asked.task_item
