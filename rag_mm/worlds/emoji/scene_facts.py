"""Reads the facts of a scene from its pixels alone, by analysis through synthesis.

Of all scenes that a level can draw, the reading is the one nearest to the image in least squares;
only the colour around cut-outs is voted beforehand. On it stands the headline figure: joint
accuracy, entity and place and colour all right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.worlds.emoji import art, classes, emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level

_PALETTE = np.array(list(emoji_scenes.COLORS.values()), np.float32) / 255  # [8, 3]
_COLOR_NAMES = tuple(emoji_scenes.COLORS)
_BATCH = 32  # Images read at a time; bounds the table of distances to about 64 MB.
_BLOCK = 4  # Side of the blocks a box is first compared by; 4 numbers sum up the 48 of each.


@dataclasses.dataclass(frozen=True, eq=False)
class _Templates:
    """All classes at one size: their pixels [num_classes, D] and their blocks [num_classes, F]."""

    pixels: np.ndarray
    blocks: np.ndarray


def read(images: np.ndarray, levels: Sequence[Level]) -> list[Facts]:
    """Reads pictures of several levels, uint8 [B, S, S, 3], each knowing its own: B facts."""
    found: dict[int, Facts] = {}
    for level in dict.fromkeys(levels):
        rows = [row for row, own in enumerate(levels) if own == level]
        found |= zip(rows, Scorer(level).read(images[rows]), strict=True)
    return [found[row] for row in range(len(levels))]


class Scorer:
    """Reads scenes of one level; knows all classes, held out or not.

    A scene is a colour, one or two boxes that do not overlap, and a class in each. Inside a box
    the picture hides the colour, so the squared error of a scene is that of the plain colour less
    a gain for each box, and the gain of a box asks for its best class whatever stands elsewhere.
    Hence the best scene is found among colours times single boxes and pairs of boxes.

    What takes time is the best class of each box (370 boxes where the step is 1). So a box is first
    given an optimistic gain, from a lower bound on its distance to any class (`_blocks`). Then the
    boxes of the most promising scene get their true gain, and after them the boxes of every scene
    that still promises more than the best scene whose gain is true. No box that could be in the
    reading is left out: it is that of a full search. On originals 1.5 boxes an image are compared
    pixel by pixel, on pure noise all of them.
    """

    def __init__(self, level: Level):
        """Reads scenes of `level`. Templates are drawn as needed; in `free` they take 150 MB."""
        self._level = level
        boxes = [(size, *corner) for size in level.sizes for corner in level.corners(size)]
        numbers = {box: i for i, box in enumerate(boxes)}
        small, nothing = min(level.sizes), len(boxes)
        singles = [(i, nothing) for i in range(nothing)]
        apart = emoji_scenes.disjoint_corners(level) if level.max_entities == 2 else ()
        pairs = [(numbers[small, *one], numbers[small, *two]) for one, two in apart if one < two]
        self._boxes = np.array(boxes)  # [O, 3]: size, row, column
        self._choices = np.array(singles + pairs)  # [H, 2]; box number O is no box.
        # A second entity must explain half of what the faintest one that a level shows would.
        least = classes.DISTINCT_RMS**2 * small**2 * 3 / 2
        self._costs = np.repeat([0, least], [len(singles), len(pairs)])
        self._templates: dict[tuple[int, int | None], _Templates] = {}

    def read(self, images: np.ndarray) -> list[Facts]:
        """Reads the facts of each image: uint8 [B, S, S, 3] to B facts.

        Pairs come in reading order of their boxes, for no pixel tells whose scene it is.
        """
        result: list[Facts] = []
        for start in range(0, len(images), _BATCH):
            some = images[start : start + _BATCH].astype(np.float32) / 255
            result += self._read_cards(some) if self._level.card else self._read_cutouts(some)
        return result

    def _read_cards(self, images: np.ndarray) -> list[Facts]:
        """Cards look the same on every colour, so all colours are tried."""
        return self._search(images, np.arange(len(_PALETTE)), None)

    def _read_cutouts(self, images: np.ndarray) -> list[Facts]:
        """Cut-outs let the colour through: their templates are drawn on the one that is voted."""
        votes = _vote_color(images)
        result: dict[int, Facts] = {}
        for color in np.unique(votes):
            chosen = np.flatnonzero(votes == color)
            found = self._search(images[chosen], np.array([color]), int(color))
            result.update(zip(chosen.tolist(), found, strict=True))
        return [result[i] for i in range(len(images))]

    def _search(self, images: np.ndarray, colors: np.ndarray, drawn_on: int | None) -> list[Facts]:
        """The best scene of each image, [B, S, S, 3], on any of C `colors`."""
        errors = ((images[:, :, :, None] - _PALETTE[colors]) ** 2).sum(-1)  # [B, S, S, C]
        plain, inside = errors.sum((1, 2)), self._inside(errors)
        gains = np.zeros((len(images), len(self._boxes) + 1, len(colors)))
        gains[:, :-1] = inside - self._bounds(images, drawn_on)[:, :, None]
        is_true = np.zeros(gains.shape[:2], bool)
        is_true[:, -1] = True
        class_ids = np.zeros(gains.shape[:2], np.int64)
        one, two = self._choices.T

        def rate() -> tuple[np.ndarray, np.ndarray]:
            """Scores of all scenes, [B, H, C], and the same with -inf where a gain is a promise."""
            scores = gains[:, one] + gains[:, two] - self._costs[:, None] - plain[:, None]
            known = is_true[:, one] & is_true[:, two]
            return scores, np.where(known[:, :, None], scores, -np.inf)

        def make_true(wanted: np.ndarray) -> None:
            """Gives the boxes of the wanted choices, bool [B, H], their true gains."""
            image, choice = np.nonzero(wanted)
            chosen = np.zeros_like(is_true)
            chosen[image[:, None], self._choices[choice]] = True
            image, box = np.nonzero(chosen & ~is_true)
            class_ids[image, box], distances = self._nearest(images, image, box, drawn_on)
            gains[image, box] = inside[image, box] - distances[:, None]
            is_true[image, box] = True

        promised = rate()[0].max(-1)  # [B, H]
        make_true(promised == promised.max(1, keepdims=True))
        promised, reached = rate()
        make_true(promised.max(-1) > reached.max((1, 2))[:, None])
        _, reached = rate()
        best = reached.reshape(len(images), -1).argmax(1)
        choices, on = np.divmod(best, len(colors))
        return [
            self._facts(self._choices[choice], class_ids[i], _COLOR_NAMES[colors[on[i]]])
            for i, choice in enumerate(choices)
        ]

    def _facts(self, boxes: np.ndarray, class_ids: np.ndarray, color: str) -> Facts:
        real = [box for box in boxes if box < len(self._boxes)]
        entities = (Entity(int(class_ids[box]), *self._boxes[box].tolist()) for box in real)
        return Facts(tuple(entities), color)

    def _inside(self, values: np.ndarray) -> np.ndarray:
        """Sums within each box: [B, S, S, C] to [B, O, C]."""
        sums = []
        for size in self._level.sizes:
            rows, columns = np.array(self._level.corners(size)).T
            sums.append(_window_sums(values, size)[:, rows, columns])
        return np.concatenate(sums, axis=1)

    def _bounds(self, images: np.ndarray, drawn_on: int | None) -> np.ndarray:
        """No class is nearer to what a box holds: [B, S, S, 3] to squared distances [B, O]."""
        blocks = _blocks(images)
        result = []
        for size in self._level.sizes:
            held = _tile(blocks, size, np.array(self._level.corners(size)))
            templates = self._template(size, drawn_on).blocks
            _, distances = _nearest_row(held.reshape(-1, held.shape[-1]), templates)
            result.append(distances.reshape(held.shape[:2]))
        return np.concatenate(result, axis=1)

    def _nearest(
        self, images: np.ndarray, image: np.ndarray, box: np.ndarray, drawn_on: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Class and squared distance nearest to what box `box[n]` of image `image[n]` holds."""
        class_ids, distances = np.zeros(len(box), np.int64), np.zeros(len(box))
        sizes, rows, columns = self._boxes[box].T
        for size in self._level.sizes:
            these = sizes == size
            views = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
            held = views[image[these], rows[these], columns[these]].transpose(0, 2, 3, 1)
            templates = self._template(size, drawn_on).pixels
            class_ids[these], distances[these] = _nearest_row(
                held.reshape(-1, templates.shape[1]), templates
            )
        return class_ids, distances

    def _template(self, size: int, drawn_on: int | None) -> _Templates:
        """All classes as cards (`drawn_on` None), or cut out on a colour of the palette."""
        if (size, drawn_on) not in self._templates:
            pictures = art.load_art()
            if drawn_on is None:
                drawn = pictures.cards(size)
            else:
                color = emoji_scenes.COLORS[_COLOR_NAMES[drawn_on]]
                drawn = art.lay_on(pictures.drawn(size), color)
            scaled = drawn.astype(np.float32) / 255
            blocks = _tile(_blocks(scaled), size, np.zeros((1, 2), np.int64))[:, 0]
            self._templates[size, drawn_on] = _Templates(scaled.reshape(len(scaled), -1), blocks)
        return self._templates[size, drawn_on]


