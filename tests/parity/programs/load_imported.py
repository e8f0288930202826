"""Loads the imported run WORKDIR."""

import sys

from rag_mm.api import imported

imported.load(sys.argv[1])
