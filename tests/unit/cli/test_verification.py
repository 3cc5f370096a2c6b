"""``distckpt verify`` reads every byte, and names the tensor that is damaged."""

import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt import save
from distckpt.cli import verification
from distckpt.storage.local import LocalStorage
from tests.unit.cli.conftest import Command, flip


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(200, 200)


@pytest.fixture
def path(tmp_path: Path, model: nn.Linear) -> Path:
    return save({"model": model, "head": nn.Linear(3, 3)}, tmp_path / "a.pt", step=3)


def test_a_whole_file_is_whole(command: Command, path: Path) -> None:
    code, out, err = command("verify", path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split()[0] == str(path)
    assert lines[1].endswith("whole")
    assert lines[2].startswith("1 file, ")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_damaged_tensor_is_named(
    command: Command, path: Path, model: nn.Linear, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_LEAST_BYTES", path.stat().st_size // num_threads)
    monkeypatch.setattr(verification, "_STEP_BYTES", 4096)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(num_threads))
    assert command("verify", path).code == 0
    flip(path, model.weight.detach().numpy().tobytes()[1000:1100])
    result = command("verify", path, "--json")
    assert result.code == 1
    (found,) = result.json["files"]
    assert (found["state"], found["tensors"]) == ("damaged", ["model.weight"])
    assert "record data/0 (tensor model.weight) has checksum" in command("verify", path).out


def test_every_flipped_byte_of_a_sample_is_found(command: Command, path: Path) -> None:
    content, chance = path.read_bytes(), random.Random(0)
    for at in [0, len(content) - 1, *chance.sample(range(len(content)), 20)]:
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        assert command("verify", path).code == 1, f"byte {at}"


def test_a_tensor_that_torch_saved_is_named_too(command: Command, tmp_path: Path) -> None:
    weight = torch.arange(1000.0)
    torch.save({"net": {"w": weight}, "b": torch.zeros(2)}, tmp_path / "a.pt")
    assert command("verify", tmp_path / "a.pt").code == 0
    flip(tmp_path / "a.pt", weight.numpy().tobytes()[:40])
    assert command("verify", tmp_path / "a.pt", "--json").json["files"][0]["tensors"] == ["net.w"]


def test_files_without_checksums_are_called_so(command: Command, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    code, out, _ = command("verify", tmp_path, "--json")
    assert code == 0
    assert out.count('"no checksums"') == 2


def test_a_directory_is_verified_file_by_file(command: Command, path: Path, model: nn.Linear) -> None:
    save({"model": model}, path.parent / "b.pt")
    (path.parent / "cut.pt").write_bytes(path.read_bytes()[:5000])
    (path.parent / "text.pt").write_text("x" * 100)
    code, out, _ = command("verify", path.parent)
    assert code == 1
    states = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:5]}
    assert states == {"a.pt": "whole", "b.pt": "whole", "cut.pt": "damaged", "text.pt": "damaged"}


def test_a_file_that_is_being_written_is_told_so(command: Command, tmp_path: Path) -> None:
    with LocalStorage(tmp_path).create("a.pt") as new:
        code, _, err = command("verify", tmp_path / new.token)
    assert code == 2
    assert "is being written: verify the file that it becomes" in err


@pytest.mark.parametrize("what", ["missing", "empty", "directory", "dcp"])
def test_what_cannot_be_verified_is_told_in_a_line(command: Command, tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.touch()
    elif what != "missing":
        path.mkdir()
    if what == "dcp":
        (path / ".metadata").touch()
    code, out, err = command("verify", path)
    assert code == {"missing": 2, "empty": 1, "directory": 1, "dcp": 2}[what]
    assert (out + err).count(str(path)) >= 1
    assert "Traceback" not in err
    text = {"missing": "does not exist", "empty": "it is empty", "directory": "no checkpoints", "dcp": "no checksums"}
    assert text[what] in out + err
