"""Few-shot classification of images written as words, by counting equal words and by a frozen LM (SPAE).

An episode is a choice of n classes with k examples each (n-way k-shot) and some images to classify. Every
figure is a mean over episodes, with the standard error over episodes. A language model never needs to be
better than counting: `overlap_votes` is the baseline of every figure.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.eval import statistics
from rag_mm.frozen_lm import prompts
from rag_mm.frozen_lm.lm_protocol import FrozenLM

Control = Literal["none", "deranged", "foreign"]
Labels = Literal["names", "nouns", "nonsense"]
Scoring = Literal["calibrated", "greedy", "both"]
NOUNS = tuple(
    "lion castle violin tornado pepper saddle lantern compass badger goblet anchor basket candle desert "
    "engine falcon garden hammer island jacket kettle ladder marble needle orchard pillow quarry ribbon "
    "silver tunnel".split()
)
NONSENSE = tuple(
    "blicket dax wug toma zup fep lorp gazzer perpo koba modi tupa riff sefo kiv nolp vimbo teeku glorp "
    "shob".split()
)
GREEDY_TOKENS = 7  # Generated for an answer, as in the paper.


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Which episodes are drawn.

    Attributes:
        ways: classes per episode, at least 2.
        shots: examples per class, at least 1 (the paper's inner shots).
        queries: images to classify per class, at least 1.
        num_episodes: at least 2.
        seed: of the choice; images, seed and numbers determine all episodes.
        control: `deranged` gives each example the label of another class of the episode, so that whoever
            reads them answers wrong; `foreign` takes the examples from other classes, so that they tell
            nothing; `none` leaves them.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 1
    num_episodes: int = 100
    seed: int = 0
    control: Control = "none"

    def __post_init__(self):
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("num_episodes", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; give at least {least}.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more.")
        if self.control not in get_args(Control):
            raise UserError(f"control {self.control!r} is unknown; use none, deranged or foreign.")


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """How a language model is asked.

    Attributes:
        repeats: how many more times the examples are shown.
        induction: whether the prompt begins by naming the labels.
        labels: the classes' names, or nouns or nonsense words in their place, drawn anew in each episode.
        num_bags: random bags of the examples' own words whose mean score is subtracted (calibration).
        scoring: `calibrated` compares the log-probabilities of the labels, as they are and calibrated;
            `greedy` reads what the model writes; or `both`.
    """

    repeats: int = 0
    induction: bool = False
    labels: Labels = "names"
    num_bags: int = 8
    scoring: Scoring = "calibrated"

    def __post_init__(self):
        if self.repeats < 0:
            raise UserError(f"repeats is {self.repeats}; give 0 or more.")
        if self.num_bags < 1:
            raise UserError(f"num_bags is {self.num_bags}; give at least 1.")
        for name, known in (("labels", get_args(Labels)), ("scoring", get_args(Scoring))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}."
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """Rows of the images that one episode uses.

    Attributes:
        number: of the episode, from 0.
        seed: of the choice of episodes.
        classes: the episode's classes, int [W].
        support: (row, way) of each example in the order of the prompt.
        queries: (row, way) of each image to classify; the way is an index into `classes`.
    """

    number: int
    seed: int
    classes: np.ndarray
    support: tuple[tuple[int, int], ...]
    queries: tuple[tuple[int, int], ...]


def draw_episodes(class_ids: np.ndarray, config: EpisodeConfig) -> list[Episode]:
    """Draws episodes from images of known classes.

    Args:
        class_ids: int [M], the class of each image.
        config: see there.

    Raises:
        UserError: too few classes have enough images.
    """
    each = config.shots + config.queries
    rows = {int(c): np.flatnonzero(class_ids == c) for c in np.unique(class_ids)}
    usable = [c for c, found in rows.items() if len(found) >= each]
    needed = config.ways * (2 if config.control == "foreign" else 1)
    if len(usable) < needed:
        raise UserError(
            f"{len(usable)} of {len(rows)} classes have {each} images or more, but {config.ways}-way "
            f"{config.shots}-shot with {config.queries} queries per class and control={config.control} needs "
            f"{needed}; give more images per class, or fewer ways, shots or queries."
        )
    return [_draw(i, rows, usable, needed, config) for i in range(config.num_episodes)]


def _draw(
    number: int,
    rows: dict[int, np.ndarray],
    usable: Sequence[int],
    needed: int,
    config: EpisodeConfig,
) -> Episode:
    rng = np.random.default_rng([config.seed, number])
    classes = rng.permutation(usable)[:needed]
    ways, shots, each = config.ways, config.shots, config.shots + config.queries
    drawn = [rng.permutation(rows[int(c)])[:each] for c in classes]
    shift = int(rng.integers(1, ways)) if config.control == "deranged" else 0
    shown = drawn[-ways:] if config.control == "foreign" else drawn
    support = [(int(r), (w + shift) % ways) for w in range(ways) for r in shown[w][:shots]]
    queries = [(int(r), w) for w in range(ways) for r in drawn[w][shots:]]
    order = rng.permutation(len(support))
    return Episode(
        number, config.seed, classes[:ways], tuple(support[i] for i in order), tuple(queries)
    )


def overlap_votes(episode: Episode, bags: Sequence[Sequence[str]]) -> np.ndarray:
    """How many of each query's words occur in the examples of each label: float [Q, W].

    Args:
        episode: the rows.
        bags: the words of each image.
    """
    votes = np.zeros((len(episode.queries), len(episode.classes)))
    for row, way in episode.support:
        known = set(bags[row])
        votes[:, way] += [sum(word in known for word in bags[q]) for q, _ in episode.queries]
    return votes


def share_right(scores: np.ndarray, ways: Sequence[int]) -> float:
    """The share of queries whose own label scores highest; of t labels that tie, each counts 1 / t.

    Args:
        scores: float [Q, W].
        ways: int [Q], the right label of each query.
    """
    is_best = scores == scores.max(axis=1, keepdims=True)
    right = is_best[np.arange(len(scores)), np.asarray(ways)]
    return float((right / is_best.sum(axis=1)).mean())


def measure(
    episodes: Sequence[Episode],
    bags: Sequence[Sequence[str]],
    class_names: Sequence[str],
    lm: FrozenLM | None = None,
    ask: AskConfig = AskConfig(),
    avoided: Sequence[Sequence[Sequence[str]]] = (),
    on_episode: Callable[[int], None] = lambda done: None,
) -> dict[str, np.ndarray]:
    """Accuracies of each episode, float [E], by method.

    Args:
        episodes: of `draw_episodes`.
        bags: the words of each image.
        class_names: of all classes.
        lm: a frozen language model; without one there is only `overlap`.
        ask: how it is asked.
        avoided: words of the same images by other runs, which are no labels either, so that the runs are
            compared with the same labels.
        on_episode: called with the number of episodes done.

    Returns:
        `overlap`; with a language model and by the `scoring` asked for: `log_p` (labels compared by
        log-probability), `calibrated` (the same minus the mean over random bags), `greedy`.

    Raises:
        UserError: the language model cannot do this, or there are fewer label words than ways.
    """
    found: dict[str, list[float]] = {}
    for episode in episodes:
        right = {"overlap": share_right(overlap_votes(episode, bags), _ways(episode))}
        if lm is not None:
            right |= _ask(lm, episode, (bags, *avoided), class_names, ask)
        for method, value in right.items():
            found.setdefault(method, []).append(value)
        on_episode(len(found["overlap"]))
    return {method: np.asarray(values) for method, values in found.items()}


def summarize(values: np.ndarray, num_queries: int) -> dict[str, Any]:
    """{"accuracy", "ci95", "n", "standard_error"} of accuracies float [E], E >= 2, with n = E.

    `ci95` is the half width of a 95 % interval over episodes, and not less than the Wilson interval of all
    `num_queries` answers, which is above zero even if every episode is right.
    """
    error = statistics.standard_error(values)
    count = len(values) * num_queries
    hits = np.arange(count) < round(float(values.mean()) * count)
    wilson = statistics.accuracy(hits)["ci95"]
    return {
        "accuracy": float(values.mean()),
        "ci95": max(statistics.Z95 * error, float(wilson)),
        "n": len(values),
        "standard_error": error,
    }


def _ways(episode: Episode) -> list[int]:
    return [way for _, way in episode.queries]


def _ask(
    lm: FrozenLM,
    episode: Episode,
    all_bags: Sequence[Sequence[Sequence[str]]],
    class_names: Sequence[str],
    ask: AskConfig,
) -> dict[str, float]:
    """Accuracies by method; the first of `all_bags` is shown, and no word of any of them is a label."""
    bags = all_bags[0]
    labels = label_names(episode, all_bags, class_names, ask.labels)
    examples = [(" ".join(bags[row]), labels[way]) for row, way in episode.support]
    words = [" ".join(bags[row]) for row, _ in episode.queries]
    free = [" ".join(bag) for bag in random_bags(episode, bags, ask.num_bags)]
    made = prompts.classification(
        examples, words + free, labels, repeats=ask.repeats, induction=ask.induction
    )
    ways = _ways(episode)
    right: dict[str, float] = {}
    if ask.scoring != "greedy":
        # Bags are scored as queries, which gives both figures in one pass.
        scores = lm.score(made.queries, [f" {label}" for label in labels], prefix=made.prefix)
        own, bias = scores[: len(words)], scores[len(words) :].mean(axis=0)
        right |= {"log_p": share_right(own, ways), "calibrated": share_right(own - bias, ways)}
    if ask.scoring != "calibrated":
        asked = [made.prefix + query for query in made.queries[: len(words)]]
        texts = lm.generate(asked, num_tokens=GREEDY_TOKENS).texts
        if texts is None:
            raise UserError("This language model has no tokenizer, so it cannot answer in words.")
        said = [prompts.chosen_label(text, labels) for text in texts]
        right["greedy"] = float(np.mean([s == way for s, way in zip(said, ways, strict=True)]))
    return right


def label_names(
    episode: Episode,
    all_bags: Sequence[Sequence[Sequence[str]]],
    class_names: Sequence[str],
    kind: Labels,
) -> list[str]:
    """The label of each of the episode's classes.

    Nouns and nonsense words are drawn anew for each episode and seed, from those that are no words of its
    images in any of `all_bags`.

    Raises:
        UserError: too few of them are left.
    """
    if kind == "names":
        return [class_names[c] for c in episode.classes]
    rows = [row for row, _ in (*episode.support, *episode.queries)]
    used = {word for bags in all_bags for row in rows for word in bags[row]}
    rng = np.random.default_rng([episode.seed, episode.number, 1])
    known = rng.permutation(NOUNS if kind == "nouns" else NONSENSE)
    free = [str(word) for word in known if word not in used]
    ways = len(episode.classes)
    if len(free) < ways:
        raise UserError(
            f"Only {len(free)} {kind} are left for {ways} ways; use the classes' names."
        )
    return free[:ways]


def random_bags(
    episode: Episode, bags: Sequence[Sequence[str]], number: int
) -> list[tuple[str, ...]]:
    """Bags as long as the first query's, of words of all examples of an episode.

    The examples' words are shuffled and used up before any is used again.
    """
    known = [word for row, _ in episode.support for word in bags[row]]
    length = len(bags[episode.queries[0][0]])
    rng = np.random.default_rng([episode.seed, episode.number, 2])
    rounds = -(-number * length // len(known))
    drawn = np.concatenate([rng.permutation(len(known)) for _ in range(rounds)])
    return [
        tuple(known[i] for i in drawn[start : start + length])
        for start in range(0, number * length, length)
    ]
