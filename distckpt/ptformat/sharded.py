"""Recognize tensors of which this rank holds a shard, and replace replicated DTensors by plain tensors.

None of the tensor types is imported: a type that no module has defined yet has no instances.
"""

import contextlib
import copyreg
import functools
import math
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from distckpt.errors import ShardedStateError


@dataclass(frozen=True, slots=True, eq=False)
class TensorShard:
    """Stands in a state for a sharded tensor. The file holds the whole tensor, row by row.

    Attributes:
        number: of its record; the first sharded tensor of a state has 0. Tensors of one storage have one number.
        dtype: of the elements.
        shape: of the whole tensor.
        requires_grad: as the tensor's.
        is_parameter: whether the tensor is an ``nn.Parameter``.
    """

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool = False
    is_parameter: bool = False

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the whole tensor, in elements."""
        return row_major_strides(self.shape)


@functools.lru_cache(maxsize=1024)
def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


HINT: Final = (
    "DTensors of shards and replicas can be loaded, and saved by a DiskSaver or distckpt.save. For other kinds use an "
    "object whose state_dict() and load_state_dict() handle the whole state, by "
    "torch.distributed.checkpoint.state_dict with StateDictOptions(full_state_dict=True), or by "
    "FullyShardedDataParallel's FULL_STATE_DICT."
)
_FLAT: Final = "_fsdp_flattened"
_PLAIN: Final = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
_LEVELS: Final = 64
_MESHES: "weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], tuple[int, ...]]]" = weakref.WeakKeyDictionary()
"""What :func:`mesh_ranks` has found, by device mesh."""


def may_be_sharded(kind: type) -> bool:
    """Return True if tensors of this type may be distributed over ranks, or may hold tensors that are."""
    return kind is not torch.Tensor and issubclass(kind, torch.Tensor)


def as_whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a replicated DTensor's local tensor, which shares its storage; any other tensor as it is. Rank-local.

    Raises:
        ShardedStateError: this rank holds only a shard of it.
    """
    problem = describe_shard(tensor)
    if problem is not None:
        raise ShardedStateError(f"A tensor is {problem}. {HINT}")
    kind = _kind_of(type(tensor))
    if kind == "async":
        return as_whole(tensor.trigger_wait())  # type: ignore[attr-defined]  # the result of a running collective
    if kind != "dtensor":
        return tensor
    local = as_whole(tensor._local_tensor)  # type: ignore[attr-defined]  # noqa: SLF001 - to_local() returns a new tensor
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(local.detach(), tensor.requires_grad)
    if local.requires_grad == tensor.requires_grad:
        return local
    return local.detach().requires_grad_(tensor.requires_grad)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor."""
    kind = type(tensor)
    return kind not in _PLAIN and may_be_sharded(kind) and _kind_of(kind) == "dtensor"


def dtensor_type() -> type | None:
    """Return the class DTensor; None if it is not imported."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_replicated(tensor: Any, world_size: int) -> bool:
    """Return True for a DTensor that each rank of the job holds whole."""
    ranks, shape = mesh_ranks(tensor.device_mesh)
    used = [one for one, size in zip(tensor.placements, shape, strict=True) if size > 1]
    return (not used and world_size == 1) or (all(one.is_replicate() for one in used) and len(ranks) == world_size)


