"""save and async_save in a world of one rank: the file, the refusals, and the pending save as a future."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import SaveError, async_save, save
from distckpt.ptformat.reader import verify
from distckpt.storage.direct_io import DirectFile

TIMEOUT_S = 30.0


class Gate:
    """Blocks every write until it is opened; then writes fail if `error` is set."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.has_begun = threading.Event()
        self.error: OSError | None = None


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, write = Gate(), DirectFile.write

    def wait_and_write(self: DirectFile, data: memoryview, offset: int) -> None:
        gate.has_begun.set()
        assert gate.is_open.wait(timeout=TIMEOUT_S)
        if gate.error is not None:
            raise gate.error
        write(self, data, offset)

    monkeypatch.setattr(DirectFile, "write", wait_and_write)
    yield gate
    gate.is_open.set()


def linear(value: float = 1.0) -> nn.Linear:
    module = nn.Linear(40, 40)
    nn.init.constant_(module.weight, value)
    return module


def weight_in(path: Path) -> float:
    verify(path)
    return float(torch.load(path, weights_only=True)["weight"][0, 0])


def test_saved_file_holds_the_states_of_all_objects(tmp_path: Path) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    path = save({"model": model, "more": [optimizer]}, tmp_path / "a.pt", step=7)
    assert path == tmp_path / "a.pt"
    verify(path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["model"]["weight"], model.weight)
    assert state["more"][0]["param_groups"][0]["lr"] == 0.5
    assert os.listdir(tmp_path) == ["a.pt"]


def test_single_object_is_saved_as_its_bare_state(tmp_path: Path) -> None:
    assert weight_in(save({"model": linear(2.0)}, str(tmp_path / "a.pt"))) == 2.0


@pytest.mark.parametrize("in_background", [False, True])
def test_existing_file_is_replaced(tmp_path: Path, *, in_background: bool) -> None:
    path = save({"model": linear(1.0)}, tmp_path / "a.pt")
    if in_background:
        async_save({"model": linear(2.0)}, path).wait()
    else:
        save({"model": linear(2.0)}, path)
    assert weight_in(path) == 2.0
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("end", ["/", "/."])
@pytest.mark.parametrize("call", [save, async_save])
def test_name_of_a_directory_is_refused(tmp_path: Path, call: Any, end: str) -> None:
    with pytest.raises(ValueError, match=r"Argument path should name a file, but given '.*new/\.?', a directory"):
        call({"a": linear()}, f"{tmp_path}/new{end}")
    assert os.listdir(tmp_path) == []


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        for call in (save, async_save):
            with pytest.raises(ValueError, match=rf"path should name a file, but .*{name} is no regular file"):
                call({"a": linear()}, tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("objects", "kwargs", "kind", "text"),
    [
        ({"a": linear()}, {"save_on_rank": "0"}, ValueError, "save_on_rank should be a rank of this job .*given '0'"),
        ([linear()], {}, TypeError, "objects should be a dictionary"),
        ({"a": 1}, {}, TypeError, "should have `state_dict` method"),
        ({"a": linear()}, {"path": 1}, TypeError, "path should be a string or Path object"),
        ({"a": linear()}, {"path": "."}, ValueError, "is a directory"),
        ({"a": linear()}, {"path": "missing/a.pt"}, FileNotFoundError, "missing cannot be opened"),
        ({"a": linear()}, {"save_on_rank": 1}, ValueError, "save_on_rank should be a rank of this job"),
        ({"a": linear()}, {"share_write": "all"}, ValueError, "share_write should be one of"),
        ({"a": linear()}, {"step": 1.5}, TypeError, "step should be int"),
        ({"a": linear()}, {"timeout_s": 0}, ValueError, "timeout_s should be a positive number"),
        ({"a": linear()}, {"timeout_s": "1"}, TypeError, "timeout_s should be a positive number .*given <class 'str'>"),
        ({"a": linear()}, {"timeout_s": True}, TypeError, "timeout_s should be a positive number"),
    ],
)
@pytest.mark.parametrize("call", [save, async_save])
def test_wrong_argument_is_refused_before_anything_is_written(
    tmp_path: Path, call: Any, objects: Any, kwargs: dict[str, Any], kind: type[Exception], text: str
) -> None:
    path = kwargs.get("path", "a.pt")
    others = {name: value for name, value in kwargs.items() if name != "path"}
    with pytest.raises(kind, match=text):
        call(objects, tmp_path / path if isinstance(path, str) else path, **others)
    assert os.listdir(tmp_path) == []


