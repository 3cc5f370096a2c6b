"""A file's bytes go into the live tensors' own memory, where they fit; the result is what torch's own way gives."""

import copy
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CorruptCheckpointError, DiskSaver, PartialLoadError
from distckpt.loading.inplace import InplaceTarget, drop_overlapping, read_into
from distckpt.loading.part_reads import TensorPart
from distckpt.ptformat.reader import OpenCheckpoint
from tests.support.equality import equal
from tests.unit.loading.test_dry_run import KINDS, bits, other_state
from tests.unit.toys import Notebook, Refuses, linear, snapshot

load = Checkpoint.load_objects


def written(folder: Path, state: Any) -> Path:
    DiskSaver(folder, require_empty=False)(state, "a.pt")
    return folder / "a.pt"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note the memory that bytes are read into."""
    seen: list[tuple[int, int]] = []
    real = OpenCheckpoint.read

    def watched(self: OpenCheckpoint, parts: Any) -> None:
        parts = list(parts)
        seen.extend((address, num_bytes) for address, num_bytes, _ in parts)
        real(self, parts)

    monkeypatch.setattr(OpenCheckpoint, "read", watched)
    return seen


def went_straight(tensor: torch.Tensor, read: list[tuple[int, int]]) -> bool:
    return tensor.nbytes > 0 and (tensor.data_ptr(), tensor.nbytes) in read


def stepped(make: Callable[..., torch.optim.Optimizer], module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = make(module.parameters(), **options)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


# -- modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=["plain", "not strict", "assign"])
def test_modules_of_every_make_load_from_a_file(tmp_path: Path, kind: str, options: dict[str, bool]) -> None:
    module, state = KINDS[kind](), other_state(kind)
    load({"m": module, "other": nn.ReLU()}, written(tmp_path, {"m": state, "other": {}}), **options)
    loaded = module.state_dict()
    assert list(loaded) == list(state)
    for key, value in state.items():
        assert torch.equal(loaded[key], value) if isinstance(value, torch.Tensor) else str(loaded[key]) == str(value)


@pytest.mark.parametrize("kind", ["linear", "batch norm", "half precision", "frozen", "attention", "tied", "nested"])
def test_plain_modules_take_the_bytes_where_they_are(tmp_path: Path, kind: str, read: list[tuple[int, int]]) -> None:
    module = KINDS[kind]()
    before = {name: (id(one), one.data_ptr(), one.requires_grad) for name, one in module.named_parameters()}
    load({"m": module}, written(tmp_path, {"m": other_state(kind)}))
    assert {name: (id(one), one.data_ptr(), one.requires_grad) for name, one in module.named_parameters()} == before
    for tensor in module.state_dict().values():
        assert went_straight(tensor, read)
    assert len(read) == len(set(read)), "each once"


FORMS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], bool]] = {
    "contiguous": (lambda: torch.zeros(3, 4), lambda: torch.randn(3, 4), True),
    "scalar": (lambda: torch.zeros(()), lambda: torch.randn(()), True),
    "scalar from one": (lambda: torch.zeros(()), lambda: torch.randn(1), False),
    "empty": (lambda: torch.zeros(0, 3), lambda: torch.zeros(0, 3), False),
    "view": (lambda: torch.zeros(10)[3:7], lambda: torch.randn(10)[1:5], True),
    "both transposed": (lambda: torch.zeros(4, 3).t(), lambda: torch.randn(4, 3).t(), True),
    "live transposed": (lambda: torch.zeros(4, 3).t(), lambda: torch.randn(3, 4), False),
    "saved transposed": (lambda: torch.zeros(3, 4), lambda: torch.randn(4, 3).t(), False),
    "strided": (lambda: torch.zeros(8)[::2], lambda: torch.randn(4), False),
    "saved strided": (lambda: torch.zeros(4), lambda: torch.randn(8)[::2], False),
    "saved expanded": (lambda: torch.zeros(3, 2), lambda: torch.randn(2).expand(3, 2), False),
    "channels last": (
        lambda: torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        True,
    ),
    "to channels last": (
        lambda: torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5),
        False,
    ),
    "strides of one element": (lambda: torch.zeros(4)[None, :, None], lambda: torch.randn(1, 4, 1).clone(), True),
    "bf16 from f32": (lambda: torch.zeros(5, dtype=torch.bfloat16), lambda: torch.randn(5), False),
    "f32 from bf16": (lambda: torch.zeros(5), lambda: torch.randn(5, dtype=torch.bfloat16), False),
    "int from float": (lambda: torch.zeros(5, dtype=torch.int64), lambda: torch.randn(5) * 9, False),
    "complex": (lambda: torch.zeros(5, dtype=torch.complex64), lambda: torch.randn(5, dtype=torch.complex64), True),
    "complex from float": (lambda: torch.zeros(5, dtype=torch.complex64), lambda: torch.randn(5), False),
    "conjugate": (
        lambda: torch.zeros(5, dtype=torch.complex64),
        lambda: torch.randn(5, dtype=torch.complex64).conj(),
        False,
    ),
    "bool": (lambda: torch.zeros(5, dtype=torch.bool), lambda: torch.ones(5, dtype=torch.bool), True),
    "larger than a step": (lambda: torch.zeros(3_000_000), lambda: torch.randn(3_000_000), True),
    "larger, of another dtype": (lambda: torch.zeros(9_000_000).half(), lambda: torch.randn(9_000_000), False),
}


class Held(nn.Module):
    """Holds one buffer, of any form."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("it", tensor)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_every_form_are_what_torch_makes_of_them(
    tmp_path: Path, form: str, read: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    make, given, is_straight = FORMS[form]
    state = given()
    module, expected = Held(make()), Held(make())
    expected.load_state_dict({"it": state})
    load({"m": module}, written(tmp_path, {"m": {"it": state}}))
    found, wanted = module.get_buffer("it"), expected.get_buffer("it")
    assert bits(found)[2:] == bits(wanted)[2:]
    assert found.stride() == wanted.stride()
    assert went_straight(found, read) == is_straight


