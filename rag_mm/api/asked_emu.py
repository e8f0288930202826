"""An Emu as the evaluation suites ask it: one that was trained here, or an imported one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.api import emu_session, imported
from rag_mm.api.emu_session import EmuSession
from rag_mm.api.imported_emu import EmuPrompt, ImportedEmu
from rag_mm.core import batches, caption_text, image_files, image_slots
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import emu_prompts
from rag_mm.data.interleaved import Parts
from rag_mm.decode import image_rollout
from rag_mm.ops import losses
from rag_mm.stages.emu import saved_emu

STAGES = ("emu", emu_session.TUNED_STAGE)
IMPORTED = "imported"
# What is said, a picture first, and the answer; None where it is to be written.
Turn = tuple[list[Any], str | None]
_AT_ONCE = 16


class AskedEmu(Protocol):
    """An Emu.

    Attributes:
        stage: emu | emu_sft | imported.
        is_tuned: whether it was tuned on instructions.
        image_size: side of the pictures that it is given.
    """

    @property
    def stage(self) -> str: ...

    @property
    def is_tuned(self) -> bool: ...

    @property
    def image_size(self) -> int: ...

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Vectors float32 [B, E] of pictures uint8 [B, S, S, 3], compared by their inner products."""
        ...

    def prompt(self, turns: Sequence[Turn], stem: str, docs: int) -> Any:
        """What `search` and `score` continue: documents retrieved by the last picture, turns, and the stem
        of the answer.

        Raises:
            UserError: a text is too long, or there is no memory to retrieve from.
        """
        ...

    def search(self, prompt: Any, num_tokens: int, length_penalty: float, min_tokens: int) -> str:
        """The text that a beam search finds."""
        ...

    def score(self, prompt: Any, candidates: Sequence[str]) -> np.ndarray:
        """The log-probability of each candidate and its end, divided by the length of prompt and candidate:
        float64 [C].
        """
        ...


def load(workdir: epath.PathLike, stage: str | None) -> AskedEmu:
    """Loads a finished run of Emu, or an imported Emu.

    Args:
        workdir: the run.
        stage: emu, the model as it was pretrained; emu_sft, tuned on instructions; None for the latter where
            there is one. An imported one is what it is.

    Raises:
        UserError: there is no such run or stage.
    """
    if imported.is_imported(workdir):
        if stage is not None:
            raise UserError(f"stage={stage} is for runs trained here; ask {workdir} without it.")
        model = imported.load(workdir)
        if not isinstance(model, ImportedEmu):
            raise UserError(f"{workdir} is an imported model, but no Emu.")
        return _Imported(model)
    session = emu_session.load(workdir)
    if stage == STAGES[1] and session.tuned is None:
        raise UserError(f"{workdir} has no finished stage {STAGES[1]}; leave stage out.")
    return _Trained(session, session.tuned is not None and stage != STAGES[0])


