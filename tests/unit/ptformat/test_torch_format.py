"""Sound files of other tools load as with torch, or are refused for the true reason: damaged is what is proven."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CorruptCheckpointError, DiskSaver, LoadError, UnsupportedCheckpoint, resume
from distckpt.ptformat.reader import read_pt

STATE = {"m": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.arange(30_000.0)}, "note": [1, "ü"]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.bias = nn.Parameter(torch.zeros(30_000))


def torchs(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


def ours(folder: Path) -> bytes:
    DiskSaver(folder / "own")(STATE, "a.pt")
    return (folder / "own" / "a.pt").read_bytes()


def zipped(data: bytes, how: int = zipfile.ZIP_STORED, comment: bytes = b"", **change: Any) -> bytes:
    """Write an archive anew by Python's zipfile."""
    buffer, rename = io.BytesIO(), change.get("rename", lambda name: name)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", how) as new:
        for one in change.get("order", list)(old.namelist()):
            with new.open(rename(one), "w", force_zip64=change.get("zip64", False)) as file:
                file.write(old.read(one))
        new.comment = comment
    return buffer.getvalue()


def streamed(data: bytes) -> bytes:
    """Write an archive anew with its sizes behind the data, as one that cannot seek does."""

    class Pipe(io.RawIOBase):
        content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(pipe, "w") as new:
        for one in old.namelist():
            new.writestr(one, old.read(one))
    return pipe.content


def appended(data: bytes) -> bytes:
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/readme.txt", b"of the run of Monday")
    return buffer.getvalue()


