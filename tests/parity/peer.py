"""Outputs of transformers for the tiny checkpoints; run as a script, writes the golden files.

    python tests/parity/peer.py

Needs the extra [parity].
"""

import pathlib
import sys
import tempfile

import numpy as np
import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(folder: pathlib.Path, **kwargs):
    """The model of a folder; missing or unexpected tensors are an error."""
    import transformers

    classes = {
        "llama": transformers.LlamaForCausalLM,
        "chameleon": transformers.ChameleonForConditionalGeneration,
        "clip": transformers.CLIPModel,
        "siglip": transformers.SiglipModel,
        "siglip2": transformers.Siglip2Model,
    }
    family = transformers.AutoConfig.from_pretrained(folder).model_type
    model, report = classes[family].from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **kwargs
    )
    wrong = {k: v for k, v in report.items() if v and k != "error_msgs"}
    assert not wrong and not report.get("error_msgs"), report
    return model.eval()


def language(model) -> dict[str, np.ndarray]:
    """Logits of two sequences, and greedy continuations of three left-padded prompts."""
    import torch

    width = max(map(len, tiny.PROMPTS))
    ids = torch.zeros((len(tiny.PROMPTS), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(tiny.PROMPTS):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    with torch.no_grad():
        logits = model(torch.tensor(tiny.tokens((2, 17))).long()).logits
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=tiny.NUM_TOKENS, do_sample=False
        )
    return {"logits": logits.numpy(), "written": written[:, width:].numpy().astype(np.int32)}


def image_tokens(model) -> dict[str, np.ndarray]:
    """Tokens of two images from Chameleon's encoder, and the latents before quantization."""
    import torch

    size = model.config.vq_config.resolution
    pixels = tiny.make_images(2, size).astype(np.float32) * np.float32(0.0078) - 1
    with torch.no_grad():
        found = model.model.get_image_tokens(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        vq = model.model.vqmodel
        latents = vq.quant_conv(vq.encoder(torch.tensor(pixels.transpose(0, 3, 1, 2))))
    return {
        "image_tokens": found.numpy().astype(np.int32),
        "latents": latents.permute(0, 2, 3, 1).numpy(),
    }


def features(name: str, model) -> dict[str, np.ndarray]:
    """CLIP's unit embeddings of images and texts."""
    import torch

    from rag_mm.models import clip

    size = model.config.vision_config.image_size
    pixels = tiny.make_images(4, size).astype(np.float32) / 255
    pixels = (pixels - np.array(clip.IMAGE_MEAN)) / np.array(clip.IMAGE_STD)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tiny.clip_tokens(name)).long(),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)).float(),
        )
    return {"images": out.image_embeds.numpy(), "texts": out.text_embeds.numpy()}


def siglip_features(name: str, model) -> dict[str, np.ndarray]:
    """SigLIP 2's unit embeddings of batches of images and of texts, and how well the first match."""
    import torch

    tokens = torch.tensor(tiny.tokens((4, 7), seed=2)).long()
    found = {}
    for i, images in enumerate(tiny.siglip_images(name)):
        pixels = torch.tensor(images.astype(np.float32) / 127.5 - 1)
        if name == "siglip2_naflex":
            given = _any_aspect(images, model.config.vision_config)
        else:
            given = {"pixel_values": pixels.permute(0, 3, 1, 2)}
        with torch.no_grad():
            out = model(input_ids=tokens, **given)
        found[f"images_{i}"] = out.image_embeds.numpy()
        if i == 0:
            found["match"] = torch.sigmoid(out.logits_per_image).numpy()
    return found | {"texts": out.text_embeds.numpy()}


def _any_aspect(images: np.ndarray, config) -> dict:
    """The images as the model's own processor gives them."""
    from transformers.models.siglip2 import image_processing_pil_siglip2 as processing

    processor = processing.Siglip2ImageProcessorPil(
        patch_size=config.patch_size, max_num_patches=config.num_patches
    )
    return processor(list(images), input_data_format="channels_last", return_tensors="pt")


def compute(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All outputs that are compared for a checkpoint."""
    model = load(folder)
    if name in tiny.CLIPS:
        return features(name, model)
    if name in tiny.SIGLIPS:
        return siglip_features(name, model)
    found = language(model)
    return found | image_tokens(model) if name in tiny.CHAMELEONS else found


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or tiny.CHECKPOINTS:
        with tempfile.TemporaryDirectory() as place:
            found = compute(name, tiny.write(pathlib.Path(place), name))
        np.savez_compressed(GOLDEN / f"{name}.npz", **found)
        print(name, {key: value.shape for key, value in found.items()})
