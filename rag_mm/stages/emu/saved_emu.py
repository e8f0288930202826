"""A trained Emu as a folder: its sizes, its text vocabulary and its parameters."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import batches, configuration, files, renames
from rag_mm.core.errors import UserError
from rag_mm.core.roles import MAIN
from rag_mm.data.interleaved import Parts
from rag_mm.decode import beam, image_rollout, sampler
from rag_mm.models.emu import emu_objective
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.emu_model import Emu
from rag_mm.nn.decoder import Mixture
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.ops import losses
from rag_mm.stages.emu import emu_text
from rag_mm.stages.emu.row_maker import RowMaker, cached
from rag_mm.stages.shared import frozen
from rag_mm.train import checkpoint

RECORD, PARAMS, VOCABULARY = "model.json", "params", "vocabulary.json"
_AT_ONCE = 256  # Images encoded at once.
_PROMPTS_AT_ONCE = 64
_LENGTHS = 16
_ROW_FIELDS = ("tokens", "targets", "positions", "segment_ids", "roles")
GREEDY = sampler.Sampling(0.0)


def make_model(config: EmuConfig, seed: int) -> Emu:
    """An untrained model."""
    return Emu(config, rngs=nnx.Rngs(params=seed))


def save(
    folder: epath.Path,
    config: EmuConfig,
    max_text_len: int,
    text_vocabulary: emu_text.EmuText,
    params: Params,
    is_leader: bool = True,
) -> None:
    """Writes what `load` reads; with several processes all call it, and the leader writes the small files."""
    checkpoint.save_params(folder / PARAMS, params)
    if not is_leader:
        return
    text_vocabulary.save(folder / VOCABULARY)
    model = renames.to_stored(dataclasses.asdict(config))
    files.write_json(folder / RECORD, {"model": model, "max_text_len": max_text_len})


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedEmu:
    """A trained Emu, in calls on arrays of the host.

    Attributes:
        config: its sizes.
        model: structure and parameters.
        maker: makes sequences of texts and images.
        vocabulary: of its texts.
    """

    config: EmuConfig
    model: frozen.LoadedModel
    maker: RowMaker
    vocabulary: emu_text.EmuText

    def codes(self, seen: np.ndarray) -> np.ndarray:
        """Codes float32 [B, N, R] of images.

        Args:
            seen: their tokens [B, M, C] of the frozen tower; or where the model has a tower of its own, the
                images uint8 [B, H, W, 3] of its size.
        """
        if self.config.has_tower:
            see = lambda pixels: self._compiled["see"](image_ops.to_float(pixels))
            seen = frozen.in_batches(see, seen, image_ops.num_at_once(seen.shape[1]))
        return frozen.in_batches(self._compiled["encode"], seen, _AT_ONCE).astype(np.float32)

    def vectors(self, codes: np.ndarray) -> np.ndarray:
        """The decoder's inputs float32 [B, N, D] for codes [B, N, R]."""
        made = frozen.in_batches(self._compiled["to_vectors"], codes, _AT_ONCE)
        return made.astype(np.float32)

    def roll_out(self, prompts: Sequence[Parts], vectors: np.ndarray) -> np.ndarray:
        """The codes float32 [B, N, R] of the image that follows each prompt.

        Args:
            prompts: texts, and images by their place in `vectors`.
            vectors: float [P, N, D].
        """

        def run(rows: np.ndarray) -> np.ndarray:
            chosen, model = [prompts[row] for row in rows], self.model
            stacked = self._stack(chosen, vectors, starts_image=True)
            return np.asarray(
                image_rollout.roll_out(model.params, stacked, graphdef=model.graphdef)
            )

        return np.concatenate(self._batched(prompts, run, self.config.num_slots))

    def write(
        self,
        prompts: Sequence[Parts],
        vectors: np.ndarray,
        num_tokens: int,
        sampling: sampler.Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each prompt, greedily by default, up to the end of the sequence."""
        seeds = np.random.default_rng(seed).integers(1 << 32, size=len(prompts), dtype=np.uint32)

        def run(rows: np.ndarray) -> list[str]:
            sampled = sampler.sample(
                self.model.params["decoder"],
                self._stack([prompts[row] for row in rows], vectors),
                seeds[rows],
                self._allowed,
                graphdef=self._decoder,
                num_steps=num_tokens,
                sampling=sampling,
                stop=self.config.ids.end,
            )
            return [self._text(row) for row in np.asarray(sampled.tokens)]

        batched = self._batched(prompts, run, num_tokens)
        return [text for part in batched for text in part]

    def search(
        self,
        prompt: Parts,
        vectors: np.ndarray,
        num_tokens: int,
        num_beams: int,
        length_penalty: float = 1.0,
        min_tokens: int = 0,
    ) -> list[str]:
        """The likeliest texts that follow a prompt, the best of `num_beams` first; as `write` otherwise.

        `length_penalty` and `min_tokens` are as of `decode.beam.search`.
        """
        most = int(self._allowed.sum()) // 2
        if num_beams > most:
            raise UserError(
                f"A search finds at most {most} texts with this vocabulary; ask for fewer."
            )

        def run(rows: np.ndarray) -> list[list[str]]:
            found = beam.search(
                self.model.params["decoder"],
                self._stack([prompt] * len(rows), vectors),
                self._allowed,
                graphdef=self._decoder,
                num_steps=num_tokens,
                stop=self.config.ids.end,
                num_beams=num_beams,
                length_penalty=length_penalty,
                min_steps=min_tokens,
            )
            return [[self._text(row) for row in beams] for beams in np.asarray(found.tokens)]

        return self._batched([prompt], run, num_tokens)[0][0]

    def text_nll(
        self, retrieved: Sequence[Parts], main: Sequence[Parts], vectors: np.ndarray
    ) -> np.ndarray:
        """Mean NLL in nats per token of the texts of each main part and the end after it: float64 [B].

        Args:
            retrieved: what comes before; its texts are given.
            main: texts, and images by their place in `vectors`.
            vectors: float [P, N, D].
        """
        ids = self.config.ids
        whole = [(*first, *rest) for first, rest in zip(retrieved, main, strict=True)]

        def run(rows: np.ndarray) -> np.ndarray:
            made = [self.maker.row(retrieved[row], main[row]) for row in rows]
            longest = max(len(row["tokens"]) for row in made)
            longest += -longest % _LENGTHS
            padding = {"tokens": ids.pad, "targets": ids.pad}
            batch = {
                name: np.stack(
                    [
                        np.pad(row[name], (0, longest - len(row[name])), constant_values=fill)
                        for row in made
                    ]
                )
                for name, fill in {**dict.fromkeys(_ROW_FIELDS, 0), **padding}.items()
            }
            placed = self._placed([whole[row] for row in rows], batch["tokens"], vectors)
            model = self.model
            nll, is_text = _text_nll(model.params, batch, placed, graphdef=model.graphdef)
            weights = (batch["roles"] == MAIN) & np.asarray(is_text)
            return (np.asarray(nll, np.float64) * weights).sum(1) / np.maximum(weights.sum(1), 1)

        return np.concatenate(self._batched(whole, run, 0))

    def _text(self, row: np.ndarray) -> str:
        ends = np.flatnonzero(row == self.config.ids.end)
        return self.vocabulary.decode_text(row[: ends[0] if len(ends) else None].tolist())

    def _batched(
        self, prompts: Sequence[Parts], run: Callable[[np.ndarray], Any], num_more: int
    ) -> list[Any]:
        """`run` on the numbers of the prompts of each batch, the last one filled up to a power of two."""
        longest = max(map(self.maker.length, prompts)) + num_more
        if longest > self.config.decoder.max_seq_len:
            raise UserError(
                f"A prompt and what is to follow have {longest} tokens, but the model takes at most "
                f"{self.config.decoder.max_seq_len}; give fewer documents, images or words."
            )
        results: list[Any] = []
        for rows in batches.split(len(prompts), _PROMPTS_AT_ONCE):
            count = min(len(rows), len(prompts) - len(results) * _PROMPTS_AT_ONCE)
            results.append(run(rows)[:count])
        return results

    def _stack(
        self, prompts: Sequence[Parts], vectors: np.ndarray, *, starts_image: bool = False
    ) -> sampler.Prompts:
        rows = [self.maker.prompt(parts, starts_image=starts_image) for parts in prompts]
        own = [_vectors_of(parts, vectors) for parts in prompts]
        # Few lengths, so that few programs are compiled.
        length = max(len(row.tokens) for row in rows)
        return image_rollout.stack_prompts(rows, own, length + -length % _LENGTHS)

    def _placed(self, rows: Sequence[Parts], tokens: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """The vectors of the images of each row at its slots, [B, T, D]."""
        placed = np.zeros((*tokens.shape, vectors.shape[-1]), np.float32)
        for own, at, parts in zip(placed, tokens == self.config.ids.slot, rows, strict=True):
            own[at] = _vectors_of(parts, vectors)
        return placed

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        return {name: self.model.compile(name) for name in ("see", "encode", "to_vectors")}

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        """Which ids may be written, bool [V]: texts and the end."""
        allowed = np.zeros(self.config.decoder.vocab_size, bool)
        allowed[[*range(self.vocabulary.text_size), self.config.ids.end]] = True
        allowed[self.config.ids.begin] = False
        return allowed

    @functools.cached_property
    def _decoder(self) -> nnx.GraphDef:
        whole = nnx.merge(self.model.graphdef, self.model.params)
        return nnx.split(whole.decoder)[0]


def load(folder: epath.Path, mesh: Mesh | None = None) -> LoadedEmu:
    """Loads the model from the folder of a finished stage, onto a mesh if one is given.

    Raises:
        UserError: there is no model, or its files do not match this version.
    """
    record = files.read_object(folder / RECORD, model=dict, max_text_len=int)
    values = renames.from_stored(record["model"])
    config = configuration.make(EmuConfig, values, str(folder / RECORD))
    text = emu_text.load(folder / VOCABULARY)
    if not emu_text.fits(text, config.ids):
        raise UserError(f"{folder} holds a vocabulary of another model; train it again.")
    loaded = frozen.load_params(folder / PARAMS, functools.partial(make_model, config, 0), mesh)
    maker = RowMaker(cached(text.encode_text), config.ids, config.num_slots, record["max_text_len"])
    return LoadedEmu(config, loaded, maker, text)


def _vectors_of(parts: Parts, vectors: np.ndarray) -> np.ndarray:
    """The vectors of the images of a sequence, [images * N, D]."""
    numbers = [part for part in parts if isinstance(part, int | np.integer)]
    return vectors[np.array(numbers, np.int64)].reshape(-1, vectors.shape[-1])


@functools.partial(jax.jit, static_argnames="graphdef")
def _text_nll(
    params: Params, batch: dict[str, jax.Array], placed: jax.Array, *, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """NLL of each target, float32 [B, T], and whether it is text, bool [B, T]."""
    model: Emu = nnx.merge(graphdef, params)
    is_slot = batch["tokens"] == model.config.ids.slot
    inputs = Mixture(batch["tokens"], placed, is_slot)
    hidden = model.decoder(inputs, batch["positions"], batch["segment_ids"])
    nll = losses.token_nll(model.decoder.logits(hidden), batch["targets"])
    return nll, emu_objective.text_targets(batch["targets"], model.config)
