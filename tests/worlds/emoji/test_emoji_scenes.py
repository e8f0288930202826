"""What a scene is: its facts, its picture, its captions, and who gets to see which."""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter

import grain
import numpy as np
import pytest

from rag_mm.core import code_grids
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, class_splits, emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Entity, Facts, Level

EASY, FREE = LEVELS["easy"], LEVELS["free"]
WITH_PAIRS = [level for level in LEVELS.values() if level.max_entities == 2]
ON_GRID = [level for level in LEVELS.values() if level.step % 4 == 0]
every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=lambda level: level.name)
CORNERS = ["top left", "top right", "bottom left", "bottom right"]


def told(facts, level):
    """What a caption can say, without an order of the entities."""
    entities = [(entity.class_id, emoji_scenes.place(entity, level)) for entity in facts.entities]
    return (*sorted(entities), facts.color)


def test_places_are_thirds_of_what_is_free():
    assert [
        emoji_scenes.place(Entity(0, 24, r, c), EASY) for r in (0, 8) for c in (0, 8)
    ] == CORNERS
    assert emoji_scenes.place(Entity(0, 16, 8, 8), FREE) == "center"
    assert emoji_scenes.place(Entity(0, 16, 3, 12), FREE) == "top right"
    assert emoji_scenes.place(Entity(0, 16, 4, 11), FREE) == "center"
    assert emoji_scenes.place(Entity(0, 32, 0, 0), Level("whole", sizes=(32,))) == "center"


def test_colors_are_far_from_each_other_and_from_a_card():
    palette = np.array([*emoji_scenes.COLORS.values(), art.WHITE], float) / 255
    distance = np.sqrt(((palette[:, None] - palette) ** 2).mean(-1))
    assert len(emoji_scenes.COLORS) == 8
    assert distance[~np.eye(9, dtype=bool)].min() > 0.2


@every_level
def test_a_class_has_32_configurations_that_words_tell_apart(level):
    for class_id in range(0, art.load_art().num_classes, 40):
        own = emoji_scenes.configurations(level, class_id)
        assert len({told(facts, level) for facts in own}) == 32
        assert {facts.entities[0].class_id for facts in own} == {class_id}


def test_easy_is_four_places_times_eight_colors():
    own = emoji_scenes.configurations(EASY, 3)
    assert {emoji_scenes.place(facts.entities[0], EASY) for facts in own} == set(CORNERS)
    assert {facts.color for facts in own} == set(emoji_scenes.COLORS)


@pytest.mark.parametrize("level", WITH_PAIRS, ids=lambda level: level.name)
def test_half_are_pairs_of_one_split_that_do_not_overlap(level):
    split = class_splits.split_of()
    for class_id in range(0, art.load_art().num_classes, 40):
        pairs = [f for f in emoji_scenes.configurations(level, class_id) if len(f.entities) == 2]
        assert len(pairs) == 16
        for facts in pairs:
            one, two = facts.entities
            assert one.size == two.size == 16
            assert split[one.class_id] == split[two.class_id] and one.class_id != two.class_id
            assert max(abs(one.row - two.row), abs(one.column - two.column)) >= 16


@every_level
def test_no_facts_are_shared_between_roles_or_classes(level):
    seen = Counter()
    for split in ("rare_seen", "tune", "test"):  # No scene shows classes of two splits.
        for role in emoji_scenes.ROLES:
            source = emoji_scenes.Scenes(level.name, class_splits.classes(split), role)
            seen.update(told(source.facts(i), level) for i in range(len(source)))
    assert max(seen.values()) == 1


@pytest.mark.parametrize("level", WITH_PAIRS, ids=lambda level: level.name)
def test_of_two_classes_only_one_invites_the_other(level):
    invited = {
        (facts.entities[0].class_id, facts.entities[1].class_id)
        for class_id in class_splits.classes("held_out")
        for facts in emoji_scenes.configurations(level, int(class_id))
        if len(facts.entities) == 2
    }
    assert not invited & {(two, one) for one, two in invited}


@pytest.mark.parametrize(
    ("level_name", "digest"),
    [
        ("easy", "e4497bd5f9334704"),
        ("pairs", "acf3365bd597e0eb"),
        ("sizes", "3b785c64dd65046a"),
        ("off_grid", "b0ef129550326303"),
        ("free", "09b248798736ff5e"),
    ],
)
def test_configurations_never_change(level_name, digest):
    """The id of a document stands for its facts in every memory and table ever made from it."""
    level = LEVELS[level_name]
    own = [emoji_scenes.configurations(level, i) for i in range(0, art.load_art().num_classes, 40)]
    assert hashlib.sha256(repr(own).encode()).hexdigest()[:16] == digest


def test_partners_in_a_smaller_world_never_change():
    level = LEVELS["pairs"]
    ids = class_splits.classes("held_out")[:8].tolist()
    own = [emoji_scenes.configurations(level, i, class_share=0.35) for i in ids]
    assert hashlib.sha256(repr(own).encode()).hexdigest()[:16] == "7296f11c06ee31c1"


