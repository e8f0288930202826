"""Instructions as tokens: wordings, answers in their place, sequences and the prompts that begin them."""

import string

import numpy as np
import pytest

from rag_mm.data import instruction_items, instruction_templates, sequences, vocabulary
from rag_mm.data.instruction_items import CodedItem, Template
from rag_mm.data.token_documents import pair

WORDS = ["move the apple to the top left on a red background what color is it edit with"] * 20
V = vocabulary.train_vocabulary(WORDS, 300, 64, 8)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=40, num_codes=4, max_spans=2)
CODES = np.arange(4, dtype=np.int32)
EDIT = CodedItem("move", {"name": "apple", "place": "top left"}, CODES + 8, (CODES,))
ASK = CodedItem("what", {"question": "what is it?", "answer": "apple"}, CODES + 8)


def test_words_are_tokenized_as_in_running_text():
    fields = {"name": "apple", "place": "top left"}
    text = "move the {name:cut} to the {place}"
    assert instruction_items.fill(text, fields) == "move the apple to the top left"
    ids, answer, num_cut = instruction_items.word(V, text, fields, 40)
    assert ids == V.encode_text("move the apple to the top left")
    assert answer is None and num_cut == 0


def test_an_empty_field_leaves_no_space():
    assert instruction_items.fill("{a} {b}", {"a": "", "b": "red"}) == "red"
    assert instruction_items.fill("{b} {a}", {"a": "", "b": "red"}) == "red"


def test_marked_fields_are_cut_first_and_the_answer_last():
    question, answer = "what is the color of it?", "on a red background"
    fields = {"question": question, "answer": answer, "place": "top left"}
    text = "at the {place}: {question:cut} {answer:cut}"
    whole = instruction_items.word(V, text, fields, 99)
    start, end = whole.answer
    assert whole.ids[start:end] == V.encode_text("on a red background")
    for left_out in range(1, len(V.encode_text(question)) - 1):
        cut = instruction_items.word(V, text, fields, len(whole.ids) - left_out)
        assert len(cut.ids) == len(whole.ids) - left_out and cut.num_cut == left_out
        assert cut.ids[slice(*cut.answer)] == whole.ids[start:end]
        assert V.decode_text(cut.ids).startswith("at the top left: w")
    with pytest.raises(ValueError, match="does not fit 2"):
        instruction_items.word(V, text, fields, 2)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="'place'"):
        instruction_items.word(V, "{name} at {place}", {"name": "a"}, 9)


def test_an_edit_is_a_given_document_and_a_main_one():
    template = Template("move the {name:cut} to the {place}", ("edit",))
    document = pair(V.encode_text("apple"), CODES + 3)
    made = instruction_items.instruct(V, template, EDIT, 40, [document])
    assert made.docs[0] is document and made.answer is None
    assert V.decode_text(made.docs[1].text) == "edit" and (made.docs[1].codes == CODES).all()
    plain = sequences.lay_out(LAYOUT, V, made.main, made.docs)
    prompt = instruction_items.prompt(LAYOUT, V, made)
    n = len(prompt.tokens)
    assert (plain.tokens[:n] == prompt.tokens).all() and plain.tokens[n] == V.code_offset + 8
    assert (plain.positions[:n] == prompt.positions).all()
    assert prompt.next_position == plain.positions[n]
    with pytest.raises(ValueError, match="shorter"):
        instruction_items.instruct(V, Template("edit", ("edit", "with")), EDIT, 40)


@pytest.mark.parametrize("text", ["{question:cut} {answer:cut}", "{answer:cut}"])
def test_an_answer_is_filled_in_before_its_picture(text):
    """The prompt is the beginning of the masked training sequence, up to where the answer begins."""
    made = instruction_items.instruct(V, Template(text), ASK, 40)
    plain = sequences.lay_out(LAYOUT, V, made.main, made.docs)
    span = instruction_items.answer_span(plain, made)
    ids = V.encode_text("apple")  # without a space before it, as a document begins
    assert plain.tokens[slice(*span[0])].tolist() == ids
    masked = sequences.mask(LAYOUT, V, plain, span)
    prompt = instruction_items.prompt(LAYOUT, V, made)
    n = len(prompt.tokens)
    assert (masked.tokens[:n] == prompt.tokens).all()
    assert (masked.positions[:n] == prompt.positions).all()
    assert masked.tokens[n:].tolist() == [*ids, V.eoss]
    assert prompt.next_position == masked.positions[n]
    with pytest.raises(ValueError, match="goes on after the answer"):
        instruction_items.instruct(V, Template("{answer} is it"), ASK, 40)
    with pytest.raises(ValueError, match="picture"):
        instruction_items.answer_span(plain, made._replace(answer=None))


def test_the_whole_text_is_a_span_unless_it_is_empty():
    made = instruction_items.instruct(V, Template("{name}", ("edit",)), EDIT, 40)
    plain = sequences.lay_out(LAYOUT, V, made.main, made.docs)
    (span,) = instruction_items.text_span(plain, made)
    assert plain.tokens[slice(*span)].tolist() == V.encode_text("apple")
    made = made._replace(main=made.main.with_text([]))
    plain = sequences.lay_out(LAYOUT, V, made.main, made.docs)
    assert instruction_items.text_span(plain, made).shape == (0, 2)


@pytest.mark.parametrize("task", instruction_templates.TEMPLATES)
def test_templates_of_a_task_take_the_same_and_differ(task):
    templates = instruction_templates.TEMPLATES[task]
    wants_text = {"{answer" in template.text for template in templates}
    assert len(wants_text) == 1 and len({len(template.given) for template in templates}) == 1
    assert len(set(templates)) == len(templates)
    assert len(templates) > 1 or task == "text_to_image"
    for template in templates:
        for text in (template.text, *template.given):
            marks = {mark for _, _, mark, _ in string.Formatter().parse(text) if mark}
            assert marks <= {instruction_items.CUT}
