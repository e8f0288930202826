"""Reads the documents SPEC; prints how many there are and whether TensorFlow was imported."""

import sys

from rag_mm.data import open_documents

documents = open_documents.open_documents(sys.argv[1])
print(len(list(documents.read(0))), "tensorflow" in sys.modules)
