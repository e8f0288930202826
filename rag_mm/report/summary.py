"""The eleven headline metrics of a run, each with a sentence that explains it."""

from collections.abc import Callable, Mapping
from typing import Any

from rag_mm.report.figures import MISSING, Figure, duration, find, number, percent

_COPIED = ("place", "color", "whole")
_DOCS = {"docs0": "0 docs", "docs1": "1 doc", "docs2": "2 docs"}


def summary_table(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Eleven (label, value, explanation) rows for the page and for the end of a command.

    Accuracies are on classes never shown in training; a number that is not in `metrics` reads
    "not measured".
    """

    def at(path: str) -> Figure | None:
        return find(metrics, path)

    ceiling = at("tokenizer.scorer_ceiling.joint")
    limit = f"the ceiling is {percent(ceiling)}" if ceiling else "the ceiling was not measured"
    return [
        (
            "Time and memory",
            _cost(metrics),
            "From the first to the last stage, without installation; peak resident memory; "
            "retrieval as a fraction of the time per generated image.",
        ),
        (
            "Tokenizer, PSNR",
            number(at("tokenizer.psnr"), 1, "dB"),
            "Fidelity of images reconstructed from their codes; higher is better.",
        ),
        (
            "Tokenizer, ceiling",
            percent(ceiling),
            "Fraction of reconstructed images in which the scorer still reads all three facts correctly: "
            "an upper bound for generated images.",
        ),
        (
            "Retriever, recall@1",
            percent(at("retriever.recall_at_1.text_to_image")),
            "Fraction of captions whose top hit, among unseen scenes, is an image that matches them.",
        ),
        (
            "Retriever, same class@2",
            percent(at("retriever.same_class_at_2")),
            "Of the top two documents, the ones given to the decoder, the fraction that show the "
            "requested entity.",
        ),
        (
            "Memory, recall@10",
            percent(at("memory.recall_at_10")),
            "Fraction of the exact 10 nearest neighbors that the index returns.",
        ),
        (
            "NLL per art code",
            _list(
                [(label, at(f"decoder.art_nll.{k}")) for k, label in _DOCS.items()]
                + [("baseline", at("control.art_nll"))],
                number,
            ),
            "Negative log-likelihood of the codes that show the entity, in nats; lower is better. "
            "If documents lower it, the decoder copies from them.",
        ),
        (
            "Joint accuracy",
            _list(
                [(label, at(f"decoder.joint_accuracy.{k}")) for k, label in _DOCS.items()],
                percent,
            ),
            f"Generated images with entity, place and color all correct; {limit}.",
        ),
        (
            "Joint accuracy, baselines",
            _list(
                [
                    ("baseline", at("control.joint_accuracy")),
                    ("top hit", at("baselines.hit_itself.joint_accuracy")),
                    ("random docs", at("baselines.random_documents.joint_accuracy")),
                    ("held-out removed", at("baselines.held_out_removed.joint_accuracy")),
                ],
                percent,
            ),
            "The same decoder trained without retrieval; the top hit returned unchanged; our decoder "
            "with random documents; our decoder with a memory that lacks these entities.",
        ),
        (
            "Copied against the caption",
            _list([(name, at(f"decoder.copied_{name}.docs2")) for name in _COPIED], percent),
            "Images with two documents that have the place or the background color of a document, or are a "
            "document's image code by code, among those whose caption asks for another.",
        ),
        (
            "Captions, CIDEr",
            _list(
                [(label, at(f"decoder.cider.{k}")) for k, label in _DOCS.items() if k != "docs1"]
                + [("baseline", at("control.cider"))],
                number,
            ),
            "Agreement of generated captions with the reference captions, 0 to 10; higher is better.",
        ),
    ]


def _cost(metrics: Mapping[str, Any]) -> str:
    names = ("wall_seconds", "peak_rss_gib", "retrieval_share")
    seconds, gib, share = (find(metrics, f"quickstart.{name}") for name in names)
    if seconds is None and gib is None:
        return MISSING
    time = MISSING if seconds is None else duration(seconds.value)
    parts = [time, number(gib, 1, "GiB")]
    return " · ".join(parts + ([] if share is None else [f"retrieval {percent(share)}"]))


def _list(figures: list[tuple[str, Figure | None]], write: Callable[[Figure | None], str]) -> str:
    if all(figure is None for _, figure in figures):
        return MISSING
    return " · ".join(f"{label}: {write(figure)}" for label, figure in figures)
