"""Decoders trained on corpora: what a row holds, who is held out, what is refused, and that they learn."""

import itertools
import json
import shutil

import numpy as np
import pytest
from corpus_runs import corpus, documents, page, tokenizer, with_neighbors

from rag_mm.core.errors import UserError
from rag_mm.core.roles import MAIN, RETRIEVED
from rag_mm.corpus import held_out
from rag_mm.data import pipeline
from rag_mm.stages import chain, chain_config
from rag_mm.stages.ra_cm3 import decoder_record, held_out_figures, pretrain

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus with neighbors in a memory of its documents, and one without."""
    root = tmp_path_factory.mktemp("corpora")
    model, given = tokenizer(root / "model"), documents(COUNT)
    with_neighbors(corpus(root / "first", given, model), given, root / "memory")
    corpus(root / "second", documents(20, 100), model)
    return root


def config(folder, name="first", **changes) -> pretrain.PretrainingStageConfig:
    return chain_config.stage_configs(page(folder / name, **changes))["pretraining"]


def sequences_of(made, held, count, rows=None):
    """(number of the main document, tokens, roles) of every sequence of some batches."""
    found = []
    batches = pretrain.make_batches(made, held.parts, made.layout(held.parts), rows)
    for batch in itertools.islice(batches, count):
        for row in range(len(batch["tokens"])):
            for number in range(1, batch["segment_ids"][row].max() + 1):
                at = batch["segment_ids"][row] == number
                (record,) = set(batch[pipeline.RECORDS][row, at].tolist())
                found.append((record, batch["tokens"][row, at], batch["roles"][row, at]))
    return found


def test_a_row_holds_documents_masked_as_the_config_says(folder):
    masked = dict(prob=1.0, min_spans=1, segment_prob=0.0)
    made = config(folder, masking=masked, num_held_out=0)
    held = held_out.hold_out(made.open_parts(), 0)
    vocabulary = held.parts[0].corpus.vocabulary
    found = sequences_of(made, held, 12)
    assert {record for record, *_ in found} <= set(range(COUNT)) and len(found) > COUNT
    num_docs = set()
    for _, tokens, roles in found:
        assert vocabulary.sentinel(0) in tokens and vocabulary.eoss in tokens
        codes = (tokens >= vocabulary.code_offset).sum()
        assert codes % 16 == 0
        num_docs.add(codes // 16 - 1)
        assert (RETRIEVED in roles) == (codes > 16) and MAIN in roles
    assert num_docs == {0, 1, 2}
    plain = config(folder, masking=dict(prob=0.0), num_held_out=0)
    texts = held.parts[0].corpus.read(np.arange(COUNT))
    for record, tokens, _ in sequences_of(plain, held, 3):
        main = tokens[-2 - 16 - len(texts[record].example.text) :]
        assert main[: -2 - 16].tolist() == list(texts[record].example.text)[:8]


def test_two_processes_make_the_rows_of_one(folder):
    made = config(folder)
    held = held_out.hold_out(made.open_parts(), 6)
    layout = made.layout(held.parts)
    whole = pretrain.make_batches(made, held.parts, layout)
    parts = [pretrain.make_batches(made, held.parts, layout, range(i, i + 2)) for i in (0, 2)]
    for _ in range(4):
        joined = [next(part) for part in parts]
        for name, values in next(whole).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in joined]), values)


def test_held_out_documents_are_neither_trained_on_nor_read(folder):
    made = config(folder, masking=dict(prob=0.0), num_held_out=20)
    held = held_out.hold_out(made.open_parts(), 20)
    assert len(set(held.document.tolist())) == 20
    read = held.parts[0].corpus.read(np.arange(COUNT))
    texts = {tuple(d.example.text[:8]): i for i, d in enumerate(read)}
    vocabulary = held.parts[0].corpus.vocabulary
    drawn, neighbors = set(), set()
    for record, tokens, _ in sequences_of(made, held, 40):
        drawn.add(record)
        ends = np.flatnonzero((tokens == vocabulary.brk) | (tokens == vocabulary.eod))
        segments = [tokens[a + 1 : b] for a, b in itertools.pairwise(ends)]
        neighbors |= {texts[tuple(s.tolist())] for s in segments[:-2:2]}
    assert drawn == set(range(COUNT)) - set(held.document.tolist())
    assert neighbors and not neighbors & set(held.document.tolist())


def test_the_choice_depends_on_ids_alone(folder, tmp_path):
    model = tokenizer(folder / "model")
    moved = corpus(tmp_path / "moved", documents(COUNT)[::-1], model)
    made = config(folder, corpora=[{"path": str(moved.path), "neighbors": None}])
    there = held_out.hold_out(made.open_parts(), 7)
    here = held_out.hold_out(config(folder).open_parts(), 7)
    ids = [[d.id for d in held.parts[0].corpus.read(held.document)] for held in (here, there)]
    assert ids[0] == ids[1]


def test_interleaved_documents_are_left_out(folder, tmp_path):
    first, *rest = documents(20)
    second = rest[0]
    album = type(first)("album", (*first.segments, *second.segments))
    mixed = corpus(tmp_path / "mixed", [album, *rest], tokenizer(folder / "model"))
    made = config(folder, corpora=[{"path": str(mixed.path), "neighbors": None}])
    held = held_out.hold_out(made.open_parts(), 4)
    assert held.num_unfit == 1
    assert 0 not in {record for record, *_ in sequences_of(made, held, 6)}


def test_the_unigram_is_that_of_the_training_documents(folder):
    held = held_out.hold_out(config(folder).open_parts(), 6)
    probs = held_out_figures.count_codes(held.parts, seed=0)
    kept = np.setdiff1d(np.arange(COUNT), held.document)
    codes = np.concatenate([d.example.codes for d in held.parts[0].corpus.read(kept)])
    share = np.bincount(codes, minlength=32) / len(codes)
    np.testing.assert_allclose(probs, share, atol=2e-3)
    assert probs.min() > 0


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A chain that learns for sixty steps."""
    settings = page(
        folder / "first",
        loop=dict(num_steps=60, log_every=20, checkpoint_every=20),
        optimizer=dict(learning_rate=1e-2, warmup_steps=5),
    )
    return chain.run_chain(settings, tmp_path_factory.mktemp("run"))


