"""Answers cut to what is compared, as Emu's evaluation does before VQA accuracy is computed."""

_ENDS = ("\n", ". ", ", ", '"')
_STARTS = ("it is ", "it's ", "a ", "an ", "the ")


def clean(text: str) -> str:
    """Up to the first line's, sentence's or clause's end, in lower case, without leading filler words."""
    for end in _ENDS:
        text = text.strip().partition(end)[0]
    text = text.strip().lower().removesuffix(".")
    while start := next((each for each in _STARTS if text.startswith(each)), ""):
        text = text.removeprefix(start)
    return text.strip()
