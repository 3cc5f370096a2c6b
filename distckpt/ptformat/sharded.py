"""Tensors that stand for more than this rank holds: refused, or replaced by the plain tensor that they stand for.

Knows which tensor types spread one tensor over ranks. Capture, the pickler and loading all ask here. None of the
types is imported: a type that no module has defined yet has no instances.
"""

import contextlib
import copyreg
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from distckpt.errors import ShardedStateError

__all__ = [
    "INSTEAD",
    "are_plain",
    "as_live",
    "find_paths",
    "is_dtensor",
    "is_flat_shard",
    "needs_a_look",
    "refusal",
    "shard_of",
    "text_of_key",
    "whole",
]

INSTEAD: Final = (
    "Sharded state cannot be saved or loaded yet. Use an object whose state_dict() and load_state_dict() handle the "
    "whole state, by torch.distributed.checkpoint.state_dict with StateDictOptions(full_state_dict=True), or by "
    "FullyShardedDataParallel's FULL_STATE_DICT."
)
_FLAT: Final = "_fsdp_flattened"
_PLAIN: Final = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
_LEVELS: Final = 64


def needs_a_look(kind: type) -> bool:
    """Return True if tensors of this type may be distributed over ranks, or may hold tensors that are."""
    return kind is not torch.Tensor and issubclass(kind, torch.Tensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor that `tensor` stands for. Rank-local; issues no collectives.

    Args:
        tensor: of any type. A DTensor that is fully replicated becomes its local tensor, which shares its storage.
            Every other tensor is returned as it is.

    Raises:
        ShardedStateError: this rank does not hold all of it.
    """
    problem = shard_of(tensor)
    if problem is not None:
        raise ShardedStateError(f"A tensor is {problem}. {INSTEAD}")
    kind = _kind_of(type(tensor))
    if kind == "async":
        return whole(tensor.trigger_wait())  # type: ignore[attr-defined]  # a collective's result, under way
    if kind != "dtensor":
        return tensor
    local = whole(tensor._local_tensor)  # type: ignore[attr-defined]  # noqa: SLF001 - to_local() makes another one
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(local.detach(), tensor.requires_grad)
    if local.requires_grad == tensor.requires_grad:
        return local
    return local.detach().requires_grad_(tensor.requires_grad)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor."""
    return needs_a_look(type(tensor)) and _kind_of(type(tensor)) == "dtensor"


def as_live(live: torch.Tensor, given: Any) -> Any:
    """Return a whole tensor in the form of a live one: a DTensor where that is one. Rank-local; issues no collectives.

    Args:
        live: a tensor of which this rank holds all.
        given: what is to be loaded into it. All that is no tensor of its shape is returned as it is.
    """
    if not is_dtensor(live) or shard_of(live) is not None:
        return given
    if not isinstance(given, torch.Tensor) or is_dtensor(given) or given.shape != live.shape:
        return given
    it: Any = live
    local = given.detach().to(it._local_tensor.device)  # noqa: SLF001 - to_local() makes another one
    return type(it).from_local(local, it.device_mesh, it.placements, run_check=False)


def shard_of(tensor: torch.Tensor) -> str | None:
    """Return a phrase that says what a tensor is a part of; None if this rank holds all of it. Rank-local.

    Example:
        >>> shard_of(torch.ones(2)) is None
        True
    """
    kind = type(tensor)
    if kind in _PLAIN:
        flat = "a parameter that FullyShardedDataParallel has flattened and sharded"
        return flat if kind is nn.Parameter and is_flat_shard(tensor) else None
    spread = _kind_of(kind)
    if spread == "dtensor":
        return _shard_of_dtensor(tensor)
    if spread == "shard":
        return f"a {kind.__name__}, of which each rank holds a part"
    return next(filter(None, map(shard_of, _inner(tensor))), None) if spread == "wrapper" else None


def is_flat_shard(tensor: torch.Tensor) -> bool:
    """Return True for a parameter of FSDP1 in a job of several ranks: it is a piece of a flattened one."""
    return getattr(tensor, _FLAT, False) is True and _has_peers()


def _has_peers() -> bool:
    process_groups = torch.distributed
    return process_groups.is_available() and process_groups.is_initialized() and process_groups.get_world_size() > 1


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return True if none of many tensors may be sharded: :func:`shard_of` in a tenth of its time."""
    return _PLAIN.issuperset(map(type, tensors)) and not any(getattr(one, _FLAT, False) for one in tensors)


def _shard_of_dtensor(tensor: Any) -> str | None:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:
        return f"a DTensor on a device mesh that this rank is no member of (ranks {mesh.mesh.flatten().tolist()})"
    # Over a mesh dimension of one rank a shard is the whole, and a sum of one addend the sum.
    is_whole = all(one.is_replicate() or mesh.size(dim) == 1 for dim, one in enumerate(placements))
    if not is_whole or tuple(tensor._local_tensor.shape) != tuple(tensor.shape):  # noqa: SLF001 - as in whole()
        told = ", ".join(map(str, placements))
        return f"a DTensor with placements ({told}) over a device mesh of {'x'.join(map(str, mesh.shape))} ranks"
    return shard_of(tensor._local_tensor)  # noqa: SLF001 - as in whole()


@functools.lru_cache(maxsize=256)
def _kind_of(kind: type) -> str | None:
    """Return how a tensor's type spreads it: a DTensor's, shards, a collective's result, another wrapper's, or None."""
    found = {
        "dtensor": ("torch.distributed.tensor", "DTensor"),
        "shard": ("torch.distributed._shard.sharded_tensor.api", "ShardedTensorBase"),
        "shards": ("torch.distributed.tensor._shards_wrapper", "LocalShardsWrapper"),
        "async": ("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),
    }
    for name, (module, attribute) in found.items():
        base = getattr(sys.modules.get(module), attribute, None)
        if isinstance(base, type) and issubclass(kind, base):
            return "shard" if name == "shards" else name
    return "wrapper" if hasattr(kind, "__tensor_flatten__") else None


def _inner(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a wrapper subclass is made of."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # a user's own class; the pickler meets what it hides
        names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name, None)
        if isinstance(inner, torch.Tensor):
            yield inner


def refusal(where: str, problem: str) -> ShardedStateError:
    """Return the error for something sharded.

    Args:
        where: the object and the key.
        problem: what :func:`shard_of` said.
    """
    return ShardedStateError(f"{where} is {problem}. {INSTEAD}")


def find_paths(state: Any, is_it: Callable[[Any], bool], path: str = "", *, most: int = 3) -> list[str]:
    """Return the keys that lead to what is looked for, joined by dots. Slow: for messages alone.

    Args:
        state: nested mappings, sequences, sets and objects with attributes.
        is_it: says of each object in it whether it is looked for.
        path: of the state itself.
        most: how many paths to return.
    """
    found: list[str] = []
    seen: set[int] = set()

    def walk(one: Any, at: str, level: int) -> None:
        if len(found) >= most or level > _LEVELS or id(one) in seen:
            return
        if not isinstance(one, str | bytes | int | float | None):
            seen.add(id(one))
        if is_it(one):
            found.append(at)
            return
        try:
            items = list(_items(one))
        except Exception:  # noqa: BLE001 - an object's own method; it is not looked into
            return
        for key, item in items:
            walk(item, f"{at}.{text_of_key(key)}" if at else text_of_key(key), level + 1)

    walk(state, path, 0)
    return found


def text_of_key(key: Any) -> str:
    """Return a key as text; where its own method raises, its class."""
    try:
        return str(key)
    except Exception:  # noqa: BLE001 - the key's own
        return f"<{type(key).__name__}>"


def _items(one: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(one, Mapping):
        yield from one.items()
        yield from ((f"(key {key!r})", key) for key in one if not isinstance(key, str | int))
    elif isinstance(one, list | tuple | set | frozenset | deque):
        yield from enumerate(one)
    elif isinstance(one, torch.Tensor) and hasattr(type(one), "__tensor_flatten__"):
        yield from enumerate(_inner(one))
    if not isinstance(one, type):
        yield from getattr(one, "__dict__", {}).items()
        slots: Any = copyreg._slotnames(type(one))  # type: ignore[attr-defined]  # noqa: SLF001 - as pickle finds them
        yield from ((name, getattr(one, name)) for name in slots if hasattr(one, name))