def test_it_learns_more_than_how_often_codes_are(trained):
    figures = trained.metrics["pretraining"]["held_out"]
    unigram = figures["unigram"]["code_nll"]["mean"]
    assert figures["docs0"]["code_nll"]["mean"] < unigram - 0.3
    paired = figures["paired"]["docs0 - unigram"]
    assert paired["mean"] < -2 * paired["standard_error"] and paired["n"] == 6
    assert {"docs0", "docs1", "docs2"} < figures.keys()
    kept = json.loads((trained.stage_dir("pretraining") / "per_document.json").read_text())
    values = kept["held_out"]["docs1"]["code_nll"]
    assert np.mean(values) == pytest.approx(figures["docs1"]["code_nll"]["mean"])


def test_logs_tell_held_out_loss_input_wait_and_fill(trained):
    stage = trained.stage_dir("pretraining")
    logged = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    assert all(f"held_out_nll_docs{count}" in row for row in logged for count in range(3))
    speed = [json.loads(line) for line in (stage / "speed.jsonl").read_text().splitlines()]
    assert all(0.5 < row["row_fill"] <= 1 and "input_wait" in row for row in speed)


def test_the_decoder_is_recorded_as_others_are(trained, folder):
    model = tokenizer(folder / "model")
    record = decoder_record.read(trained.stage_dir("pretraining"), model)
    assert record.layout.max_docs == 2 and record.layout.max_seq_len == 128
    assert record.null_prompts == ["documents", "bare", "caption"]


