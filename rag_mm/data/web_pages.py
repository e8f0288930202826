"""Web pages with images between their sentences, in the form of MMC4 (arXiv 2304.06939).

    {"id": "p1", "text_list": ["One.", "Two."], "url": "..",
     "image_info": [{"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.34}]}

Images that do not fit their sentence are left out (Emu: a similarity below 0.32).
"""

from typing import Any

from rag_mm.core import caption_text
from rag_mm.data import captions

KEY = "text_list"
MIN_SIMILARITY = 0.32  # Cosine of the CLIP embeddings of an image and its sentence.


def to_segments(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The segments of a page, from an untrusted file: each image stands before its sentence.

    Successive sentences without an image between them are one text.

    Raises:
        BadRecord: a field is missing or of another type; the message lacks the subject of its sentence.
    """
    sentences, images = fields[KEY], fields.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
        raise captions.BadRecord("bad-segment", "has a text_list that is no list of texts.")
    if not isinstance(images, list) or not all(_is_image(each, len(sentences)) for each in images):
        raise captions.BadRecord(
            "bad-segment",
            'has an image_info that is not [{"image_name": "FILE", "matched_text_index": 0, '
            '"matched_sim": 0.34}, ..] with an index into text_list.',
        )
    kept = [each for each in images if each["matched_sim"] >= MIN_SIMILARITY]
    segments: list[dict[str, str]] = []
    for i, sentence in enumerate(sentences):
        segments += [
            {"image": each["image_name"]} for each in kept if each["matched_text_index"] == i
        ]
        text = caption_text.clean(sentence)
        if text and segments and "text" in segments[-1]:
            segments[-1] = {"text": f"{segments[-1]['text']} {text}"}
        elif text:
            segments.append({"text": text})
    return segments


def _is_image(value: Any, num_sentences: int) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("image_name"), str):
        return False
    at, similarity = value.get("matched_text_index"), value.get("matched_sim")
    is_number = isinstance(similarity, int | float) and not isinstance(similarity, bool)
    return type(at) is int and 0 <= at < num_sentences and is_number
