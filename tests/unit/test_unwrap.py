"""DistributedDataParallel, DataParallel and torch.compile are seen through, in any order, on save and load."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint
from distckpt._unwrap import unwrap
from tests.support.equality import equal
from tests.unit.toys import linear, run_epochs


def _compile(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]  # torch says Callable; it is a Module


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "dp": nn.DataParallel,
    "compile": _compile,
}
ORDERS = [order for length in range(4) for order in itertools.permutations(WRAPPERS, length)]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """Give DDP a group of one; destroyed again, for the tests that come after."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _wrapped(module: nn.Module, order: tuple[str, ...]) -> nn.Module:
    for name in order:
        module = WRAPPERS[name](module)
    return module


@pytest.mark.parametrize("order", [*ORDERS, ("dp", "dp"), ("compile", "ddp", "compile")], ids="-".join)
def test_the_innermost_module_is_found(order: tuple[str, ...]) -> None:
    module = linear(0)
    assert unwrap(_wrapped(module, order)) is module


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("loaded_order", [(), ("ddp",), ("compile", "ddp")], ids="-".join)
def test_files_do_not_tell_how_the_module_was_wrapped(
    tmp_path: Path, order: tuple[str, ...], loaded_order: tuple[str, ...]
) -> None:
    module = linear(1)
    run_epochs(Checkpoint({"model": _wrapped(module, order), "other": linear(3)}, tmp_path), 1)
    content = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert equal(content["model"], module.state_dict())
    for saved, loaded in ((order, loaded_order), (loaded_order, order)):
        fresh = linear(2)
        Checkpoint.load_objects({"model": _wrapped(fresh, loaded), "other": linear(4)}, content)
        assert equal(fresh.state_dict(), module.state_dict()), saved


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_one_wrapped_object_is_its_bare_state(tmp_path: Path, order: tuple[str, ...]) -> None:
    module = linear(1)
    run_epochs(Checkpoint({"model": _wrapped(module, order)}, tmp_path), 1)
    assert equal(torch.load(tmp_path / "model_1.pt", weights_only=True), module.state_dict())


def _with_buffer(compiled: nn.Module) -> None:
    compiled.register_buffer("steps", torch.tensor(7))


def _with_hook(compiled: nn.Module) -> None:
    hooked: Any = compiled
    hooked.register_state_dict_post_hook(
        lambda _, state, prefix, *__: state.update({f"{prefix}version": torch.ones(1)})
    )
    hooked.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: state.pop(f"{prefix}version"))


def _with_methods(compiled: nn.Module) -> None:
    """Save and load the weights with the other sign."""
    one: Any = compiled
    own, load = one.state_dict, one.load_state_dict
    one.state_dict = lambda *_, **__: {key: -item for key, item in own().items()}
    one.load_state_dict = lambda state, **options: load({key: -item for key, item in state.items()}, **options)


@pytest.mark.parametrize(
    ("change", "inside"),  # of a child, torch calls no method of the instance's with its parent's mapping
    [(_with_buffer, False), (_with_buffer, True), (_with_hook, False), (_with_hook, True), (_with_methods, False)],
)
def test_what_a_compiled_module_has_of_its_own_is_saved_and_loaded(
    tmp_path: Path,
    change: Callable[[nn.Module], None],
    inside: bool,  # noqa: FBT001 - of one parametrize mark with `change`
) -> None:
    def make(seed: int) -> nn.Module:
        compiled = _compile(linear(seed))
        change(compiled)
        return nn.Sequential(compiled, linear(seed + 10)) if inside else compiled

    saved, fresh = make(1), make(2)
    run_epochs(Checkpoint({"model": saved, "other": linear(3)}, tmp_path), 1)
    content = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert equal(content["model"], saved.state_dict())
    for source in (tmp_path / "checkpoint_1.pt", content):
        Checkpoint.load_objects({"model": fresh}, source)
        assert equal(fresh.state_dict(), saved.state_dict())
        assert equal(dict(fresh.named_parameters()), dict(saved.named_parameters()))


def test_a_users_child_that_is_called_like_a_compiled_module_keeps_its_name(tmp_path: Path) -> None:
    class Wraps(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self._orig_mod, self.scale = linear(seed), nn.Parameter(torch.full((2,), float(seed)))

    saved, fresh = Wraps(1), Wraps(2)
    run_epochs(Checkpoint({"model": saved, "other": linear(3)}, tmp_path), 1)
    Checkpoint.load_objects({"model": fresh}, tmp_path / "checkpoint_1.pt")
    assert equal(fresh.state_dict(), saved.state_dict())


def test_wrappers_in_nested_collections_are_seen_through(tmp_path: Path) -> None:
    module = linear(1)
    run_epochs(Checkpoint({"nets": {"a": [_wrapped(module, ("ddp", "compile"))]}}, tmp_path), 1)
    assert equal(torch.load(tmp_path / "nets_1.pt", weights_only=True), {"a": [module.state_dict()]})


def test_a_wrapper_inside_a_module_is_the_users_own_and_stays(tmp_path: Path) -> None:
    module = nn.Sequential(nn.DataParallel(linear(1)))
    run_epochs(Checkpoint({"model": module}, tmp_path), 1)
    assert list(torch.load(tmp_path / "model_1.pt", weights_only=True)) == ["0.module.weight", "0.module.bias"]


@pytest.mark.parametrize("thing", [None, 1, "text", [], torch.ones(1)])
def test_what_is_no_module_is_handed_back(thing: object) -> None:
    assert unwrap(thing) is thing


def test_compiling_by_method_wraps_nothing() -> None:
    module = linear(0)
    module.compile(backend="eager")
    assert unwrap(module) is module
