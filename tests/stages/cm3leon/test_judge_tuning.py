"""Claims about a tuned decoder are judged by hand-made scores."""

import pytest

from rag_mm.stages.cm3leon import edit_guidance, judge_tuning


def judged(values, weights=()):
    return {each.claim: each for each in judge_tuning.claims(values, weights)}


def share(right, of=100):
    return [1.0] * right + [0.0] * (of - right)


@pytest.mark.parametrize(
    ("before", "after", "is_learnt", "is_aim"),
    [(10, 49, False, False), (10, 50, True, False), (30, 54, False, False), (40, 80, True, True)],
)
def test_a_gate_takes_both_a_gain_and_a_height(before, after, is_learnt, is_aim):
    values = {
        "untuned_recolor": {"joint": share(before)},
        "tuned_recolor": {"joint": share(after)},
    }
    found = judged(values)
    assert found["recolor is learnt"].is_met is is_learnt
    assert found["recolor reaches its aim"].is_met is is_aim


def test_text_to_image_has_to_be_kept():
    for after, is_met in ((74, False), (75, True), (90, True)):
        values = {
            "untuned_text_to_image": {"joint": share(80)},
            "tuned_text_to_image": {"joint": share(after)},
        }
        assert judged(values)["text_to_image is kept"].is_met is is_met


def test_weights_of_two_conditions():
    def scores(fidelity, compliance, joint):
        figures = zip(edit_guidance.FIGURES, (fidelity, compliance, joint), strict=True)
        return {name: share(right) for name, right in figures}

    made = {
        (0.0, 1.0): scores(35, 90, 30),
        (1.0, 1.0): scores(65, 90, 60),
        (1.5, 1.0): scores(60, 90, 54),
        (3.0, 1.0): scores(40, 60, 20),
        (1.0, 0.0): scores(60, 41, 20),
    }
    values = {edit_guidance.name("move", weights): each for weights, each in made.items()}
    found = judged(values, list(made))
    assert found["move: image weight 0 to 1 raises fidelity"].is_met
    assert not found["move: text weight 0 to 1 raises compliance"].is_met  # .49
    assert not found["move: image weight 1.5 is as good as 1"].is_met  # .06 less
    assert found["move: weights from 2"].measured == "joint 0.200 at 3/1"
    assert not any(claim.startswith("recolor") for claim in found)


def test_documents_are_copied_no_more_than_before():
    none, some = [0.0] * 100, share(20)
    values = {
        "untuned_copied": {
            "copied_place": some,
            "copied_color": none,
            "copied_whole": none,
        },
        "tuned_copied": {"copied_place": some, "copied_color": some, "copied_whole": none},
    }
    met = [each.is_met for each in judge_tuning.claims(values, ())]
    assert met == [True, False, True]  # As before; more than before; none at all.