def _nearest_row(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point, [P, D], the nearest of `rows`, [N, D], and its squared distance."""
    scores = (rows**2).sum(-1) - 2 * points @ rows.T  # [P, N]
    nearest = scores.argmin(-1)
    return nearest, scores[np.arange(len(points)), nearest] + (points**2).sum(-1)


def _blocks(images: np.ndarray) -> np.ndarray:
    """Sums up the block that starts at each pixel: [B, S, S, 3] to [B, S - 3, S - 3, 4].

    The first three numbers are the means of the colours times 4, the last the root of the squared
    deviations from them. Two blocks are never nearer to each other than these are: means and
    deviations are orthogonal, and two deviations differ by at least the difference of their norms.
    """
    means = _window_sums(images, _BLOCK) / _BLOCK
    squares = _window_sums((images**2).sum(-1), _BLOCK)
    spread = np.sqrt(np.maximum(squares - (means**2).sum(-1), 0))
    return np.concatenate([means, spread[..., None]], axis=-1).astype(np.float32)


def _tile(blocks: np.ndarray, size: int, corners: np.ndarray) -> np.ndarray:
    """The blocks that fill a box of `size` at each of O corners: [B, ...] to [B, O, F]."""
    offsets = np.arange(0, size - _BLOCK + 1, _BLOCK)
    rows = corners[:, 0, None, None] + offsets[:, None]
    columns = corners[:, 1, None, None] + offsets
    return blocks[:, rows, columns].reshape(len(blocks), len(corners), -1)


def _window_sums(values: np.ndarray, size: int) -> np.ndarray:
    """Sums over the square that starts at each pixel: [B, S, S, ...], S smaller by size - 1."""
    whole = np.zeros((len(values), *(side + 1 for side in values.shape[1:3]), *values.shape[3:]))
    whole[:, 1:, 1:] = values.cumsum(1, np.float64).cumsum(2)
    upper, lower = whole[:, :-size], whole[:, size:]
    return lower[:, :, size:] - lower[:, :, :-size] - upper[:, :, size:] + upper[:, :, :-size]


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
    return [(entity, emoji_scenes.place(entity, level)) for entity in facts.entities]
