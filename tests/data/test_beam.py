"""The Beam pipeline writes what one process reads: same documents, same order, same refusals."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.data import beam_ingest, open_documents, source_ranges
from rag_mm.memory.store import record


@pytest.fixture
def image_folder(tmp_path):
    """Fifty records, two of them bad."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(50):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9 + i % 3, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"p{i}.png")
        lines.append(json.dumps({"image": f"p{i}.png", "caption": f"number {i}", "url": f"u{i}"}))
    (folder / "p7.png").write_bytes(b"")
    lines[30] = "{"
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def read(spec: str) -> tuple[list[bytes], list[tuple[str, str]]]:
    """The good records as bytes, and the bad ones with their reasons."""
    items = list(open_documents.open_documents(spec).read(0))
    good = [record.to_bytes(record.Record(i.document, {})) for i in items if i.document is not None]
    return good, [(i.reject.name, i.reject.reason) for i in items if i.reject is not None]


def test_ranges_are_the_whole_source(image_folder, tmp_path):
    """Without Beam: what the workers do, one after the other."""
    (tmp_path / "out").mkdir()
    ranges = source_ranges.split(open_documents.open_documents(str(image_folder)), 16)
    assert [(each.start, each.stop) for each in ranges] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    found = [
        beam_ingest.write_range(each, str(image_folder), str(tmp_path / "out")) for each in ranges
    ]
    beam_ingest.write_summary(found[::-1], str(tmp_path / "out"), max_bad=0.1)
    good, bad = read(str(image_folder))
    assert read(str(tmp_path / "out")) == (good, [])
    counts = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert (counts["read"], counts["added"], counts["ok"]) == (50, 48, True)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [(r["name"], r["reason"]) for r in map(json.loads, lines)] == bad


def test_a_range_without_a_good_record_leaves_no_file(tmp_path):
    (tmp_path / "captions.jsonl").write_text("{\n{\n")
    (tmp_path / "out").mkdir()
    found = beam_ingest.write_range(
        source_ranges.Range(0, 0, 2), str(tmp_path), str(tmp_path / "out")
    )
    assert found.added == 0 and len(found.rejects) == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tar_is_a_range(tmp_path):
    from rag_mm.data import webdataset

    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(bytes(10240))
    source = webdataset.TarSource(sorted(tmp_path.glob("*.tar")))
    first, second = source_ranges.split(source, 16)
    assert first.start == 0 and first.stop == second.start < second.stop


def test_without_beam_the_extra_is_named(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    words = ["memory", "ingest", f"--documents={image_folder}", f"--out={tmp_path / 'out'}"]
    assert main.main(words) == 2
    assert "[beam]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_of_beams_local_runner(image_folder, tmp_path, capsys):
    """Skipped where Beam is not installed: it does not fit beside the lock (docs/beam.md)."""
    pytest.importorskip("apache_beam")
    words = ["memory", "ingest", f"--documents={image_folder}", "--records-per-file=8", "--json"]
    out = tmp_path / "out"
    assert main.main([*words, f"--out={out}", "--max-bad=0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 48
    assert len(list(pathlib.Path(out).glob("*.arrayrecord"))) == 7
    assert read(str(out))[0] == read(str(image_folder))[0]
    with pytest.raises(UserError, match="in the way"):
        beam_ingest.ingest(str(image_folder), out)
    assert main.main([*words, f"--out={tmp_path / 'few'}"]) == 2
    assert "rejects.jsonl lists the others" in capsys.readouterr().err
