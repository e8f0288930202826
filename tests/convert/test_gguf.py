"""GGUF files become the run of their checkpoint folder; what is not read is refused in one sentence."""

import json
import random
import sys

import gguf
import numpy as np
import pytest
import tiny_gguf
import tokenizers
from etils import epath

import rag_mm
from rag_mm.api import importing
from rag_mm.cli import main
from rag_mm.convert import gguf_format, shards
from rag_mm.core.errors import UserError

TOKENS = np.random.default_rng(0).integers(0, len(tiny_gguf.TOKENS), (2, 9)).astype(np.int32)
KINDS = {
    "untied, quantized": (
        False,
        {
            "token_embd": "Q8_0",
            "output.": "Q5_1",
            "attn_q": "Q4_0",
            "attn_k": "Q4_1",
            "attn_v": "F16",
            "attn_output": "BF16",
            "ffn_gate": "Q5_0",
            "ffn_down": "Q4_1",
        },
    ),
    "tied, float32": (True, {}),
}


def command(capsys, *words):
    code = main.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


@pytest.fixture(scope="module")
def tensors():
    return tiny_gguf.draw(tiny_gguf.config())


@pytest.fixture
def file(tmp_path, tensors):
    """Writes a file with other metadata, types or tensors."""

    def write(**changes):
        path = tmp_path / "a.gguf"
        tiny_gguf.write(path, tensors, tiny_gguf.config(), **changes)
        return path

    return write


@pytest.mark.parametrize("name", KINDS)
def test_a_file_becomes_the_run_of_its_checkpoint_folder(tmp_path, capsys, name):
    """Types, names, the order of q and k, the head, sizes: checked by logits of the run."""
    is_tied, kinds = KINDS[name]
    values = tiny_gguf.config(tie_word_embeddings=is_tied)
    stored = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.draw(values), values, kinds)
    folder = tmp_path / "folder"
    folder.mkdir()
    shapes = {key: (np.dtype(np.float32), array.shape) for key, array in stored.items()}
    shards.write_folder(folder, shapes, lambda key: stored[key].astype(np.float32), 1 << 30)
    (folder / "config.json").write_text(json.dumps(values))
    words = ("import", "gguf", tmp_path / "a.gguf", f"--out={tmp_path / 'run'}")
    code, made = command(capsys, *words)
    assert code == 0 and made["dtypes"] == ["float32"] and made["has_tokenizer"]
    importing.import_checkpoint("llama", folder, tmp_path / "expected")
    found, expected = (rag_mm.load(str(tmp_path / run)) for run in ("run", "expected"))
    assert found.config == expected.config and found.config.tie_embeddings == is_tied
    assert found.stop_tokens == (0,)
    np.testing.assert_array_equal(found.logits(TOKENS), expected.logits(TOKENS))
    prompt = " cat dog\n"
    assert found.generate(prompt, num_tokens=3).tokens == (
        expected.generate([found.text.encode_text(prompt)], num_tokens=3).tokens
    )


def test_it_is_exported_as_a_checkpoint_folder(tmp_path, capsys, file):
    path = file(metadata={"tokenizer.chat_template": "{{ messages }}"})
    assert command(capsys, "import", "gguf", path, f"--out={tmp_path / 'run'}")[0] == 0
    assert command(capsys, "export", "llama", tmp_path / "run", tmp_path / "out")[0] == 0
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["rms_norm_eps"] == 1e-5 and values["model_type"] == "llama"


def _q4_k(block: bytes) -> np.ndarray:
    """256 values of 144 bytes: d, dmin, 8 six-bit scales and minima, 4-bit values (ggml's block_q4_K)."""
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float64)
    packed, quants, values = block[4:16], block[16:], []
    for group in range(8):
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            low = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            values.append(d * scale * (byte >> 4 if group % 2 else byte & 15) - dmin * low)
    return np.array(values)


def _q6_k(block: bytes) -> np.ndarray:
    """256 values of 210 bytes: low 4 bits, high 2 bits, 16 signed scales, d (ggml's block_q6_K)."""
    low, high = block[:128], block[128:192]
    scales = np.frombuffer(block[192:208], np.int8).astype(np.float64)
    d = float(np.frombuffer(block[208:], np.float16)[0])
    values = np.empty(256)
    for i in range(256):
        half, inside = divmod(i, 128)
        part, column = divmod(inside, 32)
        byte = low[64 * half + 32 * (part % 2) + column]
        bits = (byte >> 4 if part >= 2 else byte & 15) | (
            high[32 * half + column] >> 2 * part & 3
        ) << 4
        values[i] = d * scales[i // 16] * (bits - 32)
    return values


@pytest.mark.parametrize(
    ("kind", "size", "halves", "decode"),
    [("Q4_K", 144, (0, 2), _q4_k), ("Q6_K", 210, (208,), _q6_k)],
)
def test_k_quants(tmp_path, file, tensors, kind, size, halves, decode):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4, 2, size)).astype(np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = rng.uniform(0.01, 1, (4, 2, 1)).astype(np.float16).view(np.uint8)
    path = tmp_path / "k.gguf"
    kinds = {"blk.0.odd.weight": (blocks.reshape(4, -1), kind)}
    tiny_gguf.write(path, tensors, tiny_gguf.config(), raw=kinds)
    spec = gguf_format.open_file(path).specs["blk.0.odd.weight"]
    expected = np.stack([[decode(block.tobytes()) for block in row] for row in blocks])
    assert spec.shape == (4, 512)
    np.testing.assert_allclose(shards.read_tensor(spec), expected.reshape(4, 512), rtol=1e-5)


def encode(path, text):
    checkpoint = gguf_format.open_file(path)
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.texts["tokenizer.json"])
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    return [tiny_gguf.TOKENS[i] for i in ids]