def test_each_level_relaxes_one_thing_of_the_one_before():
    assert list(emoji_scenes.RELAXES) == list(LEVELS)[1:]
    ladder = [dataclasses.asdict(level) for level in LEVELS.values()]
    for name, level in LEVELS.items():
        assert level.name == name
    relaxed = [
        {key for key in before if key != "name" and before[key] != after[key]}
        for before, after in itertools.pairwise(ladder)
    ]
    # Two cards of 24 pixels do not fit, so that pairs bring their own size.
    assert relaxed == [{"max_entities", "sizes"}, {"sizes"}, {"step"}, {"card"}]


def test_counts_of_roles_and_of_rare_classes():
    for split, expected in (("common", (16, 12, 4)), ("rare_seen", (16, 3, 4))):
        ids = class_splits.classes(split)[:5]
        counts = tuple(
            len(emoji_scenes.Scenes("easy", ids, role)) / 5 for role in emoji_scenes.ROLES
        )
        assert counts == expected


def test_seen_scenes_show_no_held_out_class():
    held_out = set(class_splits.classes("held_out").tolist())
    for level_name in LEVELS:
        source = emoji_scenes.open_documents(f"{level_name}/common+rare_seen/train")
        shown = {e.class_id for i in range(len(source)) for e in source.facts(i).entities}
        assert not shown & held_out


def test_an_easy_picture_is_a_card_on_a_plain_color():
    image = emoji_scenes.render(Facts((Entity(7, 24, 8, 0),), "blue"), EASY)
    np.testing.assert_array_equal(image[8:, :24], art.load_art().card(7, 24))
    assert (image[:8] == emoji_scenes.COLORS["blue"]).all()
    assert (image[:, 24:] == emoji_scenes.COLORS["blue"]).all()


def test_a_cut_out_lets_the_color_through():
    image = emoji_scenes.render(Facts((Entity(7, 16, 3, 5),), "cyan"), FREE)
    clear = art.load_art().rgba(7, 16)[..., 3] == 0
    assert clear.any() and (image[3:19, 5:21][clear] == emoji_scenes.COLORS["cyan"]).all()


@every_level
def test_every_cut_out_and_card_is_visible(level):
    for class_id in range(0, art.load_art().num_classes, 40):
        for facts in emoji_scenes.configurations(level, class_id):
            image = emoji_scenes.render(facts, level).astype(float) / 255
            for e in facts.entities:
                box = image[e.row : e.row + e.size, e.column : e.column + e.size]
                difference = box - np.array(emoji_scenes.COLORS[facts.color]) / 255
                assert np.sqrt((difference**2).mean()) > 0.06


def _code_mask(facts, level):
    """The codes of a grid of 8x8 that show an entity."""
    pixels = emoji_scenes.entity_mask(facts, level)
    return code_grids.mask_of_pixels(pixels, ((8, 8),)).reshape(8, 8)


def test_the_mask_covers_every_code_that_a_box_touches():
    mask = _code_mask(Facts((Entity(7, 24, 0, 8),), "red"), EASY)
    expected = np.zeros((8, 8), bool)
    expected[:6, 2:] = True
    np.testing.assert_array_equal(mask, expected)
    pair = Facts((Entity(7, 16, 0, 3), Entity(8, 16, 16, 13)), "red")
    mask = _code_mask(pair, FREE)
    plain = np.array(emoji_scenes.COLORS["red"])
    drawn = (emoji_scenes.render(pair, FREE) != plain).any(-1).reshape(8, 4, 8, 4).any((1, 3))
    assert not (drawn & ~mask).any() and mask.sum() == 4 * 5 + 4 * 5


@pytest.mark.parametrize("level", ON_GRID, ids=lambda level: level.name)
def test_cards_on_the_grid_cover_whole_codes(level):
    for class_id in range(0, art.load_art().num_classes, 40):
        for facts in emoji_scenes.configurations(level, class_id):
            mask = _code_mask(facts, level)
            assert 16 * mask.sum() == sum(entity.size**2 for entity in facts.entities)
            shown = emoji_scenes.render(facts, level).reshape(8, 4, 8, 4, 3).swapaxes(1, 2)
            assert (shown[~mask] == emoji_scenes.COLORS[facts.color]).all()


def test_a_caption_says_everything_or_drops_facts():
    facts = Facts((Entity(7, 24, 0, 8),), "red")
    name = art.load_art().names[7][0]
    whole = f"{name} at the top right on a red background"
    assert emoji_scenes.caption(facts, EASY, None, drop=False) == whole
    rng = np.random.default_rng(0)
    heard = Counter(emoji_scenes.caption(facts, EASY, rng) for _ in range(3000))
    shares = {text: count / 3000 for text, count in heard.items()}
    assert shares == pytest.approx(
        {
            name: 1 / 2,
            f"{name} at the top right": 1 / 6,
            f"{name} on a red background": 1 / 6,
            whole: 1 / 6,
        },
        abs=0.03,
    )


