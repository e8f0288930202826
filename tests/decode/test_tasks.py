"""How a model is asked: exact counts, untouched context, documents by hand, the best of several."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.data import sequences, vocabulary
from rag_mm.decode import sampler, tasks
from rag_mm.nn import decoder, param_trees

WORDS = vocabulary.train_vocabulary([], 256, 16, 4)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=3, num_codes=6, max_spans=2)
# A vocabulary rounded up, as the stage does: the last ids mean nothing and must never be drawn.
CONFIG = decoder.DecoderConfig(
    vocab_size=WORDS.size + 8,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_seq_len=LAYOUT.num_positions,
)
GREEDY = sampler.Sampling(temperature=0.0)
WARM = sampler.Sampling(temperature=1.0)


def make_example(seed):
    rng = np.random.default_rng(seed)
    text = rng.integers(256, size=rng.integers(1, 4)).tolist()
    return sequences.Example(text, rng.integers(16, size=6).astype(np.int32))


MAINS = [make_example(seed) for seed in range(3)]
DOCS = [make_example(seed) for seed in range(10, 13)]
# None, one and two documents before the three prompts of a batch.
COUNTS = [DOCS[:0], DOCS[:1], DOCS[1:3]]


@pytest.fixture(scope="module")
def generator():
    make_model = lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
    return tasks.Generator(graphdef, jax.tree.map(draw, abstract), WORDS, LAYOUT)


@pytest.fixture(scope="module")
def full_log_probs(generator):
    """Log-probabilities of every next token along one whole row."""

    @jax.jit
    def forward(tokens, positions):
        model = nnx.merge(generator.graphdef, generator.params)
        hidden = model(tokens[None], positions[None], jnp.ones_like(tokens)[None])
        return jax.nn.log_softmax(model.logits(hidden)[0])

    return lambda tokens, positions: np.asarray(forward(tokens, positions))


def draw(generator, docs=COUNTS, **options):
    texts = [main.text for main in MAINS]
    seeds = np.arange(3, dtype=np.uint32)
    return tasks.generate_codes(generator, texts, docs, seeds, WARM, **options)


def test_a_caption_becomes_exactly_the_codes_of_one_picture(generator):
    codes, log_probs = draw(generator)
    assert codes.shape == (3, LAYOUT.num_codes) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < WORDS.codebook_size
    assert log_probs.shape == (3,) and (log_probs < 0).all()


def test_codes_are_drawn_where_training_rows_have_them(generator, full_log_probs):
    """A picture's log-probability is what the training row of that picture says."""
    codes, log_probs = draw(generator)
    for i, (main, docs) in enumerate(zip(MAINS, COUNTS, strict=True)):
        drawn = sequences.Example(main.text, codes[i])
        row = sequences.make_row(LAYOUT, WORDS, drawn, docs)
        start, end = sequences.find_segments(LAYOUT, drawn, docs)[-1]
        found = full_log_probs(row["tokens"], row["positions"])[start - 1 : end - 1]
        found = found[:, WORDS.code_offset : WORDS.size]
        found = found - np.log(np.exp(found).sum(1, keepdims=True))  # among codes alone
        assert log_probs[i] == pytest.approx(found[np.arange(6), codes[i]].sum(), abs=1e-4)


def test_batches_of_any_size_and_unused_documents_change_nothing(generator):
    whole = draw(generator)
    pieces = draw(generator, batch_size=2)
    np.testing.assert_array_equal(pieces.codes, whole.codes)
    np.testing.assert_allclose(pieces.log_probs, whole.log_probs, atol=1e-4)
    again = draw(generator, docs=[COUNTS[0], DOCS[2:], COUNTS[2]])
    np.testing.assert_array_equal(again.codes[[0, 2]], whole.codes[[0, 2]])
    assert (again.codes[1] != whole.codes[1]).any() or again.log_probs[1] != whole.log_probs[1]


def test_a_picture_becomes_a_caption_that_ends(generator, full_log_probs):
    codes = np.stack([main.codes for main in MAINS])
    seeds = np.zeros(3, np.uint32)
    captions, log_probs = tasks.generate_captions(generator, codes, COUNTS, seeds, GREEDY)
    assert len(captions) == 3 and log_probs.shape == (3,)
    for i, docs in enumerate(COUNTS):
        prompt = sequences.image_to_caption_prompt(LAYOUT, WORDS, codes[i], docs)
        tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
        written, total = [], 0.0
        for step in range(LAYOUT.max_text_len + 1):
            whole = np.zeros((2, LAYOUT.length + 4), np.int32)
            whole[0, : len(tokens)], whole[1, : len(tokens)] = tokens, positions
            logits = full_log_probs(*whole)[len(tokens) - 1]
            allowed = np.append(logits[: WORDS.text_size], logits[WORDS.eoss])
            best = int(allowed.argmax())
            total += allowed[best] - np.log(np.exp(allowed).sum())
            if best == WORDS.text_size:
                break
            written.append(best)
            tokens.append(best)
            positions.append(prompt.next_position + step)
        # One that does not end by itself is cut to what a training row has room for.
        assert captions[i] == WORDS.decode_text(written[: LAYOUT.max_text_len])
        assert log_probs[i] == pytest.approx(total, abs=1e-4)


