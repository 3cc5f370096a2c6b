"""The record of events: torn lines, several writers, and what is no record."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distckpt.policy.naming import EVENTS_NAME
from distckpt.storage import event_file
from distckpt.storage.event_file import append_events, read_events
from distckpt.storage.local import LocalStorage
from tests.support.limits import PROGRAM_LIMIT_S

EVENT = {"event": "save", "at_s": 1.5, "file": "caf\udce9\n.pt", "score": float("nan")}
_REFUSALS = "no regular file|Is a directory|symbolic links|Not a directory|No such device"
_WRITER = """
import sys
from pathlib import Path
from distckpt.storage.event_file import append_events
for number in range(int(sys.argv[3])):
    append_events(Path(sys.argv[1]), [{"event": "save", "at_s": 1.0, "writer": sys.argv[2], "number": number}] * 2)
"""


def numbers_in(directory: Path) -> list[Any]:
    return [event.get("number") for event in read_events(directory).events]


def test_an_event_is_one_line_of_ascii_and_comes_back(tmp_path: Path) -> None:
    append_events(tmp_path, [EVENT, {"event": "end", "at_s": 2}])
    text = (tmp_path / EVENTS_NAME).read_text(encoding="ascii")
    assert [json.loads(line) for line in text.splitlines()] == [EVENT | {"score": "nan"}, {"event": "end", "at_s": 2}]
    assert read_events(tmp_path).events == (EVENT | {"score": "nan"}, {"event": "end", "at_s": 2})


def test_a_value_that_json_does_not_know_becomes_text(tmp_path: Path) -> None:
    append_events(tmp_path, [{"event": "save", "at_s": 1.0, "score": (Path("a"), [float("-inf")])}])
    assert read_events(tmp_path).events[0]["score"] == ["a", ["-inf"]]


def test_a_line_torn_at_any_byte_is_dropped_and_the_next_writer_begins_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_NAME
    append_events(tmp_path, [{"event": "save", "at_s": 1.0, "number": number} for number in range(3)])
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        is_complete = end == len(whole) - 1  # the newline alone is missing
        assert numbers_in(tmp_path) == [0, 1, 2][: 2 + is_complete]
        append_events(tmp_path, [{"event": "save", "at_s": 2.0, "number": 9}])
        assert numbers_in(tmp_path) == [*[0, 1, 2][: 2 + is_complete], 9]
        assert read_events(tmp_path).num_dropped == (end > begin and not is_complete)


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 80,
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[]",
        b"17",
        b'{"event": "save"}',
        b'{"event": 3, "at_s": 1.0}',
        b'{"event": "save", "at_s": "now"}',
        b'{"event": "save", "at_s": true}',
        b'{"event": "save", "at_s": NaN}',
    ],
)
def test_a_line_that_is_no_event_is_dropped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / EVENTS_NAME).write_bytes(line + b"\n\n")
    append_events(tmp_path, [EVENT])
    found = read_events(tmp_path)
    assert (len(found.events), found.num_dropped) == (1, 1)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    num_events, writers = 200, ("a", "b", "c")
    processes = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), writer, str(num_events)]) for writer in writers
    ]
    assert [process.wait(timeout=PROGRAM_LIMIT_S) for process in processes] == [0, 0, 0]
    found = read_events(tmp_path)
    assert found.num_dropped == 0
    for writer in writers:
        own = [event["number"] for event in found.events if event["writer"] == writer]
        assert own == [number for number in range(num_events) for _ in range(2)]


@pytest.mark.parametrize("kind", ["fifo", "directory", "symlink", "no directory"])
def test_what_is_no_regular_file_is_neither_read_nor_written(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / EVENTS_NAME, tmp_path / "target"
    target.write_text("")
    directory = tmp_path
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to(target)
    else:
        directory = target
    for call in (lambda: append_events(directory, [EVENT]), lambda: read_events(directory)):
        with pytest.raises(OSError, match=_REFUSALS):
            call()
    assert target.read_text() == ""


def test_a_directory_without_a_record_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == event_file.EventRecord(exists=False)


def test_a_write_that_a_full_disk_cuts_is_an_error_and_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        with pytest.raises(OSError, match="bytes were written") as raised:
            append_events(tmp_path, [EVENT])
    assert raised.value.errno == errno.ENOSPC
    append_events(tmp_path, [EVENT])
    found = read_events(tmp_path)
    assert (len(found.events), found.num_dropped) == (1, 1)


def test_a_full_record_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_file, "MAX_BYTES", 100)
    append_events(tmp_path, [EVENT] * 2)
    size = (tmp_path / EVENTS_NAME).stat().st_size
    with pytest.raises(OSError, match="full"):
        append_events(tmp_path, [EVENT])
    assert (tmp_path / EVENTS_NAME).stat().st_size == size


def test_the_record_follows_the_umask_and_is_no_checkpoint(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        append_events(tmp_path, [EVENT])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / EVENTS_NAME).stat().st_mode) == 0o600
    assert LocalStorage(tmp_path).list() == []
    with pytest.raises(ValueError, match="reserved"):
        LocalStorage(tmp_path).create(EVENTS_NAME)
