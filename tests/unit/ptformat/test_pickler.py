"""Naming a state's tensors for the manifest never fails its save: it is saved as torch saves it."""

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt
from distckpt import DiskSaver
from distckpt.ptformat.reader import verify
from tests.unit.toys import Notebook


class NoAnswers(torch.Tensor):
    """A tensor that answers nothing about itself, but how it is pickled."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.untyped_storage, torch.Tensor.storage_offset):
            raise NotImplementedError("no answer")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class OddKey:
    """A key that cannot be written as text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def of_itself() -> dict[str, Any]:
    state: dict[str, Any] = {"x": torch.ones(2)}
    state["again"] = [state] * 12
    return state


def much_shared() -> Any:
    state: Any = [torch.ones(2)]
    for _ in range(15):
        state = [state] * 2
    return state


STATES: dict[str, Callable[[], Any]] = {
    "nested": lambda: {"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "y": torch.ones(2)},
    "lazy": lambda: {**nn.LazyLinear(3).state_dict(), "y": torch.ones(2)},
    "subclass": lambda: {"x": torch.ones(2).as_subclass(NoAnswers), "y": torch.ones(2)},
    "surrogate": lambda: {b"caf\xe9".decode("utf-8", "surrogateescape"): torch.ones(1), "y": torch.ones(2)},
    "surrogate, deeper": lambda: {"y": torch.ones(2), "a": OrderedDict({"\udfff": [torch.ones(1)]}), 1 + 2j: 1},
    "odd key": lambda: {OddKey(): torch.ones(1), "y": torch.ones(2)},
    "of itself": lambda: {"x": of_itself(), "y": torch.ones(2)},
    "much shared": lambda: {"x": much_shared(), "y": torch.ones(2)},
    "meta": lambda: {"x": torch.ones(2, device="meta"), "y": torch.ones(2)},
    "sparse": lambda: {"x": torch.eye(3).to_sparse_csr(), "y": torch.ones(2)},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of prototypes, and of what cannot be loaded without executing
@pytest.mark.parametrize("kind", STATES)
def test_what_torch_saves_is_saved_whatever_its_tensors_are_called(tmp_path: Path, kind: str) -> None:
    state = STATES[kind]()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    DiskSaver(tmp_path)(state, "a.pt")
    verify(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as own, zipfile.ZipFile(buffer) as torchs:
        said = json.loads(own.read("archive/distckpt.json"))
        data = {name.partition("/")[2]: torchs.read(name) for name in torchs.namelist() if "/data/" in name}
        assert {f"data/{name}": own.read(f"archive/data/{name}") for name in map(str, range(len(data)))} == data
    assert "y" in [one[0] for one in said["tensors"]], "what can be named, is"


def test_a_key_with_a_surrogate_is_in_the_manifest_as_it_is(tmp_path: Path) -> None:
    key = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    DiskSaver(tmp_path)({key: torch.ones(1)}, "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert [one[0] for one in json.loads(archive.read("archive/distckpt.json"))["tensors"]] == [key]
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == [key]


ODD_STORAGES: dict[str, Callable[[], torch.Tensor]] = {
    "bytes": lambda: torch.arange(11, dtype=torch.uint8)[:8].view(torch.float32),
    "complex": lambda: torch.arange(5.0)[:4].view(torch.complex64),
    "part": lambda: torch.arange(11, dtype=torch.uint8)[:8].view(torch.int16)[1:3],
    "parameter": lambda: nn.Parameter(torch.arange(11, dtype=torch.uint8)[:8].view(torch.float32)),
}


@pytest.mark.parametrize("how", ["weights_only", "mmap", "distckpt"])
@pytest.mark.parametrize("kind", ODD_STORAGES)
def test_a_storage_that_does_not_consist_of_whole_elements_is_saved(tmp_path: Path, kind: str, how: str) -> None:
    path, tensor = tmp_path / "a.pt", ODD_STORAGES[kind]()
    distckpt.save({"a": Notebook({"x": tensor, "again": tensor, "plain": torch.ones(2)})}, path)
    verify(path)
    if how == "distckpt":
        book = Notebook()
        distckpt.load({"a": book}, path)
        found: Any = book.state
    else:
        found = torch.load(path, weights_only=True, mmap=how == "mmap")
    assert type(found["x"]) is type(tensor)
    assert (found["x"].dtype, found["x"].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found["x"].view(torch.uint8), tensor.view(torch.uint8))
    assert found["x"].untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert found["again"] is found["x"]
