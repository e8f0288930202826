"""One rule for the text of captions and queries, so that a caption is found whatever file it comes from."""

import unicodedata


def clean(text: str) -> str:
    """The text as it is stored, embedded and searched for.

    In Unicode's composed form (NFC), without byte-order marks, without white space at the ends; a line end
    becomes a space, with the white space around it. Case is kept.
    """
    lines = (line.strip() for line in text.replace("\ufeff", "").splitlines())
    return unicodedata.normalize("NFC", " ".join(line for line in lines if line))
