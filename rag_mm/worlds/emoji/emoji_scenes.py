"""Scenes composed from the emoji art, with exact facts, captions and masks.

A scene is a pure function of (level, class, configuration, seed). Levels increase in difficulty: `easy`
places one entity as an opaque white card on the code grid, each next level relaxes one constraint, and `free`
places one or two cut-out entities anywhere.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, class_splits, classes

COLORS = {
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "red": (210, 30, 40),
    "green": (30, 150, 60),
    "blue": (30, 60, 210),
    "yellow": (240, 210, 50),
    "cyan": (70, 200, 220),
    "pink": (235, 100, 200),
}
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
NUM_CONFIGURATIONS = 32
ROLES = {"memory": slice(0, 16), "train": slice(16, 28), "test": slice(28, 32)}
NUM_RARE_TRAIN = 3
LICENSE = "OFL-1.1"


@dataclasses.dataclass(frozen=True)
class Level:
    """A difficulty level; all lengths in pixels.

    Attributes:
        sizes: possible side lengths of an entity's square box; pairs use the smallest.
        step: box offsets are multiples of it.
        card: whether an entity is drawn as an opaque white card, or cut out along its alpha.
        max_entities: 1 or 2; with 2, half of the configurations show a pair.
    """

    name: str
    image_size: int = 32
    sizes: tuple[int, ...] = (24,)
    step: int = 8
    card: bool = True
    max_entities: int = 1

    def corners(self, size: int) -> tuple[tuple[int, int], ...]:
        """All (row, column) offsets of a box of `size`, in row-major order."""
        offsets = range(0, self.image_size - size + 1, self.step)
        return tuple((row, column) for row in offsets for column in offsets)


# With step 8, cards of 16 or 24 pixels always cover whole 4-pixel codes, and every offset of a size has a
# distinct place name.
LEVELS = {
    "easy": Level("easy"),
    "pairs": Level("pairs", sizes=(16,), max_entities=2),
    "sizes": Level("sizes", sizes=(16, 24), max_entities=2),
    "off_grid": Level("off_grid", sizes=(16, 24), step=1, max_entities=2),
    "free": Level("free", sizes=(16, 24), step=1, card=False, max_entities=2),
}
# What each level relaxes compared with the previous one.
RELAXES = {
    "pairs": "two entities, hence cards of 16 pixels",
    "sizes": "cards of 16 or 24 pixels",
    "off_grid": "cards off the code grid",
    "free": "no card",
}


@dataclasses.dataclass(frozen=True)
class Entity:
    """A class drawn in a square box; row and column are those of its top left pixel."""

    class_id: int
    size: int
    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """The complete description of a scene. The first entity is the class it was created for."""

    entities: tuple[Entity, ...]
    color: str


def place(entity: Entity, level: Level) -> str:
    """The place of an entity in words: `top left`, `top`, ..., `center`, ..., `bottom right`."""
    span = level.image_size - entity.size
    row, column = (
        int(2 * offset / span + 0.5) if span else 1 for offset in (entity.row, entity.column)
    )
    return " ".join(filter(None, (ROWS[row], COLUMNS[column]))) or "center"


def configurations(
    level: Level, class_id: int, seed: int = 0, class_share: float = 1.0
) -> tuple[Facts, ...]:
    """The 32 scenes of a class, all different in place, color or partner.

    If one size on a grid gives exactly 32 (as in `easy`: 4 places x 8 colors), these are all of them.
    Otherwise they are sampled, half of them pairs if the level has pairs. A partner comes from the same
    split, of which `class_share` is kept. Of two classes at most one chooses the other as a partner, so a
    pair of classes occurs in the scenes of only one of them. No class is drawn on a color that makes it
    invisible.
    """
    return _configurations(level, class_id, seed, class_share)


@functools.lru_cache(maxsize=8192)
def _configurations(
    level: Level, class_id: int, seed: int, class_share: float
) -> tuple[Facts, ...]:
    boxes = [(size, *corner) for size in level.sizes for corner in level.corners(size)]
    if level.max_entities == 1 and len(boxes) * len(COLORS) == NUM_CONFIGURATIONS:
        return tuple(
            Facts((Entity(class_id, *box),), color)
            for box, color in itertools.product(boxes, COLORS)
        )
    rng = make_rng(f"configurations of {level.name}", seed, class_id)
    num_pairs = NUM_CONFIGURATIONS // 2 if level.max_entities == 2 else 0
    unique: dict[tuple[object, ...], Facts] = {}
    while len(unique) < NUM_CONFIGURATIONS:
        if len(unique) < NUM_CONFIGURATIONS - num_pairs:
            facts = _sample_single(level, class_id, rng)
        else:
            facts = _sample_pair(level, class_id, _same_split(class_id, seed, class_share), rng)
        # Scenes must differ in what captions state; otherwise a hit could be the answer itself.
        stated = [(entity.class_id, place(entity, level)) for entity in facts.entities]
        unique.setdefault((*stated, facts.color), facts)
    return tuple(unique.values())


@functools.cache
def disjoint_corners(level: Level) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    """All ordered pairs of offsets at which boxes of the smallest size do not overlap."""
    size = min(level.sizes)
    return tuple(
        (one, two)
        for one, two in itertools.product(level.corners(size), repeat=2)
        if max(abs(one[0] - two[0]), abs(one[1] - two[1])) >= size
    )


def _sample_single(level: Level, class_id: int, rng: np.random.Generator) -> Facts:
    size = level.sizes[rng.integers(len(level.sizes))]
    colors = visible_colors(level, class_id)
    color = colors[rng.integers(len(colors))]
    corners = level.corners(size)
    return Facts((Entity(class_id, size, *corners[rng.integers(len(corners))]),), color)


def _same_split(class_id: int, seed: int, class_share: float) -> np.ndarray:
    """Ids of the kept classes of a class's own split, ascending."""
    split = class_splits.SPLITS[class_splits.split_of(seed)[class_id]]
    return class_splits.classes(split, seed=seed, share=class_share)