def test_words_are_merged_and_digits_stand_alone(file):
    path = file()
    assert encode(path, " cat  dog 12<|end|>cow") == [
        *("Ġcat", "Ġ", "Ġdog", "Ġ", "1", "2", "<|end|>", "c", "ow")
    ]
    # Before a digit both spaces are one word here; GPT-2 leaves the second one to the number.
    assert encode(path, "  1") == ["ĠĠ", "1"]
    assert encode(file(metadata={"tokenizer.ggml.pre": "gpt-2"}), "  1") == ["Ġ", "Ġ", "1"]


def test_a_start_token_is_added_where_the_file_or_llama_3_says_so(file):
    path = file(metadata={"tokenizer.ggml.add_bos_token": True})
    tokenizer = json.loads(gguf_format.open_file(path).texts["tokenizer.json"])
    assert tokenizer["post_processor"]["special_tokens"]["<|start|>"]["ids"] == [1]
    path = file(metadata={"tokenizer.ggml.pre": "llama-bpe"})
    tokenizer = json.loads(gguf_format.open_file(path).texts["tokenizer.json"])
    assert "<|start|>" in tokenizer["post_processor"]["special_tokens"]
    assert tokenizer["model"]["ignore_merges"]


def test_a_file_without_tokenizer_takes_token_ids(tmp_path, file):
    path = file(metadata={"tokenizer.ggml.model": None})
    made = importing.import_gguf(path, tmp_path / "run", np.dtype(np.float16))
    assert not made["has_tokenizer"] and made["dtypes"] == ["float16"]
    model = rag_mm.load(str(tmp_path / "run"))
    assert len(model.generate([[1, 2]], num_tokens=2).tokens[0]) == 2


def _llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for a LLaMA 3.1 (`rope_freqs.weight`)."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_the_scaling_of_llama_3_is_recognized(file):
    factors = _llama3_factors(16, 5_000.0, 8.0)
    path = file(extra={"rope_freqs.weight": factors})
    rope = gguf_format.open_file(path).config["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == 8.0
    path = file(extra={"rope_freqs.weight": factors * 1.1})
    with pytest.raises(UserError, match="not the scaling of LLaMA"):
        gguf_format.open_file(path)


def test_a_truncated_file_is_refused_wherever_it_ends(file):
    path = file()
    whole = path.read_bytes()
    for count in (4, 20, 100, 1_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:count])
        with pytest.raises(UserError, match="is truncated"):
            gguf_format.open_file(path)


def test_a_damaged_header_is_read_or_refused_in_one_sentence(file):
    path, rng = file(), random.Random(0)
    whole = path.read_bytes()
    end, refused = whole.index(b"blk.1.ffn_down.weight"), []
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(4, end)] = rng.choice([0, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            gguf_format.open_file(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10 and "\n" not in "".join(refused)


def test_an_unknown_type_is_refused(file, tensors):
    path = file()
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after its dimensions
    assert int.from_bytes(data[at : at + 4], "little") == gguf.GGMLQuantizationType.F32
    for number, said in ((99, "the unknown GGUF type 99"), (26, "the type I32")):
        data[at : at + 4] = number.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{said}.*Q4_0"):
            gguf_format.open_file(path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, "by the rule 'tekken'"),
        ({"tokenizer.ggml.merges": ["x y z"]}, "no readable tokenizer"),
        ({"tokenizer.ggml.merges": None}, "no readable tokenizer"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn', which is not supported"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the 16"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": "four"}, "llama.attention.head_count is 'four'"),
        ({"llama.block_count": 3}, "lacks model.layers.2"),
    ],
)
def test_a_setting_that_is_not_supported_gives_one_sentence(
    tmp_path, capsys, file, metadata, reason
):
    path = file(metadata=metadata)
    code, message = command(capsys, "import", "gguf", path, f"--out={tmp_path / 'run'}")
    assert code == 2 and reason in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_architecture_or_no_gguf_file_is_refused(tmp_path, capsys, tensors):
    path = tmp_path / "a.gguf"
    tiny_gguf.write(path, tensors, tiny_gguf.config(), architecture="qwen2")
    for spoil, reason in (
        (lambda: None, "architecture 'qwen2'"),
        (lambda: path.write_bytes(b"text"), "is not a GGUF file"),
        (path.unlink, "is no file"),
    ):
        spoil()
        code, message = command(capsys, "import", "gguf", path, f"--out={tmp_path / 'run'}")
        assert code == 2 and reason in message and message.count("\n") == 1


def test_without_the_library_its_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"\[gguf\]"):
        gguf_format.open_file(epath.Path(tmp_path / "a.gguf"))
