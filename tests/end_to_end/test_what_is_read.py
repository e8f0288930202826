"""Records every scene that a stage reads, whole: none trains on a held-out class or measures on a tune one.

An image or a caption is made from the facts of its scene, so `Scenes.facts` sees every one that is read.
"""

import dataclasses
from collections import defaultdict

import pytest

from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages import chain, chain_config
from rag_mm.stages.ra_cm3 import training_sequences
from rag_mm.stages.shared import build_memory
from rag_mm.worlds.emoji import class_splits, emoji_scenes

pytestmark = pytest.mark.slow
SEED = 5
STAGES = ("tokenizer", "retriever", "memory", "neighbors", "decoder", "control")
SEEN, ALL_SEEN_AND_TEST = {"common", "rare_seen"}, {"common", "rare_seen", "test"}
EVERY = {*class_splits.SPLITS}
# What each stage may read in each role; a role that is absent may not be read.
ALLOWED = {
    "tokenizer": {"train": SEEN, "test": {"test"}},
    "retriever": {"train": SEEN, "test": ALL_SEEN_AND_TEST},
    "memory": {"memory": EVERY, "test": ALL_SEEN_AND_TEST},
    # Facts of memory rows, which keep a document from being its own answer.
    "neighbors": {"train": SEEN, "memory": EVERY, "test": EVERY},
    "decoder": {"train": SEEN, "test": {"tune"}},
    "control": {"train": SEEN, "test": {"tune"}},
}


@dataclasses.dataclass
class Recorded:
    """What was read: {stage: {role: classes shown}}, and the memory that sequences were made of."""

    shown: dict = dataclasses.field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    num_memory: dict = dataclasses.field(default_factory=dict)
    stage: str = ""


@pytest.fixture(scope="module")
def recorded():
    """Wraps what reads scenes, and notes which stage is running."""
    made = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        call, start, facts = chain._call, emoji_scenes.Scenes.__init__, emoji_scenes.Scenes.facts
        sequences = training_sequences.SequenceSource.__init__

        def called(run, name, config):
            made.stage = name
            return call(run, name, config)

        def started(source, levels, class_ids, role, *args, **options):
            source.role = role
            start(source, levels, class_ids, role, *args, **options)

        def looked_up(source, index):
            scene = facts(source, index)
            shown = made.shown[made.stage][source.role]
            shown.update(entity.class_id for entity in scene.entities)
            return scene

        def made_sequences(source, config, masking, layout, vocabulary, texts, memory, *rest):
            made.num_memory[made.stage] = len(memory)
            sequences(source, config, masking, layout, vocabulary, texts, memory, *rest)

        patch.setattr(chain, "_call", called)
        patch.setattr(emoji_scenes.Scenes, "__init__", started)
        patch.setattr(emoji_scenes.Scenes, "facts", looked_up)
        patch.setattr(training_sequences.SequenceSource, "__init__", made_sequences)
        yield made


@pytest.fixture(scope="module")
def run(recorded, tmp_path_factory):
    """A chain with pairs, whose partners an id does not name, and a retriever of seen classes."""
    config = chain_config.load("configs/quickstart.py:tiny", {"seed": str(SEED)})
    changes = {
        "stages": list(STAGES),
        "world.levels": ("easy", "pairs"),
        "world.class_share": 0.02,
        "retriever.splits": ("common", "rare_seen"),
        "retriever.batch_size": 16,
    }
    changes |= {f"{stage}.loop.num_steps": 2 for stage in ("tokenizer", "retriever", "decoder")}
    config = chain_config.override(config, changes)
    return chain.run_chain(config, tmp_path_factory.mktemp("read") / "run")


def splits_of(class_ids) -> set[str]:
    """The splits that the classes are in."""
    split = class_splits.split_of(SEED)
    return {class_splits.SPLITS[split[class_id]] for class_id in class_ids}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_scenes_of_its_splits_only(run, recorded, stage):
    read = {role: splits_of(shown) for role, shown in recorded.shown[stage].items()}
    assert set(read) == set(ALLOWED[stage])
    for role, splits in read.items():
        assert splits <= ALLOWED[stage][role], role
    # The recording sees what it should: all that may be read is read.
    assert read["test"] == ALLOWED[stage]["test"]


def test_sequences_are_made_of_memory_documents_that_show_no_held_out_class(run, recorded):
    seen = Memory.open(run.workdir / "memory", version=build_memory.SEEN_VERSION)
    assert recorded.num_memory == {"decoder": len(seen), "control": 0}
    shown = set()
    for name in seen.ids:  # LEVEL-CLASS-CONFIGURATION
        level, class_id, number = name.rsplit("-", 2)
        scenes = emoji_scenes.configurations(
            emoji_scenes.LEVELS[level], int(class_id), SEED, class_share=0.02
        )
        shown |= {entity.class_id for entity in scenes[int(number)].entities}
    assert splits_of(shown) == SEEN
