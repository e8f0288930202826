"""Document ablations: other documents than the retrieved ones (docs/papers/ra_cm3.md#evaluation)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rag_mm.data import token_documents
from rag_mm.decode.tasks import Docs
from rag_mm.stages.shared import frozen
from rag_mm.worlds.emoji.emoji_scenes import Facts


@dataclasses.dataclass(frozen=True, eq=False)
class AblationInputs:
    """Inputs of the document ablations.

    Attributes:
        facts: facts of the Q test documents.
        docs: documents retrieved for each of them, best last.
        memory: the R memory rows as examples.
        memory_facts: facts of the memory rows.
        image_tokenizer: the decoder's image tokenizer.
    """

    facts: Sequence[Facts]
    docs: Sequence[Docs]
    memory: Sequence[token_documents.Example]
    memory_facts: Sequence[Facts]
    image_tokenizer: frozen.FrozenTokenizer


# (inputs, rng) -> the documents of each query, and the facts that its image should show, or None for the
# facts of its caption.
Ablation = Callable[[AblationInputs, np.random.Generator], tuple[list[Docs], list[Facts] | None]]


def oracle_documents(
    inputs: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """Random documents that show the query's entities, by turns; as many as were retrieved."""
    rows_of: dict[int, list[int]] = {}
    for row, row_facts in enumerate(inputs.memory_facts):
        for entity in row_facts.entities:
            rows_of.setdefault(entity.class_id, []).append(row)

    def sample(facts: Facts, count: int) -> list[token_documents.Example]:
        # In a small world, no document may show the partner in a pair.
        available = [e.class_id for e in facts.entities if e.class_id in rows_of]
        turns = [available[i % len(available)] for i in range(count if available else 0)]
        return [inputs.memory[int(rng.choice(rows_of[class_id]))] for class_id in turns]

    queries = zip(inputs.facts, inputs.docs, strict=True)
    return [sample(facts, len(docs)) for facts, docs in queries], None


def counterfactual_documents(
    inputs: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The captions of the retrieved documents, with the images of another query's documents.

    A generated image should show the other query's entities, at the places and on the background of its own
    caption: it should follow the documents' images, not the names.
    """
    order = rng.permutation(len(inputs.facts))
    docs: list[Docs] = []
    expected = []
    for i, facts in enumerate(inputs.facts):
        other = next((j for j in order if _shares_no_class(facts, inputs.facts[j])), i)
        pairs = zip(inputs.docs[i], inputs.docs[other], strict=False)
        docs.append([doc.with_codes(donor.codes) for doc, donor in pairs])
        entities = zip(facts.entities, inputs.facts[other].entities, strict=True)
        swapped = [dataclasses.replace(e, class_id=donor.class_id) for e, donor in entities]
        expected.append(dataclasses.replace(facts, entities=tuple(swapped)))
    return docs, expected


def image_only_documents(
    inputs: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The retrieved documents without their captions."""
    return [[doc.with_text(()) for doc in docs] for docs in inputs.docs], None


def text_only_documents(
    inputs: AblationInputs, rng: np.random.Generator
) -> tuple[list[Docs], list[Facts] | None]:
    """The retrieved documents with plain gray images, since every document in a sequence has an image."""
    size = inputs.image_tokenizer.image_size
    blank = inputs.image_tokenizer.encode(np.full((1, size, size, 3), 128, np.uint8))[0]
    return [[doc.with_codes(blank) for doc in docs] for docs in inputs.docs], None


def _shares_no_class(facts: Facts, other: Facts) -> bool:
    """Whether both scenes have the same number of classes and none in common."""
    classes, other_classes = ({e.class_id for e in scene.entities} for scene in (facts, other))
    return len(classes) == len(other_classes) and not classes & other_classes


ABLATIONS: dict[str, Ablation] = {
    ablation.__name__: ablation
    for ablation in (
        oracle_documents,
        counterfactual_documents,
        image_only_documents,
        text_only_documents,
    )
}
