"""Prints the error of opening a ScaNN index, and checks that TensorFlow is not imported."""

import sys

from rag_mm.core.errors import UserError
from rag_mm.memory.index import scann

try:
    scann.ScannIndex()
except UserError as error:
    print(error)
assert "tensorflow" not in sys.modules
