"""Suite `zeroshot`: zero-shot classification of images with and without RECO's memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, image_files, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import labeled, public_text
from rag_mm.eval import statistics, zeroshot
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.report import refinements
from rag_mm.stages.reco import embed_documents, refinement, train_fusion
from rag_mm.stages.shared import frozen, train_retriever

# The stage's folder, and what it is called in earlier runs.
FUSIONS = ("fusion", *(old for old, new in renames.STAGES.items() if new == "fusion"))
PAGE = "eval/zeroshot.html"
_MAX_HITS = 8  # Hits shown per query.
_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """The towers and the fusion of a run, and a memory."""

    encoder: frozen.FrozenRetriever
    memory: retrieval_memory.Memory
    refiner: refinement.Refiner

    def refine(self, modality: str, rows: np.ndarray, refine: str) -> np.ndarray:
        """Embeddings [Q, D] of length 1, refined if `refine` includes the modality."""
        if not refinement.is_refined(modality, refine):
            return rows
        return self.refiner.refine(modality, rows)


def class_rows(
    encoder: frozen.FrozenRetriever, names: Sequence[str], templates: Sequence[str] | None
) -> np.ndarray:
    """Embeddings of the classes, float32 [C, D] of length 1, as means over prompt templates.

    Without templates, towers with public weights use CLIP's, and towers trained here the bare name, since
    texts from one template retrieve each other for the template's sake.
    """
    is_public = isinstance(encoder.vocabulary, public_text.PublicTokenizer)
    chosen = templates or (zeroshot.TEMPLATES if is_public else zeroshot.NAME_ONLY)
    rows = encoder.encode_text(zeroshot.prompts(names, chosen))
    return zeroshot.ensemble(rows.reshape(len(names), len(chosen), -1))


def load(
    workdir: epath.PathLike, memory: epath.PathLike | None = None, num_neighbors: int | None = None
) -> Classifier:
    """Loads a run with a trained fusion.

    Args:
        workdir: the run.
        memory: a memory to use instead of the run's own; its embeddings must come from the same towers.
        num_neighbors: k, if it differs from training.

    Raises:
        UserError: the run or the memory does not exist, the run has no trained fusion, or the memory's
            embeddings come from other towers.
    """
    run = run_folder.open_run(workdir)
    name = _find_fusion(run)
    if name is None:
        raise UserError(
            f"{workdir} has no trained fusion (stage {FUSIONS[0]}); train a preset of configs/reco.py there, "
            "or give --refine=none, which needs a retriever alone."
        )
    trained = train_fusion.load_fusion(run.finished_stage(name))
    opened, encoder = embed_documents.open_memory(memory or _own_memory(run))
    if encoder.fingerprint != trained.towers:
        raise UserError(
            f"{opened.path} has embeddings of other towers ({encoder.fingerprint[:12]}) than the "
            f"fusion was trained on ({trained.towers[:12]}); build it with --retriever={workdir}."
        )
    search = trained.search
    if num_neighbors is not None:
        if num_neighbors < 1:
            raise UserError(f"{num_neighbors} neighbors are too few; give at least 1.")
        search = dataclasses.replace(search, num_neighbors=num_neighbors)
    bank = refinement.Bank.of_memory(opened)
    fusions = refinement.learned_fusions(trained.model)
    return Classifier(encoder, opened, refinement.Refiner(fusions, bank, search))


def _find_fusion(run: run_folder.Run) -> str | None:
    return next((name for name in FUSIONS if run.manifest(name) is not None), None)


def _own_memory(run: run_folder.Run) -> epath.PathLike:
    if run.manifest("memory") is not None:
        return run.finished_stage("memory")
    pairs = run.config.get("document_pairs")
    if not isinstance(pairs, dict) or "memory" not in pairs:
        raise UserError(f"{run.workdir} has no memory; name one with --memory.")
    return epath.Path(pairs["memory"])


def evaluate(
    workdir: epath.PathLike,
    images: labeled.Labeled,
    *,
    refine: str = "both",
    memory: epath.PathLike | None = None,
    num_neighbors: int | None = None,
    templates: Sequence[str] | None = None,
    max_shown: int = 12,
) -> dict[str, Any]:
    """Classifies images, and writes a page that shows what they retrieved.

    Args:
        workdir: a run with a trained fusion; to refine none, any run with a retriever, such as an imported
            CLIP or SigLIP 2, of which only accuracies are told.
        images: images and their classes.
        refine: what to refine: none, image, text or both.
        memory: see `load`.
        num_neighbors: see `load`.
        templates: prompt templates; see `Classifier.class_rows`.
        max_shown: maximum number of images on the page, evenly spaced.

    Returns:
        `accuracy` with `ci95` and `n`; `frozen` (accuracy without the memory); `gain` (the difference) with
        `gain_ci95` (paired by image; not for a single image); `refine`; `classes` and `memory_rows`
        (numbers); `rejected` (file and reason of each bad image); `page` (path).

    Raises:
        UserError: see `load`; no image could be read; or `refine` is unknown.
    """
    refinement.is_refined("image", refine)
    if refine == "none" and _find_fusion(run_folder.open_run(workdir)) is None:
        return _without_memory(train_retriever.load_encoder(workdir), images, templates)
    classifier = load(workdir, memory, num_neighbors)
    queries, class_ids, shown = _embed(images, classifier.encoder, max_shown)
    names = class_rows(classifier.encoder, images.class_names, templates)
    refined = classifier.refine("image", queries, refine), classifier.refine("text", names, refine)
    before, after = queries @ names.T, refined[0] @ refined[1].T
    hits = {"frozen": zeroshot.ranks(before, class_ids) == 0}
    hits["refined"] = zeroshot.ranks(after, class_ids) == 0
    page = epath.Path(workdir) / PAGE
    indices = np.array(list(shown))
    scores = (before[indices], after[indices])
    cards = _cards(
        classifier, images.class_names, class_ids, shown, queries[indices], names, scores
    )
    title = (
        f"Zero-shot, refine={refine}: {hits['frozen'].mean():.1%} to {hits['refined'].mean():.1%}"
    )
    files.write_atomic(page, refinements.render(title, cards).encode("utf-8", "replace"))
    frozen_share = float(hits["frozen"].mean())
    result: dict[str, Any] = statistics.accuracy(hits["refined"])
    gain = {"gain": result["accuracy"] - frozen_share}
    if len(queries) > 1:
        difference = statistics.paired_difference(hits["refined"], hits["frozen"])
        gain["gain_ci95"] = difference["ci95"]
    return {
        **result,
        "frozen": frozen_share,
        **gain,
        "refine": refine,
        "classes": len(images.class_names),
        "memory_rows": len(classifier.memory),
        "rejected": [list(reject) for reject in images.rejects],
        "page": str(page),
    }


def _without_memory(
    encoder: frozen.FrozenRetriever, images: labeled.Labeled, templates: Sequence[str] | None
) -> dict[str, Any]:
    queries, class_ids, _ = _embed(images, encoder, 1)
    names = class_rows(encoder, images.class_names, templates)
    return {
        **statistics.accuracy(zeroshot.hits_at_1(queries, names, class_ids)),
        "refine": "none",
        "classes": len(images.class_names),
        "rejected": [list(reject) for reject in images.rejects],
    }


def _embed(
    images: labeled.Labeled, encoder: frozen.FrozenRetriever, max_kept: int
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Embeddings float32 [Q, D], classes int64 [Q], and some of the images, evenly spaced, by index.

    Images are read once, in batches.
    """
    parts, class_ids = [], []
    kept: dict[int, np.ndarray] = {}
    stride = 1
    batch: list[np.ndarray] = []

    def encode_batch() -> None:
        rows = model_protocols.encode_query(
            encoder, text=None, image=np.stack(batch), document=None, view="image"
        )
        parts.append(rows)
        batch.clear()

    for index, (pixels, class_id) in enumerate(images.read()):
        if index % stride == 0:
            kept[index] = pixels
        if len(kept) > max_kept:  # The number of images is unknown until the end.
            stride *= 2
            kept = {i: image for i, image in kept.items() if i % stride == 0}
        # Resized in the same way as the memory's images.
        batch.append(image_files.fit(pixels, encoder.image_size))
        class_ids.append(class_id)
        if len(batch) == _BATCH_SIZE:
            encode_batch()
    if batch:
        encode_batch()
    if not parts:
        reason = f" ({images.rejects[0][1]})" if images.rejects else ""
        raise UserError(f"No image could be read{reason}.")
    return np.concatenate(parts), np.array(class_ids), kept


