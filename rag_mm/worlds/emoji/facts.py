"""Reads the facts of a scene from its pixels alone, by analysis through synthesis.

Of all scenes that a level can draw, the reading is the one nearest to the image in least squares.
On it stands the headline figure: joint accuracy, entity and place and colour all right.
"""

from collections.abc import Iterator

import numpy as np

from rag_mm.worlds.emoji import art, classes, scenes
from rag_mm.worlds.emoji.scenes import Entity, Facts, Level

_PALETTE = np.array(list(scenes.COLORS.values()), np.float32) / 255  # [8, 3]
_COLOR_NAMES = tuple(scenes.COLORS)
_BATCH = 32  # Images scored at a time; bounds the table of scores to about 64 MB.


class Scorer:
    """Reads scenes of one level; knows all classes, held out or not."""

    def __init__(self, level: Level):
        """Reads scenes of `level`. Templates are drawn as needed; in `free` they take 140 MB.

        Raises:
            ValueError: the level shows several cards, which no reading here covers.
        """
        if level.card and level.max_entities > 1:
            raise ValueError(f"Level {level.name} puts more than one card into a scene.")
        self._level = level
        corners = level.corners(min(level.sizes))
        numbers = {corner: i for i, corner in enumerate(corners)}
        apart = scenes.disjoint_corners(level) if level.max_entities == 2 else ()
        self._pairs = np.array(
            [(numbers[one], numbers[two]) for one, two in apart if one < two], np.int64
        ).reshape(-1, 2)
        self._templates: dict[tuple[int, str | None], tuple[np.ndarray, np.ndarray]] = {}

    def read(self, images: np.ndarray) -> list[Facts]:
        """Reads the facts of each image: uint8 [B, S, S, 3] to B facts.

        Pairs come in reading order of their boxes, for no pixel tells whose scene it is.
        """
        read_some = self._read_cards if self._level.card else self._read_cutouts
        result: list[Facts] = []
        for start in range(0, len(images), _BATCH):
            result += read_some(images[start : start + _BATCH].astype(np.float32) / 255)
        return result

    def _read_cards(self, images: np.ndarray) -> list[Facts]:
        """Least over box, class and colour: a card hides its background, so the terms part."""
        to_color = ((images[:, :, :, None] - _PALETTE) ** 2).sum(-1)  # [B, S, S, 8]
        best = np.full(len(images), np.inf)
        result: dict[int, Facts] = {}
        for size in self._level.sizes:
            boxes, windows = self._windows(images, size)
            templates, norms = self._template(size, None)
            scores = norms - 2 * windows @ templates.T  # [B, O, num_classes]
            class_ids = scores.argmin(-1)
            inside = scores.min(-1) + (windows**2).sum(-1)  # [B, O]
            hidden = np.stack(
                [to_color[:, r : r + size, c : c + size].sum((1, 2)) for r, c in boxes], axis=1
            )
            outside = to_color.sum((1, 2))[:, None] - hidden  # [B, O, 8]
            total = inside + outside.min(-1)
            for i, box in enumerate(total.argmin(-1)):
                if total[i, box] < best[i]:
                    best[i] = total[i, box]
                    entity = Entity(int(class_ids[i, box]), size, *boxes[box])
                    result[i] = Facts((entity,), _COLOR_NAMES[outside[i, box].argmin()])
        return [result[i] for i in range(len(images))]

    def _read_cutouts(self, images: np.ndarray) -> list[Facts]:
        """Least over boxes and classes, given the colour; a template is what drawing changes."""
        colors = _vote_color(images)
        result: dict[int, Facts] = {}
        for color in np.unique(colors):
            name = _COLOR_NAMES[color]
            chosen = np.flatnonzero(colors == color)
            entities = self._best_entities(images[chosen] - _PALETTE[color], name)
            for i, found in zip(chosen, entities, strict=True):
                result[int(i)] = Facts(found, name)
        return [result[i] for i in range(len(images))]

    def _best_entities(self, residuals: np.ndarray, color: str) -> Iterator[tuple[Entity, ...]]:
        """The one or two entities that explain most of each residual, [B, S, S, 3]."""
        gains = {}
        for size in self._level.sizes:
            boxes, windows = self._windows(residuals, size)
            templates, norms = self._template(size, color)
            # |y|^2 - |y - t|^2, what drawing t takes off the error.
            scores = 2 * windows @ templates.T - norms  # [B, O, num_classes]
            gains[size] = boxes, scores.argmax(-1), scores.max(-1)

        def entity(size: int, i: int, box: int) -> Entity:
            boxes, class_ids, _ = gains[size]
            return Entity(int(class_ids[i, box]), size, *boxes[box])

        small = min(self._level.sizes)
        pairs = self._pairs
        # Half of what the faintest entity that a level shows would explain.
        least = classes.DISTINCT_RMS**2 * small**2 * 3 / 2
        for i in range(len(residuals)):
            size = max(gains, key=lambda size: gains[size][2][i].max())
            single = gains[size][2][i]
            together = gains[small][2][i][pairs].sum(-1)
            if len(pairs) and together.max() > single.max() + least:
                one, two = pairs[together.argmax()]
                yield entity(small, i, one), entity(small, i, two)
            else:
                yield (entity(size, i, single.argmax()),)

    def _windows(
        self, images: np.ndarray, size: int
    ) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
        """The O corners of boxes, and what each box holds: float32 [B, O, size * size * 3]."""
        corners = self._level.corners(size)
        step = self._level.step
        views = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
        views = views[:, ::step, ::step].transpose(0, 1, 2, 4, 5, 3)  # [B, rows, columns, s, s, 3]
        return corners, views.reshape(len(images), len(corners), -1)

    def _template(self, size: int, color: str | None) -> tuple[np.ndarray, np.ndarray]:
        """All classes as cards, or as what they add to a colour: [num_classes, D], and norms."""
        if (size, color) not in self._templates:
            pictures = art.load_art()
            if color is None:
                drawn = pictures.cards(size).astype(np.float32) / 255
            else:
                drawn = art.lay_on(pictures.drawn(size), scenes.COLORS[color]) / np.float32(255)
                drawn = drawn - np.array(scenes.COLORS[color], np.float32) / 255
            flat = drawn.reshape(len(drawn), -1)
            self._templates[size, color] = flat, (flat**2).sum(-1)
        return self._templates[size, color]


