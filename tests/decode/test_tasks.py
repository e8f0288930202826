"""Inference tasks: exact lengths, preserved context, given documents, and what steers an image."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.decode import decode_batch, guidance, sampler, tasks
from rag_mm.decode.contrastive_decoding import Contrast
from rag_mm.decode.guidance import Guidance
from rag_mm.nn import decoder, param_trees

VOCAB = vocabulary.train_vocabulary([], 256, 16, 4)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=3, num_codes=6, max_spans=2)
# The vocabulary size is rounded up, as in the stage: the last ids are unused and must never be sampled.
CONFIG = decoder.DecoderConfig(
    vocab_size=VOCAB.size + 8,
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
    return token_documents.pair(text, rng.integers(16, size=6).astype(np.int32))


MAINS = [make_example(seed) for seed in range(3)]
DOCS = [make_example(seed) for seed in range(10, 13)]
# Zero, one and two documents for the three prompts of a batch.
DOCS_BY_PROMPT = [DOCS[:0], DOCS[:1], DOCS[1:3]]


@pytest.fixture(scope="module")
def generator():
    make_model = lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)
    random = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
    return tasks.Generator(
        graphdef,
        jax.tree.map(random, abstract),
        VOCAB,
        LAYOUT,
        null_prompts=frozenset(guidance.NULLS),
    )


@pytest.fixture(scope="module")
def full_log_probs(generator):
    """Log-probabilities of every next token of one sequence."""

    @jax.jit
    def forward(tokens, positions):
        model = nnx.merge(generator.graphdef, generator.params)
        hidden = model(tokens[None], positions[None], jnp.ones_like(tokens)[None])
        return jax.nn.log_softmax(model.logits(hidden)[0])

    return lambda tokens, positions: np.asarray(forward(tokens, positions))


def generate(generator, docs=DOCS_BY_PROMPT, sampling=WARM, **options):
    texts = [main.text for main in MAINS]
    seeds = np.arange(3, dtype=np.uint32)
    return tasks.generate_codes(generator, texts, docs, seeds, sampling, **options)


def test_a_text_gives_exactly_the_codes_of_one_image(generator):
    codes, log_probs, _ = generate(generator)
    assert codes.shape == (3, LAYOUT.num_codes) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < VOCAB.codebook_size
    assert log_probs.shape == (3,) and (log_probs < 0).all()


def test_an_image_has_the_log_probability_of_its_training_sequence(generator, full_log_probs):
    codes, log_probs, _ = generate(generator)
    for i, (main, docs) in enumerate(zip(MAINS, DOCS_BY_PROMPT, strict=True)):
        example = token_documents.pair(main.text, codes[i])
        row = sequences.make_row(LAYOUT, VOCAB, example, docs)
        start, end = sequences.lay_out(LAYOUT, VOCAB, example, docs).segments[-1]
        scores = full_log_probs(row["tokens"], row["positions"])[start - 1 : end - 1]
        scores = scores[:, VOCAB.code_offset : VOCAB.size]
        scores = scores - np.log(np.exp(scores).sum(1, keepdims=True))  # among the codes only
        assert log_probs[i] == pytest.approx(scores[np.arange(6), codes[i]].sum(), abs=1e-4)


def test_an_image_depends_on_its_own_documents_and_not_on_the_batch(generator):
    whole = generate(generator)
    batches = generate(generator, batch_size=2)
    np.testing.assert_array_equal(batches.codes, whole.codes)
    np.testing.assert_allclose(batches.log_probs, whole.log_probs, atol=1e-4)
    again = generate(generator, docs=[DOCS_BY_PROMPT[0], DOCS[2:], DOCS_BY_PROMPT[2]])
    np.testing.assert_array_equal(again.codes[[0, 2]], whole.codes[[0, 2]])
    assert (again.codes[1] != whole.codes[1]).any() or again.log_probs[1] != whole.log_probs[1]


@pytest.mark.parametrize("null", list(guidance.NULLS))
def test_a_weight_of_1_samples_the_same_codes_as_no_guidance(generator, null):
    plain = generate(generator)
    guided = generate(generator, steering=Guidance(1.0, null))
    np.testing.assert_array_equal(guided.codes, plain.codes)
    np.testing.assert_allclose(guided.log_probs, plain.log_probs, atol=1e-4)
    other = generate(generator, steering=Guidance(4.0, null))
    assert (other.codes != plain.codes).any()


def test_a_weight_of_0_samples_the_codes_of_the_null_prompt(generator):
    """That of the caption alone is the plain prompt without documents."""
    alone = generate(generator, docs=[[], [], []])
    guided = generate(generator, steering=Guidance(0.0, guidance.CAPTION))
    np.testing.assert_array_equal(guided.codes, alone.codes)


@pytest.mark.parametrize("null", [guidance.DOCUMENTS, guidance.BARE])
def test_a_null_prompt_is_a_training_sequence_whose_caption_is_masked(
    generator, full_log_probs, null
):
    """Greedy codes are the likeliest ones of that sequence; a caption does not change them."""
    options = dict(sampling=GREEDY, steering=Guidance(0.0, null))
    codes = generate(generator, **options).codes
    for i, (main, docs) in enumerate(zip(MAINS, DOCS_BY_PROMPT, strict=True)):
        docs = docs if null == guidance.DOCUMENTS else []
        example = token_documents.pair(main.text, codes[i])
        caption = sequences.lay_out(LAYOUT, VOCAB, example, docs).main[:1]
        row = sequences.make_row(LAYOUT, VOCAB, example, docs, caption)
        start = row["tokens"].tolist().index(VOCAB.sentinel(0)) + 2
        scores = full_log_probs(row["tokens"], row["positions"])[start - 1 : start + 5]
        scores = scores[:, VOCAB.code_offset : VOCAB.size]
        assert scores.argmax(1).tolist() == codes[i].tolist()


def test_a_contrast_with_the_likeliest_token_alone_is_greedy(generator):
    greedy = generate(generator, sampling=GREEDY)
    contrast = Contrast(k=1, alpha=1.0, null=guidance.DOCUMENTS)
    np.testing.assert_array_equal(generate(generator, steering=contrast).codes, greedy.codes)


def test_other_numbers_of_guidance_and_contrast_compile_nothing(generator):
    generate(generator, steering=Guidance(2.0))
    generate(generator, steering=Contrast(k=2, alpha=0.5))
    compiled = sampler._sample._cache_size()
    generate(generator, steering=Guidance(0.5, guidance.DOCUMENTS, plausible=0.2))
    generate(generator, steering=Contrast(3, 0.1, 0.5, 0.2, guidance.CAPTION))
    assert sampler._sample._cache_size() == compiled


def test_two_conditions_that_both_weigh_1_are_plain(generator):
    guided = generate(generator, steering=Guidance(1.0, documents_weight=1.0))
    np.testing.assert_array_equal(guided.codes, generate(generator).codes)


def test_a_model_that_never_saw_a_null_prompt_is_not_steered_by_it(generator):
    captions_only = dataclasses.replace(generator, null_prompts=frozenset({guidance.CAPTION}))
    generate(captions_only, steering=Guidance(2.0, guidance.CAPTION))
    for steering in (Guidance(1.0), Contrast(), Guidance(2.0, documents_weight=1.0)):
        with pytest.raises(UserError, match="never saw the null prompt"):
            generate(captions_only, steering=steering)


def test_without_documents_the_null_prompt_documents_is_the_bare_one(generator):
    """A model must know `bare` where a prompt lacks documents, and `documents` where one has some."""
    steering = Guidance(2.0, guidance.DOCUMENTS)
    knows = lambda *nulls: dataclasses.replace(generator, null_prompts=frozenset(nulls))
    none, some = [[]] * 3, [DOCS[:1]] * 3
    found = generate(knows(guidance.BARE), docs=none, steering=steering)
    bare = generate(generator, docs=none, steering=Guidance(2.0, guidance.BARE))
    np.testing.assert_array_equal(found.codes, bare.codes)
    for known, docs, missing in (
        (guidance.DOCUMENTS, none, guidance.BARE),
        (guidance.DOCUMENTS, DOCS_BY_PROMPT, guidance.BARE),
        (guidance.BARE, some, guidance.DOCUMENTS),
    ):
        with pytest.raises(UserError, match=f"never saw the null prompt '{missing}'"):
            generate(knows(known), docs=docs, steering=steering)


@pytest.mark.parametrize("steering", [None, Guidance(2.0, plausible=0.1)])
def test_jacobi_decodes_the_greedy_codes_in_no_more_passes(generator, steering):
    one, other = (
        generate(generator, sampling=GREEDY, steering=steering, decoding=decoding)
        for decoding in (tasks.SEQUENTIAL, tasks.JACOBI)
    )
    np.testing.assert_array_equal(other.codes, one.codes)
    np.testing.assert_allclose(other.log_probs, one.log_probs, atol=1e-4)
    assert one.passes.tolist() == [LAYOUT.num_codes - 1] * 3
    assert (other.passes >= 1).all() and (other.passes <= one.passes).all()
    with pytest.raises(UserError, match="decoding is 'parallel'; give one of sequential, jacobi"):
        generate(generator, decoding="parallel")


def test_captions_are_the_greedy_continuation_of_their_prompt(generator, full_log_probs):
    codes = np.stack([main.codes for main in MAINS])
    seeds = np.zeros(3, np.uint32)
    captions, means = tasks.generate_captions(generator, codes, DOCS_BY_PROMPT, seeds, GREEDY)
    assert len(captions) == 3 and means.shape == (3,)
    for i, docs in enumerate(DOCS_BY_PROMPT):
        main = token_documents.pair([0], codes[i])
        prompt = sequences.fill_prompt(LAYOUT, VOCAB, main, 0, docs)
        tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
        caption, total = [], 0.0
        for step in range(LAYOUT.max_text_len + 1):
            whole = np.zeros((2, LAYOUT.length + 4), np.int32)
            whole[0, : len(tokens)], whole[1, : len(tokens)] = tokens, positions
            logits = full_log_probs(*whole)[len(tokens) - 1]
            allowed = np.append(logits[: VOCAB.text_size], logits[VOCAB.eoss])
            best = int(allowed.argmax())
            total += allowed[best] - np.log(np.exp(allowed).sum())
            if best == VOCAB.text_size:
                break
            caption.append(best)
            tokens.append(best)
            positions.append(prompt.next_position + step)
        # A caption that does not end is cut to the length that a training sequence has room for.
        assert captions[i] == VOCAB.decode_text(caption[: LAYOUT.max_text_len])
        assert means[i] == pytest.approx(total / (step + 1), abs=1e-4)


def test_a_mean_is_over_the_tokens_up_to_the_end(generator, monkeypatch):
    """The end counts, what follows it does not; a caption without an end has all its steps."""
    tokens = np.array([[9, VOCAB.eoss, VOCAB.eoss, VOCAB.eoss], [1, 2, 3, 4], [VOCAB.eoss] * 4])
    log_probs = np.array([[-3.0, -1.0, 0, 0], [-1.0, -2.0, -3.0, -4.0], [-5.0, 0, 0, 0]])
    drawn = sampler.SampledTokens(tokens.astype(np.int32), log_probs.astype(np.float32))
    monkeypatch.setattr(sampler, "sample", lambda *args, **options: drawn)
    codes, seeds = np.stack([main.codes for main in MAINS]), np.zeros(3, np.uint32)
    captions, means = tasks.generate_captions(generator, codes, DOCS_BY_PROMPT, seeds, GREEDY)
    assert captions == [VOCAB.decode_text([9]), VOCAB.decode_text([1, 2, 3]), ""]
    np.testing.assert_allclose(means, [-2.0, -2.5, -5.0])


def test_a_caption_stops_at_the_end_of_its_span(generator):
    """A model with constant hidden states repeats one token, or ends at once."""
    params = jax.tree.map(jnp.zeros_like, generator.params)
    params["embedding"]["table"] += 1.0
    params["norm"]["scale"] += 1.0
    codes, seeds = np.stack([main.codes for main in MAINS]), np.zeros(3, np.uint32)
    for token, letters in ((VOCAB.eoss, set()), (VOCAB.encode_text("a")[0], {"a"})):
        head = {"table": params["head"]["table"].at[token].set(9.0)}
        model = tasks.Generator(generator.graphdef, params | {"head": head}, VOCAB, LAYOUT)
        captions, _ = tasks.generate_captions(model, codes, DOCS_BY_PROMPT, seeds, GREEDY)
        assert [set(caption) for caption in captions] == [letters] * 3


def test_infilling_keeps_the_codes_outside_the_hole(generator):
    seeds = np.arange(3, dtype=np.uint32)
    before = [main.codes.copy() for main in MAINS]
    infilled = tasks.infill_codes(generator, MAINS, [(2, 5)], DOCS_BY_PROMPT, seeds, GREEDY)
    assert infilled.codes.shape == (3, 6)
    assert infilled.codes.min() >= 0 and infilled.codes.max() < VOCAB.codebook_size
    for codes, main in zip(infilled.codes, before, strict=True):
        np.testing.assert_array_equal(codes[[0, 1, 5]], main[[0, 1, 5]])
    assert all((b == main.codes).all() for b, main in zip(before, MAINS, strict=True))
    # Codes inside the hole are ignored.
    other = [token_documents.pair(m.text, np.r_[m.codes[:2], 0, 0, 0, m.codes[5:]]) for m in MAINS]
    again = tasks.infill_codes(generator, other, [(2, 5)], DOCS_BY_PROMPT, seeds, GREEDY)
    np.testing.assert_array_equal(again.codes, infilled.codes)


def test_holes_are_filled_as_in_a_masked_training_sequence(generator, full_log_probs):
    """Greedy codes of [2, 5) are the most likely ones of the training sequence that masks them."""
    seeds = np.zeros(3, np.uint32)
    codes, log_probs, _ = tasks.infill_codes(
        generator, MAINS, [(2, 5)], DOCS_BY_PROMPT, seeds, GREEDY
    )
    for i, (main, docs) in enumerate(zip(MAINS, DOCS_BY_PROMPT, strict=True)):
        filled = token_documents.pair(main.text, codes[i])
        segments = sequences.lay_out(LAYOUT, VOCAB, filled, docs).segments
        span = segments[-1:, :1] + np.array([[2, 5]])
        row = sequences.make_row(LAYOUT, VOCAB, filled, docs, span)
        end = int(row["segment_ids"].sum()) - 1  # of the moved codes, which eoss follows
        assert row["tokens"][end] == VOCAB.eoss
        scores = full_log_probs(row["tokens"], row["positions"])[end - 4 : end - 1]
        scores = scores[:, VOCAB.code_offset : VOCAB.size]
        assert scores.argmax(1).tolist() == codes[i, 2:5].tolist()
        scores = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        assert log_probs[i] == pytest.approx(scores.max(1).sum(), abs=1e-4)


def test_several_holes_are_filled_in_turn_each_knowing_those_before(generator, full_log_probs):
    """As in the training sequence that masks both; the second span follows the first, filled."""
    holes, seeds = [(0, 2), (4, 6)], np.zeros(3, np.uint32)
    codes, log_probs, _ = tasks.infill_codes(generator, MAINS, holes, DOCS_BY_PROMPT, seeds, GREEDY)
    for i, (main, docs) in enumerate(zip(MAINS, DOCS_BY_PROMPT, strict=True)):
        np.testing.assert_array_equal(codes[i, 2:4], main.codes[2:4])
        filled = token_documents.pair(main.text, codes[i])
        image = sequences.lay_out(LAYOUT, VOCAB, filled, docs).segments[-1, 0]
        row = sequences.make_row(LAYOUT, VOCAB, filled, docs, image + np.array(holes))
        end = int(row["segment_ids"].sum())
        scores = full_log_probs(row["tokens"], row["positions"])
        scores = scores[:, VOCAB.code_offset : VOCAB.size]
        scores = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        # S0 a a X S1 b b X
        at = np.array([end - 8, end - 7, end - 4, end - 3])
        assert scores[at].argmax(1).tolist() == codes[i, [0, 1, 4, 5]].tolist()
        assert log_probs[i] == pytest.approx(scores[at].max(1).sum(), abs=1e-4)


@pytest.mark.parametrize(
    "holes",
    [
        *([(3, 3)], [(4, 2)], [(-1, 2)], [(0, 7)], []),
        *([(2, 4), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_holes_outside_the_image_are_rejected(generator, holes):
    with pytest.raises(UserError, match="hole"):
        tasks.infill_codes(generator, MAINS, holes, DOCS_BY_PROMPT, np.zeros(3, np.uint32), WARM)


def test_more_documents_than_the_layout_has_room_for_are_rejected(generator):
    three = [DOCS, [], []]
    seeds = np.zeros(3, np.uint32)
    codes = np.stack([main.codes for main in MAINS])
    for task in (
        lambda: generate(generator, docs=three),
        lambda: tasks.generate_captions(generator, codes, three, seeds, WARM),
        lambda: tasks.infill_codes(generator, MAINS, [(0, 2)], three, seeds, WARM),
    ):
        with pytest.raises(UserError, match="at most 2"):
            task()


def test_seeds_do_not_depend_on_the_number_of_examples():
    many = tasks.make_seeds(3, 100)
    assert many.dtype == np.uint32 and len(np.unique(many)) == 100
    np.testing.assert_array_equal(tasks.make_seeds(3, 7), many[:7])
    for left, right in itertools.combinations(
        [many, tasks.make_seeds(4, 100), tasks.make_seeds(3, 100, 1)], 2
    ):
        assert not np.intersect1d(left, right).size


def test_without_a_batch_size_memory_decides(generator, monkeypatch):
    """Budgets for one image, and for all; a last batch is padded to a power of two."""
    sizes, real = [], sampler.sample

    def counted(params, prompts, seeds, *args, **options):
        sizes.append(len(seeds))
        return real(params, prompts, seeds, *args, **options)

    monkeypatch.setattr(sampler, "sample", counted)
    whole = generate(generator)
    monkeypatch.setattr(decode_batch, "CPU_BYTES", 1)
    one_by_one = generate(generator)
    assert sizes == [4, 1, 1, 1]
    np.testing.assert_array_equal(one_by_one.codes, whole.codes)


def test_streams_and_drafts_take_their_share_of_memory(generator, monkeypatch):
    asked = []

    def batch_size(config, params, prompt_len, num_steps, num_streams, num_drafts):
        asked.append((num_streams, num_drafts))
        return 4

    monkeypatch.setattr(decode_batch, "batch_size", batch_size)
    generate(generator)
    generate(generator, steering=Guidance(2.0))
    generate(generator, sampling=GREEDY, steering=Guidance(2.0, plausible=0.1), decoding="jacobi")
    assert asked == [(1, 1), (2, 1), (2, LAYOUT.num_codes)]
