"""Trains a vocabulary on TEXT... and saves it as FILE."""

import sys

from rag_mm.data import vocabulary

path, *texts = sys.argv[1:]
vocabulary.train_vocabulary(texts, 320, 64, 8).save(path)
