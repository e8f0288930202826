"""Questions to an Emu that was tuned on instructions, and dialogues with it (`EmuSession.ask` and `chat`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_mm.api.loaded_run import GeneratedAnswers
from rag_mm.core import caption_text, image_files
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data.interleaved import Mark
from rag_mm.stages.emu import tuned_emu

if TYPE_CHECKING:
    from rag_mm.api.emu_session import EmuSession

Said = list[str | image_files.AnyImage]
NUM_TOKENS = 24
_ROLES = ("system", *(mark.value for mark in (Mark.USER, Mark.ASSISTANT)))


def ask(
    session: "EmuSession",
    images: Sequence[image_files.AnyImage],
    question: str,
    *,
    docs: int = 1,
    documents: Sequence[Document] = (),
    num: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_tokens: int = NUM_TOKENS,
) -> GeneratedAnswers:
    """See `EmuSession.ask`."""
    tuned, question = _tuned(session), caption_text.clean(question)
    if not question:
        raise UserError("The question is empty; give one.")
    if not images:
        raise UserError("There is no image to ask about; give at least one.")
    pixels = [image_files.to_pixels(each) for each in images]
    retrieved, chosen = session.find_documents({"image": pixels[0]}, docs, documents)
    said: Said = [*pixels, question]
    prompt: list[Any] = [*chosen, *tuned.prompt([(said, None)])]
    asked = dataclasses.replace(session, emu=tuned.emu)
    texts = asked.write(prompt, num, seed, temperature, top_p, num_tokens, images_first=True)
    parts, vectors = asked.read(prompt, images_first=True)
    means = -tuned.emu.text_nll([parts] * num, [(text,) for text in texts], vectors)
    order = np.argsort(-means, kind="stable")
    return GeneratedAnswers([texts[i] for i in order], means[order].tolist(), retrieved)


def chat(
    session: "EmuSession",
    messages: Sequence[Mapping[str, Any]],
    *,
    docs: int = 0,
    documents: Sequence[Document] = (),
    seed: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_tokens: int = NUM_TOKENS,
) -> str:
    """See `EmuSession.chat`."""
    tuned = _tuned(session)
    system, turns = _turns(messages)
    images = [part for said, _ in turns for part in said if not isinstance(part, str)]
    chosen: list[Document] = []
    if docs or documents:
        if not images:
            raise UserError("A dialogue without an image retrieves nothing; give docs=0.")
        query = {"image": image_files.to_pixels(images[0])}
        chosen = session.find_documents(query, docs, documents)[1]
    asked = dataclasses.replace(session, emu=tuned.emu)
    spoken = tuned if system is None else dataclasses.replace(tuned, system=system)
    while True:
        prompt: list[Any] = [*chosen, *spoken.prompt(turns)]
        parts, _ = asked.read(prompt, images_first=True)
        is_short = (
            tuned.emu.maker.length(parts) + num_tokens <= tuned.emu.config.decoder.max_seq_len
        )
        if is_short or len(turns) == 1:
            return asked.write(prompt, 1, seed, temperature, top_p, num_tokens, images_first=True)[
                0
            ]
        # The first turn is forgotten, but not its images.
        kept = [part for part in turns[0][0] if not isinstance(part, str)]
        turns = [([*kept, *turns[1][0]], turns[1][1]), *turns[2:]]


def _tuned(session: "EmuSession") -> tuned_emu.TunedEmu:
    if session.tuned is None:
        raise UserError(
            "This Emu was not tuned on instructions; train the stage emu_sft, as configs/emu.py:sft does."
        )
    return session.tuned


def _turns(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[str | None, list[tuple[Said, str | None]]]:
    """The system's text, or None, and what is said and answered, turn by turn, the last without an answer."""
    checked = [_message(number, message) for number, message in enumerate(messages, start=1)]
    system = None
    if checked and checked[0][0] == _ROLES[0]:
        system, checked = " ".join(map(str, checked[0][1])), checked[1:]
    wanted = [Mark.USER.value if i % 2 == 0 else Mark.ASSISTANT.value for i in range(len(checked))]
    if len(checked) % 2 == 0 or [role for role, _ in checked] != wanted:
        raise UserError(
            "The messages do not take turns; give user and assistant in turn, a user's first and last, after "
            "at most one of the system."
        )
    answers = [" ".join(map(str, content)) for _, content in checked[1::2]]
    said = [content for _, content in checked[::2]]
    return system, list(zip(said, [*answers, None], strict=True))


def _message(number: int, message: Mapping[str, Any]) -> tuple[str, Said]:
    """Role and content of a message; only a user's may hold images."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"Message {number} has the role {role!r}; give one of {', '.join(_ROLES)}.")
    parts: list[Any] = list(content) if isinstance(content, list | tuple) else [content]
    said = [caption_text.clean(part) if isinstance(part, str) else part for part in parts]
    if not said or any(part is None or (isinstance(part, str) and not part) for part in said):
        raise UserError(f"Message {number} is empty; give a text, an image or a list of them.")
    if role != Mark.USER.value and not all(isinstance(part, str) for part in said):
        raise UserError(f"Message {number} of the {role} holds an image; give images to the user.")
    return role, said
