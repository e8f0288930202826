"""Emu's training rows: interleaved sequences drawn from a mixture and packed, with their pictures' tokens."""

import dataclasses

import grain
import numpy as np

from rag_mm.core import checks, manifest_values
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Part, Parts
from rag_mm.stages.emu.album import PictureArrays
from rag_mm.stages.emu.row_maker import RowMaker, RowSize, pack_rows
from rag_mm.stages.emu.training_documents import TrainingDocuments


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Relative frequencies of training sequences, by kind.

    Attributes:
        pairs: a caption and its image, in both orders, after retrieved documents or none.
        stories: captions, each followed by its image.
        clips: a caption and the frames of a clip, in both orders.
        texts: a caption alone.
        documents: a window of a further document.
    """

    pairs: float = 1.0
    stories: float = 0.0
    clips: float = 0.0
    texts: float = 0.0
    documents: float = 0.0

    def __post_init__(self):
        checks.at_least(self, 0, *self.shares)
        if not sum(self.shares.values()):
            raise ValueError("the mixture's shares are all 0; give one that is more")

    @property
    def shares(self) -> dict[str, float]:
        """The frequencies by kind."""
        return dict(vars(self))


@dataclasses.dataclass(frozen=True)
class InterleavedConfig:
    """What training sequences are made of, and how long they are.

    Attributes:
        mixture: how often which kind of sequence is drawn.
        num_docs_weights: relative frequencies of pairs with 0, 1, .. retrieved documents before them.
        image_query_prob: probability that these are the neighbors of the pair's image, else of one of its
            captions with words left out; None, as at inference: of what is given, the image where it comes
            first.
        image_first_prob: probability that the images of a pair, a clip and their retrieved documents come
            before their texts.
        max_text_len: a text is cut to this many tokens; one of a further document is not cut, but read in
            pieces of as many.
        max_seq_len: tokens in a row, into which several sequences are packed.
        counted_slots: slots that an image counts for in `max_seq_len`, so that models of different numbers of
            slots read the same sequences in a step, and rows are longer where they have more; None: as many
            as it has.
        max_images: images in a row.
        window_images: images in a window of a document.
        sampled_share: share of the windows that are not successive parts, but images sampled from the whole
            document, each with the text after it.
    """

    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    num_docs_weights: tuple[float, ...] = (1.0, 1.0)
    image_query_prob: float | None = None
    image_first_prob: float = 0.5
    max_text_len: int = 32
    max_seq_len: int = 128
    max_images: int = 10
    window_images: int = 5
    sampled_share: float = 0.5
    counted_slots: int | None = dataclasses.field(
        default=None, metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        weights = self.num_docs_weights
        if not weights or min(weights) < 0 or not sum(weights):
            raise ValueError(f"num_docs_weights are {weights}; give at least 0, not all 0")
        checks.between(self, 0, 1, "image_query_prob", "image_first_prob", "sampled_share")
        sizes = ("max_text_len", "max_seq_len", "max_images", "window_images")
        checks.at_least(self, 1, *sizes, "counted_slots")

    @property
    def max_docs(self) -> int:
        """Most retrieved documents before a pair."""
        return max(i for i, weight in enumerate(self.num_docs_weights) if weight)

    def rows(self, batch_size: int) -> RowSize:
        """The size of batches."""
        return RowSize(batch_size, self.max_seq_len, self.max_images, self.counted_slots)


@dataclasses.dataclass(frozen=True, eq=False)
class RowSource:
    """Draws training sequences.

    Attributes:
        config: the mixture and lengths.
        documents: what sequences are made of.
        neighbors: int32 [R, captions + 1, K], rows of the memory for each query of a pair, -1 for a missing
            one; None without retrieval.
        maker: makes sequences.
        pictures: the array of each picture.
        name: of these arrays in a batch.
    """

    config: InterleavedConfig
    documents: TrainingDocuments
    neighbors: np.ndarray | None
    maker: RowMaker
    pictures: PictureArrays
    name: str

    def __post_init__(self):
        for kind, share in self.config.mixture.shares.items():
            if share and not self._group(kind):
                raise UserError(
                    f"sequences.mixture asks for {kind}, of which there are none; leave them out."
                )

    def make(self, index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sequence, as `RowMaker.row` returns it."""
        kinds, shares = zip(*self.config.mixture.shares.items(), strict=True)
        kind = str(rng.choice(kinds, p=np.array(shares) / sum(shares)))
        group = self._group(kind)
        main, retrieved = group[int(index) % len(group)], tuple[Parts, ...]()
        if kind == "texts":
            main = main[:1]
        elif kind == "documents":
            main = self._window(main, rng)
        elif kind in ("pairs", "clips"):
            is_image_first = bool(rng.random() < self.config.image_first_prob)
            if kind == "pairs":
                retrieved = self._retrieved(int(index) % len(group), is_image_first, rng)
            if is_image_first:
                main = interleaved.images_first(main)
                retrieved = tuple(interleaved.images_first(parts) for parts in retrieved)
        while retrieved and not self._fits((*sum(retrieved, ()), *main)):
            retrieved = retrieved[1:]
        if not self._fits(main):
            raise UserError(
                f"A sequence of {kind} does not fit a row: it has {self._length(main)} tokens and "
                f"{_num_images(main)} images; raise sequences.max_seq_len or sequences.max_images."
            )
        return self.maker.row(sum(retrieved, ()), main)

    def batches(
        self, batch_size: int, seed: int, rows: range | None = None, num_workers: int = 0
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Endless batches, of the keys that `models.emu.emu_objective.loss_fn` reads; see `packing`."""
        config = self.config
        shares = config.mixture.shares.items()
        longest = max(len(self._group(kind)) for kind, share in shares if share)
        return pack_rows(
            np.arange(longest),
            self.make,
            self.maker,
            config.rows(batch_size),
            {self.name: self.pictures.take},
            seed,
            rows,
            num_workers,
        )

    def _group(self, kind: str) -> list[Parts]:
        return self.documents.pairs if kind == "texts" else getattr(self.documents, kind)

    def _retrieved(
        self, index: int, is_image_first: bool, rng: np.random.Generator
    ) -> tuple[Parts, ...]:
        """Some of the documents retrieved for a pair, in random order."""
        if self.neighbors is None:
            return ()
        weights, of_pair = np.asarray(self.config.num_docs_weights), self.neighbors[index]
        count = int(rng.choice(len(weights), p=weights / weights.sum()))
        chance = self.config.image_query_prob
        is_image = is_image_first if chance is None else rng.random() < chance
        found = of_pair[-1 if is_image else int(rng.integers(len(of_pair) - 1))]
        chosen = rng.permutation(found[found >= 0])[:count]
        return tuple(self.documents.memory[row] for row in chosen)

    def _window(self, parts: Parts, rng: np.random.Generator) -> Parts:
        config = self.config
        if rng.random() < config.sampled_share:
            # Empty where no image has a text after it.
            parts = interleaved.sampled_pairs(parts, config.window_images, rng) or parts
        room = config.max_seq_len - 2  # Beside the ids that begin and end a sequence.
        images = min(config.window_images, config.max_images)
        longest = min(config.max_text_len, room)
        pieces = tuple(piece for part in parts for piece in self.maker.pieces(part, longest))
        return interleaved.window(pieces, self._size, room, images, rng)

    def _size(self, part: Part) -> int:
        """Tokens that a part counts for in a row."""
        uncounted = self.config.rows(1).uncounted(self.maker.num_slots)
        return self.maker.size(part) - uncounted * isinstance(part, int)

    def _length(self, parts: Parts) -> int:
        return 2 + sum(map(self._size, parts))

    def _fits(self, parts: Parts) -> bool:
        is_short = self._length(parts) <= self.config.max_seq_len
        return is_short and _num_images(parts) <= self.config.max_images


def _num_images(parts: Parts) -> int:
    return sum(isinstance(part, int) for part in parts)
