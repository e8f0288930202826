"""The lines of the training charts, as the stages logged them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from etils import epath

from rag_mm.report.content import Band, Curve
from rag_mm.train import train_metrics

_FORESEEN = "Unseen art foreseen: top-1 share of codes"


class Line(NamedTuple):
    """One figure of a stage's log, the title of its chart, and its name there."""

    stage: str
    figure: str
    chart: str
    label: str

    @property
    def key(self) -> str:
        """How a reference names it."""
        return f"{self.stage}/{self.figure}"


LINES = (
    Line("tokenizer", "psnr", "Image tokenizer: PSNR (dB)", "train"),
    Line("tokenizer", "code_usage", "Image tokenizer: share of codes in use", "train"),
    Line("retriever", "loss", "Retriever: contrastive loss (nats)", "train"),
    Line("decoder", "art_top1_docs1", _FORESEEN, "1 document"),
    Line("decoder", "art_top1_docs0", _FORESEEN, "no document"),
    Line("control", "art_top1_docs0", _FORESEEN, "vanilla"),
    Line("decoder", "code_nll", "Decoder: NLL per image code (nats)", "with retrieval"),
    Line("control", "code_nll", "Decoder: NLL per image code (nats)", "vanilla"),
    Line("decoder", "text_nll", "Decoder: NLL per text token (nats)", "with retrieval"),
    Line("control", "text_nll", "Decoder: NLL per text token (nats)", "vanilla"),
)


def read_values(workdir: epath.PathLike, line: Line) -> dict[int, float]:
    """Step -> value; some figures are logged at checkpoints only, and older logs lack some."""
    rows = train_metrics.read_log(epath.Path(workdir) / line.stage / "log.jsonl")
    return {int(row["step"]): row[line.figure] for row in rows if line.figure in row}


def read_curves(workdir: epath.PathLike, bands: Mapping[str, Band]) -> Iterator[Curve]:
    """All lines of a run that were logged, each with the band of its key, if there is one."""
    for line in LINES:
        if values := read_values(workdir, line):
            band = bands.get(line.key)
            yield Curve(line.chart, line.label, [*values], [*values.values()], band)