def test_a_run_that_was_stopped_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = page(folder / "first")
    chain.run_chain(settings, whole)

    def stop(self, step, generator):
        if step == 4:
            raise KeyboardInterrupt
        return watch(self, step, generator)

    watch = held_out_figures.HeldOutWatch.__call__
    with monkeypatch.context() as patch:
        patch.setattr(held_out_figures.HeldOutWatch, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            chain.run_chain(settings, broken)
    chain.run_chain(settings, broken)
    for name in ("log.jsonl", "per_document.json"):
        ours, theirs = ((run / "pretraining" / name).read_text() for run in (whole, broken))
        assert ours == theirs


def test_another_tokenizer_and_stale_neighbors_are_refused(folder, tmp_path):
    other = corpus(tmp_path / "other", documents(20), tokenizer(tmp_path / "model", seed=1))
    settings = page(folder / "first", corpora=[{"path": str(other.path), "neighbors": None}])
    with pytest.raises(UserError, match="holds codes of the image tokenizer"):
        chain.run_chain(settings, tmp_path / "run")
    with pytest.raises(UserError, match="holds codes of the image tokenizer"):
        config(
            folder, corpora=[str(folder / "first"), {"path": str(other.path), "neighbors": None}]
        )
    stale = tmp_path / "stale"
    corpus(stale, documents(30), tokenizer(folder / "model"))
    (neighbors,) = (folder / "first").glob("neighbors-*")
    shutil.copytree(neighbors, stale / neighbors.name)
    with pytest.raises(UserError, match="holds neighbors of another corpus"):
        config(folder, corpora=[str(stale)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(corpora=[{"path": "FIRST", "weight": 0.0}]), "is 0.0; give a positive number"),
        (dict(corpora=[{"path": "FIRST", "weight": float("nan")}]), "is nan; give a positive"),
        (dict(corpora=[{"path": "FIRST", "share": 1}]), "path and perhaps weight and neighbors"),
        (dict(corpora=["nowhere"]), "nowhere is not a corpus; name a folder made by"),
        (dict(corpora=["SECOND"]), "has no neighbors; run `rag-mm corpus neighbors`"),
        (dict(corpora=[{"path": "FIRST", "neighbors": "abc"}]), "neither a folder nor a memory"),
        (dict(num_held_out=50), "more than half of the corpora's documents"),
        (dict(num_held_out=1), "a standard error needs 2"),
        (dict(masking=dict(max_spans=5)), "the vocabulary has 4 sentinels"),
        (dict(sequences=dict(max_seq_len=60)), "can take"),
        (dict(sequences=dict(max_seq_len=500, num_docs_weights=(1, 1, 1, 1))), "has 2 neighbors"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(folder, changes, says):
    places = {"FIRST": str(folder / "first"), "SECOND": str(folder / "second")}
    changes = json.loads(json.dumps(changes))
    for entry in changes.get("corpora", ()):
        if isinstance(entry, dict):
            entry["path"] = places.get(entry["path"], entry["path"])
    if "corpora" in changes:
        changes["corpora"] = [
            places.get(e, e) if isinstance(e, str) else e for e in changes["corpora"]
        ]
    with pytest.raises(UserError, match=says) as raised:
        config(folder, **changes)
    assert str(raised.value).startswith("pretraining: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(tokenizer={"folder": "elsewhere"}), "is its corpus's; leave folder"),
        (dict(stages=("tokenizer", "retriever")), "a corpus has no images to train on; give one"),
        (dict(stages=("tokenizer", "memory"), memory={}), "has no images to store; give one"),
        (
            dict(stages=("tokenizer", "neighbors"), neighbors={}),
            "does not support the config's world",
        ),
        (dict(world={"corpus": ""}), "name a folder made by `rag-mm corpus build`"),
        (dict(world={"documents": "", "image_size": 16}), "name your folder"),
    ],
)
def test_a_world_of_codes_has_no_images(folder, changes, says):
    settings = page(folder / "first")
    given = settings["tokenizer"]
    changes = {k: given | v if k == "tokenizer" else v for k, v in changes.items()}
    with pytest.raises(UserError, match=says):
        chain_config.stage_configs(settings | {"retriever": given} | changes)


def test_a_given_models_batch_need_not_split_over_the_devices(folder, tmp_path):
    """Eight here; nothing but the decoder is trained."""
    settings = page(folder / "first", batch_size=8, scale=dict(mesh=(8, 1, 1)))
    settings["tokenizer"] |= dict(batch_size=7, scale=dict(mesh=(8, 1, 1)))
    run = chain.run_chain(settings, tmp_path / "run")
    assert run.metrics["pretraining"]["held_out"]["docs0"]["code_nll"]["mean"] > 0
    settings["pretraining"]["batch_size"] = 7
    with pytest.raises(UserError, match="pretraining: its batch of 7 does not split"):
        chain.run_chain(settings, tmp_path / "other")


def test_weights_and_neighbors_are_chosen_by_corpus(folder):
    (neighbors,) = (folder / "first").glob("neighbors-*")
    memory = neighbors.name.removeprefix("neighbors-")
    for wanted in ("only", str(neighbors), memory[:6], memory + "0" * 48):
        made = config(folder, corpora=[{"path": str(folder / "first"), "neighbors": wanted}])
        assert made.open_parts()[0].neighbors.path == neighbors
    mixed = [
        str(folder / "first"),
        {"path": str(folder / "second"), "weight": 3.0, "neighbors": None},
    ]
    made = config(folder, corpora=mixed)
    held = held_out.hold_out(made.open_parts(), 0)
    records = np.array([record for record, *_ in sequences_of(made, held, 40)])
    assert 0.65 < (records >= COUNT).mean() < 0.85
    assert made.layout(held.parts).max_docs == 2