def mesh_ranks(mesh: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a device mesh's ranks, flattened, and its shape. torch computes both anew each time."""
    found = _MESHES.get(mesh)
    if found is None:
        found = _MESHES[mesh] = tuple(mesh.mesh.flatten().tolist()), tuple(mesh.shape)
    return found


def describe_disorder(tensor: Any) -> str | None:
    """Return a phrase if torch does not hold a DTensor's shards in the order of its device mesh; else None.

    A process group sorts its ranks. Where a mesh lists them in another order, ``distribute_tensor`` and FSDP2 shard by
    the group's order, and other parts of torch by the mesh's.
    """
    mesh = tensor.device_mesh
    ranks, shape = mesh_ranks(mesh)
    sharded = tuple(dim for dim, one in enumerate(tensor.placements) if hasattr(one, "dim") and shape[dim] > 1)
    if not sharded or _is_ascending(ranks, shape, sharded):
        return None
    return (
        f"a DTensor that is sharded over the ranks {mesh.mesh.tolist()}, which are not in ascending order: parts of "
        "torch disagree on which rank has which shard. Make the device mesh of ascending ranks"
    )


@functools.lru_cache(maxsize=256)
def _is_ascending(ranks: tuple[int, ...], shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    mesh = torch.tensor(ranks, device="cpu").view(shape)
    return all(bool((mesh.diff(dim=dim) > 0).all()) for dim in dims)


def describe_shard(tensor: torch.Tensor) -> str | None:
    """Return a phrase that describes a sharded tensor; None if this rank holds all of it. Rank-local.

    Example:
        >>> describe_shard(torch.ones(2)) is None
        True
    """
    kind = type(tensor)
    if kind in _PLAIN:
        flat = "a parameter that FullyShardedDataParallel has flattened and sharded"
        return flat if kind is nn.Parameter and is_flat_shard(tensor) else None
    found = _kind_of(kind)
    if found == "dtensor":
        return _shard_of_dtensor(tensor)
    if found == "shard":
        return f"a {kind.__name__}, of which each rank holds a shard"
    return next(filter(None, map(describe_shard, _inner(tensor))), None) if found == "wrapper" else None


def is_flat_shard(tensor: torch.Tensor) -> bool:
    """Return True for a flattened and sharded parameter of FSDP1 in a job of several ranks."""
    return getattr(tensor, _FLAT, False) is True and has_peers()


def has_peers() -> bool:
    """Return True in a job of several ranks."""
    process_groups = torch.distributed
    return process_groups.is_available() and process_groups.is_initialized() and process_groups.get_world_size() > 1


def none_sharded(tensors: Sequence[torch.Tensor]) -> bool:
    """Return True if no tensor of a list may be sharded. Ten times as fast as :func:`describe_shard`."""
    return _PLAIN.issuperset(map(type, tensors)) and not any(getattr(one, _FLAT, False) for one in tensors)


def _shard_of_dtensor(tensor: Any) -> str | None:
    placements = tensor.placements
    ranks, shape = mesh_ranks(tensor.device_mesh)
    if tensor.device_mesh.get_coordinate() is None:
        return f"a DTensor on a device mesh that does not contain this rank (ranks {list(ranks)})"
    # Over a mesh dimension of one rank, a shard is the whole tensor and a partial sum is the sum.
    is_whole = all(one.is_replicate() or size == 1 for one, size in zip(placements, shape, strict=True))
    if not is_whole or tuple(tensor._local_tensor.shape) != tuple(tensor.shape):  # noqa: SLF001 - as in as_whole()
        names = ", ".join(map(str, placements))
        return f"a DTensor with placements ({names}) over a device mesh of {'x'.join(map(str, shape))} ranks"
    return describe_shard(tensor._local_tensor)  # noqa: SLF001 - as in as_whole()


@functools.lru_cache(maxsize=256)
def _kind_of(kind: type) -> str | None:
    """Return the kind of a tensor type: dtensor, shard, async, wrapper, or None for a plain one."""
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
    with contextlib.suppress(Exception):  # a user's class; the pickler meets what it hides
        names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name, None)
        if isinstance(inner, torch.Tensor):
            yield inner


def sharded_error(where: str, problem: str) -> ShardedStateError:
    """Return the error for a sharded tensor.

    Args:
        where: object and key.
        problem: from :func:`describe_shard`.
    """
    return ShardedStateError(f"{where} is {problem}. {HINT}")


def find_paths(state: Any, matches: Callable[[Any], bool], path: str = "", *, most: int = 3) -> list[str]:
    """Return the paths (keys joined by dots) of the first objects that match. Slow: for messages only.

    Args:
        state: nested mappings, sequences, sets and objects with attributes.
        matches: called with each object.
        path: of the state itself.
        most: number of paths to return.
    """
    found: list[str] = []
    seen: set[int] = set()

    def walk(one: Any, at: str, level: int) -> None:
        if len(found) >= most or level > _LEVELS or id(one) in seen:
            return
        if not isinstance(one, str | bytes | int | float | None):
            seen.add(id(one))
        if matches(one):
            found.append(at)
            return
        try:
            items = list(_items(one))
        except Exception:  # noqa: BLE001 - a user's method has failed
            return
        for key, item in items:
            walk(item, f"{at}.{key_to_text(key)}" if at else key_to_text(key), level + 1)

    walk(state, path, 0)
    return found


def key_to_text(key: Any) -> str:
    """Return a key as text; its class if its own method raises."""
    try:
        return str(key)
    except Exception:  # noqa: BLE001 - a user's method
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
