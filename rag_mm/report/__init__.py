"""The report of a run: one self-contained page, the same panels as PNG, and ten headline rows."""

from rag_mm.report.content import (
    Curve,
    Generation,
    Hit,
    Reconstruction,
    ReportData,
    Retrieval,
    WrittenCaption,
)
from rag_mm.report.page import render_report
from rag_mm.report.sheets import save_figures
from rag_mm.report.summary import summary_table

__all__ = [
    "Curve",
    "Generation",
    "Hit",
    "Reconstruction",
    "ReportData",
    "Retrieval",
    "WrittenCaption",
    "render_report",
    "save_figures",
    "summary_table",
]
