"""Words and vectors of a codebook: sources, the choice of words, and inputs that make none."""

import numpy as np
import pytest
from etils import epath

from rag_mm.core import digests as core_digests
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages.shared import frozen, given_models, world_config
from rag_mm.stages.spae import build_codebook, rank_words, word_features, word_source

WORLD = world_config.EmojiWorld(class_share=0.05, seed=0)


def _write(path, words, vectors):
    np.savez(path, words=np.asarray(words), vectors=np.asarray(vectors))
    return str(path)


def _config(lm, **changes):
    given = {"num_words": 3, "dim": 2} | changes
    return build_codebook.LanguageCodebookStageConfig(0, WORLD, lm, **given)


def _run(tmp_path, config):
    stage_dir = tmp_path / "language_codebook"
    metrics = build_codebook.run(config, run_folder.Run(tmp_path), stage_dir)
    return metrics, build_codebook.load(stage_dir)


def test_whole_words_begin_with_the_space_of_their_token():
    texts = ["ing", " the", " The", " a", " cat", " cat", "dog", " caf\u00e9", " it's", " 12"]
    assert word_source.whole_words(texts) == {"the": 1, "cat": 4}
    assert word_source.whole_words(["the", "cat", "x"]) == {"the": 0, "cat": 1}


def test_words_of_an_npz_file_become_a_table_in_their_order(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    words = ["one", "Two", "three", "flag", "five", "six"]
    lm = _write(tmp_path / "lm.npz", words, vectors)
    metrics, codebook = _run(tmp_path, _config(lm))
    assert codebook.words == ("one", "three", "flag") and codebook.table.shape == (3, 2)
    assert metrics["num_candidates"] == 5
    assert metrics["table_digest"] == build_codebook.digest_of(codebook.table)
    counts = word_features.names_of(WORLD).counts()
    named = [word for word in words if word in counts]
    _, first = _run(tmp_path, _config(lm, prefer_names=True))
    assert named and first.words[: len(named)] == tuple(named)


@pytest.mark.parametrize("is_settled", [False, True])
def test_another_file_of_the_same_name_is_another_config(tmp_path, monkeypatch, is_settled):
    """Also where files are old enough for their digest to be kept."""
    monkeypatch.setattr(core_digests, "_SETTLED_NS", -(10**12) if is_settled else 10**12)
    path = tmp_path / "lm.npz"
    digests = {_config(_write(path, ["aa", "bb"], np.eye(2) * scale)).lm_digest for scale in (1, 2)}
    assert len(digests) == 2


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_language_model_is_hashed_once_unless_it_was_just_written(
    tmp_path, monkeypatch, is_folder
):
    (tmp_path / "lm").mkdir()
    file = _write(tmp_path / "lm" / "lm.npz", ["aa", "bb"], np.eye(2))
    path = str(tmp_path / "lm") if is_folder else file
    hashed, digest = [], files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda each: hashed.append(each) or digest(each))
    fresh = {_config(path).lm_digest for _ in range(2)}
    assert len(hashed) == 2
    monkeypatch.setattr(core_digests, "_SETTLED_NS", -(10**12))
    assert {_config(path).lm_digest for _ in range(3)} == fresh and len(hashed) == 3
    _write(tmp_path / "lm" / "lm.npz", ["aa", "bb"], np.eye(2) * 2)
    assert _config(path).lm_digest not in fresh and len(hashed) == 4


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["aa", "bb"], np.eye(2), "2 whole words, fewer than num_words=3"),
        (
            ["aa", "bb", "cc"],
            np.full((3, 4), np.nan),
            "makes no codebook: a word vector is not finite",
        ),
        (["aa", "bb", "cc"], np.ones((3, 4)), "span 0 directions, fewer than 2"),
        (["aa", "bb", "cc"], np.eye(2), "give `words` as strings"),
        ([1, 2, 3], np.eye(3), "give `words` as strings"),
        (["aa", "bb", "cc"], np.eye(3, dtype=int), "`vectors` are int64"),
    ],
)
def test_words_that_make_no_codebook_are_rejected(tmp_path, words, vectors, message):
    config = _config(_write(tmp_path / "lm.npz", words, vectors))
    with pytest.raises(UserError, match=message):
        _run(tmp_path, config)


