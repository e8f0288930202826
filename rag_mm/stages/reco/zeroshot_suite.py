"""Suite `zeroshot`: pictures of named classes by frozen towers, with the help of a memory and without."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, image_files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import labelled, public_text
from rag_mm.eval import statistics, zeroshot
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.report import refinements
from rag_mm.stages.reco import embed_documents, refinement, train_fusion
from rag_mm.stages.shared import frozen

FUSIONS = ("fusion", "document_fusion")
PAGE = "eval/zeroshot.html"
_SHOWN = 8  # hits on either side of a query
_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A run's towers, its fusion and a memory, loaded."""

    encoder: frozen.FrozenRetriever
    memory: retrieval_memory.Memory
    refiner: refinement.Refiner

    def class_rows(self, names: Sequence[str], templates: Sequence[str] | None) -> np.ndarray:
        """A unit row for each class, float32 [C, D], the mean over templates.

        Towers of public weights take CLIP's templates where none are given, those trained here the
        bare name, since captions that look alike find each other by what they share.
        """
        is_public = isinstance(self.encoder.vocabulary, public_text.PublicTokenizer)
        chosen = templates or (zeroshot.TEMPLATES if is_public else zeroshot.NAME_ONLY)
        rows = self.encoder.encode_text(zeroshot.prompts(names, chosen))
        return zeroshot.ensemble(rows.reshape(len(names), len(chosen), -1))

    def refine(self, modality: str, rows: np.ndarray, refine: str) -> np.ndarray:
        """Unit rows, refined where `refine` covers the modality."""
        if not refinement.is_refined(modality, refine):
            return rows
        return self.refiner.refine(modality, rows)


def load(
    workdir: epath.PathLike, memory: epath.PathLike | None = None, num_neighbors: int | None = None
) -> Classifier:
    """Loads a run whose fusion is trained.

    Args:
        workdir: the run.
        memory: looked up instead of the run's own; it must hold embeddings of the same towers.
        num_neighbors: k, if not the one that the fusion was trained with.

    Raises:
        UserError: no such run or memory, no trained fusion in it, or a memory of other towers.
    """
    run = run_folder.open_run(workdir)
    name = next((name for name in FUSIONS if run.manifest(name) is not None), None)
    if name is None:
        raise UserError(
            f"{workdir} has no trained fusion ({' or '.join(FUSIONS)}): train a preset of "
            "configs/reco.py there."
        )
    trained = train_fusion.load_fusion(run.finished_stage(name))
    opened, encoder = embed_documents.open_memory(memory or _own_memory(run))
    if encoder.fingerprint != trained.towers:
        raise UserError(
            f"{opened.path} holds embeddings of other towers ({encoder.fingerprint[:12]}) than the "
            f"fusion was trained on ({trained.towers[:12]}); build it with --retriever={workdir}."
        )
    search = trained.search
    if num_neighbors is not None:
        if num_neighbors < 1:
            raise UserError(f"{num_neighbors} neighbors are too few; give at least 1.")
        search = dataclasses.replace(search, num_neighbors=num_neighbors)
    bank = refinement.Bank.of_memory(opened)
    fusions = refinement.learned_fusions(trained.mounted)
    return Classifier(encoder, opened, refinement.Refiner(fusions, bank, search))


def _own_memory(run: run_folder.Run) -> epath.PathLike:
    if run.manifest("memory") is not None:
        return run.finished_stage("memory")
    return epath.Path(run.config["document_pairs"]["memory"])


