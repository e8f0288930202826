"""VQA accuracy: agreement with ten people's answers, after cleaning (visualqa.org/evaluation).

Behaves as the official evaluation of version 2 in all its details, among them that answers are cleaned only
where people disagree, that a comma between digits anywhere makes all punctuation vanish rather than become
spaces, and that a period stays only before a digit.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = tuple(r';/[]"{}()=+\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # The official code removes no more.
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {"none": "0"} | {
    name: str(number)
    for number, name in enumerate("zero one two three four five six seven eight nine ten".split())
}
# Contractions of which one apostrophe may be missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""


def _without_an_apostrophe() -> dict[str, str]:
    known = {
        whole[: match.start()] + whole[match.end() :]: whole
        for whole in _CONTRACTIONS.split()
        for match in re.finditer("'", whole)
    }
    return known | {"somebody'd": "somebodyd"}  # as in the official table


_WHOLE = _without_an_apostrophe()


def clean(answer: str) -> str:
    """An answer as it is compared: lower case, no punctuation or articles, numbers up to ten as digits."""
    is_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        is_apart = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_apart or is_number else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """The mean over people of min(n / 3, 1), n of the others having given this answer; 0..1.

    Args:
        answer: what the model says.
        people: the answers of people, ten in the published data; at least one.

    Raises:
        ValueError: there is no answer to compare with.
    """
    if not people:
        raise ValueError("give the answers of people to compare with")
    given, said = [_strip(each) for each in people], _strip(answer)
    if len(set(given)) > 1:
        given, said = [clean(each) for each in given], clean(said)
    equal = given.count(said)
    # Of the others, those who gave it themselves see one less.
    return (equal * min(1.0, (equal - 1) / 3) + (len(given) - equal) * min(1.0, equal / 3)) / len(
        given
    )


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
