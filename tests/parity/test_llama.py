"""The decoder configured as LLaMA matches transformers: layer by layer, in its logits and its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.decode import beam, sampler
from rag_mm.nn import decoder, param_trees
from rag_mm.ops import attention

pytestmark = pytest.mark.parity

CONFIG = decoder.DecoderConfig(
    vocab_size=50,
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_seq_len=64,
    norm="rmsnorm",
    norm_eps=1e-6,
    positions="rope",
    rope_theta=5_000.0,
    mlp="swiglu",
)
LAYER = "model.layers.{}."
# Our name -> theirs; {} counts layers, which we stack.
NAMES = {
    "embedding/table": "model.embed_tokens.weight",
    "head/table": "lm_head.weight",
    "norm/scale": "model.norm.weight",
    "stack/blocks/attention_norm/scale": LAYER + "input_layernorm.weight",
    "stack/blocks/mlp_norm/scale": LAYER + "post_attention_layernorm.weight",
    "stack/blocks/attention/q/kernel": LAYER + "self_attn.q_proj.weight",
    "stack/blocks/attention/k/kernel": LAYER + "self_attn.k_proj.weight",
    "stack/blocks/attention/v/kernel": LAYER + "self_attn.v_proj.weight",
    "stack/blocks/attention/out/kernel": LAYER + "self_attn.o_proj.weight",
    "stack/blocks/mlp/gate/kernel": LAYER + "mlp.gate_proj.weight",
    "stack/blocks/mlp/up/kernel": LAYER + "mlp.up_proj.weight",
    "stack/blocks/mlp/down/kernel": LAYER + "mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def llama(torch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
        initializer_range=0.2,
        attn_implementation="eager",
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # Ones would hide a missing norm.
                weight.add_(0.3 * torch.randn(weight.shape))
    return model


@pytest.fixture(scope="module")
def ours(llama):
    graphdef, abstract = param_trees.describe(
        lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0)), None
    )
    theirs = {name: weight.numpy() for name, weight in llama.state_dict().items()}
    used = set()

    def convert(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = range(leaf.shape[0]) if "{}" in NAMES[name] else [None]
        sources = [NAMES[name].format(i) for i in layers]
        used.update(sources)
        # PyTorch stores [out, in]; tables and norms are the same.
        weights = [theirs[s].T if name.endswith("kernel") else theirs[s] for s in sources]
        return jnp.asarray(np.stack(weights).reshape(leaf.shape))

    params = jax.tree_util.tree_map_with_path(convert, abstract)
    assert used == set(theirs)
    return graphdef, params


def make_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 50, shape).astype(np.int32)


def test_hidden_states_layer_by_layer_and_logits(torch, llama, ours):
    tokens = make_tokens((2, 17))
    with torch.no_grad():
        expected = llama(torch.tensor(tokens).long(), output_hidden_states=True)

    @jax.jit
    def forward(params):
        model = nnx.merge(ours[0], params)
        positions = jnp.tile(jnp.arange(17, dtype=jnp.int32), (2, 1))

        def attend(heads, handed):
            q, k, v, *_ = heads
            return attention.attention(q, k, v, is_causal=True), handed

        x = model.embed(jnp.asarray(tokens), positions)
        states = [x]
        rotation = model.config.block.rotation(positions)
        for block in model.stack.unstack():
            x, _ = block(x, rotation, attend)
            states.append(x)
        states[-1] = model.norm(x)  # As in transformers, the last state is after the norm.
        whole = model(jnp.asarray(tokens), positions, jnp.ones((2, 17), jnp.int32))
        return states, model.logits(whole)

    states, logits = forward(ours[1])
    assert len(states) == len(expected.hidden_states) == 4
    for i, (found, wanted) in enumerate(zip(states, expected.hidden_states, strict=True)):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4, err_msg=f"layer {i}")
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)


def make_prompts():
    """Prompts of three lengths, padded on the left."""
    lengths = (4, 9, 7)
    tokens, positions, segment_ids = np.zeros((3, 3, 9), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, -n:] = make_tokens(n, seed=row)
        positions[row, -n:] = np.arange(n)
        segment_ids[row, -n:] = 1
    return sampler.Prompts(tokens, positions, segment_ids, np.array(lengths, np.int32))


def test_greedy_generation_token_for_token(torch, llama, ours):
    """Prompts of three lengths, padded on the left in both."""
    prompts, longest, steps = make_prompts(), 9, 12
    tokens, _, segment_ids = prompts[:3]
    with torch.no_grad():
        expected = llama.generate(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segment_ids).long(),
            max_new_tokens=steps,
            do_sample=False,
        )
    found = sampler.sample(
        ours[1],
        prompts,
        np.zeros(3, np.uint32),
        np.ones(50, bool),
        graphdef=ours[0],
        num_steps=steps,
        sampling=sampler.Sampling(temperature=0.0),
    )
    np.testing.assert_array_equal(found.tokens, expected[:, longest:].numpy())
    assert len(np.unique(found.tokens)) > 5  # It does not just repeat itself.


@pytest.mark.parametrize(
    ("penalty", "min_steps", "stop"), [(0.0, 0, 7), (1.0, 0, 31), (-1.0, 4, 36), (2.0, 0, 12)]
)
def test_beam_search_finds_the_same_texts_and_scores(torch, llama, ours, penalty, min_steps, stop):
    """Five beams of prompts of three lengths; some texts end early, and some searches before all steps."""
    prompts, longest, steps, beams = make_prompts(), 9, 10, 5
    tokens, _, segment_ids = prompts[:3]
    with torch.no_grad():
        expected = llama.generate(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segment_ids).long(),
            max_new_tokens=steps,
            min_new_tokens=min_steps or None,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=stop,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for is_scanned in (False, True):
        found = beam.search(
            ours[1],
            prompts,
            np.ones(50, bool),
            graphdef=ours[0],
            num_steps=steps,
            stop=stop,
            num_beams=beams,
            length_penalty=penalty,
            min_steps=min_steps,
            is_scanned=is_scanned,
        )
        theirs = expected.sequences[:, longest:].numpy().reshape(3, beams, -1)
        padding = ((0, 0), (0, 0), (0, steps - theirs.shape[2]))
        theirs = np.pad(theirs, padding, constant_values=stop)
        np.testing.assert_array_equal(found.tokens, theirs)
        scores = expected.sequences_scores.numpy().reshape(3, beams)
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    assert penalty > 1 or (np.asarray(found.tokens) == stop).any()  # Above 1, long texts win.
