"""The scorer: reads the facts of a scene from its pixels, by analysis by synthesis.

The result is the scene closest to the image in squared error among all scenes of a level; only the background
of cut-outs is chosen beforehand, by vote. It defines the headline metric, joint accuracy: entity, place and
color all correct.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from rag_mm.worlds.emoji import art, classes, emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level

_PALETTE = np.array(list(emoji_scenes.COLORS.values()), np.float32) / 255  # [8, 3]
_COLOR_NAMES = tuple(emoji_scenes.COLORS)
_BATCH = 32  # Images per batch; limits the distance table to about 64 MB.
_BLOCK = 4  # Block side of the first comparison; 4 numbers summarize the 48 of a block.


@dataclasses.dataclass(frozen=True, eq=False)
class _Templates:
    """All classes at one size: pixels [num_classes, D] and block features [num_classes, F]."""

    pixels: np.ndarray
    blocks: np.ndarray


def read(images: np.ndarray, levels: Sequence[Level]) -> list[Facts]:
    """Reads images uint8 [B, S, S, 3] of B given levels: B facts."""
    facts: dict[int, Facts] = {}
    for level in dict.fromkeys(levels):
        indices = [i for i, image_level in enumerate(levels) if image_level == level]
        facts |= zip(indices, Scorer(level).read(images[indices]), strict=True)
    return [facts[i] for i in range(len(levels))]


class Scorer:
    """Reads scenes of one level; knows all classes, held out or not.

    A scene is a color, one or two disjoint boxes, and a class in each. Inside a box the entity hides the
    color, so the squared error of a scene is that of the plain color minus a gain per box, and the best
    class of a box does not depend on the rest of the scene. It is therefore enough to search over colors
    times single boxes and pairs of boxes.

    The expensive part is the best class of each box (370 boxes at step 1). So this is branch and bound: every
    box first gets an upper bound on its gain, from a lower bound on its distance to any class (`_blocks`).
    Then the boxes of the most promising scene get their exact gain, and after that the boxes of every scene
    whose bound exceeds the best exact scene. The result equals that of an exhaustive search. On originals 1.5
    boxes per image are compared pixel by pixel, on pure noise all of them.
    """

    def __init__(self, level: Level):
        """Reads scenes of `level`. Templates are rendered once, on demand; those of `free` take 150 MB."""
        self._level = level
        boxes = [(size, *corner) for size in level.sizes for corner in level.corners(size)]
        numbers = {box: i for i, box in enumerate(boxes)}
        small, nothing = min(level.sizes), len(boxes)
        singles = [(i, nothing) for i in range(nothing)]
        apart = emoji_scenes.disjoint_corners(level) if level.max_entities == 2 else ()
        pairs = [(numbers[small, *one], numbers[small, *two]) for one, two in apart if one < two]
        self._boxes = np.array(boxes)  # [O, 3]: size, row, column
        self._choices = np.array(singles + pairs)  # [H, 2]; index O means no box.
        # A second entity must gain at least half of what the faintest entity of a level would.
        min_gain = classes.DISTINCT_RMS**2 * small**2 * 3 / 2
        self._costs = np.repeat([0, min_gain], [len(singles), len(pairs)])

    def read(self, images: np.ndarray) -> list[Facts]:
        """Reads the facts of each image: uint8 [B, S, S, 3] to B facts.

        Pairs are in row-major order of their boxes; pixels do not show which entity is the first.
        """
        result: list[Facts] = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH].astype(np.float32) / 255
            result += self._read_cards(batch) if self._level.card else self._read_cutouts(batch)
        return result

    def _read_cards(self, images: np.ndarray) -> list[Facts]:
        """Cards look the same on every color, so all colors are searched."""
        return self._search(images, np.arange(len(_PALETTE)), None)

    def _read_cutouts(self, images: np.ndarray) -> list[Facts]:
        """Cut-outs are transparent: their templates are rendered on the color that wins the vote."""
        votes = _vote_color(images)
        result: dict[int, Facts] = {}
        for color in np.unique(votes):
            indices = np.flatnonzero(votes == color)
            facts = self._search(images[indices], np.array([color]), int(color))
            result.update(zip(indices.tolist(), facts, strict=True))
        return [result[i] for i in range(len(images))]

    def _search(self, images: np.ndarray, colors: np.ndarray, drawn_on: int | None) -> list[Facts]:
        """The best scene of each image, float32 [B, S, S, 3], on any of C `colors`."""
        errors = ((images[:, :, :, None] - _PALETTE[colors]) ** 2).sum(-1)  # [B, S, S, C]
        plain, inside = errors.sum((1, 2)), self._inside(errors)
        gains = np.zeros((len(images), len(self._boxes) + 1, len(colors)))
        gains[:, :-1] = inside - self._bounds(images, drawn_on)[:, :, None]
        is_exact = np.zeros(gains.shape[:2], bool)
        is_exact[:, -1] = True
        class_ids = np.zeros(gains.shape[:2], np.int64)
        one, two = self._choices.T

        def rate() -> tuple[np.ndarray, np.ndarray]:
            """Upper bounds of all scenes, [B, H, C], and exact scores, -inf where not yet known."""
            scores = gains[:, one] + gains[:, two] - self._costs[:, None] - plain[:, None]
            known = is_exact[:, one] & is_exact[:, two]
            return scores, np.where(known[:, :, None], scores, -np.inf)

        def make_exact(selected: np.ndarray) -> None:
            """Computes the exact gains of the boxes of the selected choices, bool [B, H]."""
            image, choice = np.nonzero(selected)
            needed = np.zeros_like(is_exact)
            needed[image[:, None], self._choices[choice]] = True
            image, box = np.nonzero(needed & ~is_exact)
            class_ids[image, box], distances = self._nearest(images, image, box, drawn_on)
            gains[image, box] = inside[image, box] - distances[:, None]
            is_exact[image, box] = True

        bounds = rate()[0].max(-1)  # [B, H]
        make_exact(bounds == bounds.max(1, keepdims=True))
        bounds, scores = rate()
        make_exact(bounds.max(-1) > scores.max((1, 2))[:, None])
        _, scores = rate()
        best = scores.reshape(len(images), -1).argmax(1)
        choices, color_ids = np.divmod(best, len(colors))
        return [
            self._facts(self._choices[choice], class_ids[i], _COLOR_NAMES[colors[color_ids[i]]])
            for i, choice in enumerate(choices)
        ]

    def _facts(self, boxes: np.ndarray, class_ids: np.ndarray, color: str) -> Facts:
        present = [box for box in boxes if box < len(self._boxes)]
        entities = (Entity(int(class_ids[box]), *self._boxes[box].tolist()) for box in present)
        return Facts(tuple(entities), color)

    def _inside(self, values: np.ndarray) -> np.ndarray:
        """Sums within each box: [B, S, S, C] to [B, O, C]."""
        sums = []
        for size in self._level.sizes:
            rows, columns = np.array(self._level.corners(size)).T
            sums.append(_window_sums(values, size)[:, rows, columns])
        return np.concatenate(sums, axis=1)

    def _bounds(self, images: np.ndarray, drawn_on: int | None) -> np.ndarray:
        """Lower bounds on each box's squared distance to any class: [B, S, S, 3] to [B, O]."""
        blocks = _blocks(images)
        result = []
        for size in self._level.sizes:
            content = _tile(blocks, size, np.array(self._level.corners(size)))
            templates = _template(size, drawn_on).blocks
            _, distances = _nearest_row(content.reshape(-1, content.shape[-1]), templates)
            result.append(distances.reshape(content.shape[:2]))
        return np.concatenate(result, axis=1)

    def _nearest(
        self, images: np.ndarray, image: np.ndarray, box: np.ndarray, drawn_on: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Closest class to the content of box `box[n]` of image `image[n]`, and its squared distance."""
        class_ids, distances = np.zeros(len(box), np.int64), np.zeros(len(box))
        sizes, rows, columns = self._boxes[box].T
        for size in self._level.sizes:
            mask = sizes == size
            windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
            content = windows[image[mask], rows[mask], columns[mask]].transpose(0, 2, 3, 1)
            templates = _template(size, drawn_on).pixels
            class_ids[mask], distances[mask] = _nearest_row(
                content.reshape(-1, templates.shape[1]), templates
            )
        return class_ids, distances


@functools.cache
def _template(size: int, drawn_on: int | None) -> _Templates:
    """All classes as cards (`drawn_on` None), or as cut-outs on a palette color."""
    emoji_art = art.load_art()
    if drawn_on is None:
        drawn = emoji_art.cards(size)
    else:
        drawn = art.lay_on(emoji_art.drawn(size), emoji_scenes.COLORS[_COLOR_NAMES[drawn_on]])
    scaled = drawn.astype(np.float32) / 255
    blocks = _tile(_blocks(scaled), size, np.zeros((1, 2), np.int64))[:, 0]
    return _Templates(scaled.reshape(len(scaled), -1), blocks)


def _nearest_row(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point, [P, D], the index of the closest of `rows`, [N, D], and its squared distance."""
    scores = (rows**2).sum(-1) - 2 * points @ rows.T  # [P, N]
    nearest = scores.argmin(-1)
    return nearest, scores[np.arange(len(points)), nearest] + (points**2).sum(-1)


def _blocks(images: np.ndarray) -> np.ndarray:
    """Features of the block that starts at each pixel: [B, S, S, 3] to [B, S - 3, S - 3, 4].

    The first three are the color means times 4, the last the norm of the deviations from them. Distances of
    features are lower bounds on distances of blocks: means and deviations are orthogonal, and two deviations
    differ by at least the difference of their norms.
    """
    means = _window_sums(images, _BLOCK) / _BLOCK
    squares = _window_sums((images**2).sum(-1), _BLOCK)
    spread = np.sqrt(np.maximum(squares - (means**2).sum(-1), 0))
    return np.concatenate([means, spread[..., None]], axis=-1).astype(np.float32)


def _tile(blocks: np.ndarray, size: int, corners: np.ndarray) -> np.ndarray:
    """Features of the blocks that tile a box of `size` at O corners: [B, ...] to [B, O, F]."""
    offsets = np.arange(0, size - _BLOCK + 1, _BLOCK)
    rows = corners[:, 0, None, None] + offsets[:, None]
    columns = corners[:, 1, None, None] + offsets
    return blocks[:, rows, columns].reshape(len(blocks), len(corners), -1)


def _window_sums(values: np.ndarray, size: int) -> np.ndarray:
    """Sums over the square window at each pixel: [B, S, S, ...], S reduced by size - 1."""
    whole = np.zeros((len(values), *(side + 1 for side in values.shape[1:3]), *values.shape[3:]))
    whole[:, 1:, 1:] = values.cumsum(1, np.float64).cumsum(2)
    upper, lower = whole[:, :-size], whole[:, size:]
    return lower[:, :, size:] - lower[:, :, :-size] - upper[:, :, size:] + upper[:, :, :-size]


def _vote_color(images: np.ndarray) -> np.ndarray:
    """Index of the palette color that most pixels are close to: [B, S, S, 3] to int64 [B]."""
    between = ((_PALETTE[:, None] - _PALETTE) ** 2).sum(-1)
    # Half the smallest distance (a quarter, squared): a pixel closer to another color does not count.
    max_distance = between[between > 0].min() / 4
    distances = ((images[:, :, :, None] - _PALETTE) ** 2).sum(-1)
    return np.minimum(distances, max_distance).sum((1, 2)).argmin(-1)


def compare(read: Facts, asked: Facts, level: Level) -> dict[str, bool]:
    """Which requested facts are correct: keys `entity`, `place`, `color`, and `joint` for all of them.

    The order of entities does not matter. Sizes do not count, because no caption requests them. For a pair,
    `joint` also requires each entity at its own place.
    """
    pairs = [
        sorted((e.class_id, place) for e, place in _placed(facts, level)) for facts in (read, asked)
    ]
    class_ids = [[class_id for class_id, _ in scene] for scene in pairs]
    places = [sorted(place for _, place in scene) for scene in pairs]
    color = read.color == asked.color
    return {
        "entity": class_ids[0] == class_ids[1],
        "place": places[0] == places[1],
        "color": color,
        "joint": pairs[0] == pairs[1] and color,
    }


def _placed(facts: Facts, level: Level) -> list[tuple[Entity, str]]:
    return [(entity, emoji_scenes.place(entity, level)) for entity in facts.entities]