def test_one_memory_under_two_keys_gets_what_torch_would_leave_there(tmp_path: Path) -> None:
    for base in (torch.zeros(6), torch.zeros(12)[::2]):
        module = nn.Module()
        for name, tensor in (("a", base), ("b", base[2:]), ("c", base[:3]), ("d", torch.zeros(2))):
            module.register_buffer(name, tensor)
        twin = copy.deepcopy(module)
        state = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
        twin.load_state_dict(state)
        load({"m": module}, written(tmp_path, {"m": state}))
        assert equal(dict(module.state_dict()), dict(twin.state_dict()))


def test_one_module_under_two_names_gets_the_state_of_the_last(tmp_path: Path) -> None:
    module = linear(0)
    load({"a": module, "b": module}, written(tmp_path, {"a": linear(1).state_dict(), "b": linear(2).state_dict()}))
    assert equal(dict(module.state_dict()), dict(linear(2).state_dict()))


def test_a_version_of_each_parameter_is_counted(tmp_path: Path) -> None:
    module = linear(0)
    before = module.weight._version
    load({"m": module}, written(tmp_path, {"m": linear(1).state_dict()}))
    assert module.weight._version > before, "autograd has to notice"


def test_the_older_batch_norm_loads_from_a_file(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(2)
    state = {key: value + 1 for key, value in module.state_dict().items() if key != "num_batches_tracked"}
    load({"m": module}, written(tmp_path, {"m": state}))
    assert torch.equal(module.running_mean, state["running_mean"])  # type: ignore[arg-type]  # it has statistics


# -- optimizers --------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, momentum=0.5),
    "adagrad": torch.optim.Adagrad,
}


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [one for held in optimizer.state.values() for one in held.values() if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_load_with_and_without_a_state_of_their_own(
    tmp_path: Path, kind: str, read: list[tuple[int, int]], *, has_state: bool
) -> None:
    make = OPTIMIZERS[kind]
    source = stepped(make, linear(1))
    source.param_groups[0]["lr"] = 0.7
    fresh, twin = (stepped(make, linear(0)) if has_state else make(linear(0).parameters()) for _ in range(2))
    before = [one.data_ptr() for one in tensors_of(fresh) if one.dim()]
    twin.load_state_dict(copy.deepcopy(source.state_dict()))
    load({"o": fresh}, written(tmp_path, {"o": source.state_dict()}))
    assert equal(fresh.state_dict(), twin.state_dict())
    if has_state:
        assert [one.data_ptr() for one in tensors_of(fresh) if one.dim()] == before
    assert all(went_straight(one, read) for one in tensors_of(fresh))
    assert len(read) == len(tensors_of(source)), "each once"
    for parameter in fresh.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    fresh.step()


def test_a_step_that_moves_to_another_dtype_is_loaded_as_torch_does(tmp_path: Path) -> None:
    source = stepped(torch.optim.AdamW, linear(1))
    state = copy.deepcopy(source.state_dict())
    for held in state["state"].values():
        held["step"] = held["step"].double()
    state["param_groups"][0]["fused"] = True
    fresh = stepped(torch.optim.AdamW, linear(0))
    for held in fresh.state.values():
        held["step"] = held["step"].double()
    load({"o": fresh}, written(tmp_path, {"o": state}))
    assert [held["step"].dtype for held in fresh.state.values()] == [torch.float32] * 2
    assert [held["step"].item() for held in fresh.state.values()] == [1.0] * 2
    assert equal(fresh.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_tensors_that_others_hold_are_left_to_them(tmp_path: Path) -> None:
    optimizer = stepped(torch.optim.AdamW, linear(0))
    path = written(tmp_path, {"o": stepped(torch.optim.AdamW, linear(1)).state_dict()})
    kept = optimizer.state_dict()
    values = copy.deepcopy(kept)
    load({"o": optimizer}, path)
    assert equal(kept, values), "what was taken before can be put back"
    optimizer.load_state_dict(kept)
    twin = torch.optim.AdamW(linear(0).parameters())
    twin.load_state_dict(optimizer.state_dict())  # its tensors are the same ones now
    del kept
    load({"o": optimizer}, path)
    assert equal(twin.state_dict(), values)


OTHERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, Any]]] = {
    "a view": lambda one: (one, one.view(-1)[:2]),
    "detached": lambda one: (one, one.detach()),
    "NumPy's view": lambda one: (one, one.numpy()),
    "a flat buffer": lambda one: ((flat := one.flatten().clone()).view(one.shape), flat),
    "NumPy's memory": lambda one: (torch.from_numpy(array := one.numpy().copy()), array),
    "shared with processes": lambda one: (one.clone().share_memory_(), None),  # type: ignore[no-untyped-call]  # torch ships it without types
}


