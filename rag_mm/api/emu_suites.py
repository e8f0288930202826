"""Suites `caption`, `vqa` and `visdial` on a run of Emu or an imported Emu (docs/papers/emu.md)."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.api import asked_emu
from rag_mm.api.asked_emu import AskedEmu, Turn
from rag_mm.core import progress
from rag_mm.core.errors import UserError
from rag_mm.data import (
    captioned_documents,
    emu_prompts,
    instruction_files,
    visdial_files,
    vqa_files,
)
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.data.visdial_files import DialogRound
from rag_mm.eval import candidate_ranking, cider, short_answers, statistics, vqa_accuracy
from rag_mm.memory import rices
from rag_mm.memory.index import exact
from rag_mm.memory.writing import stream

SUITES = {"caption": "caption", "vqa": "question", "visdial": "dialog"}
VISDIAL = "visdial"  # Also the name of its layout.
RICES, RANDOM = "rices", "random"
PLAIN, PAPER = "plain", "paper"
# As in the paper's evaluation.
_NUM_TOKENS, _LENGTH_PENALTY, _MIN_CAPTION, _MIN_ANSWER = 20, -1.0, 8, 1


@dataclasses.dataclass(frozen=True)
class EmuSuiteConfig:
    """How a run of Emu is asked.

    Attributes:
        stage: emu, the model as it was pretrained; emu_sft, tuned on instructions; None for the latter where
            there is one.
        prompts: paper, the wordings of the paper's evaluation; plain, the question alone.
        docs: documents of the run's memory, retrieved by the picture, before all else.
        shots: number of examples in context.
        examples: LAYOUT:PATH of these, such as the training split of what is asked.
        select: rices, those with the nearest pictures, the nearest last; or random.
        max_examples: the examples chosen from, the first ones.
        limit: number of items, the first ones; None for all.
        seed: of random examples.
    """

    stage: str | None = None
    prompts: str = PLAIN
    docs: int = 0
    shots: int = 0
    examples: str | None = None
    select: str = RICES
    max_examples: int = 10_000
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        known = {
            "stage": (None, *asked_emu.STAGES),
            "prompts": (PLAIN, PAPER),
            "select": (RICES, RANDOM),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                choices = ", ".join(filter(None, values))
                raise UserError(f"{name} is {getattr(self, name)!r}; give one of {choices}.")
        for name, least in (("docs", 0), ("shots", 0), ("limit", 2), ("max_examples", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}; give at least {least}.")
        if (self.examples is None) == (self.shots > 0):
            raise UserError(
                f"shots is {self.shots} and examples is {self.examples}; give both or neither."
            )


def evaluate(
    workdir: epath.PathLike, suite: str, spec: str, config: EmuSuiteConfig = EmuSuiteConfig()
) -> dict[str, Any]:
    """Asks a run of Emu, or an imported Emu, every item of some public data.

    Args:
        workdir: the run.
        suite: one of `SUITES`.
        spec: `LAYOUT:PATH`, such as coco-captions:DIR, vqav2:DIR or visdial:DIR; of `caption` also any source
            as for `rag-mm memory build`.
        config: how it is asked.

    Returns:
        `caption`: `cider`. `vqa`: `accuracy` with `ci95` and `n`, and `by_answer_type`. `visdial`: `mrr`,
        `recall_1`, `recall_5`, `recall_10`, `rank`, and `ndcg` where there are dense annotations. All with
        `answers`, the id and the text (of visdial the rank of the right candidate) of each item, `rejected`,
        the name and reason of each bad record, `stage` and `shots`.

    Raises:
        UserError: there is no such run, stage or data, the data is of another suite, a prompt is too long,
            or fewer than two items are good.
    """
    _check(suite, spec, config)
    emu = asked_emu.load(workdir, config.stage)
    asker = _Asker(emu, suite, config, _Pool.open(emu, suite, config))
    rejects: list[stream.Reject] = []
    found: list[Any] = []
    values: list[Any] = []
    items = itertools.islice(_read(suite, spec, emu, rejects), config.limit)
    with progress.track(suite, total=0) as bar:
        for item in items:
            found.append(item)
            values.append(asker.rank(item) if isinstance(item, DialogRound) else asker.answer(item))
            bar.update(len(found))
    if len(found) < 2:
        first = f"; the first bad one is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
        raise UserError(f"{spec} has {len(found)} good items, but 2 are needed{first}")
    return {
        **_score(suite, found, values),
        "rejected": [[reject.name, reject.detail] for reject in rejects],
        "stage": emu.stage,
        "shots": config.shots,
    }


def _check(suite: str, spec: str, config: EmuSuiteConfig) -> None:
    """Checks before anything is loaded that data and examples are of the suite."""
    if suite not in SUITES:
        raise UserError(f"Emu has no suite {suite!r}; give one of {', '.join(SUITES)}.")
    if suite == VISDIAL and config.shots:
        raise UserError("The suite visdial has a dialogue before each question; give no shots.")
    for given in filter(None, (spec, config.examples)):
        layout = given.partition(":")[0]
        if suite == VISDIAL:
            path = given.removeprefix(f"{VISDIAL}:")
            if layout != VISDIAL or not path or not epath.Path(path).exists():
                raise UserError(f"{given!r} is no visdial:PATH of a folder that exists.")
        elif captioned_documents.open_items(given, (SUITES[suite],)).task != SUITES[suite]:
            fitting = [
                name for name, task in instruction_files.TASKS.items() if task == SUITES[suite]
            ]
            raise UserError(
                f"{layout} has no items of the suite {suite}; give {' or '.join(fitting)}."
            )


def _read(
    suite: str, spec: str, emu: AskedEmu, rejects: list[stream.Reject]
) -> Iterator[InstructionItem | DialogRound]:
    """The good items; the others go to `rejects`."""
    size = emu.image_size
    if suite != VISDIAL:
        source = captioned_documents.open_items(spec, (SUITES[suite],))
        yield from source.read(size)
        rejects += source.rejects
        return
    path = epath.Path(spec.removeprefix(f"{VISDIAL}:"))
    for found in visdial_files.read_rounds(path, size):
        if isinstance(found, stream.Reject):
            rejects.append(found)
        elif found.right is not None:
            yield found


@dataclasses.dataclass(frozen=True, eq=False)
class _Pool:
    """The examples to choose from, and an index of their pictures' embeddings."""

    items: list[InstructionItem]
    index: exact.ExactIndex
    config: EmuSuiteConfig

    @classmethod
    def open(cls, emu: AskedEmu, suite: str, config: EmuSuiteConfig) -> "_Pool | None":
        """The examples of a config; None where it has none."""
        if config.examples is None:
            return None
        read = _read(suite, config.examples, emu, [])
        items = [
            each
            for each in itertools.islice(read, config.max_examples)
            if isinstance(each, InstructionItem)
        ]
        if len(items) <= config.shots:
            raise UserError(
                f"{config.examples} has {len(items)} good items, too few for {config.shots} examples."
            )
        index = exact.ExactIndex()
        index.build(emu.embed(np.stack([each.picture for each in items])))
        return cls(items, index, config)

    def choose(self, emu: AskedEmu, item: InstructionItem, number: int) -> list[InstructionItem]:
        """The examples for the `number`-th item, in the order of the prompt; never itself."""
        own = np.array([i for i, each in enumerate(self.items) if each.id == item.id], np.int64)
        if self.config.select == RANDOM:
            rng = np.random.default_rng((self.config.seed, number))
            others = np.setdiff1d(np.arange(len(self.items)), own)
            return [self.items[i] for i in rng.permutation(others)[: self.config.shots]]
        query = emu.embed(item.picture[None])
        forbidden = own[None] if len(own) else None
        found = rices.select_examples(
            self.index.search, query, self.config.shots, forbidden=forbidden
        )
        return [self.items[i] for i in found.ids[0] if i >= 0]


