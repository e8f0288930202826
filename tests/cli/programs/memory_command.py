"""Runs `rag-mm memory` with the arguments given; the memory's retriever is the stand-in."""

import sys

from stand_in import StandInEncoder

from rag_mm.cli import main, memory

memory.load_encoder = lambda folder, image_batch=None: StandInEncoder()
sys.exit(main.main(["memory", *sys.argv[1:]]))
