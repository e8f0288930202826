"""Fixtures: a retriever and a tokenizer that need no training."""

import pytest
from stand_in import StandInEncoder, StandInTokenizer


@pytest.fixture
def encoder():
    return StandInEncoder()


@pytest.fixture
def tokenizer():
    return StandInTokenizer()
