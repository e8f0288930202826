"""The ten headline rows: what a run measured, and what each figure means."""

from collections.abc import Callable, Mapping
from typing import Any

from rag_mm.report.figures import MISSING, Figure, duration, find, number, percent

_DOCS = {"docs0": "0 docs", "docs1": "1 doc", "docs2": "2 docs"}


def summary_table(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Ten (label, value, meaning) rows for the page and for the end of a command.

    Accuracies are on classes that training never showed; a figure that is not in `metrics` reads
    "not measured".
    """

    def at(path: str) -> Figure | None:
        return find(metrics, path)

    ceiling = at("tokenizer.scorer_ceiling.joint")
    limit = f"the ceiling is {percent(ceiling)}" if ceiling else "its ceiling was not measured"
    return [
        (
            "Time and memory",
            _cost(metrics),
            "From the first to the last stage, installation aside; peak of resident memory; "
            "the share of a picture's time that finding its documents takes.",
        ),
        (
            "Tokenizer, PSNR",
            number(at("tokenizer.psnr"), 1, "dB"),
            "How close a picture comes back from its codes; more is better.",
        ),
        (
            "Tokenizer, ceiling",
            percent(ceiling),
            "Entity, place and colour still read right after the tokenizer alone; "
            "no generated picture can be expected to do better.",
        ),
        (
            "Retriever, recall@1",
            percent(at("retriever.recall_at_1.text_to_image")),
            "A caption finds a picture that satisfies it, first among unseen scenes.",
        ),
        (
            "Retriever, same entity@2",
            percent(at("retriever.same_class_at_2")),
            "Of the two documents given to the decoder, those that show the entity asked for.",
        ),
        (
            "Memory, recall@10",
            percent(at("memory.recall_at_10")),
            "The fast index against exact search; 100 % would lose nothing.",
        ),
        (
            "NLL per art code",
            _list(
                [(label, at(f"decoder.art_nll.{k}")) for k, label in _DOCS.items()]
                + [("vanilla", at("control.art_nll"))],
                number,
            ),
            "How surprised the decoder is by the entity's codes, in nats; less is better, "
            "and a fall with documents means that it copies.",
        ),
        (
            "Joint accuracy",
            _list(
                [(label, at(f"decoder.joint_accuracy.{k}")) for k, label in _DOCS.items()],
                percent,
            ),
            f"Entity, place and colour all right in the generated picture; {limit}.",
        ),
        (
            "Joint accuracy without us",
            _list(
                [
                    ("vanilla", at("control.joint_accuracy")),
                    ("hit itself", at("baselines.hit_itself.joint_accuracy")),
                    ("random docs", at("baselines.random_documents.joint_accuracy")),
                    ("rows removed", at("baselines.held_out_removed.joint_accuracy")),
                ],
                percent,
            ),
            "The same decoder trained without retrieval; the retrieved picture handed back "
            "unchanged; our decoder given documents drawn by lot; our decoder and a memory without "
            "the rows of these entities.",
        ),
        (
            "Captions, CIDEr",
            _list(
                [(label, at(f"decoder.cider.{k}")) for k, label in _DOCS.items() if k != "docs1"]
                + [("vanilla", at("control.cider"))],
                number,
            ),
            "Agreement of written captions with the truth, 0 to 10; more is better.",
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