class _Asker:
    """Asks one item after the other."""

    def __init__(self, emu: AskedEmu, suite: str, config: EmuSuiteConfig, pool: _Pool | None):
        self.emu, self.suite, self.config, self.pool = emu, suite, config, pool
        self._count = 0

    def answer(self, item: InstructionItem) -> str:
        """A caption or an answer, by a search as in the paper's evaluation."""
        examples = [] if self.pool is None else self.pool.choose(self.emu, item, self._count)
        self._count += 1
        turns = [self._turn(each, True) for each in examples] + [self._turn(item, False)]
        prompt = self.emu.prompt(turns, self._stem(), self.config.docs)
        is_caption = self.suite == "caption"
        least = _MIN_CAPTION if is_caption and self.config.prompts == PAPER else _MIN_ANSWER
        text = self.emu.search(prompt, _NUM_TOKENS, _LENGTH_PENALTY, least)
        return text.strip() if is_caption else short_answers.clean(text)

    def rank(self, item: DialogRound) -> np.ndarray:
        """The score of each candidate: its log-probability, divided by the length of prompt and candidate."""
        said = [*item.history, (item.question, None)]
        turns: list[Turn] = [
            ([*([] if number else [item.picture]), f"{question}?"], answer)
            for number, (question, answer) in enumerate(said)
        ]
        return self.emu.score(self.emu.prompt(turns, "", self.config.docs), item.candidates)

    def _turn(self, item: InstructionItem, is_answered: bool) -> Turn:
        """An item as said, and answered if it is an example."""
        answer = item.answers[0] if self.suite == "caption" else item.fields["answer"]
        stem = self._stem()
        return [item.picture, *self._words(item)], (
            " ".join(filter(None, (stem, answer))) if is_answered else None
        )

    def _words(self, item: InstructionItem) -> list[str]:
        """What is said beside the picture."""
        is_paper, is_tuned = self.config.prompts == PAPER, self.emu.is_tuned
        if self.suite == "caption":
            if not is_tuned:
                return []
            return [emu_prompts.CAPTION if is_paper else "describe it"]
        question = item.fields["question"]
        return [emu_prompts.QUESTION.format(question) if is_paper and is_tuned else question]

    def _stem(self) -> str:
        """How an answer begins."""
        if self.config.prompts == PLAIN or not self.emu.is_tuned:
            return ""
        return emu_prompts.CAPTION_STEM if self.suite == "caption" else emu_prompts.QUESTION_STEM


