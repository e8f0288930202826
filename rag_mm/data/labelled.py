"""Pictures with class names, to classify: a folder of class folders, or a TFDS dataset with labels."""

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, captions, image_decoding, sources

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Labelled(Protocol):
    """Pictures of named classes."""

    class_names: tuple[str, ...]
    rejects: list[tuple[str, str]]

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """Pictures uint8 [H, W, 3] of any size with the number of their class; bad ones are listed."""
        ...


class LabelledFolder:
    """A folder with one folder of pictures for each class, named as the class with `_` for a blank.

    Attributes:
        class_names: in alphabetical order.
        rejects: (file, reason) of each picture that the last reading could not read.
    """

    def __init__(self, directory: pathlib.Path):
        """Lists the pictures.

        Raises:
            UserError: no folder, no class folder in it, or none with a picture.
        """
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder of class folders.")
        found = {
            folder.name: [p for p in sorted(folder.iterdir()) if p.suffix.lower() in ENDINGS]
            for folder in sorted(directory.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }
        self._files = {name: paths for name, paths in found.items() if paths}
        if not self._files:
            raise UserError(
                f"{directory} has no class folder with pictures; lay them out as CLASS/picture.jpg."
            )
        self.class_names = _readable(list(self._files), directory)
        self.rejects: list[tuple[str, str]] = []

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """All pictures, class by class."""
        self.rejects.clear()
        for number, paths in enumerate(self._files.values()):
            for path in paths:
                try:
                    yield sources.load_image(path), number
                except UserError as error:
                    self.rejects.append((str(path), str(error)))


class LabelledTfds:
    """A TFDS dataset with a picture and a label, in ArrayRecord form (no TensorFlow is needed).

    Attributes:
        class_names: as the label's feature has them, made readable.
        rejects: (record, reason) of each picture that the last reading could not read.
    """

    def __init__(self, name: str, split: str = "test", label: str = "label"):
        """Opens a dataset that TFDS has prepared, by name or folder.

        Raises:
            UserError: no such dataset or split, or no such label in it.
        """
        self._features, self._records = array_records.open_tfds(name, split)
        self._image = array_records.only_image(self._features)
        try:
            feature = self._features[label]
            stored: list[str] = list(feature.names)
        except (KeyError, AttributeError):
            known = ", ".join(sorted(self._features))
            raise UserError(f"{name} has no class label {label!r}; it has {known}.") from None
        self._name, self._label = f"{pathlib.PurePath(name).name}-{split}", label
        self.class_names = _readable(stored, name)
        self.rejects: list[tuple[str, str]] = []

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """All pictures in the dataset's order."""
        self.rejects.clear()
        for place in range(len(self._records)):
            fields: Any = self._records[place]
            try:
                picture = image_decoding.decode(
                    array_records.walk(fields, self._image), min_pixels=2
                )
            except (captions.BadRecord, image_decoding.BadPicture) as error:
                self.rejects.append((f"{self._name}-{place}", str(error)))
            else:
                yield picture.pixels, int(fields[self._label])


def readable(name: str) -> str:
    """A class as a caption would name it: `001.Black_footed_Albatross` is `Black footed Albatross`."""
    return " ".join(re.sub(r"^\d+\.", "", name).replace("_", " ").split())


def _readable(names: list[str], where: object) -> tuple[str, ...]:
    """Raises a UserError where two classes would be one, or one would be nothing."""
    found = tuple(readable(name) for name in names)
    for name, made in zip(names, found, strict=True):
        if not made or found.count(made) > 1:
            raise UserError(
                f"The class {name!r} of {where} reads {made!r}, which is "
                f"{'another class, too' if made else 'nothing'}; rename it."
            )
    return found


def caltech_birds2011(split: str = "test") -> LabelledTfds:
    """CUB-200-2011: 200 kinds of birds; 5,794 pictures in `test`."""
    return LabelledTfds("caltech_birds2011", split)


def cars196(split: str = "test") -> LabelledTfds:
    """Stanford Cars: 196 models of cars; 8,041 pictures in `test`."""
    return LabelledTfds("cars196", split)


DATASETS: dict[str, Callable[[str], LabelledTfds]] = {
    "caltech_birds2011": caltech_birds2011,
    "cars196": cars196,
}


def open_dataset(spec: str) -> LabelledTfds:
    """The dataset NAME or NAME:SPLIT (`test` if it is not said), any that has pictures and labels."""
    name, _, split = (
        spec.rpartition(":") if re.search(r":\w+(\[[^\]]*\])?$", spec) else (spec, "", "")
    )
    chosen = split or "test"
    return DATASETS[name](chosen) if name in DATASETS else LabelledTfds(name, chosen)