def test_error_names_rank_step_and_the_file_that_is_intact(tmp_path: Path, gate: Gate) -> None:
    gate.is_open.set()
    path = save({"model": linear(1.0)}, tmp_path / "a.pt")
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SaveError, match=r"rank 0, step 9: .*ENOSPC.*The earlier file .*a\.pt is intact") as caught:
        save({"model": linear(2.0)}, path, step=9)
    assert caught.value.errno == errno.ENOSPC
    assert weight_in(path) == 1.0
    assert os.listdir(tmp_path) == ["a.pt"]


def test_file_holds_the_state_of_the_call_though_training_goes_on(tmp_path: Path, gate: Gate) -> None:
    model = linear(1.0)
    pending = async_save({"model": model}, tmp_path / "a.pt")
    nn.init.constant_(model.weight, 5.0)
    assert not pending.done()
    assert os.listdir(tmp_path) != ["a.pt"]
    gate.is_open.set()
    assert pending.result(TIMEOUT_S) == tmp_path / "a.pt"
    assert pending.done()
    assert weight_in(tmp_path / "a.pt") == 1.0


def test_save_ends_without_a_call_of_wait(tmp_path: Path, gate: Gate) -> None:
    pending = async_save({"model": linear(1.0)}, tmp_path / "a.pt")
    gate.is_open.set()
    pending.join()
    assert pending.done()
    assert weight_in(tmp_path / "a.pt") == 1.0


def test_wait_that_times_out_can_be_repeated(tmp_path: Path, gate: Gate) -> None:
    pending = async_save({"model": linear(1.0)}, tmp_path / "a.pt")
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"a\.pt is not saved yet: rank 0 is still writing"):
            pending.wait(timeout_s=0.01)
    gate.is_open.set()
    pending.wait(timeout_s=TIMEOUT_S)
    assert weight_in(pending.result()) == 1.0


def test_error_is_logged_at_once_and_raised_by_every_wait(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = OSError(errno.EIO, "Input/output error")
    pending = async_save({"model": linear(1.0)}, tmp_path / "a.pt")
    gate.is_open.set()
    pending.join()
    assert pending.done()
    assert "rank 0" in caplog.text
    assert "a.pt was not saved" in caplog.text
    for _ in range(2):
        with pytest.raises(SaveError, match="EIO"):
            pending.result()
    assert os.listdir(tmp_path) == []


def test_later_save_to_the_same_path_is_committed_last(tmp_path: Path, gate: Gate) -> None:
    first = async_save({"model": linear(1.0)}, tmp_path / "a.pt")
    timer = threading.Timer(0.2, gate.is_open.set)
    timer.start()
    second = async_save({"model": linear(2.0)}, tmp_path / "a.pt")
    assert first.done()
    second.wait()
    first.wait()
    timer.join()
    assert weight_in(tmp_path / "a.pt") == 2.0


def test_two_saves_can_be_pending(tmp_path: Path) -> None:
    pending = [async_save({"model": linear(value)}, tmp_path / f"{value}.pt") for value in (1.0, 2.0)]
    assert [weight_in(one.result()) for one in pending] == [1.0, 2.0]


PROGRAM = textwrap.dedent(
    """
    import sys, threading, torch, distckpt
    from distckpt.storage.direct_io import DirectFile
    assert "ignite" not in sys.modules

    class Tensor:
        def __init__(self, value): self.value = value
        def state_dict(self): return {"weight": torch.full((50, 50), self.value)}

    path = sys.argv[1]
    distckpt.save({"model": Tensor(1.0)}, path)
    gate, write = threading.Event(), DirectFile.write
    def wait_and_write(*arguments):
        gate.wait(60)
        if sys.argv[2] == "fail":
            raise OSError(5, "Input/output error")
        write(*arguments)
    DirectFile.write = wait_and_write
    distckpt.async_save({"model": Tensor(2.0)}, path)
    print("pending", flush=True)
    if sys.argv[2] == "hang":
        sys.stdin.read()
    threading.Timer(0.3, gate.set).start()
    """
)


def run_program(path: Path, way: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "pending\n"
    return process


def test_killed_process_leaves_the_earlier_file(tmp_path: Path) -> None:
    process = run_program(tmp_path / "a.pt", "hang")
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    assert weight_in(tmp_path / "a.pt") == 1.0
    save({"model": linear(3.0)}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"], "the next save removes the temporary file of a dead process"


def test_process_that_ends_completes_its_save(tmp_path: Path) -> None:
    process = run_program(tmp_path / "a.pt", "end")
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (0, "")
    assert weight_in(tmp_path / "a.pt") == 2.0


def test_process_that_ends_says_that_its_save_was_lost(tmp_path: Path) -> None:
    process = run_program(tmp_path / "a.pt", "fail")
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "a.pt was not saved" in errors
    assert "EIO" in errors
    assert weight_in(tmp_path / "a.pt") == 1.0
