"""Few-shot episodes: how they are drawn, scored and summed up."""

import numpy as np
import pytest
import stand_in_words

from rag_mm.core.errors import UserError
from rag_mm.eval import few_shot_episodes
from rag_mm.eval.few_shot_episodes import AskConfig, Episode, EpisodeConfig

CLASSES = np.repeat(np.arange(8), 6)
NAMES = [f"class {number}" for number in range(8)]
# Every image of a class has its own word and one that all images share.
BAGS = [(f"word{c}", "all") for c in CLASSES]


def draw(**options) -> list[Episode]:
    return few_shot_episodes.draw_episodes(CLASSES, EpisodeConfig(num_episodes=20, **options))


def test_an_episode_has_k_examples_and_other_queries_of_n_classes():
    for episode in draw(ways=3, shots=2, queries=3):
        rows = [row for row, _ in (*episode.support, *episode.queries)]
        assert len(set(rows)) == len(rows) == 3 * 5
        ways = [way for _, way in episode.support]
        assert np.bincount(ways).tolist() == [2, 2, 2]
        assert all(
            CLASSES[r] == episode.classes[w] for r, w in (*episode.support, *episode.queries)
        )
    orders = {tuple(way for _, way in episode.support) for episode in draw(ways=3)}
    assert len(orders) > 1


def test_the_seed_decides_and_a_control_keeps_the_queries():
    one, again, other = draw(ways=3, seed=1), draw(ways=3, seed=1), draw(ways=3, seed=2)
    assert [e.queries for e in one] == [e.queries for e in again] != [e.queries for e in other]
    assert [e.queries for e in one] == [e.queries for e in draw(ways=3, seed=1, control="deranged")]


def test_in_the_deranged_control_no_example_has_its_own_label():
    for episode in draw(ways=4, shots=2, control="deranged"):
        assert all(CLASSES[row] != episode.classes[way] for row, way in episode.support)
        assert {CLASSES[row] for row, _ in episode.support} == set(episode.classes)


def test_foreign_examples_are_of_no_class_of_the_episode():
    for episode in draw(ways=4, control="foreign"):
        assert not {CLASSES[row] for row, _ in episode.support} & set(episode.classes)
        assert sorted(way for _, way in episode.support) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ways=9), "8 of 8 classes have 2 images or more, but 9-way 1-shot .* needs 9"),
        (dict(ways=5, control="foreign"), "needs 10"),
        (dict(shots=6), "0 of 8 classes have 7 images"),
        (dict(ways=1), "ways is 1; give at least 2"),
        (dict(shots=0), "shots is 0"),
        (dict(queries=0), "queries is 0"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_too_few_images_are_a_user_error(options, message):
    with pytest.raises(UserError, match=message):
        draw(**options)


def test_overlap_counts_each_word_in_each_example():
    episode = Episode(0, 0, np.array([0, 1]), ((0, 0), (1, 1), (2, 1)), ((3, 1), (4, 0)))
    bags = [("a", "b"), ("b", "c"), ("c", "c"), ("c", "b"), ("z", "y")]
    votes = few_shot_episodes.overlap_votes(episode, bags)
    assert votes.tolist() == [[1, 3], [0, 0]]
    assert few_shot_episodes.share_right(votes, [1, 0]) == (1 + 0.5) / 2


def measure(lm=None, ask=None, **options):
    found = few_shot_episodes.measure(draw(**options), BAGS, NAMES, lm, ask or AskConfig())
    return {method: float(values.mean()) for method, values in found.items()}


def test_without_a_language_model_words_are_counted():
    assert measure(ways=4) == {"overlap": 1.0}
    assert measure(ways=4, control="deranged") == {"overlap": 0.0}
    assert measure(ways=4, control="foreign") == {"overlap": 0.25}


@pytest.mark.parametrize("labels", ["names", "nouns", "nonsense"])
def test_calibration_removes_the_bias_for_a_label(labels):
    """A reader that counts like the baseline, but for a liking of the last label."""
    ask = AskConfig(labels=labels, scoring="both")
    found = measure(stand_in_words.BiasedReader(), ask, ways=2)
    assert found["log_p"] == 0.5 and found["calibrated"] == found["overlap"] == 1.0
    assert found["greedy"] == 0.5  # It answers with the last example's label.


def test_repeats_and_induction_reach_the_prompt():
    reader = stand_in_words.BiasedReader()
    measure(reader, AskConfig(repeats=2, induction=True, labels="nouns"), ways=2, shots=2)
    assert all(prefix.startswith("For each of") for prefix in reader.prefixes)
    assert {prefix.count("Input:") for prefix in reader.prefixes} == {2 * 2 * 3}
    answers = {tuple(sorted(set(p.split("Output: ")[1::1]))) for p in reader.prefixes}
    assert len(answers) > 5  # Drawn anew for each episode.


def test_a_label_is_no_word_of_the_images():
    episode = Episode(0, 0, np.array([0, 1]), ((0, 0), (1, 1)), ((2, 0),))
    bags = [few_shot_episodes.NOUNS[:20], ("lion",), few_shot_episodes.NOUNS[20:-2]]
    labels = few_shot_episodes.label_names(episode, [bags], NAMES, "nouns")
    assert sorted(labels) == sorted(few_shot_episodes.NOUNS[-2:])
    bags[1] = few_shot_episodes.NOUNS
    with pytest.raises(UserError, match="Only 0 nouns are left for 2 ways"):
        few_shot_episodes.label_names(episode, [bags], NAMES, "nouns")


def test_labels_change_with_the_seed_and_are_words_of_no_run():
    rows = (np.array([0, 1]), ((0, 0), (1, 1)), ((2, 0),))
    bags = [("a",), ("b",), ("c",)]

    def labels(seed, *others):
        episode = Episode(0, seed, *rows)
        return few_shot_episodes.label_names(episode, [bags, *others], NAMES, "nouns")

    assert len({tuple(labels(seed)) for seed in range(5)}) == 5
    first, second = labels(0)
    assert labels(0, [(first,), (), ()])[0] == second


def test_label_words_are_different():
    for words in (few_shot_episodes.NOUNS, few_shot_episodes.NONSENSE):
        assert len(set(words)) == len(words) >= 20


def test_random_bags_use_every_word_before_any_again():
    episode = Episode(3, 0, np.array([0, 1]), ((0, 0), (1, 1)), ((2, 0),))
    bags = [("a", "b", "c"), ("d", "e", "f"), ("q", "q")]
    drawn = few_shot_episodes.random_bags(episode, bags, 6)
    assert [len(bag) for bag in drawn] == [2] * 6
    assert sorted(sum(drawn, ())) == sorted("abcdef" * 2)


def test_the_interval_is_over_episodes_and_never_zero():
    values = np.array([0.5, 1.0, 1.0, 0.5])
    found = few_shot_episodes.summarize(values, 2)
    assert found["accuracy"] == 0.75 and found["n"] == 4
    assert found["standard_error"] == pytest.approx(values.std(ddof=1) / 2)
    sure = few_shot_episodes.summarize(np.ones(50), 4)
    assert sure["standard_error"] == 0 and 0.005 < sure["ci95"] < 0.05
