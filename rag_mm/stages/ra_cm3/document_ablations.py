"""Documents that a generator is given to see what it takes from them (docs/papers/ra_cm3.md#evaluation)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rag_mm.data import sequences
from rag_mm.decode.tasks import Docs
from rag_mm.stages.shared import frozen
from rag_mm.worlds.emoji.emoji_scenes import Facts


@dataclasses.dataclass(frozen=True, eq=False)
class AblationInputs:
    """Q test documents, their facts and retrieved documents; R rows of the memory and their facts."""

    facts: Sequence[Facts]
    docs: Sequence[Docs]
    memory: Sequence[sequences.Example]
    memory_facts: Sequence[Facts]
    image_tokenizer: frozen.FrozenTokenizer


# (asked, rng) -> the documents of each query, and what pictures should show if not what captions say.
Ablation = Callable[[AblationInputs, np.random.Generator], tuple[list[Docs], list[Facts] | None]]


def oracle_documents(
    asked: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """As many documents as were retrieved, each of an entity that was asked for, in turns, drawn by lot."""
    showing: dict[int, list[int]] = {}
    for row, shown in enumerate(asked.memory_facts):
        for entity in shown.entities:
            showing.setdefault(entity.class_id, []).append(row)

    def draw(facts: Facts, count: int) -> list[sequences.Example]:
        # In a small world a pair's partner may be one that no document shows.
        known = [e.class_id for e in facts.entities if e.class_id in showing]
        turns = [known[i % len(known)] for i in range(count if known else 0)]
        return [asked.memory[int(rng.choice(showing[class_id]))] for class_id in turns]

    pairs = zip(asked.facts, asked.docs, strict=True)
    return [draw(facts, len(docs)) for facts, docs in pairs], None


def counterfactual_documents(
    asked: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The captions of the retrieved documents beside pictures of what another query retrieved.

    A picture should show the other query's entities, where and on what its own caption asks: the picture
    follows the document, not the name.
    """
    order = rng.permutation(len(asked.facts))
    docs: list[Docs] = []
    wanted = []
    for i, own in enumerate(asked.facts):
        other = next((j for j in order if _is_other(own, asked.facts[j])), i)
        pairs = zip(asked.docs[i], asked.docs[other], strict=False)
        docs.append([dataclasses.replace(mine, codes=theirs.codes) for mine, theirs in pairs])
        entities = zip(own.entities, asked.facts[other].entities, strict=True)
        swapped = [dataclasses.replace(mine, class_id=theirs.class_id) for mine, theirs in entities]
        wanted.append(dataclasses.replace(own, entities=tuple(swapped)))
    return docs, wanted


def image_only_documents(
    asked: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The retrieved documents without their captions."""
    return [[dataclasses.replace(doc, text=()) for doc in docs] for docs in asked.docs], None


def text_only_documents(
    asked: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The retrieved documents with plain grey pictures: a row has room for a picture in any case."""
    side = asked.image_tokenizer.config.image_size
    blank = asked.image_tokenizer.encode(np.full((1, side, side, 3), 128, np.uint8))[0]
    return [[dataclasses.replace(doc, codes=blank) for doc in docs] for docs in asked.docs], None


def _is_other(own: Facts, other: Facts) -> bool:
    mine, theirs = ({e.class_id for e in facts.entities} for facts in (own, other))
    return len(mine) == len(theirs) and not mine & theirs


ABLATIONS: dict[str, Ablation] = {
    control.__name__: control
    for control in (
        oracle_documents,
        counterfactual_documents,
        image_only_documents,
        text_only_documents,
    )
}