def _sample_pair(
    level: Level, class_id: int, members: np.ndarray, rng: np.random.Generator
) -> Facts:
    size, pairs = min(level.sizes), disjoint_corners(level)
    while True:
        # Partners come from the next half of the cyclic order, so two classes never choose each other.
        ahead = rng.integers(1, (len(members) - 1) // 2 + 1)
        partner = int(members[(np.searchsorted(members, class_id) + ahead) % len(members)])
        visible = visible_colors(level, partner)
        shared = [color for color in visible_colors(level, class_id) if color in visible]
        if shared:
            one, two = pairs[rng.integers(len(pairs))]
            entities = Entity(class_id, size, *one), Entity(partner, size, *two)
            return Facts(entities, shared[rng.integers(len(shared))])


def visible_colors(level: Level, class_id: int) -> tuple[str, ...]:
    """The background colors on which a class can be seen: all of them if it is drawn as a card."""
    return tuple(COLORS) if level.card else _contrasting_colors()[class_id]


@functools.cache
def _contrasting_colors() -> tuple[tuple[str, ...], ...]:
    """For each class, the colors on which its cut-out is visible."""
    drawn = art.load_art().drawn(classes.SMALLEST_SIZE)
    contrast = []
    for color in COLORS.values():
        plain = np.full((*drawn.shape[1:3], 3), color, np.uint8)
        contrast.append(classes.rms_to(art.lay_on(drawn, color), plain))
    visible = np.stack(contrast, axis=1) >= classes.DISTINCT_RMS  # [num_classes, 8]
    return tuple(tuple(itertools.compress(COLORS, row)) for row in visible)


def render(facts: Facts, level: Level) -> np.ndarray:
    """Draws a scene: uint8 [S, S, 3] with S = `level.image_size`."""
    emoji_art = art.load_art()
    image = np.empty((level.image_size, level.image_size, 3), np.uint8)
    image[:] = COLORS[facts.color]
    for entity in facts.entities:
        if level.card:
            tile = emoji_art.card(entity.class_id, entity.size)
        else:
            tile = art.lay_on(emoji_art.rgba(entity.class_id, entity.size), COLORS[facts.color])
        image[_box(entity)] = tile
    return image


def _box(entity: Entity) -> tuple[slice, slice]:
    rows = slice(entity.row, entity.row + entity.size)
    return rows, slice(entity.column, entity.column + entity.size)


def caption(facts: Facts, level: Level, rng: np.random.Generator | None, drop: bool = True) -> str:
    """Describes a scene, for instance `red apple at the top left on a blue background`.

    If the place is stated, an entity of at most half the image side is called `little`, and one that is not
    exactly at the place is `near` it. With `drop`, half of the captions only name the entities, a sixth omit
    the background, a sixth omit the places, and a sixth state everything; names are sampled from the names of
    the class. Without `drop`, everything is stated with first names, and `rng` may be None.

    Raises:
        ValueError: `drop` without `rng`.
    """
    names = [art.load_art().names[entity.class_id] for entity in facts.entities]
    says_place = says_color = True
    if drop:
        if rng is None:
            raise ValueError("Dropping facts at random needs an rng; pass one, or drop=False.")
        names = [(choice[rng.integers(len(choice))],) for choice in names]
        draw = rng.integers(6)
        says_place, says_color = draw in (3, 5), draw in (4, 5)
    parts = [
        _with_place(choice[0], entity, level) if says_place else choice[0]
        for choice, entity in zip(names, facts.entities, strict=True)
    ]
    return " and ".join(parts) + (f" on a {facts.color} background" if says_color else "")


def _with_place(name: str, entity: Entity, level: Level) -> str:
    span = level.image_size - entity.size
    size = "little " if 2 * entity.size <= level.image_size else ""
    where = "near" if span and (2 * entity.row % span or 2 * entity.column % span) else "at"
    return f"{size}{name} {where} the {place(entity, level)}"


def entity_mask(facts: Facts, level: Level) -> np.ndarray:
    """The pixels in the box of any entity: bool [S, S]."""
    covered = np.zeros((level.image_size, level.image_size), bool)
    for entity in facts.entities:
        covered[_box(entity)] = True
    return covered


def make_rng(purpose: str, *key: int) -> np.random.Generator:
    """An independent stream per purpose; without it, NumPy treats (1, 2) and (1, 2, 0) as the same seed."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


def _choose(
    levels: Sequence[Level], class_id: int, role: str, is_rare: bool, seed: int, class_share: float
) -> list[tuple[Level, int]]:
    """Level and configuration number of each scene of a class in one role."""
    order = make_rng("roles", seed, class_id).permutation(NUM_CONFIGURATIONS)
    shown: set[tuple[frozenset[Entity], str]] = set()
    for name, part in ROLES.items():
        numbers = order[part]
        if name == "train" and is_rare:
            numbers = numbers[:NUM_RARE_TRAIN]
        scenes = [
            (levels[(class_id + turn) % len(levels)], int(number))
            for turn, number in enumerate(numbers)
        ]
        if len(levels) > 1:  # The configurations of one level all differ.
            facts = [configurations(level, class_id, seed, class_share)[n] for level, n in scenes]
            keys = [(frozenset(scene.entities), scene.color) for scene in facts]
            scenes = [scene for scene, key in zip(scenes, keys, strict=True) if key not in shown]
            shown |= set(keys)
        if name == role:
            return scenes
    raise ValueError(f"there is no role {role!r}")


class Scenes:
    """Random access to the scenes of some classes in one role, as documents (a Grain source).

    Item i depends only on i and the arguments. Within a level, memory, train and test share no facts.

    Attributes:
        class_ids: int64 [len], the class each item was created for.
        levels: the level of each item, as long as `class_ids`.
        seed: of configurations, roles, captions and splits.
    """

    def __init__(
        self,
        level_names: str | Sequence[str],
        class_ids: np.ndarray,
        role: str,
        seed: int = 0,
        class_share: float = 1.0,
    ):
        """Selects scenes by level and role.

        A class has 16 memory scenes, 12 training scenes (3 if it is rare) and 4 test scenes. Several levels
        alternate over them, with a different first level per class. Two levels may place a class alike: a
        training scene that shows what a memory scene shows is left out, and so is a test scene that shows
        what either does.

        Args:
            level_names: members of `LEVELS`.
            class_ids: int64 [C].
            role: one of `ROLES`.
            seed: of configurations, roles, captions and splits.
            class_share: fraction of each split from which partners are chosen.

        Raises:
            UserError: unknown level or role.
        """
        level_names = [level_names] if isinstance(level_names, str) else list(level_names)
        for name in level_names:
            if name not in LEVELS:
                raise UserError(f"There is no level {name!r}; choose from {', '.join(LEVELS)}.")
        if role not in ROLES:
            raise UserError(f"There is no role {role!r}; choose from {', '.join(ROLES)}.")
        selection = f"{len(class_ids)} classes, partners of {class_share:g}"
        self._name = f"{'+'.join(level_names)}, {selection}, {role}, seed {seed}"
        self.seed, self._class_share = seed, class_share
        rare = class_splits.split_of(seed) == class_splits.SPLITS.index("rare_seen")
        chosen_levels = [LEVELS[name] for name in level_names]
        scenes = [
            (class_id, level, number)
            for class_id in class_ids
            for level, number in _choose(
                chosen_levels, int(class_id), role, bool(rare[class_id]), seed, class_share
            )
        ]
        self.class_ids = np.array([class_id for class_id, _, _ in scenes], np.int64)
        self.levels = tuple(level for _, level, _ in scenes)
        self._numbers = np.array([number for _, _, number in scenes], np.int64)

    def __repr__(self) -> str:
        return f"Scenes({self._name})"

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, index: int) -> Document:
        """The scene with its caption of index 0; its id is that of `scene_id`."""
        return Document(
            id=self.scene_id(index),
            segments=(Text(self.caption(index, 0)), Image(self.image(index))),
            license=LICENSE,
        )

    def scene_id(self, index: int) -> str:
        """`level-class-configuration` of item `index`."""
        return f"{self.levels[index].name}-{self.class_ids[index]:04d}-{self._numbers[index]:02d}"

    def facts(self, index: int) -> Facts:
        """The facts of item `index`."""
        class_scenes = configurations(
            self.levels[index], int(self.class_ids[index]), self.seed, self._class_share
        )
        return class_scenes[self._numbers[index]]

    def image(self, index: int) -> np.ndarray:
        """The image of item `index`: uint8 [S, S, 3]."""
        return render(self.facts(index), self.levels[index])

    def caption(self, index: int, caption_index: int) -> str:
        """Caption number `caption_index` of item `index`, with facts dropped at random."""
        rng = make_rng(
            "caption", self.seed, self.class_ids[index], self._numbers[index], caption_index
        )
        return caption(self.facts(index), self.levels[index], rng)

    def full_caption(self, index: int) -> str:
        """The caption of item `index` that states all facts."""
        return caption(self.facts(index), self.levels[index], None, drop=False)

    def entity_mask(self, index: int) -> np.ndarray:
        """The pixels in the box of any entity of item `index`: bool [S, S]."""
        return entity_mask(self.facts(index), self.levels[index])


def open_documents(spec: str) -> Scenes:
    """Opens `level/split[+split]/role[/seed]`, for instance `easy/held_out/memory`; the seed defaults to 0.

    Raises:
        UserError: `spec` is malformed, or names an unknown level, split or role.
    """
    parts = spec.split("/")
    seed = parts.pop() if len(parts) == 4 else "0"
    if len(parts) != 3 or not seed.isdecimal():
        raise UserError(
            f"{spec!r} does not name scenes; write level/split/role or level/split/role/seed, "
            "such as easy/common/memory."
        )
    level_name, split_names, role = parts
    class_ids = class_splits.classes(*split_names.split("+"), seed=int(seed))
    return Scenes(level_name, class_ids, role, seed=int(seed))
