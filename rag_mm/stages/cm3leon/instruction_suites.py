"""Suites `vqa`, `caption`, `edit`: a decoder on public instruction data, or on scenes with exact scores."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import image_files, progress, run_folder
from rag_mm.core.document_types import Image
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_files, token_documents, vqa_files
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.decode import tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import cider, edit_agreement, statistics, vqa_accuracy
from rag_mm.memory import policy, retrieval_memory
from rag_mm.stages.cm3leon import instruction_sequences, measure_tasks, scene_instructions
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import (
    build_memory,
    coded_corpus,
    find_neighbors,
    frozen,
    train_retriever,
    train_tokenizer,
)
from rag_mm.worlds.emoji import emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.scene_tasks import Output, TaskItem

# The tasks that a suite asks; those of scenes have exact scores.
SUITES = {
    "vqa": ("question", "what", "where", "which_color", "how_many"),
    "caption": ("caption",),
    "edit": ("edit", "recolor", "move", "swap"),
}
SCENES = "scenes:"
DECODERS = ("sft", "decoder")  # The first that a run has finished is asked.
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """How a run is asked.

    Attributes:
        stage: stage whose decoder is asked; None for `sft` or else `decoder`.
        docs: retrieved documents, found by the picture that is asked about; edits have none.
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
        if self.docs and items[0].wants_text:
            pictures = np.stack([image_files.fit(i.picture, tokenizer.image_size) for i in items])
            documents = self._retrieve(pictures, np.stack([item.codes for item in coded]))
        asked = [
            measure_tasks.word(self.generator, item, docs)
            for item, docs in zip(coded, documents, strict=True)
        ]
        return measure_tasks.answer(self.generator, tokenizer, asked, sampling, seed)

    def _retrieve(
        self, pictures: np.ndarray, codes: np.ndarray
    ) -> list[list[token_documents.Example]]:
        """Documents found by pictures uint8 [B, S, S, 3], best last."""
        memory = self.memory
        assert memory is not None
        found = policy.find_neighbors(
            memory.index("mixed").search,
            memory.encode(image=pictures),
            memory.embeddings("mixed"),
            num_neighbors=self.docs,
            query_rows=np.full(len(pictures), -1),
            query_keys=np.full(len(pictures), policy.NO_KEY),
            row_keys=np.full(len(memory), policy.NO_KEY),
            **self.rules.bounds(memory.read_codes, codes),
        )
        corpus = coded_corpus.Corpus(self.generator.layout, self.image_tokenizer)
        rows = [[int(row) for row in ids[::-1] if row >= 0] for ids in found.ids]
        texts = {row: memory.document(row).text for row in {row for ids in rows for row in ids}}
        all_codes = memory.codes
        assert all_codes is not None
        return [[corpus.example(texts[row], all_codes[row]) for row in ids] for ids in rows]


def evaluate(
    workdir: epath.PathLike, suite: str, spec: str, config: SuiteConfig = SuiteConfig()
) -> dict[str, Any]:
    """Asks a run's decoder every question, caption or edit of some data.

    Args:
        workdir: the run.
        suite: one of `SUITES`.
        spec: `LAYOUT:PATH` of `instruction_files.LAYOUTS`, or `scenes:LEVEL/SPLIT[+SPLIT]/ROLE[/SEED]`.
        config: how it is asked.

    Returns:
        `vqa`: `accuracy` (0..1) with `ci95` and `n`, and the same by `answer_type`, or by task for scenes.
        `caption`: `cider`, and `right` for scenes. `edit`: `compliance`, `fidelity` and `joint`, exact for
        scenes and else as `edit_agreement.agreement` by the run's retriever. All with `answers`, the id and
        text of each item, `rejected`, the name and reason of each bad record, `stage` and `docs`.

    Raises:
        UserError: there is no such run, stage or data, the data is of another suite, or fewer than two items
            are good.
    """
    source = _open(spec, suite)
    run = run_folder.open_run(workdir)
    stage = config.stage or _finished_decoder(run)
    asker = _open_asker(run, stage, config.docs)
    found: list[tuple[InstructionItem, TaskItem | None]] = []
    outputs: list[Output] = []
    items = itertools.islice(_items(source, suite, asker.image_tokenizer.image_size), config.limit)
    with progress.track(suite, total=0) as bar:
        while chunk := list(itertools.islice(items, _BATCH)):
            seed = config.seed + len(found)
            outputs += asker.ask([item for item, _ in chunk], Sampling(config.temperature), seed)
            found += chunk
            bar.update(len(found))
    rejects = source.rejects if isinstance(source, instruction_files.InstructionFiles) else []
    if len(found) < 2:
        first = f"; the first bad one is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
        raise UserError(f"{spec} has {len(found)} good items, but 2 are needed{first}")
    return {
        **_score(suite, found, outputs, run),
        "answers": [
            [item.id, scene_tasks.text_of(output)]
            for (item, _), output in zip(found, outputs, strict=True)
        ],
        "rejected": [[reject.name, reject.detail] for reject in rejects],
        "stage": stage,
        "docs": asker.docs if found[0][0].wants_text else 0,
    }


