"""The tables of the page about instruction tuning, from the metrics of the stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from rag_mm.eval import over_reliance
from rag_mm.report import figures
from rag_mm.report.decoding_page import PageSection, Strip, TextTable
from rag_mm.stages.cm3leon import edit_guidance, scene_instructions
from rag_mm.stages.cm3leon.edit_guidance import Weights
from rag_mm.stages.cm3leon.judge_tuning import AIMS, GAIN, GATES, KEPT_WITHIN, TUNED, UNTUNED

_VERDICTS = {True: "met", False: "not met", None: ""}


def tasks(metrics: Mapping[str, Any]) -> PageSection:
    """Every task before and after, with its gate and its aim."""
    before, after = (metrics["tasks"][decoder] for decoder in (UNTUNED, TUNED))
    rows = []
    for name, found in after.items():
        figure = scene_instructions.find(name).figure
        old, new = before[name][figure]["accuracy"], found[figure]["accuracy"]
        if name == scene_instructions.TEXT_TO_IMAGE:
            gate, least = f"before - {KEPT_WITHIN:g}", old - KEPT_WITHIN
        else:
            fixed = GATES.get(name, 0.0)
            gate = f"before + {GAIN:g}" + (f", {fixed:g}" if fixed else "")
            least = max(fixed, old + GAIN)
        aim = AIMS.get(name)
        row = [
            name,
            figures.percent(figures.as_measured(before[name][figure])),
            figures.percent(figures.as_measured(found[figure])),
            gate,
            _VERDICTS[new >= least],
            "" if aim is None else f"{aim:g}",
            _VERDICTS[None if aim is None else new >= aim],
            ", ".join(f"{key} {each['accuracy']:.2f}" for key, each in found.items()),
        ]
        rows.append(row)
    head = ["task", "before", "after", "gate", "", "aim", "", "after, by fact"]
    text = (
        "Share of test items that the exact scorer finds right: the whole answer in words, or entity, place, "
        "color (and boxes) of a picture at once. ± is half of a 95 % interval. Gates and aims were fixed "
        "beforehand; a claim rests on three seeds (rag-mm ablate)."
    )
    return PageSection("Tasks", text, tables=[TextTable(head, rows)])


def claims(metrics: Mapping[str, Any]) -> PageSection:
    """What was claimed beforehand about edits with two conditions and about documents."""
    names = {True: "met", False: "not met", None: "reported"}
    rows = [
        [each["claim"], each["required"], each["measured"], names[each["is_met"]]]
        for each in metrics.get("claims", [])
    ]
    table = TextTable(["claim", "required", "measured", ""], rows)
    return PageSection("Claims", "Of this run, one seed.", tables=[table])


def guidance(
    metrics: Mapping[str, Any], weights: Sequence[Weights], strips: Sequence[Strip]
) -> PageSection:
    """Fidelity, compliance and both by the weights of picture and instruction."""
    found = metrics.get("guidance", {})
    tables = []
    for task, own in found.items():
        rows = [
            [
                f"{image:g}",
                f"{text:g}",
                *(
                    figures.percent(figures.as_measured(scores.get(key)))
                    for key in edit_guidance.FIGURES
                ),
            ]
            for image, text in weights
            if (scores := own.get(edit_guidance.name(task, (image, text))))
        ]
        tables.append(TextTable(["image", "text", *edit_guidance.FIGURES], rows, task))
    text = (
        "The logits are l_0 + image weight (l_picture - l_0) + text weight (l_full - l_picture); 1 and 1 is "
        "plain sampling. Fidelity: what was not to change is as it was. Compliance: what was to change is as "
        "asked. Joint: both."
    )
    return PageSection("Edits with two conditions", text, strips=strips, tables=tables)


def copied(metrics: Mapping[str, Any]) -> PageSection:
    """What pictures have from documents against their captions, before and after."""
    found = metrics.get("over_reliance", {})
    rows = [
        [
            figure.removeprefix("copied_"),
            *(figures.percent(figures.find(found, f"{decoder}.{figure}")) for decoder in found),
            f"{most:g}",
        ]
        for figure, most in over_reliance.AT_MOST.items()
    ]
    text = (
        "Text to image: share of pictures that have the place, the background color, or all codes of a "
        "document, among the scenes whose documents all differ from the caption in that."
    )
    table = TextTable(["copied", *found, "at most"], rows if found else [])
    return PageSection("Copied against the caption", text, tables=[table])
