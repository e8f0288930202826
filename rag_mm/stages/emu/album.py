"""The pictures of a run, each numbered once, and the vision tokens of all of them in files."""

import dataclasses
from collections.abc import Callable, Hashable

import numpy as np
from etils import epath

from rag_mm.core import files, progress

PER_FILE = 4096
_AT_ONCE = 256


class Album:
    """Pictures numbered from 0 in the order in which they are first added; each is drawn when asked for."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._draw: list[Callable[[], np.ndarray]] = []

    def add(self, key: Hashable, draw: Callable[[], np.ndarray]) -> int:
        """The number of the picture with this key; `draw` gives its pixels, uint8 [H, W, 3]."""
        if key not in self._numbers:
            self._numbers[key] = len(self._draw)
            self._draw.append(draw)
        return self._numbers[key]

    def __len__(self) -> int:
        return len(self._draw)

    def pixels(self, number: int) -> np.ndarray:
        """A picture, uint8 [H, W, 3]."""
        return self._draw[number]()

    @property
    def digest(self) -> str:
        """A digest of which picture has which number."""
        return files.digest("\n".join(map(repr, self._numbers)).encode())


@dataclasses.dataclass(frozen=True, eq=False)
class PictureArrays:
    """One array of each picture of an album, in files that are mapped into memory.

    Attributes:
        parts: of `PER_FILE` pictures each but for the last.
    """

    parts: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, folder: epath.Path) -> "PictureArrays":
        """Opens what `write` wrote for all pictures."""
        names = sorted(path for path in folder.iterdir() if path.suffix == ".npy")
        return cls(tuple(np.load(name, mmap_mode="r", allow_pickle=False) for name in names))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a picture's array."""
        return self.parts[0].shape[1:]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The arrays of pictures int [...], in their stored dtype, [..., *shape]; zeros for -1."""
        flat = np.asarray(numbers).reshape(-1)
        taken = np.zeros((len(flat), *self.shape), self.parts[0].dtype)
        for i, number in enumerate(flat.tolist()):
            if number >= 0:
                taken[i] = self.parts[number // PER_FILE][number % PER_FILE]
        return taken.reshape(*np.shape(numbers), *self.shape)


def write(
    album: Album,
    folder: epath.Path,
    encode: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Writes `encode(pixels uint8 [B, H, W, 3])` of all pictures; files that are there already are kept.

    Args:
        album: the pictures.
        folder: where.
        encode: an array of each picture, [B, ...].
    """

    def make(numbers: range) -> np.ndarray:
        return encode(np.stack([album.pixels(number) for number in numbers]))

    write_arrays("pictures", len(album), folder, make)


def write_arrays(
    name: str, total: int, folder: epath.Path, make: Callable[[range], np.ndarray]
) -> None:
    """Writes an array of each number below `total`, for `PictureArrays`; files that are there are kept.

    Args:
        name: label of the progress bar.
        total: how many.
        folder: where.
        make: successive numbers -> the array of each, [B, ...].
    """
    with progress.track(name, total) as bar:
        for first in range(0, total, PER_FILE):
            path = folder / f"{first // PER_FILE:05d}.npy"
            if path.exists():
                continue
            end, made = min(first + PER_FILE, total), []
            for start in range(first, end, _AT_ONCE):
                batch = range(start, min(start + _AT_ONCE, end))
                made.append(make(batch))
                bar.update(batch.stop)
            files.write_array(path, np.concatenate(made))
