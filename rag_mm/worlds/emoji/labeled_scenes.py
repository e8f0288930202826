"""Emoji scenes as labeled images, in the form of `data.labeled.Labeled`: a scene's class is its entity's."""

from collections.abc import Iterator

import numpy as np

from rag_mm.worlds.emoji import art, emoji_scenes


class LabeledScenes:
    """The scenes of some classes in one role.

    Attributes:
        class_names: the first name of each class, in the order of their numbers.
        rejects: empty; no scene is bad.
    """

    def __init__(self, spec: str):
        """Selects scenes as `emoji_scenes.open_documents` does, for instance `easy/test/test`.

        Raises:
            UserError: `spec` is malformed, or names an unknown level, split or role.
        """
        self._scenes = emoji_scenes.open_documents(spec)
        numbers, self._class_ids = np.unique(self._scenes.class_ids, return_inverse=True)
        self.class_names = tuple(art.load_art().names[number][0] for number in numbers)
        self.rejects: list[tuple[str, str]] = []

    def read(self) -> Iterator[tuple[np.ndarray, int]]:
        """(Image uint8 [32, 32, 3], class index) of each scene."""
        for row, class_id in enumerate(self._class_ids):
            picture = self._scenes[row].image
            assert picture is not None
            yield picture, int(class_id)
