"""CLIP with Hugging Face's weights gives Hugging Face's embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.models import clip
from rag_mm.nn import param_trees

pytestmark = pytest.mark.parity

END = 29
CONFIG = clip.CLIPConfig(
    image_size=12,
    patch_size=4,
    vision=clip.TowerConfig(24, 2, 3, 40),
    text=clip.TowerConfig(16, 3, 2, 32),
    vocab_size=30,
    max_text_len=7,
    end_of_text=END,
    projection_dim=10,
)
LAYER = "encoder.layers.{}."
BLOCK = {
    "attention_norm": LAYER + "layer_norm1",
    "mlp_norm": LAYER + "layer_norm2",
    "attention/q": LAYER + "self_attn.q_proj",
    "attention/k": LAYER + "self_attn.k_proj",
    "attention/v": LAYER + "self_attn.v_proj",
    "attention/out": LAYER + "self_attn.out_proj",
    "mlp/up": LAYER + "mlp.fc1",
    "mlp/down": LAYER + "mlp.fc2",
}
# Our module -> theirs.
MODULES = {
    "vision/pre_norm": "vision_model.pre_layrnorm",
    "vision/post_norm": "vision_model.post_layernorm",
    "text/norm": "text_model.final_layer_norm",
    **{f"vision/stack/blocks/{k}": f"vision_model.{v}" for k, v in BLOCK.items()},
    **{f"text/stack/blocks/{k}": f"text_model.{v}" for k, v in BLOCK.items()},
}
LEAVES = {
    "vision/patches/kernel": "vision_model.embeddings.patch_embedding.weight",
    "vision/class_embedding": "vision_model.embeddings.class_embedding",
    "vision/position_embedding": "vision_model.embeddings.position_embedding.weight",
    "text/embedding/table": "text_model.embeddings.token_embedding.weight",
    "text/position_embedding": "text_model.embeddings.position_embedding.weight",
    "image_projection": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("kernel", "projection")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def theirs(torch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=10)
    vision = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=12,
        patch_size=4,
    )
    text = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=7,
        eos_token_id=END,
        bos_token_id=28,
        pad_token_id=0,
    )
    config = transformers.CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=10
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # Initial biases are 0 and scales 1, which would hide a mistake.
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    make_model = lambda: clip.CLIP(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    weights = {
        name: weight.numpy()
        for name, weight in theirs.state_dict().items()
        if not name.endswith("position_ids")
    }
    used = set()

    def convert(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in LEAVES:
            source = LEAVES[name]
        else:
            module, kind = name.rsplit("/", 1)
            source = f"{MODULES[module]}.{'bias' if kind == 'bias' else 'weight'}"
        sources = [source.format(i) for i in range(leaf.shape[0])] if "{}" in source else [source]
        used.update(sources)
        found = []
        for source in sources:
            weight = weights[source]
            if weight.ndim == 4:  # a convolution's [out, channel, row, column]
                weight = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
            found.append(weight.T if name.endswith(TRANSPOSED) else weight)
        return jnp.asarray(np.stack(found).reshape(leaf.shape))

    params = jax.tree_util.tree_map_with_path(convert, abstract)
    assert used == set(weights)
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 28, (4, 7)).astype(np.int32)
    # At the end, at the beginning, and several times: the first one counts.
    for row, places in enumerate([[6], [1], [3, 5], [2, 3, 4, 5, 6]]):
        tokens[row, places] = END
    return {"images": rng.random((4, 12, 12, 3)).astype(np.float32), "tokens": tokens}


@pytest.fixture(scope="module")
def expected(torch, theirs, batch):
    pixels = (batch["images"] - np.array(CONFIG.image_mean)) / np.array(CONFIG.image_std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(batch["tokens"]).long(), pixel_values=pixels)


def test_image_features(ours, batch, expected):
    found = jax.jit(lambda model, x: model.encode_image(x))(ours, batch["images"])
    np.testing.assert_allclose(found, expected.image_embeds.numpy(), atol=1e-4)


def test_text_features(ours, batch, expected):
    found = jax.jit(lambda model, x: model.encode_text(x))(ours, batch["tokens"])
    np.testing.assert_allclose(found, expected.text_embeds.numpy(), atol=1e-4)


def test_features_before_the_unit_norm(ours, batch, expected):
    """Normalization would hide a constant factor."""
    images = jax.jit(lambda model, x: model.vision(x) @ model.image_projection[...])(
        ours, batch["images"]
    )
    texts = jax.jit(lambda model, x: model.text(x) @ model.text_projection[...])(
        ours, batch["tokens"]
    )
    wanted = expected.vision_model_output.pooler_output, expected.text_model_output.pooler_output
    np.testing.assert_allclose(images, wanted[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(texts, wanted[1].numpy(), atol=1e-4)


def test_all_tokens_before_the_projection(ours, batch, expected):
    """The image tower's are before its last norm, the text tower's after it."""
    images = jax.jit(lambda model, x: model.vision.tokens(x))(ours, batch["images"])
    texts = jax.jit(lambda model, x: model.text.tokens(x))(ours, batch["tokens"])
    assert images.shape == (4, 10, 24) and texts.shape == (4, 7, 16)
    wanted = expected.vision_model_output, expected.text_model_output
    np.testing.assert_allclose(images, wanted[0].last_hidden_state.numpy(), atol=1e-4)
    np.testing.assert_allclose(texts, wanted[1].last_hidden_state.numpy(), atol=1e-4)


def test_contrastive_loss(torch, theirs, ours, batch, expected):
    loss, _ = clip.loss_fn(ours, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    targets = torch.arange(4)
    entropy = torch.nn.functional.cross_entropy
    both = entropy(expected.logits_per_image, targets) + entropy(expected.logits_per_text, targets)
    assert float(loss) == pytest.approx(float(both) / 2, abs=1e-4)