def test_a_caption_of_a_pair_names_both():
    pair = Facts((Entity(7, 16, 0, 0), Entity(8, 16, 16, 16)), "red")
    first, second = (art.load_art().names[i][0] for i in (7, 8))
    for level in WITH_PAIRS:
        assert emoji_scenes.caption(pair, level, None, drop=False) == (
            f"little {first} at the top left and little {second} at the bottom right on a red background"
        )


@pytest.mark.parametrize(
    ("entity", "told"),
    [
        (Entity(7, 24, 0, 4), "at the top"),
        (Entity(7, 24, 1, 4), "near the top"),
        (Entity(7, 16, 8, 16), "at the right"),
        (Entity(7, 16, 8, 13), "near the right"),
    ],
)
def test_a_caption_says_what_is_little_and_what_is_only_near(entity, told):
    little = "little " if entity.size == 16 else ""
    name = art.load_art().names[7][0]
    said = emoji_scenes.caption(
        Facts((entity,), "red"), emoji_scenes.LEVELS["off_grid"], None, drop=False
    )
    assert said == f"{little}{name} {told} on a red background"


def test_documents_depend_on_seed_and_index_alone():
    source = emoji_scenes.open_documents("free/held_out/test")
    again = emoji_scenes.Scenes("free", class_splits.classes("held_out"), "test")
    for i in (0, 17, len(source) - 1):
        assert source[i].id == again[i].id and source[i].text == again[i].text
        np.testing.assert_array_equal(source[i].image, again[i].image)
        np.testing.assert_array_equal(source[i].image, emoji_scenes.render(source.facts(i), FREE))
        assert re.fullmatch(rf"free-{source.class_ids[i]:04d}-\d\d", source[i].id)
    other = emoji_scenes.Scenes("free", class_splits.classes("held_out"), "test", seed=1)
    assert any(source[i].id == other[i].id and source[i].text != other[i].text for i in range(99))
    assert len({source.caption(3, draw) for draw in range(20)}) > 1
    assert source.caption(3, 0) == source[3].text


def test_scenes_are_a_grain_source_with_unique_ids():
    source = emoji_scenes.Scenes("easy", class_splits.classes("rare_seen")[:20], "train")
    loaded = [document.id for document in grain.MapDataset.source(source).shuffle(seed=0)]
    assert len(set(loaded)) == len(source) == 60


def test_several_levels_take_turns_in_every_class_and_share_nothing_between_roles():
    ids = class_splits.classes("held_out")[:10]
    sources = [
        emoji_scenes.Scenes(tuple(emoji_scenes.LEVELS), ids, role) for role in emoji_scenes.ROLES
    ]
    assert {level.name for level in sources[2].levels} == set(emoji_scenes.LEVELS)
    for source in sources:
        assert len(source.levels) == len(source)
        alone = {name: emoji_scenes.Scenes(name, ids, "test") for name in emoji_scenes.LEVELS}
        for i in (0, len(source) // 2, len(source) - 1):
            level = source.levels[i]
            assert source[i].id.startswith(f"{level.name}-")
            assert source.facts(i) in emoji_scenes.configurations(level, int(source.class_ids[i]))
            np.testing.assert_array_equal(
                source.image(i), emoji_scenes.render(source.facts(i), alone[level.name].levels[0])
            )
    # The id is level, class, configuration: no role has a configuration of another, at any level.
    shown = [source[i].id.partition("-")[2] for source in sources for i in range(len(source))]
    assert len(set(shown)) == len(shown)
    with pytest.raises(UserError, match="no level 'hard'"):
        emoji_scenes.Scenes(("easy", "hard"), ids, "test")


@pytest.mark.parametrize("levels", [("off_grid", "free"), tuple(LEVELS)], ids="+".join)
def test_no_picture_is_shown_in_two_roles_even_if_two_levels_place_it_alike(levels):
    ids = class_splits.classes("common")[:150]
    pictures = {}
    for role in emoji_scenes.ROLES:
        source = emoji_scenes.Scenes(levels, ids, role)
        pictures[role] = {source.image(i).tobytes() for i in range(len(source))}
        assert len(source) > 0.95 * len(emoji_scenes.Scenes(levels[0], ids, role))
    assert not pictures["test"] & (pictures["train"] | pictures["memory"])
    assert not pictures["train"] & pictures["memory"]


def test_a_seed_in_the_name_of_documents_gives_another_world():
    source = emoji_scenes.open_documents("easy/test/memory/3")
    np.testing.assert_array_equal(np.unique(source.class_ids), class_splits.classes("test", seed=3))
    assert set(source.class_ids) != set(emoji_scenes.open_documents("easy/test/memory").class_ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("easy/common/train/x", "level/split/role/seed"),
        ("easy/common", "write level/split/role"),
        ("hard/common/train", "no level 'hard'"),
        ("easy/unseen/train", "no split 'unseen'"),
        ("easy/common/valid", "no role 'valid'"),
    ],
)
def test_a_wrong_name_of_documents_is_explained(spec, message):
    with pytest.raises(UserError, match=message):
        emoji_scenes.open_documents(spec)
