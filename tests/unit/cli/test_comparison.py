"""``distckpt diff`` tells which keys differ, and by how much."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt.cli import comparison, sources
from distckpt.cli.comparison import compare
from distckpt.ptformat.safetensors_format import build_safetensors_header
from tests.unit.cli.conftest import Command

STATE = {
    "same": torch.arange(100.0),
    "shape": torch.ones(2, 3),
    "dtype": torch.ones(2),
    "data": torch.zeros(1000),
    "lr": 0.1,
    "kind": 1,
    "nan": float("nan"),
    "gone": torch.ones(4, dtype=torch.float16),
    "zero": torch.tensor([0.0, 1.0]),
}


def other_state() -> dict[str, Any]:
    """Return a state that differs from STATE in all ways."""
    data = torch.zeros(1000)
    data[10], data[20] = 0.5, -1.5
    changed = {
        "shape": torch.ones(3, 2),
        "dtype": torch.ones(2, dtype=torch.float64),
        "data": data,
        "lr": 0.2,
        "kind": "1",
        "zero": torch.tensor([-0.0, 1.0]),
        "new": torch.ones(1),
    }
    return {name: value for name, value in {**STATE, **changed}.items() if name != "gone"}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "a.pt", tmp_path / "b.pt"]
    torch.save(STATE, found[0])
    torch.save(other_state(), found[1])
    return found


TEXT = """\
only in DIR/a.pt
KEY   WHAT
gone  float16 (4)

only in DIR/b.pt
KEY  WHAT
new  float32 (1)

changed
KEY    CHANGE  FIRST    SECOND
shape  shape   (2, 3)   (3, 2)
dtype  dtype   float32  float64
lr     value   0.1      0.2
kind   type    1        '1'

other values
KEY   LARGEST   MEAN  DIFFERENT  NAN IN ONE
data      1.5  0.002  2 of 1000           0
zero        0      0  bits only           0

8 keys differ, 2 are equal
"""


def test_all_kinds_of_differences(command: Command, paths: list[Path]) -> None:
    code, out, err = command("diff", *paths)
    assert (code, err) == (1, "")
    assert out.replace(str(paths[0].parent), "DIR") == TEXT


def test_json_has_them_too(command: Command, paths: list[Path]) -> None:
    found = command("diff", *paths, "--json").json
    assert (found["only_in_first"], found["only_in_second"], found["num_equal"]) == (["gone"], ["new"], 2)
    assert found["tensors"][0] == {
        "name": "data",
        "largest": 1.5,
        "mean": 0.002,
        "num_different": 2,
        "num_nan": 0,
        "num_elements": 1000,
    }


def test_equal_files_exit_with_zero(command: Command, paths: list[Path], trained: Path) -> None:
    assert command("diff", paths[0], paths[0]).code == 0
    checkpoint = trained / "checkpoint_40.pt"
    assert command("diff", checkpoint, checkpoint).out == "0 keys differ, 5 are equal\n"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_chunks_add_up(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 64)
    monkeypatch.setattr(comparison, "CHUNK_BYTES", 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(num_threads))
    one = {"a": torch.arange(1000.0), "turned": torch.arange(60.0).reshape(6, 10).t(), "i": torch.arange(99)}
    one["half"] = one["a"][500:]
    other = {
        "a": one["a"] + torch.arange(1000) % 7,
        "turned": one["turned"].contiguous(),
        "i": one["i"] - 5,
        "half": one["a"][500:].clone(),
    }
    torch.save(one, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    found = {
        each["name"]: each for each in command("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--json").json["tensors"]
    }
    assert list(found) == ["a", "i"]
    apart = (torch.arange(1000) % 7).double()
    assert (found["a"]["largest"], found["a"]["mean"]) == (6.0, pytest.approx(float(apart.mean())))
    assert found["a"]["num_different"] == int(apart.count_nonzero())
    assert (found["i"]["largest"], found["i"]["mean"]) == (5.0, 5.0)


def test_a_flat_file_equals_a_nested_one(command: Command, tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.tensor([1.0, 2.0])}}, tmp_path / "a.pt")
    header = build_safetensors_header([("model.w", "F32", (2,))], {})
    (tmp_path / "a.safetensors").write_bytes(header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert command("diff", tmp_path / "a.pt", tmp_path / "a.safetensors").code == 0


@pytest.mark.parametrize(
    ("one", "other", "largest", "num_different", "num_nan"),
    [
        ([1.0, math.inf], [1.0, math.inf], 0.0, 0, 0),
        ([0.0, math.inf], [1.0, math.inf], 1.0, 1, 0),
        ([math.inf], [-math.inf], math.inf, 1, 0),
        ([math.nan, 1.0], [math.nan, 2.0], 1.0, 1, 0),
        ([math.nan, 1.0], [3.0, 1.0], 0.0, 1, 1),
        ([3e38], [-3e38], math.inf, 1, 0),
    ],
)
def test_numbers_that_are_not_finite(
    one: list[float], other: list[float], largest: float, num_different: int, num_nan: int
) -> None:
    found = compare(torch.tensor(one), torch.tensor(other))
    assert (found.largest, found.num_different, found.num_nan) == (largest, num_different, num_nan)


@pytest.mark.parametrize(
    ("one", "other", "dtype"),
    [
        (2**60, 2**60 + 1, torch.int64),
        (-(2**62), -(2**62) + 3, torch.int64),
        (-(2**63), 2**63 - 1, torch.int64),
        (2**64 - 1, 2**64 - 2, torch.uint64),
        (0, 2**64 - 1, torch.uint64),
    ],
)
def test_differences_of_large_integers_are_exact(one: int, other: int, dtype: torch.dtype) -> None:
    found = compare(torch.tensor([one, 5], dtype=dtype), torch.tensor([other, 5], dtype=dtype))
    assert (found.largest, found.num_different) == (float(abs(other - one)), 1)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64),
        *(torch.int8, torch.uint8, torch.int64, torch.uint16, torch.bool),
    ],
)
def test_every_dtype_is_compared(dtype: torch.dtype) -> None:
    one, other = torch.tensor([0.0, 1.0, 0.0]).to(dtype), torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    found = compare(one, other)
    assert (found.largest, found.num_different, found.has_other_bits) == (1.0, 1, True)
    assert not compare(one, one.clone()).has_other_bits
