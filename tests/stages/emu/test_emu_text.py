"""Texts of an Emu on an imported language model: its tokenizer, ids behind it, and what is refused."""

import dataclasses

import pytest
import tiny_llama
from etils import epath

from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import vocabulary
from rag_mm.models.emu.emu_config import CFormerConfig, VisionConfig
from rag_mm.stages import chain_config
from rag_mm.stages.emu import emu_text

TEXT = "red apple at the top left on a blue background"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama.imported(tmp_path_factory.mktemp("llama"))


def configs(llama, **overrides):
    values = {"emu_data.language_model": llama, **overrides}
    page = chain_config.load("configs/emu.py:llama_tiny", values)
    return chain_config.stage_configs(page)


def test_texts_have_the_imported_tokenizers_ids_and_come_back(llama, tmp_path):
    text = emu_text.of_language_model(llama)
    whole = tiny_llama.make_tokenizer().encode(TEXT).ids
    assert whole[0] == 1 and text.encode_text(TEXT) == whole[1:]
    text.save(tmp_path / "text.json")
    again = emu_text.load(epath.Path(tmp_path / "text.json"))
    assert again.encode_text(TEXT) == whole[1:] and again.decode_text(whole) == TEXT
    # As the paper's 32,000 to 32,003 behind LLaMA's 32,000 ids.
    size = tiny_llama.make_tokenizer().get_vocab_size()
    assert emu_text.slot_tokens(again) == SlotTokens(1, 2, size, size + 1, size + 2, size + 3)


def test_own_vocabularies_are_read_as_before(tmp_path):
    own = vocabulary.train_vocabulary([TEXT] * 3, 260, 1, 1)
    own.save(tmp_path / "own.json")
    again = emu_text.load(epath.Path(tmp_path / "own.json"))
    assert again.encode_text(TEXT) == own.encode_text(TEXT)
    assert emu_text.slot_tokens(again) == SlotTokens(*range(260, 266))


def test_the_model_has_the_language_models_sizes_and_six_more_tokens(llama):
    made = configs(llama)["emu"]
    config = made.emu_config(VisionConfig(), emu_text.of_language_model(llama))
    decoder, size = config.decoder, tiny_llama.make_tokenizer().get_vocab_size()
    assert (decoder.embed_dim, decoder.mlp_dim, decoder.num_kv_heads) == (32, 48, 2)
    assert decoder.vocab_size == size + 6 and decoder.max_seq_len == 160
    longer = dataclasses.replace(made.sequences, max_seq_len=512)
    with pytest.raises(
        UserError, match="rows of 512 tokens are longer than the language model's 256"
    ):
        dataclasses.replace(made, sequences=longer).emu_config(
            VisionConfig(), emu_text.of_language_model(llama)
        )
    # A larger C-Former is the user's choice.
    larger = dataclasses.replace(made, cformer=CFormerConfig(num_queries=6))
    assert larger.emu_config(VisionConfig(), emu_text.of_language_model(llama)).num_slots == 6


def test_another_language_model_is_another_config(llama, tmp_path):
    first = configs(llama)["emu_data"].language_model_fingerprint
    other = tiny_llama.imported(tmp_path, intermediate_size=40)
    assert first and configs(other)["emu_data"].language_model_fingerprint != first


def test_a_model_without_sizes_and_language_model_is_refused():
    page = chain_config.load("configs/emu.py:llama_tiny")
    with pytest.raises(UserError, match="give its sizes, or emu_data.language_model"):
        chain_config.stage_configs(page)
    with pytest.raises(UserError, match="language_model is nowhere, which holds no decoder"):
        configs("nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(has_tokenizer=False), "imported without a tokenizer; import it again"),
        (dict(bos_token_id=None), "which ids begin and end a sequence; write bos_token_id"),
        (dict(eos_token_id=1), "which ids begin and end a sequence"),
        (dict(eos_token_id=999), "ids beyond the model's vocabulary of"),
    ],
)
def test_language_models_that_cannot_be_trained_on_are_refused(tmp_path, changes, message):
    llama = tiny_llama.imported(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        emu_text.of_language_model(llama)
