"""A memory that a run is given as a folder, in place of building its own from the world's documents.

It stays where it is. The stage `memory` records its place, version and fingerprint, and the codes of the
run's image tokenizer unless the memory has them.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
from etils import epath

from rag_mm.core import files, image_files, progress
from rag_mm.core.errors import UserError
from rag_mm.memory import shared_encoding
from rag_mm.memory.index import protocol
from rag_mm.memory.model_protocols import ImageTokenizer
from rag_mm.memory.retrieval_memory import CodeReader, Memory
from rag_mm.memory.store import manifest
from rag_mm.stages import multiprocess
from rag_mm.stages.shared import coded_corpus, frozen

RECORD, CODES = "given.json", "codes.npy"
_MAX_KEPT = 4096  # Images whose codes are kept once computed.


@dataclasses.dataclass(frozen=True)
class MemoryRecord:
    """What the stage recorded.

    Attributes:
        folder: of the memory, absolute.
        version: the version of the memory that the run was trained with.
        fingerprint: of that version.
        tokenizer: fingerprint of the run's image tokenizer.
    """

    folder: str
    version: int
    fingerprint: str
    tokenizer: str


def find(path: epath.PathLike) -> epath.Path:
    """The folder of a memory, absolute: `path` itself, or that of a run which built one.

    Raises:
        UserError: there is none.
    """
    path = epath.Path(manifest.local_folder(path)).resolve()
    for folder in (path, path / "memory"):
        if (folder / manifest.CURRENT).exists():
            return folder
        if (record := read(folder)) is not None:
            raise UserError(f"{path} was given its memory, too; give {record.folder} itself.")
    raise UserError(f"{path} holds no memory; rag-mm memory build makes one.")


def fingerprint_of(path: epath.PathLike, version: int | None) -> str:
    """The fingerprint of a version of a memory, None for the newest; raises UserError if there is none."""
    return Memory.open(find(path), version=version).fingerprint


def take(
    path: epath.PathLike,
    version: int | None,
    encoder: frozen.FrozenRetriever,
    image_tokenizer: frozen.FrozenTokenizer,
    stage_dir: epath.Path,
) -> Memory | None:
    """Records a given memory in `stage_dir`, and encodes its images unless it has the codes.

    All processes call it and encode; only the leader, to which the opened memory is returned, does the rest.

    Raises:
        UserError: another retriever built the memory, or a document has no image.
    """
    if not multiprocess.is_leader():
        shared_encoding.follow(encoder, image_tokenizer)
        return None
    with shared_encoding.lead(encoder, image_tokenizer) as (_, shared):
        memory = Memory.open(find(path), version=version)
        _check(memory, encoder, image_tokenizer)
        assert shared is not None
        stored = memory.code_reader(image_tokenizer.fingerprint)
        if stored is None or (stored(np.arange(len(memory))) == protocol.MISSING).any():
            files.write_array(stage_dir / CODES, _encode_all(memory, shared))
    record = MemoryRecord(
        str(memory.path), memory.manifest.version, memory.fingerprint, image_tokenizer.fingerprint
    )
    files.write_json(stage_dir / RECORD, dataclasses.asdict(record))
    return open_recorded(stage_dir, encoder)


def read(stage_dir: epath.Path) -> MemoryRecord | None:
    """What `take` recorded; None where the stage built a memory."""
    path = stage_dir / RECORD
    if not path.exists():
        return None
    kinds = {"folder": str, "version": int, "fingerprint": str, "tokenizer": str}
    values = files.read_object(path, **kinds)
    return MemoryRecord(**{name: values[name] for name in kinds})


def open_recorded(stage_dir: epath.Path, encoder: frozen.FrozenRetriever) -> Memory:
    """Opens the recorded version, with the codes of the run's image tokenizer.

    Raises:
        UserError: the memory is not at its place any more, or is another one; or the codes are damaged.
    """
    record = _need(stage_dir)
    memory = Memory.open(record.folder, encoder, version=record.version)
    if memory.fingerprint != record.fingerprint:
        raise UserError(
            f"Version {record.version} of {record.folder} is not the memory that {stage_dir.parent} was "
            "given; put that one back."
        )
    if (stage_dir / CODES).exists():
        codes = files.read_array(stage_dir / CODES)
        if codes.dtype != np.int32 or codes.ndim != 2 or len(codes) != len(memory):
            raise UserError(f"{stage_dir / CODES} is damaged; train the stage memory again.")
        memory.attach_codes(lambda rows: codes[rows])
    elif (stored := memory.code_reader(record.tokenizer)) is not None:
        memory.attach_codes(stored)
    return memory


def open_newest(
    stage_dir: epath.Path,
    encoder: frozen.FrozenRetriever,
    image_tokenizer: frozen.FrozenTokenizer,
) -> Memory:
    """Opens the newest version, to which documents may have been added since; raises as `open_recorded`.

    Codes that neither the memory nor the run has are computed when they are read.
    """
    record = _need(stage_dir)
    # A run from elsewhere may name any memory of this machine.
    progress.say(f"memory: {record.folder}, which the run was given")
    memory = Memory.open(record.folder, encoder)
    if memory.manifest.version == record.version:
        return open_recorded(stage_dir, encoder)
    stored = memory.code_reader(record.tokenizer)
    memory.attach_codes(stored or _encoding_reader(memory, image_tokenizer))
    return memory


def _need(stage_dir: epath.Path) -> MemoryRecord:
    record = read(stage_dir)
    if record is None:
        raise ValueError(f"{stage_dir} was not given a memory")
    # The record may be a stranger's.
    if not (os.path.isabs(record.folder) and os.path.isdir(record.folder)):
        raise UserError(
            f"{record.folder!r} is not a memory; put back the one that {stage_dir.parent} was given."
        )
    return record


def _check(
    memory: Memory, encoder: frozen.FrozenRetriever, image_tokenizer: frozen.FrozenTokenizer
) -> None:
    if memory.manifest.encoder != encoder.fingerprint:
        raise UserError(
            f"{memory.path} was built by another retriever than the run's; give the one that built it, "
            f"--config.retriever.folder={memory.path}/retriever."
        )
    num_lacking = len(memory) - memory.stats()["with_image"]
    if num_lacking:
        raise UserError(
            f"{num_lacking:,} of the {len(memory):,} documents of {memory.path} have no image, which "
            "training reads; remove them first (rag-mm memory remove)."
        )
    if memory.manifest.image_size < image_tokenizer.image_size:
        progress.say(
            f"memory: its images have {memory.manifest.image_size} pixels and are scaled up to "
            f"{image_tokenizer.image_size}; build it with --tokenizer for larger ones"
        )


def _encode_all(memory: Memory, image_tokenizer: ImageTokenizer) -> np.ndarray:
    """The codes of every row's first picture, int32 [R, N], encoded by all processes."""
    at_once, parts = image_tokenizer.image_batch * jax.process_count(), []
    with progress.track("memory", total=len(memory)) as bar:
        for start in range(0, len(memory), at_once):
            rows = range(start, min(start + at_once, len(memory)))
            images = [coded_corpus.memory_image(memory, row) for row in rows]
            pixels = np.stack(
                [image_files.fit(each, image_tokenizer.image_size) for each in images]
            )
            parts.append(image_tokenizer.encode(pixels))
            bar.update(rows.stop)
    return np.concatenate(parts)


def _encoding_reader(memory: Memory, image_tokenizer: frozen.FrozenTokenizer) -> CodeReader:
    """Encodes the first pictures of rows, int [...], when asked: int32 [..., N], -1 for a missing one."""

    @functools.lru_cache(maxsize=_MAX_KEPT)
    def encode(row: int) -> np.ndarray:
        image = None if row == protocol.MISSING else memory.document(row).image
        if image is None:
            return np.full(image_tokenizer.num_codes, protocol.MISSING, np.int32)
        return image_tokenizer.encode(image_files.fit(image, image_tokenizer.image_size)[None])[0]

    def read(rows: np.ndarray) -> np.ndarray:
        codes = np.empty((*rows.shape, image_tokenizer.num_codes), np.int32)
        for place, row in np.ndenumerate(rows):
            codes[place] = encode(int(row))
        return codes

    return read
