"""An imported SigLIP 2: its text, its images of any aspect, and its use as a retriever by commands."""

import json
import pathlib
import sys

import numpy as np
import PIL.Image
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import rag_mm
from rag_mm.api import importing
from rag_mm.cli import main
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # Gemma's, in their places.
TEXTS = ["A red KITE", "a  photo of a cat", "Ünïcode! ÉTÉ", "x" * 40, "", "cat, dog. cat dog cat"]


def gemma_files(folder: pathlib.Path, **settings: object) -> pathlib.Path:
    """tokenizer.json and tokenizer_config.json as of a SigLIP 2: a small Gemma, the end after each text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=tiny.VOCAB, special_tokens=SPECIALS)
    made.train_from_iterator(["a photo of a cat", "a red kite and a dog"] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    values = dict(
        tokenizer_class="Siglip2Tokenizer",
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint and the run that it was imported to."""
    place = tmp_path_factory.mktemp("siglip2")
    folder = gemma_files(tiny.write(place / "theirs", "siglip2_naflex"))
    importing.import_checkpoint("siglip2", folder, place / "run")
    return folder, place / "run"


@pytest.fixture(scope="module")
def encoder(folders):
    return rag_mm.load(str(folders[1]))


def test_case_is_folded_and_a_long_text_keeps_its_end(encoder):
    text, length = encoder.retriever.vocabulary, encoder.retriever.config.max_text_len
    assert text.encode_within("A Cat", length) == text.encode_within("a cat", length)
    long = text.encode_within("cat dog " * 9, length)
    assert len(long) == length and long[-1] == 1 and 1 not in long[:-1]
    upper, lower = encoder.encode_text(["A RED KITE", "a red kite"])
    np.testing.assert_array_equal(upper, lower)
    assert np.abs(encoder.encode_text(["a dog"]) - lower).max() > 1e-3


@pytest.mark.parity
def test_ids_are_those_of_transformers(folders, encoder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    how = dict(padding="max_length", truncation=True, max_length=7)
    text, config = encoder.retriever.vocabulary, encoder.retriever.config
    for string in TEXTS:
        ids = text.encode_within(string, config.max_text_len)
        padded = ids + [config.padding] * (config.max_text_len - len(ids))
        assert padded == theirs(string, **how).input_ids, string


@pytest.mark.parity
@pytest.mark.parametrize("name", tiny.SIGLIPS)
def test_images_are_scaled_as_by_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    from transformers.models.siglip import image_processing_pil_siglip
    from transformers.models.siglip2 import image_processing_pil_siglip2

    torch = pytest.importorskip("torch")
    folder = tiny.write(tmp_path / "theirs", name)
    importing.import_checkpoint("siglip2", folder, tmp_path / "run")
    shapes = [(41, 67), (67, 41), (5, 90), (33, 32)]
    images = [tiny.make_images(1, 90)[0, :h, :w] for h, w in shapes]
    if name == "siglip2_naflex":
        model = transformers.Siglip2Model.from_pretrained(folder)
        processor = image_processing_pil_siglip2.Siglip2ImageProcessorPil(
            patch_size=4, max_num_patches=9
        )
    else:
        model = transformers.SiglipModel.from_pretrained(folder)
        processor = image_processing_pil_siglip.SiglipImageProcessorPil(
            size=dict(height=14, width=14)
        )
    with torch.no_grad():
        given = processor([PIL.Image.fromarray(image) for image in images], return_tensors="pt")
        wanted = model.eval().get_image_features(**given).pooler_output.numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = rag_mm.load(str(tmp_path / "run")).encode_image(images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_match_is_a_probability_by_scale_and_bias(encoder):
    images = list(tiny.make_images(2, 12))
    found = encoder.match(images, ["a cat", "a dog", "kite"])
    cosines = encoder.encode_image(images) @ encoder.encode_text(["a cat", "a dog", "kite"]).T
    logits = np.log(found / (1 - found))
    slope, bias = np.polyfit(cosines.ravel(), logits.ravel(), 1)
    np.testing.assert_allclose(slope * cosines + bias, logits, atol=1e-4)
    params = encoder.retriever.model.params
    assert slope == pytest.approx(float(np.exp(params["logit_scale"][0])), rel=1e-2)
    assert bias == pytest.approx(float(params["logit_bias"][0]), abs=1e-2)


def test_a_clip_has_no_probability_of_a_match(tmp_path):
    importing.import_checkpoint("clip", tiny.write(tmp_path / "a", "clip"), tmp_path / "run")
    with pytest.raises(UserError, match="A CLIP has no probability"):
        rag_mm.load(str(tmp_path / "run")).match(list(tiny.make_images(1, 12)), ["a"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(padding_side="left"), "padding_side is 'left'"),
        (dict(pad_token="<nothing>"), "'<nothing>' is no token"),
        (dict(tokenizer_class="SiglipTokenizer"), "the tokenizer of SigLIP 1"),
    ],
)
def test_another_tokenizer_is_refused_before_anything_is_written(tmp_path, settings, says):
    folder = gemma_files(tiny.write(tmp_path / "a", "siglip2"), **settings)
    with pytest.raises(UserError, match=says):
        importing.import_checkpoint("siglip2", folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_padding_is_the_tokenizers(tmp_path):
    token = dict(content="<mask>", lstrip=False)
    folder = gemma_files(tiny.write(tmp_path / "a", "siglip2"), pad_token=token)
    assert importing.open_checkpoint("siglip2", folder).config.padding == 4


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("siglip2", dict(do_center_crop=True), "do_center_crop is True"),
        ("siglip2", dict(size=dict(height=9, width=9)), "size is"),
        ("siglip2_naflex", dict(max_num_patches=16), "max_num_patches is 16"),
        ("siglip2", dict(resample=1), "resample is 1"),
    ],
)
def test_another_preprocessing_is_refused(tmp_path, name, settings, says):
    folder = tiny.write(tmp_path / "a", name)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=says):
        importing.open_checkpoint("siglip2", folder)