def _score(suite: str, found: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    if suite == VISDIAL:
        return _ranked(found, values)
    answers = [[item.id, text] for item, text in zip(found, values, strict=True)]
    if suite == "caption":
        scores = cider.cider(values, [item.answers for item in found])
        return {"cider": statistics.mean(scores), "answers": answers}
    right = [
        vqa_accuracy.accuracy(text, item.answers) for item, text in zip(found, values, strict=True)
    ]
    groups: Mapping[str, list[float]] = collections.defaultdict(list)
    for item, value in zip(found, right, strict=True):
        groups[item.fields.get(vqa_files.TYPES[1], "")].append(value)
    mean = statistics.mean(right)
    return {
        "accuracy": mean["mean"],
        "ci95": mean["ci95"],
        "n": mean["n"],
        "by_answer_type": {kind: float(np.mean(own)) for kind, own in groups.items() if kind},
        "answers": answers,
    }


def _ranked(found: Sequence[DialogRound], values: Sequence[np.ndarray]) -> dict[str, Any]:
    rights = [
        int(candidate_ranking.ranks(scores)[item.right])
        for item, scores in zip(found, values, strict=True)
        if item.right is not None
    ]
    each = [candidate_ranking.figures(rank) for rank in rights]
    result: dict[str, Any] = {
        name: statistics.mean([figures[name] for figures in each]) for name in each[0]
    }
    gains = [
        gain
        for item, scores in zip(found, values, strict=True)
        if item.relevance is not None
        and (gain := candidate_ranking.ndcg(scores, item.relevance)) is not None
    ]
    if len(gains) > 1:
        result["ndcg"] = statistics.mean(gains)
    pairs = zip(found, rights, strict=True)
    return result | {"answers": [[item.id, rank] for item, rank in pairs]}
