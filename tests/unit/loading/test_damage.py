"""Files that are no checkpoint, damaged or hostile: a clear error, nothing executed, nothing changed."""

import copy
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt.errors import CorruptCheckpointError, LoadError, UnsafeCheckpoint
from distckpt.loading.api import load_objects
from distckpt.ptformat.reader import read_pt


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        """Touch the marker, were this executed."""
        return (os.system, (f"touch '{self.marker}'",))


class Own:
    """A class of the user's, which loading would have to import."""


def saved(value: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(4.0).reshape(2, 2), "bias": torch.zeros(2)},
    "epoch": {"number": 3},
}
GOOD = saved(STATE)
LEGACY = saved(STATE, zipped=False)
NOISE = random.Random(0).randbytes(5000)
BLANK = b"\0" * 5000

DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"P",
    "text": lambda: b"not a checkpoint\n" * 9,
    "html": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "noise": lambda: NOISE,
    "zeros": lambda: BLANK,
    "zip of something else": lambda: zipped({"a.txt": b"text"}),
    "zip without files": lambda: zipped({}),
    "zip with data.pkl only": lambda: zipped({"archive/data.pkl": b"\x80\x02}."}),
    "zip's end alone": lambda: GOOD[-22:],
    "head of zeros": lambda: BLANK[:200] + GOOD[200:],
    "tail of zeros": lambda: GOOD[:-200] + BLANK[:200],
    "all but the head of zeros": lambda: GOOD[:64] + BLANK[: len(GOOD) - 64],
    "half, then noise": lambda: GOOD[: len(GOOD) // 2] + NOISE[: len(GOOD) // 2],
    "pickle, torn": lambda: pickle.dumps(list(range(1000)))[:-50],
    "legacy, torn": lambda: LEGACY[: len(LEGACY) // 2],
    "legacy, head alone": lambda: LEGACY[:40],
    "another zip's name": lambda: GOOD.replace(b"data.pkl", b"atad.pkl"),
}
HOSTILE: dict[str, Callable[[Any], bytes]] = {
    "zip": lambda payload: saved({"model": payload}),
    "zip, deep": lambda payload: saved({"model": {"weight": torch.ones(2, 2), "bias": [(payload,)]}}),
    "legacy": lambda payload: saved({"model": payload}, zipped=False),
    "raw pickle": lambda payload: pickle.dumps({"model": payload}, protocol=2),
}


def targets() -> dict[str, Any]:
    return {"model": nn.Linear(2, 2), "optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}


def failure(path: Path, kind: type[LoadError]) -> LoadError:
    """Load `path` into live objects; return the error after seeing that it left them as they were."""
    objects = targets()
    before = copy.deepcopy(objects["model"].state_dict())
    with pytest.raises(kind) as caught:
        load_objects(objects, path)
    assert all(map(torch.equal, before.values(), objects["model"].state_dict().values()))
    assert objects["optimizer"].param_groups[0]["lr"] == 0.1
    return caught.value


def check_message(error: LoadError, path: Path) -> None:
    assert str(path) in str(error)
    for advice in ("weights_only", "add_safe_globals", "trust", "arbitrary code"):
        assert advice not in str(error)
    assert "\n" not in str(error)


def test_good_files_load(tmp_path: Path) -> None:
    for name, data in {"zip.pt": GOOD, "legacy.pt": LEGACY}.items():
        (tmp_path / name).write_bytes(data)
        loaded = read_pt(tmp_path / name)
        assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
        assert loaded["epoch"] == {"number": 3}


@pytest.mark.parametrize("as_type", [str, Path])
def test_missing_file_is_the_systems_own_error(tmp_path: Path, as_type: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_objects(targets(), as_type(tmp_path / "absent.pt"))
    assert caught.value.filename == str(tmp_path / "absent.pt")


def test_directory_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        load_objects(targets(), tmp_path)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_named_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(DAMAGED[kind]())
    error = failure(path, CorruptCheckpointError)
    assert isinstance(error, RuntimeError)
    assert isinstance(error, pickle.UnpicklingError)
    check_message(error, path)


@pytest.mark.parametrize("whole", [GOOD, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [n / 40 for n in range(1, 40)] + [0.001, 0.99, 0.995, 0.9995])
def test_truncated_file_is_damaged(tmp_path: Path, whole: bytes, part: float) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(whole[: max(1, int(len(whole) * part))])
    # A legacy file is a stream: torn in the midst of a class's name, it names one that nobody allows.
    check_message(failure(path, CorruptCheckpointError if whole is GOOD else LoadError), path)


@pytest.mark.parametrize("whole", [GOOD, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("seed", range(20))
def test_file_with_damaged_bytes_loads_or_is_an_error_of_ours(tmp_path: Path, whole: bytes, seed: int) -> None:
    chance = random.Random(seed)
    for turn in range(10):
        path = tmp_path / f"{turn}.pt"
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read_pt(path)
        except LoadError as error:
            check_message(error, path)


@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_file_is_not_executed(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "a.pt"
    path.write_bytes(HOSTILE[kind](Payload(marker)))
    error = failure(path, UnsafeCheckpoint)
    assert not marker.exists()
    assert isinstance(error, pickle.UnpicklingError)
    check_message(error, path)
    assert "Nothing was executed" in str(error)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_code_in_a_pickle_of_another_protocol_is_not_executed(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "executed", tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"model": Payload(marker)}, protocol=protocol))
    check_message(failure(path, LoadError), path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3])  # torch itself reads no higher one without executing
def test_checkpoint_of_another_pickle_protocol_loads(tmp_path: Path, protocol: int) -> None:
    torch.save(STATE, tmp_path / "a.pt", pickle_protocol=protocol)
    assert read_pt(tmp_path / "a.pt")["epoch"] == {"number": 3}


def test_payload_would_have_been_executed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))  # noqa: S301 - the test's own
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("value", [Own(), np.ma.ones(2), print], ids=["own class", "NumPy", "function"])
def test_file_with_objects_is_refused_with_their_name(tmp_path: Path, kind: str, value: Any) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(HOSTILE[kind](value))
    error = failure(path, UnsafeCheckpoint)
    check_message(error, path)
    expected = {"Own": "Own", "MaskedArray": "numpy", "builtin_function_or_method": "print"}[type(value).__name__]
    assert expected in str(error)


def test_torch_never_executes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "")
    files = {"good": GOOD, "legacy": LEGACY, "noise": NOISE, "unsafe": saved({"model": Own()})}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        try:
            read_pt(tmp_path / name)
        except LoadError:
            assert name in {"noise", "unsafe"}
    assert len(seen) == len(files) - 1, "no second try; the good one is read by the unpickler that torch.load uses then"
    assert all(kwargs["weights_only"] is True for kwargs in seen)


def test_environment_cannot_make_loading_execute_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "executed", tmp_path / "a.pt"
    path.write_bytes(saved({"model": Payload(marker)}))
    try:
        read_pt(path)
    except LoadError as error:
        check_message(error, path)
    assert not marker.exists()
