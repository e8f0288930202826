"""Suite `text2image`: pictures drawn from captions, a single sample and the best of several re-ranked."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rag_mm.convert import inception_format
from rag_mm.core import progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import captioned_documents, token_documents
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.decode import reranking, tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import frechet, kernel_distance, statistics
from rag_mm.memory.writing import stream
from rag_mm.models import inception
from rag_mm.ops import images as image_ops
from rag_mm.stages.cm3leon import instruction_suites
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.shared import frozen, train_retriever
from rag_mm.worlds.emoji import emoji_scenes

_TASK = "caption"
_BATCH, _INCEPTION_BATCH = 64, 16
_SEEN = "inception of "  # Before the name of pictures: their features for the FID.


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
        inception: safetensors file of the FID's Inception; None tells no FID.
    """

    temperature: float = 1.0
    best_of: int = 8
    inception: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.best_of < 1:
            raise UserError(f"best_of is {self.best_of}; give at least 1.")


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
        and picture; with `inception` also `fid`. The same keys at the top are those of the best of `best_of`,
        which that cosine chose.
        `n`, `best_of`, `rejected`, the name and reason of each bad record, `stage` and `docs`.

    Raises:
        UserError: there is no such run, stage or data, the Inception's weights are others, or fewer than two
            records are good.
    """
    see_inception = None if config.inception is None else _load_inception(config.inception)
    run = run_folder.open_run(workdir)
    stage = config.stage or decoder_record.STAGE
    asker = instruction_suites.open_asker(run, stage, config.docs)
    encoder = train_retriever.load_encoder(run.workdir)
    rejects: list[stream.Reject] = []
    read = itertools.islice(_read(spec, asker.image_tokenizer.image_size, rejects), config.limit)
    rows = collections.defaultdict[str, list[np.ndarray]](list)
    with progress.track("text2image", total=0) as bar:
        while chunk := list(itertools.islice(read, _BATCH)):
            done = sum(map(len, rows["text"]))
            captions = encoder.encode_text([each.answers[0] for each in chunk])
            rows["text"].append(captions)
            drawn = _draw(chunk, captions, asker, encoder, config, config.seed + done)
            for name, pictures in drawn.items():
                rows[name].append(encoder.encode_image(pictures))
                if see_inception is not None:
                    rows[_SEEN + name].append(see_inception(pictures))
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


def _read(spec: str, image_size: int, rejects: list[stream.Reject]) -> Iterator[InstructionItem]:
    """Captions with their pictures; bad records are added to `rejects`."""
    if spec.startswith(instruction_suites.SCENES):
        scenes = emoji_scenes.open_documents(spec.removeprefix(instruction_suites.SCENES))
        source: Any = captioned_documents.CaptionedDocuments(scenes)
    else:
        source = captioned_documents.open_items(spec, (_TASK,))
        if source.task != _TASK:
            raise UserError(f"{spec} has no captions to draw; give coco-captions:DIR or documents.")
    yield from source.read(image_size)
    rejects += source.rejects


def _draw(
    chunk: Sequence[InstructionItem],
    captions: np.ndarray,
    asker: instruction_suites.Asker,
    encoder: frozen.FrozenRetriever,
    config: Text2ImageConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """Pictures uint8 [B, S, S, 3]: the captions' own ones, the first samples and the best.

    `captions` are the texts' unit vectors, float32 [B, D].
    """
    tokenizer, layout = asker.image_tokenizer, asker.generator.layout
    ids = [
        token_documents.encode_text(tokenizer.vocabulary, each.answers[0], layout.max_text_len)[0]
        for each in chunk
    ]
    docs: list[list[token_documents.Example]] = [[] for _ in chunk]
    if asker.docs:
        docs = asker.find(captions)
    sampling = Sampling(config.temperature)

    def generate(seeds: np.ndarray) -> np.ndarray:
        codes = tasks.generate_codes(asker.generator, ids, docs, seeds, sampling).codes
        return tokenizer.decode(codes)

    def score(pictures: np.ndarray) -> np.ndarray:
        return (encoder.encode_image(pictures) * captions).sum(axis=1)

    drawn = reranking.best_of(generate, score, len(chunk), config.best_of, seed)
    real = np.stack([each.picture for each in chunk])
    return {"real": real, "single": drawn.items[0], "best": drawn.best}


def _load_inception(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pictures uint8 [B, H, W, 3] to the FID's features, float32 [B, D]."""
    tensors = inception_format.load(path)

    @jax.jit
    def see(tensors: Mapping[str, jax.Array], pictures: np.ndarray) -> jax.Array:
        convolve = inception.convolve_with(tensors)
        return inception.features(convolve, image_ops.to_float(pictures))

    on_device = jax.device_put(tensors)
    return lambda pictures: frozen.in_batches(
        lambda batch: see(on_device, batch), pictures, _INCEPTION_BATCH
    )


def _figures(rows: dict[str, np.ndarray], which: str) -> dict[str, Any]:
    drawn, real, texts = rows[which], rows["real"], rows["text"]
    seen = {}
    if _SEEN + which in rows:
        seen = {"fid": frechet.frechet_distance(rows[_SEEN + which], rows[_SEEN + "real"])}
    return {
        **seen,
        "frechet_own": frechet.frechet_distance(drawn, real),
        "kid": kernel_distance.kernel_distance(drawn, real)["polynomial"],
        "clip_score": statistics.mean(100 * (drawn * texts).sum(axis=1)),
    }
