"""What a rank has of a pipeline's stage, in plain values that other ranks can compare.

A part holds values by name: of a module its tensors, of an optimizer the states of its parameters. A tensor of a part
is whole, or a DTensor over some ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch

from distckpt.backends import wire
from distckpt.errors import ShardedStateError
from distckpt.ptformat.fast_pickle import is_freed
from distckpt.ptformat.sharded import as_whole, describe_shard, is_dtensor, none_sharded
from distckpt.saving.shard_placement import MeshPlacement, place_on_rank
from distckpt.saving.shards import local_of

_KEYS: Final = frozenset({str, int, float, bool, type(None)})
Node = Sequence[Any]
"""A value: its kind, and the number of a tensor, a plain value, or the nodes inside it."""


@dataclass(slots=True)
class StagePart:
    """What this rank has of one stage.

    Attributes:
        kind: phrase for the object; the same on all ranks.
        entries: values by name.
        groups: an optimizer's parameter groups, with names; None for a module.
        versions: the ``version`` entries of a module's ``_metadata``, by path.
        unchecked: names that may differ in value between the ranks that have them.
        tensors: the tensors in `entries`. Set by :meth:`describe`.
    """

    kind: str
    entries: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Sequence[str] = ()
    tensors: list[torch.Tensor] = field(default_factory=list)
    _forms: list[Any] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what the other ranks need, as plain values. Rank-local.

        Raises:
            ShardedStateError: a value cannot be saved by name.
        """
        nodes = {name: self._node_of(value, name) for name, value in self.entries.items()}
        return {
            "kind": self.kind,
            "nodes": nodes,
            "tensors": self._forms,
            "versions": self.versions,
            "unchecked": self.unchecked,
        }

    def _node_of(self, value: Any, name: str) -> Node:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return ["tensor", self._number_of(value, name)]
        if kind is dict and _KEYS.issuperset(map(type, value)):
            return ["dict", [[key, self._node_of(item, name)] for key, item in value.items()]]
        if kind in (list, tuple):
            return [kind.__name__, [self._node_of(item, name) for item in value]]
        return ["value", wire.encode(value).decode()]

    def _number_of(self, tensor: torch.Tensor, name: str) -> int:
        placement = _placement_of(tensor)
        held = tensor if placement is None else local_of(tensor)
        problem = None if none_sharded([held]) else describe_shard(held)
        if problem is None and placement is None:
            held = tensor = as_whole(tensor).detach()
        if problem is None and (held.layout is not torch.strided or held.is_quantized or held.is_nested):
            problem = f"a tensor of layout {held.layout}, quantized or nested"
        if problem is None and held.is_meta:
            problem = "a tensor on the meta device"
        if problem is None and is_freed(held):
            problem = "a tensor whose storage was freed"
        if problem is None and hasattr(type(held), "__tensor_flatten__"):
            problem = f"a {type(held).__name__}, which is made of other tensors"
        if problem is not None:
            msg = f"{self.kind}, {name!r}: {problem}. A stage's tensors have to be dense tensors or DTensors"
            raise ShardedStateError(msg)
        storage = held.untyped_storage()._cdata  # noqa: SLF001 - torch's identity of a storage
        signs = held.is_conj(), held.is_neg()
        strides = tensor.stride(), held.stride()
        key = storage, held.storage_offset(), tensor.shape, strides, held.dtype, signs, placement
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(tensor)
            self._forms.append([str(tensor.dtype).removeprefix("torch."), tensor.shape, placement])
        return self._numbers[key]


def _placement_of(tensor: torch.Tensor) -> MeshPlacement | None:
    """Return the placement of a DTensor of which this rank holds a shard; None for other tensors.

    Each rank holds the whole of a replicated DTensor. The ranks' values are compared, as those of plain tensors are.
    """
    if not is_dtensor(tensor) or none_sharded([tensor]) or describe_shard(tensor) is None:
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]  # a DTensor's
    return None if mesh.get_coordinate() is None else MeshPlacement.of(tensor)


class TensorForm(NamedTuple):
    """What all ranks know of a tensor of a part."""

    dtype: str
    shape: tuple[int, ...]
    placement: MeshPlacement

    @property
    def form(self) -> Any:
        """What has to be equal for all tensors of one name."""
        return self.dtype, self.shape, self.placement._replace(ranks=())


class KnownPart(NamedTuple):
    """What all ranks know of a part.

    Attributes:
        rank: the rank that has it.
    """

    rank: int
    kind: str
    nodes: Mapping[str, Node]
    tensors: Sequence[TensorForm]
    versions: Mapping[str, Any]
    unchecked: Sequence[str]

    @classmethod
    def of_plain(cls, rank: int, plain: Mapping[str, Any]) -> "KnownPart":
        """Return the part that :meth:`StagePart.describe` has described."""
        alone = place_on_rank(rank)
        tensors = [
            TensorForm(dtype, tuple(shape), alone if placement is None else MeshPlacement.of_plain(placement))
            for dtype, shape, placement in plain["tensors"]
        ]
        return cls(rank=rank, **{**plain, "tensors": tensors})


def form_of(part: KnownPart, name: str) -> Any:
    """Return what two parts compare of a value: the forms of its tensors, and all else."""
    node = part.nodes[name]
    return _without_numbers(node), [part.tensors[number].form for number in numbers_in(node)]


def _without_numbers(node: Node) -> Any:
    kind, content = node
    if kind == "dict":
        return [kind, [[key, _without_numbers(item)] for key, item in content]]
    if kind in ("list", "tuple"):
        return [kind, [_without_numbers(item) for item in content]]
    return [kind, None if kind == "tensor" else content]


def numbers_in(node: Node) -> list[int]:
    """Return the numbers of the tensors in a value, in its order."""
    kind, content = node
    if kind == "tensor":
        return [content]
    if kind == "value":
        return []
    inner = (item for _, item in content) if kind == "dict" else content
    return [number for one in inner for number in numbers_in(one)]
