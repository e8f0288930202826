"""Labeled images for classification: a folder with one folder per class, or a TFDS dataset with labels."""

import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, captions, file_names, image_decoding, sources

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Labeled(Protocol):
    """Images of named classes."""

    class_names: tuple[str, ...]
    rejects: list[tuple[str, str]]

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """(Image uint8 [H, W, 3] of any size, class index); bad images are listed in `rejects` instead."""
        ...


class LabeledFolder:
    """A folder with one folder of images per class, named after the class with `_` for spaces.

    Attributes:
        class_names: in alphabetical order.
        rejects: (file, reason) of each image that the last `read` could not decode.
    """

    def __init__(self, directory: pathlib.Path):
        """Lists the images.

        Raises:
            UserError: the folder does not exist or has no class folder with images.
        """
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder of class folders.")
        paths_by_class = {
            folder.name: [path for path in sorted(folder.iterdir()) if _is_image(path)]
            for folder in sorted(directory.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }
        self._files = {name: paths for name, paths in paths_by_class.items() if paths}
        if not self._files:
            raise UserError(
                f"{directory} has no class folder with images; arrange them as CLASS/image.jpg."
            )
        self.class_names = _readable(list(self._files), directory)
        self.rejects: list[tuple[str, str]] = []

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """All images, class by class."""
        self.rejects.clear()
        for number, paths in enumerate(self._files.values()):
            for path in paths:
                try:
                    yield sources.load_image(path), number
                except UserError as error:
                    self.rejects.append((str(path), str(error)))


def _is_image(path: pathlib.Path) -> bool:
    name = f"{path.parent.name}/{path.name}"
    return path.suffix.lower() in ENDINGS and not file_names.is_system_file(name)


class LabeledTfds:
    """A TFDS dataset in ArrayRecord format with an image and a label per record; needs no TensorFlow.

    Attributes:
        class_names: names of the label feature, made readable.
        rejects: (record, reason) of each image that the last `read` could not decode.
    """

    def __init__(self, name: str, split: str = "test", label: str = "label"):
        """Opens a dataset that TFDS has prepared, by name or folder.

        Raises:
            UserError: no such dataset, split or label.
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
        """All images in the dataset's order."""
        self.rejects.clear()
        for i in range(len(self._records)):
            fields: Any = self._records[i]
            try:
                image = image_decoding.decode(
                    array_records.get_feature(fields, self._image), min_pixels=2
                )
            except (captions.BadRecord, image_decoding.BadImage) as error:
                self.rejects.append((f"{self._name}-{i}", str(error)))
            else:
                yield image.pixels, int(fields[self._label])


def readable(name: str) -> str:
    """A class name as in a caption: `001.Black_footed_Albatross` becomes `Black footed Albatross`."""
    name = unicodedata.normalize("NFC", name)
    return " ".join(re.sub(r"^\d+\.", "", name).replace("_", " ").split())


def _readable(names: list[str], where: object) -> tuple[str, ...]:
    """Raises UserError if two readable names are equal, or one is empty."""
    readable_names = tuple(readable(name) for name in names)
    for name, made in zip(names, readable_names, strict=True):
        if not made or readable_names.count(made) > 1:
            problem = "the name of another class too" if made else "empty"
            raise UserError(
                f"The class {name!r} of {where} becomes {made!r}, which is {problem}; rename it."
            )
    return readable_names


def caltech_birds2011(split: str = "test") -> LabeledTfds:
    """CUB-200-2011: 200 bird species; 5,794 images in `test`."""
    return LabeledTfds("caltech_birds2011", split)


def cars196(split: str = "test") -> LabeledTfds:
    """Stanford Cars: 196 car models; 8,041 images in `test`."""
    return LabeledTfds("cars196", split)


DATASETS: dict[str, Callable[[str], LabeledTfds]] = {
    "caltech_birds2011": caltech_birds2011,
    "cars196": cars196,
}


def open_dataset(spec: str) -> LabeledTfds:
    """Opens NAME or NAME:SPLIT (default `test`): any TFDS dataset with one image and one label per record."""
    match = re.fullmatch(r"(.+):(\w+(?:\[[^\]]*\])?)", spec)
    name, split = spec, "test"
    if match and not pathlib.Path(spec).is_dir():
        name, split = match.groups()
    return DATASETS[name](split) if name in DATASETS else LabeledTfds(name, split)