def _finished_decoder(run: run_folder.Run) -> str:
    """The first of `DECODERS` that is finished; the last if none is, which is then refused."""
    for name in DECODERS[:-1]:
        manifest = run.manifest(name)
        if manifest is not None and manifest.is_done:
            return name
    return DECODERS[-1]


Source = instruction_files.InstructionFiles | emoji_scenes.Scenes


def _open(spec: str, suite: str) -> Source:
    if spec.startswith(SCENES):
        return emoji_scenes.open_documents(spec.removeprefix(SCENES))
    source = instruction_files.InstructionFiles(spec)
    task = instruction_files.TASKS[source.layout]
    if task not in SUITES[suite]:
        fitting = [name for name, each in instruction_files.TASKS.items() if each in SUITES[suite]]
        raise UserError(
            f"{source.layout} has items of the task {task!r}, which the suite {suite} does not ask; give "
            f"{' or '.join(fitting)}."
        )
    return source


def _open_asker(run: run_folder.Run, stage: str, docs: int) -> Asker:
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    generator = train_decoder.load_generator(run, stage, image_tokenizer)
    if docs > generator.layout.max_docs:
        raise UserError(f"docs is {docs}, but the decoder reads {generator.layout.max_docs}.")
    memory = build_memory.open_memory(run) if docs else None
    rules = find_neighbors.load_policy(run) if docs else policy.Rules()
    return Asker(generator, image_tokenizer, memory, rules, docs)


def _items(
    source: Source, suite: str, image_size: int
) -> Iterator[tuple[InstructionItem, TaskItem | None]]:
    """The items of a suite; of scenes, all tasks in turn, with their facts."""
    if isinstance(source, instruction_files.InstructionFiles):
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


def _score(
    suite: str,
    found: Sequence[tuple[InstructionItem, TaskItem | None]],
    outputs: Sequence[Output],
    run: run_folder.Run,
) -> dict[str, Any]:
    exact = _exact(found, outputs)
    if suite == "vqa":
        values = [float(scores["right"]) for scores in exact] or [
            vqa_accuracy.accuracy(scene_tasks.text_of(output), item.answers)
            for (item, _), output in zip(found, outputs, strict=True)
        ]
        key = "task" if exact else vqa_files.TYPES[1]
        kinds = [item.task if exact else item.fields.get(key, "") for item, _ in found]
        groups = collections.defaultdict(list)
        for kind, value in zip(kinds, values, strict=True):
            groups[kind].append(value)
        by_kind = {kind: float(np.mean(own)) for kind, own in groups.items() if kind}
        return {**_accuracy(values), f"by_{key}": by_kind}
    if suite == "caption":
        texts = [scene_tasks.text_of(output) for output in outputs]
        scores = cider.cider(texts, [item.answers for item, _ in found])
        right = [float(each["right"]) for each in exact]
        return {"cider": statistics.mean(scores)} | ({"right": _accuracy(right)} if exact else {})
    if exact:
        return {key: _accuracy([float(each[key]) for each in exact]) for key in exact[0]}
    encoder = train_retriever.load_encoder(run.workdir)
    drawn = [
        segment.pixels for output in outputs for segment in output if isinstance(segment, Image)
    ]
    vectors = [
        encoder.encode_image(np.stack(pictures))
        for pictures in (
            drawn,
            [item.given[0] for item, _ in found],
            [item.picture for item, _ in found],
        )
    ]
    agreement = edit_agreement.agreement(*vectors)
    return {key: statistics.mean(values) for key, values in agreement.items()}


def _exact(
    found: Sequence[tuple[InstructionItem, TaskItem | None]], outputs: Sequence[Output]
) -> list[scene_tasks.Scores]:
    """The scores of scene tasks, in order; none for other items."""
    by_task = collections.defaultdict(list)
    for place, ((item, task_item), output) in enumerate(zip(found, outputs, strict=True)):
        if task_item is not None:
            by_task[item.task].append((place, task_item, output))
    scores: dict[int, scene_tasks.Scores] = {}
    for name, own in by_task.items():
        places, asked, drawn = zip(*own, strict=True)
        task = scene_instructions.TASKS[name].scene_task
        scores |= zip(places, task.score(asked, drawn), strict=True)
    return [scores[place] for place in sorted(scores)]


def _accuracy(values: Sequence[float]) -> dict[str, float | int]:
    """{"accuracy", "ci95", "n"}; consensus accuracies may lie between 0 and 1."""
    if set(values) <= {0.0, 1.0}:
        return statistics.accuracy(values)
    found = statistics.mean(values)
    return {"accuracy": found["mean"], "ci95": found["ci95"], "n": found["n"]}
