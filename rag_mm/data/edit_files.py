"""Public data of picture pairs: edits as InstructPix2Pix has them, and feature maps as ControlNet has them.

InstructPix2Pix (Brooks et al. 2023, github.com/timothybrooks/instruct-pix2pix, edit_dataset.py):
`seeds.json`, a list of [folder, [seed, ..]]; each folder has `prompt.json` with `edit` and, of the pictures,
the captions `input` and `output`, and for each seed the pictures `SEED_0.jpg` and `SEED_1.jpg`, before and
after.

ControlNet (Zhang et al. 2023, github.com/lllyasviel/ControlNet, its page on training): `prompt.json`, whose
lines are `{"source": FILE, "target": FILE, "prompt": TEXT}`; the source is the feature map.
"""

import functools
from collections.abc import Iterator
from typing import Any

from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, instruction_records, sources
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.data.instruction_records import Found

SEEDS, PROMPT = "seeds.json", "prompt.json"


def read_edits(path: epath.Path, image_size: int) -> Iterator[Found]:
    """Items of the task `edit`, one for each seed; also with the fields `input` and `output` where given.

    Raises:
        UserError: `seeds.json` is missing or no list.
    """
    file = instruction_records.find_file(path, SEEDS)
    entries = files.read_json(file)
    if not isinstance(entries, list):
        raise UserError(f"{file} is not a list of [folder, [seed, ..]]; give the published file.")
    for number, entry in enumerate(entries, start=1):
        if not _is_entry(entry):
            bad = captions.BadRecord("not-json", "is not [folder, [seed, ..]].")
            yield bad.as_reject(f"entry {number} of {SEEDS}")
            continue
        name, seeds = entry
        for seed in seeds:
            make = functools.partial(_edit, file.parent, name, seed, image_size)
            yield instruction_records.attempt(f"{name}/{seed}", make)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    seeds = entry[1]
    return isinstance(seeds, list) and all(isinstance(s, str | int) for s in seeds)


def _edit(folder: epath.Path, name: str, seed: str | int, image_size: int) -> InstructionItem:
    data, _ = sources.read_inside(folder, f"{name}/{PROMPT}")
    prompt = instruction_records.fields_of(captions.parse_json(data))
    fields = {"edit": instruction_records.text_of(prompt, "edit")}
    for key in ("input", "output"):
        if key in prompt:
            fields[key] = instruction_records.text_of(prompt, key)
    before, after = (
        instruction_records.read_picture(folder, f"{name}/{seed}_{which}.jpg", image_size)
        for which in (0, 1)
    )
    return InstructionItem(f"{name}/{seed}", "edit", fields, after, (before,))


def read_feature_maps(path: epath.Path, image_size: int) -> Iterator[Found]:
    """Items of the task `structure`, one for each line; the feature is named by the optional key `feature`.

    Raises:
        UserError: `prompt.json` is missing.
    """
    file = instruction_records.find_file(path, PROMPT)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                make = functools.partial(_map, file.parent, number, line, image_size)
                yield instruction_records.attempt(f"line {number}", make)


def _map(folder: epath.Path, number: int, line: bytes, image_size: int) -> InstructionItem:
    record = instruction_records.fields_of(captions.parse_json(line))
    feature = instruction_records.text_of(record, "feature") if "feature" in record else "structure"
    fields = {"caption": instruction_records.text_of(record, "prompt"), "feature": feature}
    source, target = (
        instruction_records.read_picture(
            folder, instruction_records.text_of(record, key), image_size
        )
        for key in ("source", "target")
    )
    return InstructionItem(str(number), "structure", fields, target, (source,))