def test_a_pickle_is_not_read(tmp_path):
    np.savez(tmp_path / "lm.npz", words=np.array(["aa", None], object), vectors=np.eye(2))
    with pytest.raises(UserError, match="is no .npz file with `words`"):
        word_source.read(str(tmp_path / "lm.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"single"])
def test_what_is_no_npz_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    if content == b"single":
        with path.open("wb") as file:
            np.save(file, np.eye(2))
    with pytest.raises(UserError, match="is no .npz file"):
        word_source.read(str(path))


def test_an_absent_language_model_is_named():
    with pytest.raises(UserError, match="lm=/no/such.gguf does not exist"):
        _config("/no/such.gguf")


def test_without_a_language_model_the_stage_asks_for_one(tmp_path):
    with pytest.raises(UserError, match="lm is empty; give smollm2"):
        _run(tmp_path, _config(""))


def test_an_aligned_table_needs_features():
    with pytest.raises(ValueError, match="needs features"):
        _config("random", table="aligned")


@pytest.mark.parametrize(
    ("features", "message"),
    [({}, "have no features; set"), ({"all_names": np.zeros((2, 4))}, "none is in a name")],
)
def test_words_that_cannot_be_ranked_are_refused(features, message):
    codebook = build_codebook.LanguageCodebook(("aa", "bb"), np.eye(2), features)
    with pytest.raises(UserError, match=message):
        rank_words._features(rank_words.WordPoolsStageConfig(0, WORLD), codebook)


def _two_stages(workdir, retriever, **options):
    """A retriever, and a codebook whose words have features in it, of any earlier ones."""
    run = run_folder.Run(epath.Path(workdir))
    run.save_config({})
    config = _config("random", num_words=8, features="templates")
    copy = lambda run, folder: (
        given_models.copy_model(retriever, folder / given_models.FOLDER) or {}
    )
    run_folder.run_stage(run, "retriever", {"folder": str(retriever)}, (), copy, **options)
    return run, run_folder.run_stage(
        run,
        "language_codebook",
        {},
        build_codebook.inputs(config),
        lambda run, folder: build_codebook.run(config, run, folder),
        **options,
    )


def test_the_retriever_of_the_features_is_kept_and_counts(tiny_run, tmp_path):
    """What reads the codebook needs no other, and another one makes another codebook."""
    retriever = given_models.find_model(tiny_run.workdir, "retriever")
    run, first = _two_stages(tmp_path / "run", retriever)
    codebook = build_codebook.load(run.finished_stage("language_codebook"))
    assert frozen.fingerprint(codebook.retriever) == frozen.fingerprint(retriever)
    embedded = frozen.FrozenRetriever(codebook.retriever).encode_text([codebook.words[0]])
    assert (embedded @ codebook.features["templates"][0] > 0).all()
    other = tmp_path / "other"
    given_models.copy_model(retriever, other)
    (other / "note.txt").write_text("another one")
    run, second = _two_stages(tmp_path / "run", epath.Path(other), overwrite=True)
    assert first.inputs["retriever"] != second.inputs["retriever"]
    assert first.fingerprint != second.fingerprint
    files.discard(run.stage_dir("language_codebook") / frozen.GUIDE)
    with pytest.raises(UserError, match="made by an earlier version, without a copy of its"):
        build_codebook.load(run.stage_dir("language_codebook"))


class _Encoder:
    """Embeds a text as how often it has each of three letters."""

    def encode_text(self, texts):
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def test_features_from_names_are_means_over_the_names_with_the_word():
    names = word_features.Names(
        ["a cat", "bat", "c"],
        [frozenset({"cat", "a"}), frozenset({"bat"}), frozenset({"cat"})],
        np.array([True, False, False]),
    )
    words = ("cat", "bat", "dog")
    every = word_features.from_names(words, names, _Encoder(), is_seen_only=False)
    expected = np.array([[2, 0, 2], [1, 1, 0], [0, 0, 0]])
    lengths = np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1)
    np.testing.assert_allclose(every, expected / lengths, rtol=1e-6)
    seen = word_features.from_names(words, names, _Encoder(), is_seen_only=True)
    assert seen[0].any() and not seen[1].any()


def test_seen_names_leave_out_the_names_of_held_out_classes():
    names = word_features.names_of(WORLD)
    num_seen = len(WORLD.classes(*world_config.SEEN))
    assert names.is_seen.sum() == num_seen < len(names.texts)
