"""An imported Chameleon's prompts: an image becomes its tokens between two marker tokens."""

import pathlib
import sys

import numpy as np
import pytest
import tokenizers

from rag_mm.api import imported, importing
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

WORDS = {"<unk>": 0, "<image>": 1, "<racm3:break>": 40, "<eoss>": 41, "look": 42, "here": 43}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("chameleon")
    folder = tiny.write(place / "theirs", "chameleon")
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    text.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    text.add_special_tokens(["<image>", "<racm3:break>", "<eoss>"])
    text.save(str(folder / "tokenizer.json"))
    importing.import_checkpoint("chameleon", folder, place / "run")
    return imported.load(place / "run")


def test_an_image_becomes_its_tokens_between_two_markers(model):
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3)).astype(np.uint8)
    tokens = model.encode_image([image])[0].tolist()
    assert len(tokens) == model.model.vq.num_codes == 64
    assert model.prompt(["look ", image, " here"]) == [42, 40, *tokens, 41, 43]
    assert model.prompt(["look here"]) == [42, 43]


def test_user_errors(model):
    with pytest.raises(UserError, match="contains <image>, the placeholder for an image"):
        model.prompt(["look <image>"])
    with pytest.raises(UserError, match="without the decoder of its image tokenizer"):
        model.decode_image(np.zeros((1, 64), np.int32))
    with pytest.raises(UserError, match="maximum sequence length of 64"):
        model.generate_image([42])
