"""The figures of docs/results/interchange.md, each in its own process; needs the extra [parity].

    python tests/parity/figures.py convert     a 1.1B LLaMA of random bfloat16: seconds, peak memory
    python tests/parity/figures.py clip        ViT-B/32 embeddings against transformers, interleaved
    python tests/parity/figures.py decode 100M greedy decoding against generate; or 1.1B
    python tests/parity/figures.py bare 100M   only its matrix products: an upper bound

Weights are random: neither side's speed depends on them.
"""

import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from rag_mm.api import imported, importing
from rag_mm.convert import shards, table

SIZES = {
    "1.1B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                 num_key_value_heads=4),
    "100M": dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10,
                 num_key_value_heads=10),
}  # fmt: skip
ROUNDS = 5


def llama_config(size: str) -> dict:
    """config.json of a LLaMA of this size."""
    return SIZES[size] | dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=32_000,
        max_position_embeddings=2048,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        eos_token_id=None,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def write(folder: pathlib.Path, values: dict, dtype: np.dtype, max_bytes: int) -> int:
    """Writes a checkpoint of random weights; returns its size in bytes."""
    family = importing.FAMILIES[values["model_type"]]
    mappings = family.mappings(family.read_config(table.CheckpointFolder(values)))
    shapes = {p.theirs: (dtype, p.shape) for p in sorted(mappings, key=lambda p: p.theirs)}
    rng = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        shape = shapes[name][1]
        if len(shape) < 2:
            return np.ones(shape, dtype) if "norm" in name else np.zeros(shape, dtype)
        return (rng.standard_normal(shape, np.float32) / np.sqrt(math.prod(shape[1:]))).astype(
            dtype
        )

    folder.mkdir()
    shards.write_folder(folder, shapes, draw, max_bytes)
    (folder / "config.json").write_text(json.dumps(values))
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def timed(command: list[str]) -> dict:
    """Wall-clock and CPU seconds of a command, and its peak resident memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.monotonic() - began, "cpu": cpu, "rss": usage.ru_maxrss * 1024}


def convert() -> None:
    """Import, load and export of a 1.1B LLaMA."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("FIGURES_DIR")) as place:
        root = pathlib.Path(place)
        values, dtype = llama_config("1.1B"), np.dtype(ml_dtypes.bfloat16)
        size = write(root / "a", values, dtype, 500_000_000)
        cli = [sys.executable, "-m", "rag_mm"]
        load = pathlib.Path(__file__).parent / "programs" / "load_imported.py"
        for name, command in (
            ("import", [*cli, "import", "llama", str(root / "a"), f"--out={root / 'run'}"]),
            ("load", [sys.executable, str(load), str(root / "run")]),
            ("export", [*cli, "export", "llama", str(root / "run"), str(root / "b")]),
        ):
            found = timed(command)
            rate, share = size / 1e6 / found["seconds"], found["rss"] / size
            print(
                f"{name}: {found['seconds']:.1f} s, {found['cpu']:.1f} of CPU, {rate:.0f} MB/s, "
                f"peak {share:.2f} x {size:,} bytes"
            )


def clip() -> None:
    """Images per second, batch size 32, float32."""
    import torch
    import transformers

    config = transformers.CLIPConfig()
    theirs = transformers.CLIPModel(config).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3)).astype(np.uint8)
    batch = torch.tensor(pixels.transpose(0, 3, 1, 2)).float() / 255
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        theirs.save_pretrained(root / "a")
        importing.import_checkpoint("clip", root / "a", root / "run")
        ours = imported.load(root / "run").retriever
    images = pixels.astype(np.float32) / 255

    def run_theirs():
        with torch.no_grad():
            theirs.get_image_features(pixel_values=batch)

    compare("ViT-B/32, 32 pictures", lambda: np.asarray(ours._encode_image(images)), run_theirs, 32)


def decode(size: str) -> None:
    """Tokens per second of one sequence, float32, 16 prompt tokens, 64 new tokens."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory(dir=os.environ.get("FIGURES_DIR")) as place:
        root = pathlib.Path(place)
        write(root / "a", llama_config(size), np.dtype(np.float32), 500_000_000)
        importing.import_checkpoint("llama", root / "a", root / "run")
        theirs = transformers.LlamaForCausalLM.from_pretrained(root / "a").eval()
        ours = imported.load(root / "run")
    assert theirs.dtype == torch.float32 and ours.config.dtype == "float32"
    prompt = np.random.default_rng(0).integers(1, 32_000, 16).tolist()
    ids, count = torch.tensor([prompt]), 64

    def run_theirs():
        with torch.no_grad():
            return theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    run_ours = lambda: ours.generate([prompt], num_tokens=count)
    same = run_ours().tokens[0] == run_theirs()[0, 16:].tolist()
    print(f"same tokens: {same}")
    compare(f"LLaMA {size}, greedy", run_ours, run_theirs, count)


def bare(size: str) -> None:
    """Tokens per second if a token is one vector times every matrix, float32, in one compiled loop.

    An upper bound: products of one token do not depend on each other, as they do in a decoder.
    """
    import jax
    import jax.numpy as jnp

    values = llama_config(size)
    width, mlp = values["hidden_size"], values["intermediate_size"]
    head_dim = width // values["num_attention_heads"]
    kv = head_dim * values["num_key_value_heads"]
    # q, k, v, out; gate, up, down.
    shapes = [(width, width), (width, kv), (width, kv), (width, width)]
    shapes += [(width, mlp), (width, mlp), (mlp, width)]
    shapes = shapes * values["num_hidden_layers"] + [(width, values["vocab_size"])]
    rng = np.random.default_rng(0)
    matrices = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    count, size_bytes = 64, sum(matrix.nbytes for matrix in matrices)

    @jax.jit
    def run(matrices):
        def token(_, total):
            # Each product depends on the previous token, so that none is hoisted out of the loop.
            return sum((jnp.full((1, m.shape[0]), total * 1e-9) @ m).max() for m in matrices)

        return jax.lax.fori_loop(0, count, token, jnp.float32(1))

    run(matrices).block_until_ready()
    seconds = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        run(matrices).block_until_ready()
        seconds.append(time.monotonic() - began)
    rate = count / statistics.median(seconds)
    print(f"{size}, bare products: {rate:.1f} a second, {rate * size_bytes / 1e9:.1f} GB/s")


def compare(name: str, ours, theirs, count: int) -> None:
    """Interleaves ours and theirs; prints medians and the median of the per-round ratios."""
    ours(), theirs()
    seconds = []
    for _ in range(ROUNDS):
        pair = []
        for call in (ours, theirs):
            began = time.monotonic()
            call()
            pair.append(time.monotonic() - began)
        seconds.append(pair)
    rates = [count / statistics.median(side) for side in zip(*seconds, strict=True)]
    ratio = statistics.median(b / a for a, b in seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"{name}: {rates[0]:.1f} a second, transformers {rates[1]:.1f}, ratio {ratio:.2f}; {peak:.1f} GiB"
    )


if __name__ == "__main__":
    {"convert": convert, "clip": clip, "decode": decode, "bare": bare}[sys.argv[1]](*sys.argv[2:])
