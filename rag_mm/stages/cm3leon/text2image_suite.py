"""Suite `text2image`: pictures drawn from captions, a single sample and the best of several re-ranked."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rag_mm.core import image_files, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_files, open_documents, token_documents
from rag_mm.decode import reranking, tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import frechet, kernel_distance, statistics
from rag_mm.memory.writing import stream
from rag_mm.stages.cm3leon import instruction_suites
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.shared import frozen, train_retriever
from rag_mm.worlds.emoji import emoji_scenes

_COCO = "coco-captions"
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Text2ImageConfig(instruction_suites.SuiteConfig):
    """How pictures are drawn.

    Attributes:
        stage: stage whose decoder draws; None for `decoder`.
        docs: documents that the caption retrieves.
        limit: number of captions, the first ones; None for all.
        temperature: of sampling.
        seed: of sampling.
        best_of: pictures drawn for each caption. The retriever ranks them by their similarity to it; 1 draws
            the single sample alone.
    """

    temperature: float = 1.0
    best_of: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.best_of < 1:
            raise UserError(f"best_of is {self.best_of}; give at least 1.")


class Captioned(NamedTuple):
    """A caption and its own picture, uint8 [H, W, 3]."""

    caption: str
    picture: np.ndarray


def evaluate(
    workdir: epath.PathLike, spec: str, config: Text2ImageConfig = Text2ImageConfig()
) -> dict[str, Any]:
    """Draws a picture for every caption of some data, and compares with the data's own pictures.

    Args:
        workdir: the run.
        spec: a document source as for `rag-mm memory build`, `coco-captions:DIR`, of which the first caption
            of a picture is drawn, or `scenes:LEVEL/SPLIT[+SPLIT]/ROLE[/SEED]`.
        config: how pictures are drawn.

    Returns:
        `single`: of the first sample, `frechet_own` and `kid`, the Fréchet and the cubic kernel's distance (x
        1,000) of the run's own retriever's unit features, and `clip_score`, 100 times its cosine of caption
        and picture. The same keys at the top are those of the best of `best_of`, which that cosine chose.
        `n`, `best_of`, `rejected`, the name and reason of each bad record, `stage` and `docs`.

    Raises:
        UserError: there is no such run, stage or data, or fewer than two records are good.
    """
    run = run_folder.open_run(workdir)
    stage = config.stage or decoder_record.STAGE
    asker = instruction_suites.open_asker(run, stage, config.docs)
    encoder = train_retriever.load_encoder(run.workdir)
    rejects: list[stream.Reject] = []
    read = itertools.islice(_read(spec, encoder.image_size, rejects), config.limit)
    rows: dict[str, list[np.ndarray]] = {"text": [], "real": [], "single": [], "best": []}
    with progress.track("text2image", total=0) as bar:
        while chunk := list(itertools.islice(read, _BATCH)):
            done = sum(map(len, rows["text"]))
            for name, vectors in _draw(chunk, asker, encoder, config, config.seed + done).items():
                rows[name].append(vectors)
            bar.update(done + len(chunk))
    if sum(map(len, rows["text"])) < 2:
        first = f"; the first bad one is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
        raise UserError(f"{spec} has too few good captions with pictures; 2 are needed{first}")
    found = {name: np.concatenate(parts) for name, parts in rows.items()}
    return {
        **_figures(found, "best"),
        "single": _figures(found, "single"),
        "n": len(found["text"]),
        "best_of": config.best_of,
        "rejected": [[reject.name, reject.detail] for reject in rejects],
        "stage": stage,
        "docs": asker.docs,
    }


def _read(spec: str, image_size: int, rejects: list[stream.Reject]) -> Iterator[Captioned]:
    """Captions with their pictures; bad records are added to `rejects`."""
    if spec.startswith(f"{_COCO}:"):
        files = instruction_files.InstructionFiles(spec)
        for asked in files.read(image_size):
            yield Captioned(asked.answers[0], asked.picture)
        rejects += files.rejects
        return
    if spec.startswith(instruction_suites.SCENES):
        scenes = emoji_scenes.open_documents(spec.removeprefix(instruction_suites.SCENES))
        source = stream.as_source(scenes)
    else:
        source = open_documents.open_documents(spec)
    for item in source.read(0):
        document = item.document
        if item.reject is not None:
            rejects.append(item.reject)
        elif document is not None and document.image is not None and document.text.strip():
            yield Captioned(document.text, document.image)


def _draw(
    chunk: Sequence[Captioned],
    asker: instruction_suites.Asker,
    encoder: frozen.FrozenRetriever,
    config: Text2ImageConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """Unit vectors float32 [B, D] of captions, of their own pictures, of first samples and of the best."""
    texts, tokenizer = [each.caption for each in chunk], asker.image_tokenizer
    captions = encoder.encode_text(texts)
    layout, vocabulary = asker.generator.layout, tokenizer.vocabulary
    ids = [token_documents.encode_text(vocabulary, text, layout.max_text_len)[0] for text in texts]
    docs: list[list[token_documents.Example]] = [[] for _ in chunk]
    if asker.docs:
        docs = asker.find(captions)
    sampling = Sampling(config.temperature)

    def generate(seeds: np.ndarray) -> np.ndarray:
        codes = tasks.generate_codes(asker.generator, ids, docs, seeds, sampling).codes
        return encoder.encode_image(tokenizer.decode(codes))

    def score(vectors: np.ndarray) -> np.ndarray:
        return (vectors * captions).sum(axis=1)

    drawn = reranking.best_of(generate, score, len(chunk), config.best_of, seed)
    real = np.stack([image_files.fit(each.picture, encoder.image_size) for each in chunk])
    return {
        "text": captions,
        "real": encoder.encode_image(real),
        "single": drawn.items[0],
        "best": drawn.best,
    }


def _figures(rows: dict[str, np.ndarray], which: str) -> dict[str, Any]:
    drawn, real, texts = rows[which], rows["real"], rows["text"]
    return {
        "frechet_own": frechet.frechet_distance(drawn, real),
        "kid": kernel_distance.kernel_distance(drawn, real)["polynomial"],
        "clip_score": statistics.mean(100 * (drawn * texts).sum(axis=1)),
    }