@dataclasses.dataclass(frozen=True, eq=False)
class _Trained:
    """A run's model."""

    session: EmuSession
    is_tuned: bool

    @property
    def stage(self) -> str:
        return STAGES[self.is_tuned]

    @property
    def image_size(self) -> int:
        return self.session.encoder.image_size

    @functools.cached_property
    def _emu(self) -> saved_emu.LoadedEmu:
        tuned = self.session.tuned
        return tuned.emu if self.is_tuned and tuned is not None else self.session.emu

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        return self.session.encoder.encode_image(pictures)

    def prompt(self, turns: Sequence[Turn], stem: str, docs: int) -> tuple[Parts, np.ndarray]:
        documents: Sequence[Document] = ()
        if docs:
            query = {"image": _last_picture(turns)}
            documents = self.session.find_documents(query, docs, ())[1]
        tuned = self.session.tuned
        said = list(tuned.prompt(turns)) if self.is_tuned and tuned is not None else _in_turn(turns)
        said += [stem] if stem else []
        self._check_texts(said)
        session = dataclasses.replace(self.session, emu=self._emu)
        return session.read([*documents, *said], images_first=True)

    def search(
        self,
        prompt: tuple[Parts, np.ndarray],
        num_tokens: int,
        length_penalty: float,
        min_tokens: int,
    ) -> str:
        return self._emu.search(*prompt, num_tokens, emu_session.BEAMS, length_penalty, min_tokens)[
            0
        ]

    def score(self, prompt: tuple[Parts, np.ndarray], candidates: Sequence[str]) -> np.ndarray:
        parts, vectors = prompt
        answers: list[Parts] = [(text,) for text in candidates]
        nll = self._emu.text_nll([parts] * len(answers), answers, vectors)
        lengths = np.array([len(self._emu.maker.text(text)) + 1 for text in candidates])
        return -nll * lengths / (self._emu.maker.length(parts) - 1 + lengths)

    def _check_texts(self, prompt: Sequence[Any]) -> None:
        """Refuses a text that would be cut."""
        maker: saved_emu.RowMaker = self._emu.maker
        for part in prompt:
            if isinstance(part, str):
                count = len(maker.encode(caption_text.clean(part)))
                if count > maker.max_text_len:
                    raise UserError(
                        f"The text {part[:30]!r} has {count} tokens, but this model's texts at most "
                        f"{maker.max_text_len}; give prompts=plain, or train with a larger "
                        "emu.sequences.max_text_len."
                    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Imported:
    """An imported model; pictures are compared by the mean of their vectors."""

    emu: ImportedEmu
    stage = IMPORTED

    @property
    def is_tuned(self) -> bool:
        return self.emu.is_instruct

    @property
    def image_size(self) -> int:
        return self.emu.config.vision.image_size

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        means = self.emu.encode_image(list(pictures)).mean(1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def prompt(self, turns: Sequence[Turn], stem: str, docs: int) -> EmuPrompt:
        if docs:
            raise UserError("An imported Emu has no memory; give docs=0.")
        if not self.is_tuned:
            return self.emu.prompt([*_in_turn(turns), *([stem] if stem else [])])
        parts: list[Any] = [f"{emu_prompts.SYSTEM} [USER]: "]
        for number, (said, answer) in enumerate(turns):
            parts += [" [USER]: "] if number else []
            parts += [
                part if i == 0 or not isinstance(part, str) else f" {part}"
                for i, part in enumerate(said)
            ]
            given = stem if answer is None else f"{answer}</s>"
            parts.append(f" [ASSISTANT]: {given}".rstrip())
        return self.emu.prompt(parts)

    def search(
        self, prompt: EmuPrompt, num_tokens: int, length_penalty: float, min_tokens: int
    ) -> str:
        found = self.emu.complete(
            [prompt],
            num_tokens=num_tokens,
            num_beams=emu_session.BEAMS,
            length_penalty=length_penalty,
            min_tokens=min_tokens,
        )
        return _need_texts(found.texts)[0]

    def score(self, prompt: EmuPrompt, candidates: Sequence[str]) -> np.ndarray:
        own = [[*self.emu.text_ids(text), self.emu.config.ids.end] for text in candidates]
        sums = np.concatenate(
            [
                _log_probs(self.emu, prompt, [own[row] for row in rows])
                for rows in batches.split(len(own), _AT_ONCE)
            ]
        )[: len(own)]
        return sums / (len(prompt.row.tokens) - 1 + np.array([len(ids) for ids in own]))


def _log_probs(emu: ImportedEmu, prompt: EmuPrompt, own: Sequence[list[int]]) -> np.ndarray:
    """The log-probability of each candidate's ids after the prompt: float64 [B]."""
    size = max(map(len, own))
    rows = []
    for ids in own:
        tokens = np.append(prompt.row.tokens, ids).astype(np.int32)
        slot = np.append(prompt.row.slot, np.full(len(ids), -1)).astype(np.int32)
        rows.append(image_slots.SlottedIds(tokens, slot))
    longest = max(len(row.tokens) for row in rows)
    if longest > emu.config.decoder.max_seq_len:
        raise UserError(
            f"A prompt and an answer have {longest} tokens, but the model takes at most "
            f"{emu.config.decoder.max_seq_len}."
        )
    length = min(longest + -longest % 32, emu.config.decoder.max_seq_len)
    stacked = image_rollout.stack_prompts(rows, [prompt.vectors] * len(rows), length)
    nll = np.asarray(
        _last_nll(emu.params, stacked, graphdef=emu.graphdef, size=size + -size % 8), np.float64
    )
    is_own = np.arange(nll.shape[1], 0, -1) <= np.array([[len(ids)] for ids in own])
    return -(nll * is_own).sum(1)


@functools.partial(jax.jit, static_argnames=("graphdef", "size"))
def _last_nll(params: Any, prompts: Any, *, graphdef: nnx.GraphDef, size: int) -> jax.Array:
    """NLL of the last `size` tokens of each row, which is padded on the left: float32 [B, size]."""
    decoder = nnx.merge(graphdef, params).decoder
    ids = prompts.tokens.tokens
    size = min(size, ids.shape[1] - 1)
    hidden = decoder(prompts.tokens, prompts.positions, prompts.segment_ids)
    return losses.token_nll(decoder.logits(hidden[:, -size - 1 : -1]), ids[:, -size:])


def _in_turn(turns: Sequence[Turn]) -> list[Any]:
    """Pictures and texts one after the other."""
    return [
        part for said, answer in turns for part in (*said, *([] if answer is None else [answer]))
    ]


def _last_picture(turns: Sequence[Turn]) -> np.ndarray:
    pictures = [part for said, _ in turns for part in said if not isinstance(part, str)]
    return image_files.to_pixels(pictures[-1])


def _need_texts(texts: list[str] | None) -> list[str]:
    if texts is None:
        raise UserError(
            "This Emu was imported without a tokenizer; import it from a folder with one."
        )
    return texts