@pytest.mark.parametrize("kind", OTHERS)
def test_memory_that_others_hold_is_left_to_them(tmp_path: Path, kind: str) -> None:
    optimizer = stepped(torch.optim.AdamW, linear(0))
    path = written(tmp_path, {"o": (source := stepped(torch.optim.AdamW, linear(1))).state_dict()})
    others, addresses = [], []
    for held in optimizer.state.values():
        held["exp_avg"], other = OTHERS[kind](held["exp_avg"])
        others.append(other)
        addresses.append(held["exp_avg"].data_ptr())
    before = copy.deepcopy(others)
    load({"o": optimizer}, path)
    assert all(np.array_equal(one, other) for one, other in zip(others, before, strict=True) if other is not None)
    assert equal(optimizer.state_dict(), source.state_dict())
    assert not {held["exp_avg"].data_ptr() for held in optimizer.state.values()} & set(addresses)


def test_a_copy_of_a_parameter_that_an_optimizer_keeps_is_its_own_after_a_load(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    for seed in (1, 0, 0):
        module = linear(seed)
        optimizer = stepped(torch.optim.AdamW, module)
        for parameter in module.parameters():
            optimizer.state[parameter]["slow"] = parameter.detach()
        made.append({"m": module, "o": optimizer})
    source, fresh, twin = made
    state = {name: one.state_dict() for name, one in source.items()}
    for name, one in twin.items():
        one.load_state_dict(copy.deepcopy(state)[name])
    load(fresh, written(tmp_path, state))
    for objects in (fresh, twin):
        with torch.no_grad():
            objects["m"].weight.fill_(7)
    assert equal(snapshot(fresh), snapshot(twin))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_an_optimizers_hooks_see_the_values(tmp_path: Path, when: str) -> None:
    source, fresh = (stepped(torch.optim.AdamW, linear(seed)) for seed in (1, 0))
    seen: list[Any] = []

    def hook(optimizer: torch.optim.Optimizer, state: Any = None) -> None:
        seen.append(copy.deepcopy(state or optimizer.state_dict()))

    getattr(fresh, f"register_load_state_dict_{when}_hook")(hook)
    load({"o": fresh}, written(tmp_path, {"o": source.state_dict()}))
    assert equal(seen[0]["state"], source.state_dict()["state"])


# -- all or none -------------------------------------------------------------------------------------


def objects(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    module = linear(seed)
    return {"m": module, "o": stepped(torch.optim.AdamW, module), "n": Notebook({"page": seed})}


def states(seed: int) -> dict[str, Any]:
    return {name: one.state_dict() for name, one in objects(seed).items()}


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def begin_of(path: Path, tensor: torch.Tensor) -> int:
    return path.read_bytes().index(tensor.detach().numpy().tobytes())


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_found_before_anything_live_is_touched(tmp_path: Path, *, verify: bool) -> None:
    live = objects(0)
    before = snapshot(live)
    path = written(tmp_path, states(1))
    flipped(path, begin_of(path, states(1)["m"]["weight"]) + 2)
    if verify:
        with pytest.raises(CorruptCheckpointError, match="checksum"):
            load(live, path, verify=verify)
        assert equal(snapshot(live), before)
    else:
        load(live, path, verify=verify)
        assert equal(live["o"].state_dict(), states(1)["o"])


def test_damage_is_reported_before_a_mismatch(tmp_path: Path) -> None:
    model = linear(1, in_features=5)
    path = written(tmp_path, {"m": model.state_dict()})
    flipped(path, begin_of(path, model.weight) + 2)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        load({"m": linear(0)}, path)


def test_every_object_is_as_before_when_one_refuses(tmp_path: Path) -> None:
    live = {**objects(0), "bad": Refuses()}
    before = snapshot(live)
    with pytest.raises(RuntimeError, match="it refuses"):
        load(live, written(tmp_path, {**states(1), "bad": {}}))
    assert equal(snapshot(live), before)


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_read_that_fails_in_the_last_step_is_tried_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    live = objects(0)
    path = written(tmp_path, states(1))
    real, left = os.preadv, [num_failures]
    weight = live["m"].weight.data_ptr()

    def failing(fd: int, buffers: Any, at: int) -> int:
        address = torch.frombuffer(buffers[0], dtype=torch.uint8).data_ptr()
        if address == weight and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    if num_failures == 1:
        load(live, path)
        assert equal(snapshot(live), states(1))
        return
    with pytest.raises(PartialLoadError, match=r"Of o, m some tensors hold the old values and some the new") as caught:
        load(live, path)
    assert isinstance(caught.value, OSError)
    assert live["n"].state == {"page": 0}
    assert live["o"].param_groups[0]["lr"] == 1e-3
    load(live, path)
    assert equal(snapshot(live), states(1))


def test_a_file_that_shrinks_in_the_last_step_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, states(1))

    def cut(*args: Any) -> None:
        os.truncate(path, 200)
        read_into(*args)

    monkeypatch.setattr("distckpt.loading.inplace.read_into", cut)
    live = objects(0)
    with pytest.raises(PartialLoadError, match="it became shorter while it was read"):
        load(live, path)


def test_targets_that_share_memory_exclude_each_other() -> None:
    base = torch.zeros(10)

    def target(live: torch.Tensor, offset: int | None) -> InplaceTarget:
        ranges = [[(0, len(live))]]
        if offset is None:
            return InplaceTarget((), live, None)
        part = TensorPart(live, ranges, live.shape, live.stride(), live.dtype, offset, is_row_major=True)
        return InplaceTarget((), live, part)

    first, same, part, apart = target(base[:4], 8), target(base[:4], 8), target(base[2:5], 16), target(base[6:], 32)
    assert drop_overlapping([first, same, apart]) == [first, same, apart]
    assert drop_overlapping([first, part, apart]) == [apart]
    assert drop_overlapping([first, target(base[:4], 12), apart]) == [apart]
    assert drop_overlapping([first, target(base[3:5], None), apart]) == [apart]
    assert drop_overlapping([target(torch.zeros(0), None)]) == []
    read: list[Any] = []
    reader: Any = Notebook()
    reader.read = read.extend
    read_into([first, same], reader)
    assert len(read) == 1


# -- what it costs -----------------------------------------------------------------------------------

MEMORY = """
import sys, threading, torch, distckpt
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

torch.set_num_threads(2)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(11)))
optimizer = torch.optim.AdamW(model.parameters())
if sys.argv[2] == "stepped":
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
objects = {"model": model, "optimizer": optimizer}
small = torch.nn.Linear(2, 2)
distckpt.Checkpoint.load_objects({"m": small}, {"m": small.state_dict()})
before = most = anonymous()
over = threading.Event()
def watch():
    global most
    while not over.wait(0.0005):
        most = max(most, anonymous())
thread = threading.Thread(target=watch)
thread.start()
distckpt.Checkpoint.load_objects(objects, sys.argv[1])
over.set()
thread.join()
print(max(most, anonymous()) - before)
"""


@pytest.mark.parametrize(("kind", "most"), [("stepped", 0.1), ("fresh", 0.8)])
def test_no_second_copy_of_the_state_is_made_in_memory(tmp_path: Path, kind: str, most: float) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(11)))
    state = {"model": model.state_dict(), "optimizer": stepped(torch.optim.AdamW, model).state_dict()}
    path = written(tmp_path, state)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), kind], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert int(done.stdout) < most * path.stat().st_size, "a fresh optimizer takes what it is given, two thirds"


