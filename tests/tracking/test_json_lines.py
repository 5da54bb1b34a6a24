"""metrics.jsonl and completions.jsonl after power cuts, full disks and editors: no resume stops, all is named."""

import json
import os
from types import SimpleNamespace

import pytest

from megatron_opd.config import LogConfig
from megatron_opd.tracking import json_lines
from megatron_opd.tracking.report_run import read_run
from megatron_opd.tracking.tracker import Tracker, build_tracker, read_metrics
from megatron_opd.trainer.completions import Completions

NO_ROWS = {
    "garbage": b"nonsense",
    "NUL bytes": b"\0" * 4096,
    "NUL bytes and half a row": b'\0\0\0ss": 1.0}',
    "binary": bytes(range(256)).replace(b"\n", b""),
    "half a character": '{"step": 2, "text": "ü"}'.encode()[:-3],
    "two rows in one line": b'{"step": 2}{"step": 3}',
    "a list": b"[1, 2]",
    "a number": b"17",
    "null": b"null",
    "without step": b'{"loss": 1.0}',
    "step is a text": b'{"step": "2"}',
    "step is true": b'{"step": true}',
    "step is a fraction": b'{"step": 2.5}',
    "step is infinite": b'{"step": Infinity}',
    "empty": b"",
    "deeply nested": b"[" * 100_000,
    "a number of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
}
NO_METRICS = {
    **NO_ROWS,
    "a value is a text": b'{"step": 2, "loss": "low"}',
    "a value is a list": b'{"step": 2, "a": [1]}',
}


def line(step):
    return json.dumps({"step": step, "time_s": float(step), "loss": 0.5}).encode() + b"\n"


def resumed(run_dir, step, name):
    """Rewinds a file as a resumed run does; returns the log's lines."""
    with build_tracker(LogConfig(), run_dir, num_steps=9, settings={}) as tracker:
        if name == "metrics.jsonl":
            tracker.rewind(step)
            tracker.log({"loss": 1.0}, step + 1)
        else:
            Completions(LogConfig(), run_dir, SimpleNamespace(is_main=True), None, tracker).rewind(step)
    return [line.split("  ", 1)[1] for line in (run_dir / "train.log").read_text().splitlines() if "jsonl" in line]


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("kind", NO_METRICS)
def test_lines_that_are_no_rows_are_put_aside_and_named(tmp_path, name, kind):
    if name == "completions.jsonl" and kind not in NO_ROWS:
        return
    bad = NO_METRICS[kind] + b"\n"
    (tmp_path / name).write_bytes(line(1) + bad + line(2) + line(3) + bad)
    (said,) = resumed(tmp_path, 2, name)
    assert said == f"{tmp_path / name}: moved what is no row to {name}.damaged: line 2, 5"
    assert (tmp_path / name).read_bytes().startswith(line(1) + line(2))
    assert b'step": 3, "time_s": 3.0' not in (tmp_path / name).read_bytes()
    assert (tmp_path / f"{name}.damaged").read_bytes() == bad * 2
    assert resumed(tmp_path, 2, name) == [said]  # once


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("kind", [kind for kind in NO_ROWS if NO_ROWS[kind]])
def test_a_last_line_that_was_cut_is_dropped_and_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(line(1) + line(2) + NO_ROWS[kind])
    (said,) = resumed(tmp_path, 2, name)
    assert said == f"{tmp_path / name}: dropped its last line, which was cut short after {len(NO_ROWS[kind])} bytes"
    assert (tmp_path / name).read_bytes().startswith(line(1) + line(2))
    assert not (tmp_path / f"{name}.damaged").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_last_row_that_only_lacks_its_end_stays(tmp_path, name):
    """As an editor may leave it; a row after the step goes, as it does with an end."""
    (tmp_path / name).write_bytes(line(1) + line(2)[:-1])
    assert resumed(tmp_path, 2, name) == []
    assert (tmp_path / name).read_bytes().startswith(line(1) + line(2))
    (tmp_path / name).write_bytes(line(1) + line(2)[:-1])
    assert resumed(tmp_path, 1, name) == []
    assert line(2) not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize(("every", "at", "end"), [(1, 3, 2), (2, 5, 3), (2, 4, 0), (3, 8, 5)])
def test_rows_that_are_lost_at_the_end_are_said(tmp_path, every, at, end):
    """A file that was cut at the end of a line looks whole: only the step of the checkpoint tells."""
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b"".join(map(line, range(every, end + 1, every))))
    said = []
    log, tracker = LogConfig(completions_every=every), SimpleNamespace(message=said.append)
    Completions(log, tmp_path, SimpleNamespace(is_main=True), None, tracker).rewind(at)
    assert said == [
        f"{path}: there are no rows after step {end - end % every}, though the run is at step {at - at % every}"
    ]
    path.write_bytes(line(at - at % every))
    said.clear()
    Completions(log, tmp_path, SimpleNamespace(is_main=True), None, tracker).rewind(at)
    assert said == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\0", b"\xef\xbb\xbf", os.urandom(999).replace(b"\n", b"")])
def test_files_without_any_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    is_missed = name == "metrics.jsonl"  # which has a row a step; answers are off here
    assert len(resumed(tmp_path, 4, name)) == bool(content) + is_missed
    rows = (tmp_path / name).read_bytes().splitlines()
    assert [json.loads(row)["step"] for row in rows] == ([5] if name == "metrics.jsonl" else [])


def test_other_ends_of_lines_within_texts_are_not_ends(tmp_path):
    text = json.dumps({"step": 1, "response": "a\u2028b\x85c\x0bd"}, ensure_ascii=False).encode() + b"\r\n"
    (tmp_path / "completions.jsonl").write_bytes(text + line(2))
    assert resumed(tmp_path, 2, "completions.jsonl") == []
    assert (tmp_path / "completions.jsonl").read_bytes() == text + line(2)


def test_many_damaged_lines_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"x\n" * 40)
    (said,) = resumed(tmp_path, 0, "metrics.jsonl")
    assert said.endswith("line 1, 2, 3, 4, 5 and 35 more")


@pytest.mark.parametrize("kind", NO_METRICS)
def test_readers_name_the_line(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + NO_METRICS[kind] + b"\n" + line(2))
    for read in (lambda: read_metrics(path), lambda: read_run(tmp_path)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a row of metrics"):
            read()


@pytest.mark.parametrize("content", [b"run: [", b"\xff\xfe", b"[1, 2]", b"nothing"])
def test_a_report_names_a_config_that_cannot_be_read(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(line(1))
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml .*remove it to see the report without it"):
        read_run(tmp_path)


def test_a_crash_in_the_middle_of_a_rewind_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"garbage\n" + line(2))
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("full")

    monkeypatch.setattr("megatron_opd.tracking.json_lines.write_whole", full_disk)
    with pytest.raises(OSError, match="full"):
        json_lines.rewind(path, 1)
    assert path.read_bytes() == before


def test_ranks_without_sinks_say_nothing():
    Tracker().rewind(3)
