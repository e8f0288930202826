"""Metrics by owner: the decoder by number of documents, the model without retrieval, other baselines."""

import numpy as np

from rag_mm.stages.ra_cm3 import evaluate


def test_metrics_are_grouped_by_owner():
    baselines = ("hit_itself", "oracle_paste", "random_documents", "held_out_removed")
    variants = ("docs0", "docs1", "docs2", "control", *baselines)
    summary = {name: {"joint_accuracy": {"accuracy": i / 10}} for i, name in enumerate(variants)}
    values = {name: {"joint": np.full(4, i / 10)} for i, name in enumerate(variants)}
    for i, name in enumerate(variants[:4]):
        values[name] |= {"art_nll": np.full(4, float(i)), "cider": np.full(4, float(i))}
    values["random_documents"]["art_nll"] = np.full(4, 3.0)
    arranged = evaluate._arrange(evaluate.SplitFigures(summary, values))
    assert arranged["decoder"]["joint_accuracy"]["docs2"] == {"accuracy": 0.2}
    assert arranged["control"]["joint_accuracy"] == {"accuracy": 0.3}
    assert tuple(arranged["baselines"]) == baselines
    paired = arranged["decoder"]["paired"]
    assert len(paired) == len(evaluate.PAIRS)
    assert paired["art_nll_docs1_minus_control"]["mean"] == -2.0