@pytest.mark.parametrize("verify", [True, False])
def test_each_byte_is_read_from_storage_once(tmp_path: Path, *, verify: bool) -> None:
    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))

    model = nn.Linear(2048, 4096)
    path = written(tmp_path, {"m": model.state_dict()})
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    before = bytes_read()
    load({"m": model}, path, verify=verify)
    read = bytes_read() - before
    if read == 0:
        pytest.skip("the file system has no storage below it that is counted")
    assert 0.99 * path.stat().st_size < read < 1.01 * path.stat().st_size + 65536


@pytest.mark.parametrize("kind", ["bf16 from f32", "live transposed", "contiguous", "saved strided"])
def test_the_default_device_of_a_program_makes_no_difference(tmp_path: Path, kind: str) -> None:
    make, given, _ = FORMS[kind]
    module, state = Held(make()), given()
    path = written(tmp_path, {"m": {"it": state}, "o": stepped(torch.optim.AdamW, linear(1)).state_dict()})
    optimizer = stepped(torch.optim.AdamW, linear(0))
    expected = Held(make())
    expected.load_state_dict({"it": state})
    with torch.device("meta"):
        load({"m": module, "o": optimizer}, path)
    assert torch.equal(module.get_buffer("it"), expected.get_buffer("it"))
    assert equal(optimizer.state_dict(), torch.load(path, weights_only=True)["o"])
