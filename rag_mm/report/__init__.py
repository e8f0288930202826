"""The report of a run: a self-contained HTML page, its panels as PNG, and eleven headline metrics."""

from rag_mm.report.content import (
    CaptionExample,
    Curve,
    Generation,
    Hit,
    Reconstruction,
    ReportData,
    Retrieval,
)
from rag_mm.report.page import render_report
from rag_mm.report.sheets import save_figures
from rag_mm.report.summary import summary_table

__all__ = [
    "CaptionExample",
    "Curve",
    "Generation",
    "Hit",
    "Reconstruction",
    "ReportData",
    "Retrieval",
    "render_report",
    "save_figures",
    "summary_table",
]
