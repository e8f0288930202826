"""Experiment pages, one per system; shipped in the wheel as rag_mm.configs."""