def call(capsys, *words):
    code = main.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_it_is_a_retriever_like_a_clip(tmp_path, capsys, monkeypatch, folders):
    """Import, memory, search, zero-shot and export by commands."""
    monkeypatch.chdir(tmp_path)
    folder, _ = folders
    made = call(capsys, "import", "siglip2", folder, "--out=run")
    assert made["family"] == "siglip2" and made["has_tokenizer"]
    lines = []
    for i, picture in enumerate(tiny.make_images(4, 16)):
        place = pathlib.Path("pictures", "cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(place / f"{i}.png")
        name = (place / f"{i}.png").relative_to("pictures")
        lines.append(json.dumps({"image": str(name), "caption": f"a {place.name}"}))
    pathlib.Path("pictures/captions.jsonl").write_text("\n".join(lines))
    build = ("memory", "build", "--documents=pictures", "--retriever=run", "--out=mem")
    assert call(capsys, *build, "--index=exact")["rows"] == 4
    hits = call(capsys, "memory", "search", "mem", "--text=A CAT", "-k=2", "--view=text")["hits"]
    assert [hit["text"] for hit in hits] == ["a cat", "a cat"] and hits[0]["score"] > 0.9999
    pathlib.Path("pictures/captions.jsonl").unlink()
    words = ("eval", "--suite=zeroshot", "--workdir=run", "--images=pictures", "--refine=none")
    found = call(capsys, *words, "--template={}")
    assert found["n"] == 4 and found["classes"] == 2 and "frozen" not in found
    assert main.main(list(words)) == 0 and "of 4 images" in capsys.readouterr().out
    back = call(capsys, "export", "siglip2", "run", "back", "--card")
    assert back["tensors"] == made["tensors"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        texts = [(place / name).read_text() for place in (folder, pathlib.Path("back"))]
        assert json.loads(texts[0]) == json.loads(texts[1])
    assert "SigLIP 2" in pathlib.Path("back/README.md").read_text()