def aligned(data: bytes, border: int) -> bytes:
    """Write an archive anew with each record's data on a border, padded in the local header under another tool's id."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as new:
            for one in old.namelist():
                info = zipfile.ZipInfo(one)
                begin = buffer.tell() + 30 + len(one) + 4
                info.extra = struct.pack("<HH", 0xD935, -begin % border) + bytes(-begin % border)
                new.writestr(info, old.read(one))
    return buffer.getvalue()


def big_endian(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for one in old.namelist():
            content = old.read(one)
            if "/data/" in one:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            new.writestr(one, b"big" if one.endswith("byteorder") else content)
    return buffer.getvalue()


LOADED: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda data: data,
    "written anew": zipped,
    "deflated": lambda data: zipped(data, zipfile.ZIP_DEFLATED),
    "with a comment": lambda data: zipped(data, comment=b"x" * 300),
    "in another folder": lambda data: zipped(data, rename=lambda name: "other/" + name.partition("/")[2]),
    "in another order": lambda data: zipped(data, order=lambda names: list(reversed(names))),
    "zip64": lambda data: zipped(data, zip64=True),
    "streamed": streamed,
    "with another record": appended,
    "on borders of 16": lambda data: aligned(data, 16),
    "on borders of 512": lambda data: aligned(data, 512),
    "of the other byte order": big_endian,
}


def loads(path: Path) -> None:
    """See that a file loads in all ways, to what it holds."""
    for state in (read_pt(path), read_pt(path, verified=False), torch.load(path, weights_only=True)):
        assert torch.equal(state["m"]["weight"], STATE["m"]["weight"])  # type: ignore[index]
        assert torch.equal(state["m"]["bias"], STATE["m"]["bias"])  # type: ignore[index]
        assert state["note"] == STATE["note"]
    for load in (Checkpoint.load_objects, resume):
        model = Model()
        load({"m": model}, path if load is not resume else path.parent)
        assert torch.equal(model.bias, STATE["m"]["bias"])  # type: ignore[index]


@pytest.mark.parametrize("writer", ["torch", "distckpt"])
@pytest.mark.parametrize("kind", LOADED)
def test_what_another_tool_has_written_anew_loads(tmp_path: Path, kind: str, writer: str) -> None:
    data = LOADED[kind](torchs() if writer == "torch" else ours(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pt").write_bytes(data)
    loads(tmp_path / "in" / "a.pt")


@pytest.mark.parametrize("num_bytes", [1, 7, 4096, 60_000])
def test_bytes_behind_a_file_of_torchs_are_passed_over(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "a.pt").write_bytes(torchs() + bytes(num_bytes))
    loads(tmp_path / "a.pt")


def test_the_older_format_loads(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(torchs(_use_new_zipfile_serialization=False))
    loads(tmp_path / "a.pt")


def test_a_comment_that_zip_adds_to_ours_is_no_damage(tmp_path: Path) -> None:
    ours(tmp_path)
    subprocess.run(["zip", "-q", "-z", "a.pt"], input=b"mine\n", cwd=tmp_path / "own", check=True)
    loads(tmp_path / "own" / "a.pt")


@pytest.mark.parametrize("kind", [kind for kind in LOADED if kind not in ("as it is", "of the other byte order")])
@pytest.mark.parametrize("writer", ["torch", "distckpt"])
def test_a_flipped_byte_in_what_was_written_anew_is_found(tmp_path: Path, kind: str, writer: str) -> None:
    data = bytearray(LOADED[kind](torchs() if writer == "torch" else ours(tmp_path)))
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        large = max(archive.infolist(), key=lambda one: one.file_size)
    data[large.header_offset + 200 + large.compress_size // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"record \S*data/1 "):
        read_pt(path)


# -- what is refused, and why --------------------------------------------------------------------------


def encrypted(data: bytes) -> bytes:
    """Set the flag of encryption in all headers: the bytes need not be."""
    changed = bytearray(zipped(data))
    with zipfile.ZipFile(io.BytesIO(changed)) as archive:
        begin, found = archive.start_dir, archive.infolist()
    for one in found:
        changed[one.header_offset + 6] |= 1
        changed[begin + 8] |= 1
        begin += 46 + len(one.filename.encode()) + len(one.extra) + len(one.comment)
    return bytes(changed)


def safetensors() -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(4)


def long_integer() -> bytes:
    buffer = io.BytesIO()
    torch.save({"m": Model().state_dict(), "n": 10**700}, buffer)
    return buffer.getvalue()


def numpy_file(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.ones(2))
    return buffer.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (lambda: encrypted(torchs()), "is encrypted"),
    "bzip2": (lambda: zipped(torchs(), zipfile.ZIP_BZIP2), "compressed by zip's method 12"),
    "lzma": (lambda: zipped(torchs(), zipfile.ZIP_LZMA), "compressed by zip's method 14"),
    "protocol 4": (lambda: torchs(pickle_protocol=4), "pickle has protocol 4"),
    "protocol 5, deflated": (lambda: zipped(torchs(pickle_protocol=5), zipfile.ZIP_DEFLATED), "has protocol 5"),
    "protocol 4, before zip": (
        lambda: torchs(pickle_protocol=4, _use_new_zipfile_serialization=False),
        "pickle has protocol 4",
    ),
    "long integer": (long_integer, "integer of more than 255 bytes"),
    "long integer, deflated": (
        lambda: zipped(long_integer(), zipfile.ZIP_DEFLATED),
        "integer of more than 255 bytes",
    ),
    "pickle": (lambda: pickle.dumps({"m": [1.0]}), r"pickle\.load reads it, and executes code"),
    "pickle of protocol 2": (lambda: pickle.dumps({"m": [1.0]}, 2), r"pickle\.load reads it, and executes code"),
    "safetensors": (safetensors, "safetensors.torch.load_file"),
    "npy": (lambda: numpy_file(np.save), "numpy.load"),
    "npz": (lambda: numpy_file(np.savez), r"\.npz"),
    "npz, deflated": (lambda: numpy_file(np.savez_compressed), r"\.npz"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(500), "h5py"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("verify", [True, False])
def test_a_sound_file_that_is_not_read_is_not_called_damaged(tmp_path: Path, kind: str, *, verify: bool) -> None:
    make, why = REFUSED[kind]
    path, model = tmp_path / "a.pt", Model()
    path.write_bytes(make())
    with pytest.raises(UnsupportedCheckpoint, match=rf"a\.pt cannot be read: it.*{why}") as caught:
        Checkpoint.load_objects({"m": model}, path, verify=verify)
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert "damaged" not in str(caught.value)
    assert not model.bias.any()


def test_a_program_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    program = "import sys, torch; torch.jit.script(torch.nn.Linear(2, 2)).save(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, tmp_path / "a.pt"], check=True)
    with pytest.raises(UnsupportedCheckpoint, match=r"it is a TorchScript program: torch\.jit\.load"):
        Checkpoint.load_objects({"m": nn.Linear(2, 2)}, tmp_path / "a.pt")


def test_a_flipped_flag_is_damage_and_no_encryption(tmp_path: Path) -> None:
    data = bytearray(torchs())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        data[archive.start_dir + 8] |= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        read_pt(tmp_path / "a.pt")


def test_what_does_not_inflate_to_its_length_is_damaged_and_no_bomb(tmp_path: Path) -> None:
    data = bytearray(zipped(torchs(), zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        one = max(archive.infolist(), key=lambda one: one.file_size)
    for at in (one.header_offset + 22, data.rindex(one.filename.encode()) - 22):
        struct.pack_into("<I", data, at, 1000)
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="does not inflate to"):
        read_pt(tmp_path / "a.pt")


def test_a_directory_is_the_operating_systems_error(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        Checkpoint.load_objects({"m": Model()}, tmp_path / "a.pt")


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(LoadError, match="it is empty"):
        Checkpoint.load_objects({"m": Model()}, tmp_path / "a.pt")