def evaluate(
    workdir: epath.PathLike,
    pictures: labelled.Labelled,
    *,
    refine: str = "both",
    memory: epath.PathLike | None = None,
    num_neighbors: int | None = None,
    templates: Sequence[str] | None = None,
    max_shown: int = 12,
) -> dict[str, Any]:
    """Classifies pictures, and writes a page that shows what was retrieved.

    Args:
        workdir: a run whose fusion is trained.
        pictures: with their classes.
        refine: none, image, text or both.
        memory, num_neighbors: see `load`.
        templates: of prompts; see `Classifier.class_rows`.
        max_shown: most pictures on the page, evenly spaced.

    Returns:
        accuracy, ci95, n, frozen (accuracy without the memory), gain (the difference), its gain_ci95,
        paired picture by picture, refine, classes, memory_rows, rejected, page.

    Raises:
        UserError: see `load`; no picture could be read; or there is no such `refine`.
    """
    refinement.is_refined("image", refine)
    found = load(workdir, memory, num_neighbors)
    rows, class_ids, kept = _embed(pictures, found.encoder, max_shown)
    names = found.class_rows(pictures.class_names, templates)
    refined = found.refine("image", rows, refine), found.refine("text", names, refine)
    before, after = rows @ names.T, refined[0] @ refined[1].T
    hits = {"frozen": zeroshot.ranks(before, class_ids) == 0}
    hits["refined"] = zeroshot.ranks(after, class_ids) == 0
    page = epath.Path(workdir) / PAGE
    shown = np.array(list(kept))
    scores = (before[shown], after[shown])
    cards = _cards(found, pictures.class_names, class_ids, kept, rows[shown], names, scores)
    title = (
        f"Zero-shot, refine={refine}: {hits['frozen'].mean():.1%} to {hits['refined'].mean():.1%}"
    )
    files.write_atomic(page, refinements.render(title, cards).encode("utf-8", "replace"))
    frozen_share = float(hits["frozen"].mean())
    result: dict[str, Any] = statistics.accuracy(hits["refined"])
    gain = {"gain": result["accuracy"] - frozen_share}
    if len(rows) > 1:
        difference = statistics.paired_difference(hits["refined"], hits["frozen"])
        gain["gain_ci95"] = difference["ci95"]
    return {
        **result,
        "frozen": frozen_share,
        **gain,
        "refine": refine,
        "classes": len(pictures.class_names),
        "memory_rows": len(found.memory),
        "rejected": [list(reject) for reject in pictures.rejects],
        "page": str(page),
    }


def _embed(
    pictures: labelled.Labelled, encoder: frozen.FrozenRetriever, max_kept: int
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Unit rows float32 [Q, D], classes int64 [Q], and some of the pictures, evenly spaced, by number.

    Pictures are read once, some at a time.
    """
    parts, class_ids = [], []
    kept: dict[int, np.ndarray] = {}
    stride = 1
    batch: list[np.ndarray] = []

    def close() -> None:
        rows = model_protocols.encode_query(
            encoder, text=None, image=np.stack(batch), document=None, view="image"
        )
        parts.append(rows)
        batch.clear()

    for number, (pixels, class_id) in enumerate(pictures.read()):
        if number % stride == 0:
            kept[number] = pixels
        if len(kept) > max_kept:  # How many there are is known at the end only.
            stride *= 2
            kept = {each: kept[each] for each in kept if each % stride == 0}
        # Prepared as the memory's own pictures are, whatever their size.
        batch.append(image_files.fit(pixels, encoder.image_size))
        class_ids.append(class_id)
        if len(batch) == _BATCH:
            close()
    if batch:
        close()
    if not parts:
        reason = f" ({pictures.rejects[0][1]})" if pictures.rejects else ""
        raise UserError(f"There is no picture that can be read{reason}.")
    return np.concatenate(parts), np.array(class_ids), kept


def _cards(
    found: Classifier,
    class_names: Sequence[str],
    class_ids: np.ndarray,
    shown: dict[int, np.ndarray],
    rows: np.ndarray,
    names: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray],
) -> list[refinements.Card]:
    by_image = found.refiner.search.find(found.refiner.bank, "image", rows).ids
    by_text = found.refiner.search.find(found.refiner.bank, "text", names).ids
    cards = []
    for n, (i, picture) in enumerate(shown.items()):
        own = int(class_ids[i])
        before, after = (_guess(part[n], own, class_names) for part in scores)
        guessed = int(scores[1][n].argmax())
        cards.append(
            refinements.Card(
                picture=picture,
                truth=class_names[own],
                before=before,
                after=after,
                image_neighbors=_hits(found.memory, by_image[n]),
                text_query=class_names[guessed],
                text_neighbors=_hits(found.memory, by_text[guessed]),
            )
        )
    return cards


def _guess(scores: np.ndarray, own: int, names: Sequence[str]) -> refinements.Guess:
    best = int(scores.argmax())
    return refinements.Guess(names[best], float(scores[best]), float(scores[own]), best == own)


def _hits(memory: retrieval_memory.Memory, ids: np.ndarray) -> list[refinements.Pair]:
    documents = [memory.document(int(row)) for row in ids[:_SHOWN] if row >= 0]
    return [refinements.Pair(document.image, document.text) for document in documents]
