"""A file that is no checkpoint, is damaged or wants to execute: a clear error, nothing executed, nothing changed."""

import errno
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distckpt import Checkpoint, CorruptCheckpointError, LoadError, UnsafeCheckpoint
from tests.support.equality import equal
from tests.unit.toys import Notebook, linear, run_epochs, snapshot


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.mark,))


def _objects() -> dict[str, Any]:
    return {"model": linear(1), "book": Notebook({"page": 1}), "optimizer": torch.optim.Adam(linear(2).parameters())}


def _saved(folder: Path) -> bytes:
    run_epochs(Checkpoint({**_objects(), "large": torch.nn.Linear(100, 100)}, folder), 1)
    path = folder / "checkpoint_1.pt"
    data = path.read_bytes()
    path.unlink()
    return data


def _zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one-byte": lambda data: data[:1],
    "first-half": lambda data: data[: len(data) // 2],
    "all-but-one": lambda data: data[:-1],
    "header-only": lambda data: data[:64],
    "tail-only": lambda data: data[len(data) // 2 :],
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "text": lambda _: b"this is no checkpoint\n",
    "html": lambda _: b"<!DOCTYPE html><html><body>404</body></html>",
    "other-zip": lambda _: _zip_of({"readme.txt": b"hello"}),
    "empty-zip": lambda _: _zip_of({}),
    "no-pickle": lambda _: _zip_of({"archive/version": b"3\n", "archive/data/0": b"1234"}),
    "bad-pickle": lambda _: _zip_of({"archive/data.pkl": b"\x80\x02nonsense", "archive/version": b"3\n"}),
    "json": lambda _: b'{"model": {}}',
    "zeroed-directory": lambda data: data[:-200] + bytes(200),
    "gzip": lambda _: b"\x1f\x8b\x08\x00" + bytes(40),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("as_kind", [str, Path])
def test_what_is_no_checkpoint_is_told_as_such(tmp_path: Path, kind: str, as_kind: Callable[[Path], Any]) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(DAMAGE[kind](_saved(tmp_path)))
    objects = _objects()
    before = snapshot(objects)
    with pytest.raises(CorruptCheckpointError, match=r"a\.pt is no checkpoint") as caught:
        Checkpoint.load_objects(objects, as_kind(path))
    assert equal(snapshot(objects), before)
    # What people catch today goes on catching it.
    assert isinstance(caught.value, LoadError | RuntimeError | pickle.UnpicklingError | EOFError)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize("part", range(1, 20))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, part: int) -> None:
    data = _saved(tmp_path)
    path = tmp_path / "a.pt"
    path.write_bytes(data[: len(data) * part // 20])
    objects = _objects()
    before = snapshot(objects)
    with pytest.raises(CorruptCheckpointError):
        Checkpoint.load_objects(objects, path)
    assert equal(snapshot(objects), before)


def _unsafe(mark: Path) -> dict[str, bytes]:
    def torch_file(content: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    payload = {"model": linear(3).state_dict(), "book": Payload(mark)}
    return {
        "zip": torch_file(payload),
        "legacy": torch_file(payload, _use_new_zipfile_serialization=False),
        "numpy": torch_file({"model": linear(3).state_dict(), "book": np.array([{}])}),
        "function": torch_file({"model": linear(3).state_dict(), "book": os.getcwd}),
        "own-class": torch_file({"model": linear(3).state_dict(), "book": Notebook()}),
        "whole-module": torch_file({"model": linear(3), "book": {}}),
    }


@pytest.mark.parametrize("kind", ["zip", "legacy", "numpy", "function", "own-class", "whole-module"])
def test_what_would_execute_is_refused_and_nothing_is_executed(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    path.write_bytes(_unsafe(mark)[kind])
    objects = {"model": linear(1), "book": Notebook({"page": 1})}
    before = snapshot(objects)
    with pytest.raises(UnsafeCheckpoint, match=r"can only be loaded by executing code.*Nothing was executed") as caught:
        Checkpoint.load_objects(objects, path)
    assert not mark.exists()
    assert equal(snapshot(objects), before)
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert "weights_only=False" not in str(caught.value)


def test_a_plain_pickle_is_never_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(LoadError):
        Checkpoint.load_objects({"book": Notebook()}, path)
    assert not mark.exists()


def test_the_payload_would_work_without_care(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    path.write_bytes(_unsafe(mark)["zip"])
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_torch_is_always_asked_for_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("weights_only"))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    # The environment's way around it does not reach us, whatever torch makes of it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    handler = Checkpoint(_objects(), tmp_path)
    run_epochs(handler, 1)
    assert handler.last_checkpoint is not None
    Checkpoint.load_objects(_objects(), handler.last_checkpoint)
    handler.reload_objects(_objects(), global_step=1)
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(LoadError):
        Checkpoint.load_objects(_objects(), tmp_path / "broken.pt")
    assert asked
    assert set(asked) == {True}


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_no_environment_makes_it_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    mark, path = tmp_path / "mark", tmp_path / "a.pt"
    path.write_bytes(_unsafe(mark)["zip"])
    with pytest.raises(LoadError):
        Checkpoint.load_objects({"model": linear(1), "book": Notebook()}, path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda _path: None, FileNotFoundError), (lambda path: path.mkdir(), IsADirectoryError)],
)
def test_a_file_that_cannot_be_opened_is_the_operating_systems_error(
    tmp_path: Path, make: Callable[[Path], None], kind: type[OSError]
) -> None:
    make(tmp_path / "a.pt")
    with pytest.raises(kind, match=r"a\.pt"):
        Checkpoint.load_objects({"model": linear(0)}, tmp_path / "a.pt")


def test_a_read_that_fails_half_way_is_the_operating_systems_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.pt").write_bytes(b"something")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        Checkpoint.load_objects({"model": linear(0)}, tmp_path / "a.pt")
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, LoadError)