def _cards(
    classifier: Classifier,
    class_names: Sequence[str],
    class_ids: np.ndarray,
    shown: dict[int, np.ndarray],
    queries: np.ndarray,
    names: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray],
) -> list[refinements.Card]:
    refiner = classifier.refiner
    by_image = refiner.search.find(refiner.bank, "image", queries).ids
    by_text = refiner.search.find(refiner.bank, "text", names).ids
    cards = []
    for n, (i, image) in enumerate(shown.items()):
        class_id = int(class_ids[i])
        before, after = (_guess(part[n], class_id, class_names) for part in scores)
        predicted = int(scores[1][n].argmax())
        cards.append(
            refinements.Card(
                picture=image,
                truth=class_names[class_id],
                before=before,
                after=after,
                image_neighbors=_hits(classifier.memory, by_image[n]),
                text_query=class_names[predicted],
                text_neighbors=_hits(classifier.memory, by_text[predicted]),
            )
        )
    return cards


def _guess(scores: np.ndarray, class_id: int, names: Sequence[str]) -> refinements.Guess:
    best = int(scores.argmax())
    return refinements.Guess(
        names[best], float(scores[best]), float(scores[class_id]), best == class_id
    )


def _hits(memory: retrieval_memory.Memory, ids: np.ndarray) -> list[refinements.Pair]:
    documents = [memory.document(int(row)) for row in ids[:_MAX_HITS] if row >= 0]
    return [refinements.Pair(document.image, document.text) for document in documents]
