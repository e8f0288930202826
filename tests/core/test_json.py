"""JSON of any origin is finite, shallow and of the expected types, or refused in one sentence."""

import os

import pytest

from rag_mm.core import checks, costs, files
from rag_mm.core.errors import UserError
from rag_mm.train import train_metrics

BAD = {
    "deep lists": b"[" * 100_000,
    "deep but closed": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "overflow": b'{"a": 1e400}',
    "a huge integer": b'{"a": ' + b"9" * 400 + b"}",
    "digits without end": b'{"a": ' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "nothing": b"",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_json_is_one_sentence(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json is not readable JSON") as caught:
        files.read_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 400


def test_sound_json_is_read():
    text = '{"a": [1, -2.5e-300, 18446744073709551616, null, true, "\\u00e9"], "b": {}}'
    expected = {"a": [1, -2.5e-300, 1 << 64, None, True, "é"], "b": {}}
    assert files.parse_json(text) == files.parse_json(text.encode()) == expected


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match="a device or a pipe"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "b.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="a device or a pipe"):
        files.read_json(tmp_path / "b.json")


@pytest.mark.parametrize("text", ["[]", "null", "1", "{}", '{"names": {}}', '{"names": null}'])
def test_an_object_of_other_types_is_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is (not a JSON object|damaged: its 'names')"):
        files.read_object(tmp_path / "a.json", names=list)


@pytest.mark.parametrize(
    "values",
    [{"a": 1 << 40}, {"a": {"b": [1, -(1 << 40)]}}, {"a": [0] * 2000}, {"a": [[1 << 63]]}],
)
def test_sizes_beyond_any_model_are_refused(values):
    with pytest.raises(UserError, match="where: a"):
        checks.sizes(values, "where")


TIMES = [*BAD.values(), b"[]", b'{"parts": 1}', b'{"parts": [1, {}, {"wall_seconds": "x"}]}']


@pytest.mark.parametrize("data", TIMES)
def test_damaged_times_stop_nothing(tmp_path, data):
    (tmp_path / costs.FILE_NAME).write_bytes(data)
    empty = costs.summary(tmp_path)
    assert (empty["wall_seconds"], empty["parts"], empty["machine"]) == (0, 0, None)
    with costs.timed(tmp_path):
        pass
    assert costs.summary(tmp_path)["parts"] == 1


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    lines = [b'{"step": 1, "loss": 2.5, "name": "x"}', *BAD.values(), b'{"step": "1"}', b"[1]"]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 2, "loss": 1.5}']))
    expected = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]
    assert train_metrics.read_log(tmp_path / "log.jsonl") == expected
    os.mkfifo(tmp_path / "pipe")
    assert train_metrics.read_log(tmp_path / "pipe") == []
