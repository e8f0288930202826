"""Reads the lines of the training charts from the logs of the stages."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from etils import epath

from rag_mm.report.content import Band, Curve
from rag_mm.train import train_metrics

_HELD_OUT_TOP1 = "Held-out entities for checks: top-1 accuracy of art codes"


class Line(NamedTuple):
    """One metric of a stage's log, the title of its chart, and its label there."""

    stage: str
    figure: str
    chart: str
    label: str

    @property
    def key(self) -> str:
        """Its key in a reference file (`report.reference`)."""
        return f"{self.stage}/{self.figure}"


LINES = (
    Line("tokenizer", "psnr", "Image tokenizer: PSNR (dB)", "train"),
    Line("tokenizer", "code_usage", "Image tokenizer: fraction of codes in use", "train"),
    Line("retriever", "loss", "Retriever: contrastive loss (nats)", "train"),
    Line("decoder", "art_top1_docs1", _HELD_OUT_TOP1, "1 document"),
    Line("decoder", "art_top1_docs0", _HELD_OUT_TOP1, "no documents"),
    Line("control", "art_top1_docs0", _HELD_OUT_TOP1, "baseline"),
    Line("decoder", "code_nll", "Decoder: NLL per image code (nats)", "with retrieval"),
    Line("control", "code_nll", "Decoder: NLL per image code (nats)", "baseline"),
    Line("decoder", "text_nll", "Decoder: NLL per text token (nats)", "with retrieval"),
    Line("control", "text_nll", "Decoder: NLL per text token (nats)", "baseline"),
)


def read_values(workdir: epath.PathLike, line: Line) -> dict[int, float]:
    """Step -> value. Some metrics are logged at checkpoints only, and older logs lack some."""
    rows = train_metrics.read_log(epath.Path(workdir) / line.stage / "log.jsonl")
    return {int(row["step"]): row[line.figure] for row in rows if line.figure in row}


def read_curves(workdir: epath.PathLike, bands: Mapping[str, Band]) -> Iterator[Curve]:
    """Every logged line of a run, with the band of its key if there is one."""
    for line in LINES:
        if values := read_values(workdir, line):
            band = bands.get(line.key)
            yield Curve(line.chart, line.label, [*values], [*values.values()], band)
