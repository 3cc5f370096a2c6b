"""Tensors that are read later are, once read, what torch.load gives; what is odd is left to torch."""

import io
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import DiskSaver
from distckpt.ptformat.archive import read_archive
from distckpt.ptformat.lazy_state import NeedsTorchLoad, read_lazy_state
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.storage.local import LocalFile

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn),
]
BASE = torch.arange(24.0).reshape(4, 6)

PLAIN: dict[str, Callable[[], Any]] = {
    "dtypes": lambda: {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
    "views": lambda: [BASE, BASE[1:3], BASE.t(), BASE[:, 2], BASE[::2], BASE.expand(2, 4, 6)],
    "shapes": lambda: {"scalar": torch.tensor(3.5), "empty": torch.zeros(0), "empty of two": torch.zeros(3, 0)},
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "parameters": lambda: OrderedDict(
        a=nn.Parameter(torch.ones(2)), b=nn.Parameter(torch.ones(1), requires_grad=False)
    ),
    "containers": lambda: {"t": (1, [2.5, None, True]), "n": {"x": {1, 2}}, "size": torch.Size([1, 2]), 3: 2**70},
    "kinds": lambda: [torch.float32, torch.device("cpu"), 1 + 2j, bytearray(b"ab"), b"cd", "é\n"],
    "counter": lambda: Counter("aab"),
    "bare tensor": lambda: torch.ones(3),
    "module": lambda: nn.BatchNorm1d(3).state_dict(),
    "nothing": dict,
}
ODD: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "quantised by channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(3, device="meta"),
}


def described(value: Any) -> Any:
    """Describe a value so that `==` compares types, layouts and bits."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return str(value)
    if isinstance(value, torch.Tensor):
        told = type(value), value.dtype, value.shape, value.requires_grad, str(value.layout), value.device
        if value.layout is not torch.strided or value.is_meta:
            return told, str(value)
        values = value.dequantize() if value.is_quantized else value.resolve_conj()
        raw = values.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return told, value.is_conj(), tuple(value.stride()), value.storage_offset(), raw
    if isinstance(value, dict):
        return type(value), [(key, described(item)) for key, item in value.items()], getattr(value, "__dict__", None)
    return (type(value), [described(item) for item in value]) if isinstance(value, list | tuple) else value


def written(path: Path, state: Any, writer: str) -> Path:
    if writer == "torch":
        torch.save(state, path)
    else:
        DiskSaver(path.parent, require_empty=False)(state, path.name)
    return path


@pytest.mark.parametrize("writer", ["torch", "distckpt"])
@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_plain_is_read_later_and_is_what_torch_reads(tmp_path: Path, kind: str, writer: str) -> None:
    torch.manual_seed(0)
    path = written(tmp_path / "a.pt", PLAIN[kind](), writer)
    with OpenCheckpoint(path) as file:
        assert file.read_structure()
        state = file.state()
        file.fill()
    assert described(state) == described(torch.load(path, weights_only=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # these kinds are prototypes, or old
@pytest.mark.parametrize("kind", ODD)
def test_what_torch_builds_from_values_is_left_to_torch(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    torch.save({"odd": ODD[kind](), "even": torch.ones(2)}, tmp_path / "a.pt")
    with OpenCheckpoint(tmp_path / "a.pt") as file:
        assert not file.read_structure()
        state = file.state()
    assert described(state) == described(torch.load(tmp_path / "a.pt", weights_only=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_class_that_somebody_allowed_is_left_to_torch(tmp_path: Path, *, zipped: bool) -> None:
    torch.save({"o": Allowed(torch.ones(2))}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with torch.serialization.safe_globals([Allowed]), OpenCheckpoint(tmp_path / "a.pt") as file:
        assert not file.read_structure()
        assert torch.equal(file.state()["o"].value, torch.ones(2))


class Allowed:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    torch.save({"all": base, "part": base[2:4], "again": base}, tmp_path / "a.pt")
    with OpenCheckpoint(tmp_path / "a.pt") as file:
        state = file.state()
        assert state["all"] is state["again"]
        file.fill()
        assert file.offset_of(state["all"]) is None, "it is the same storage"
    assert torch.equal(state["all"], base)
    assert torch.equal(state["part"], base[2:4])


def test_offset_of_is_where_the_bytes_are(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    DiskSaver(tmp_path)({"t": tensor[10:]}, "a.pt")
    with OpenCheckpoint(tmp_path / "a.pt") as file:
        given = file.state()["t"]
        at = file.offset_of(given)
        assert at is not None
        begin = at + given.storage_offset() * 4
        assert (tmp_path / "a.pt").read_bytes()[begin : begin + 3960] == tensor[10:].numpy().tobytes()


def test_the_other_byte_order_is_left_to_torch(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"t": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with OpenCheckpoint(tmp_path / "a.pt") as file:
        assert not file.read_structure()
        assert file.state()["t"][0] != 1.0


@pytest.mark.parametrize("change", ["longer", "absent"])
def test_a_storage_of_another_length_is_left_to_torch(tmp_path: Path, change: str) -> None:
    buffer = io.BytesIO()
    torch.save({"t": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/0"):
                new.writestr(name, old.read(name))
            elif change == "longer":
                new.writestr(name, bytes(80))
    with LocalFile(tmp_path / "a.pt") as file, pytest.raises(NeedsTorchLoad):
        read_lazy_state(read_archive(file), file)


def test_an_open_file_is_read_even_if_another_takes_its_name(tmp_path: Path) -> None:
    torch.save({"t": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"t": torch.zeros(2)}, tmp_path / "b.pt")
    with OpenCheckpoint(tmp_path / "a.pt") as file:
        (tmp_path / "b.pt").rename(tmp_path / "a.pt")
        file.verify()
        state = file.state()
        file.fill()
    assert torch.equal(state["t"], torch.ones(2))