def test_a_caption_stops_at_the_end_of_its_span(generator):
    """A model whose hidden states are constant says one thing for ever, or ends at once."""
    params = jax.tree.map(jnp.zeros_like, generator.params)
    params["embedding"]["table"] += 1.0
    params["norm"]["scale"] += 1.0
    codes, seeds = np.stack([main.codes for main in MAINS]), np.zeros(3, np.uint32)
    for token, letters in ((WORDS.eoss, set()), (WORDS.encode_text("a")[0], {"a"})):
        head = {"table": params["head"]["table"].at[token].set(9.0)}
        model = tasks.Generator(generator.graphdef, params | {"head": head}, WORDS, LAYOUT)
        captions, _ = tasks.generate_captions(model, codes, COUNTS, seeds, GREEDY)
        assert [set(caption) for caption in captions] == [letters] * 3


def test_infill_keeps_what_is_outside_of_the_hole(generator):
    seeds = np.arange(3, dtype=np.uint32)
    before = [main.codes.copy() for main in MAINS]
    found = tasks.infill_codes(generator, MAINS, (2, 5), COUNTS, seeds, GREEDY)
    assert found.codes.shape == (3, 6)
    assert found.codes.min() >= 0 and found.codes.max() < WORDS.codebook_size
    for codes, main in zip(found.codes, before, strict=True):
        np.testing.assert_array_equal(codes[[0, 1, 5]], main[[0, 1, 5]])
    assert all((b == main.codes).all() for b, main in zip(before, MAINS, strict=True))
    # What stood in the hole does not matter.
    other = [sequences.Example(m.text, np.r_[m.codes[:2], 0, 0, 0, m.codes[5:]]) for m in MAINS]
    again = tasks.infill_codes(generator, other, (2, 5), COUNTS, seeds, GREEDY)
    np.testing.assert_array_equal(again.codes, found.codes)


def test_holes_are_filled_as_training_rows_move_spans(generator, full_log_probs):
    """Greedy codes for [2, 5) are the best ones of the row that masks them, both sides in sight."""
    seeds = np.zeros(3, np.uint32)
    codes, log_probs = tasks.infill_codes(generator, MAINS, (2, 5), COUNTS, seeds, GREEDY)
    for i, (main, docs) in enumerate(zip(MAINS, COUNTS, strict=True)):
        filled = sequences.Example(main.text, codes[i])
        span = sequences.find_segments(LAYOUT, filled, docs)[-1:, :1] + np.array([[2, 5]])
        row = sequences.make_row(LAYOUT, WORDS, filled, docs, span)
        end = int(row["segment_ids"].sum()) - 1  # of the moved codes, which eoss follows
        assert row["tokens"][end] == WORDS.eoss
        found = full_log_probs(row["tokens"], row["positions"])[end - 4 : end - 1]
        found = found[:, WORDS.code_offset : WORDS.size]
        assert found.argmax(1).tolist() == codes[i, 2:5].tolist()
        found = found - np.log(np.exp(found).sum(1, keepdims=True))
        assert log_probs[i] == pytest.approx(found.max(1).sum(), abs=1e-4)


@pytest.mark.parametrize("hole", [(3, 3), (4, 2), (-1, 2), (0, 7)])
def test_holes_outside_of_the_picture_are_refused(generator, hole):
    with pytest.raises(UserError, match="hole"):
        tasks.infill_codes(generator, MAINS, hole, COUNTS, np.zeros(3, np.uint32), WARM)


def test_more_documents_than_the_layout_has_room_for_are_refused(generator):
    three = [DOCS, [], []]
    seeds = np.zeros(3, np.uint32)
    codes = np.stack([main.codes for main in MAINS])
    for ask in (
        lambda: draw(generator, docs=three),
        lambda: tasks.generate_captions(generator, codes, three, seeds, WARM),
        lambda: tasks.infill_codes(generator, MAINS, (0, 2), three, seeds, WARM),
    ):
        with pytest.raises(UserError, match="at most 2"):
            ask()


def test_best_of_keeps_the_candidate_that_scores_best_row_by_row():
    seen = []

    def draw(seeds):
        seen.append(seeds)
        return tasks.SampledCodes(np.full((2, 4), len(seen), np.int32), np.zeros(2))

    liking = np.array([[0.1, 0.9], [0.7, 0.2], [0.3, 0.8]])  # candidates x rows
    score = lambda codes: liking[codes[:, 0] - 1, [0, 1]]
    best = tasks.best_of(draw, score, num_rows=2, num_candidates=3, seed=7)
    assert best[:, 0].tolist() == [2, 1]
    assert len(np.unique(np.concatenate(seen))) == 6
    np.testing.assert_array_equal(seen[0], tasks.row_seeds(7, 2))


def test_best_of_one_scores_nothing():
    draw = lambda seeds: tasks.SampledCodes(seeds[:, None].astype(np.int32), np.zeros(len(seeds)))
    best = tasks.best_of(draw, lambda codes: 1 / 0, num_rows=3, num_candidates=1, seed=0)
    assert best.shape == (3, 1)


def test_row_seeds_do_not_depend_on_how_many_rows_there_are():
    many = tasks.row_seeds(3, 100)
    assert many.dtype == np.uint32 and len(np.unique(many)) == 100
    np.testing.assert_array_equal(tasks.row_seeds(3, 7), many[:7])
    for left, right in itertools.combinations(
        [many, tasks.row_seeds(4, 100), tasks.row_seeds(3, 100, 1)], 2
    ):
        assert not np.intersect1d(left, right).size