def _vote_color(images: np.ndarray) -> np.ndarray:
    """The palette colour most pixels are near, as indices: [B, S, S, 3] to int64 [B]."""
    between = ((_PALETTE[:, None] - _PALETTE) ** 2).sum(-1)
    # A pixel nearer to another colour must not count, hence half the least distance.
    reach = between[between > 0].min() / 4
    distances = ((images[:, :, :, None] - _PALETTE) ** 2).sum(-1)
    return np.minimum(distances, reach).sum((1, 2)).argmin(-1)


def compare(read: Facts, asked: Facts, level: Level) -> dict[str, bool]:
    """Which of `asked` came true: keys `entity`, `place`, `color`, and `joint` for all of them.

    Entities have no order. Sizes do not count: no caption asks for them. With a pair, `joint` also
    wants each entity in its own place.
    """
    told = [
        sorted((e.class_id, place) for e, place in _placed(facts, level)) for facts in (read, asked)
    ]
    entity = [class_id for class_id, _ in told[0]] == [class_id for class_id, _ in told[1]]
    places = [sorted(place for _, place in one) for one in told]
    color = read.color == asked.color
    return {
        "entity": entity,
        "place": places[0] == places[1],
        "color": color,
        "joint": told[0] == told[1] and color,
    }


def _placed(facts: Facts, level: Level) -> list[tuple[Entity, str]]:
    return [(entity, scenes.place(entity, level)) for entity in facts.entities]
