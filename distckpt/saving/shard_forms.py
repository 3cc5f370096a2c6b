"""The forms of a state's DTensors: all that a save reads of them, except for their bytes.

A repeated save takes over what an earlier save has found: names, numbers, layouts, and what the ranks compare. Each
rank does so for itself: the result equals that of a new search, and the ranks compare it in the same way.

IMPORTANT: everything that :class:`~distckpt.saving.shards.Shards` reads of a DTensor is compared here. A difference
that is overlooked writes a file with wrong tensors.
"""

import itertools
import operator
import weakref
from array import array
from collections.abc import Sequence
from typing import Any, Final

import torch

from distckpt._compare import have_values
from distckpt.ptformat.fast_pickle import NotPlain, PlainWalk
from distckpt.ptformat.sharded import TensorShard, as_whole
from distckpt.ptformat.tensor_forms import Differs, TensorForms
from distckpt.saving.shards import NO_ROWS, Rows, Shards, ShardSource

_ATTACHED: Final = operator.attrgetter("__dict__")
_PARTS: Final = operator.attrgetter("_local_tensor", "_spec.mesh", "_spec.placements")
_ATTRIBUTES: Final = ("dtype", "shape", "requires_grad")
_METHODS: Final = ("stride",)
_PLAIN: Final = frozenset({torch.Tensor})


KnownShards = tuple[list[ShardSource], list[TensorShard], Rows]
"""The sharded tensors of a state whose form is known: the arguments of :meth:`Shards.reuse`."""


class ShardForms:
    """The forms of a state's DTensors. Keeps neither them nor their device meshes alive.

    Args:
        tensors: the DTensors, in the order of the pickle.
        numbers: of their storages in the pickle.
        shards: what the save has found of them.

    Raises:
        Differs: they cannot be compared.
    """

    def __init__(self, tensors: list[Any], numbers: list[int], shards: Shards) -> None:
        self._is_sharded = [number < len(shards) for number in numbers]
        self._wholes_at = [index for index, number in enumerate(numbers) if number >= len(shards)]
        firsts = dict(zip(reversed(numbers), range(len(numbers) - 1, -1, -1), strict=True))
        self._firsts = [firsts[number] for number in range(len(shards))]
        self._sources = [source.of(None) for source in shards]
        self._tensors = list(shards.tensors)
        try:
            # A device mesh keeps its process groups alive.
            self._meshes = [weakref.ref(one._spec.mesh) for one in tensors]  # noqa: SLF001 - torch has no quicker way
            self._placements = [one._spec.placements for one in tensors]  # noqa: SLF001 - as above
            locals_ = [one._local_tensor for one in itertools.compress(tensors, self._is_sharded)]  # noqa: SLF001 - as above
            walk = PlainWalk()
            walk.put(locals_, "", 0)
        except (AttributeError, NotPlain, RuntimeError) as error:
            raise Differs from error
        self._rows: list[tuple[Any, ...]] = [(one.dtype, one.shape, one.requires_grad, one.stride()) for one in tensors]
        self._are_parameters = _are_parameters(tensors)
        self._locals = TensorForms(walk)
        storages = dict(zip(itertools.compress(itertools.count(), self._is_sharded), walk.numbers, strict=False))
        self._storage_of = [storages[index] for index in self._firsts]
        forms = dict(zip(storages, walk.forms, strict=True))
        self._offsets = [
            forms[index].offset * forms[index].dtype.itemsize if source.has_fixed_rows else 0
            for index, source in zip(self._firsts, shards, strict=True)
        ]
        self._others = [number for number, source in enumerate(shards) if not source.has_fixed_rows]

    def read(self, tensors: list[Any]) -> tuple[KnownShards, list[torch.Tensor]]:
        """Compare DTensors with these forms; return what a save reads of them.

        Args:
            tensors: the DTensors, in the order of the pickle.

        Returns:
            The sharded ones; the others, of which each rank has the whole, as plain tensors.

        Raises:
            Differs: they differ.
        """
        try:
            parts = list(map(_PARTS, tensors))
            is_equal = have_values(tensors, self._rows, _ATTRIBUTES, _METHODS) and all(
                mesh is old_mesh() and (placements is old or (placements == old and _kinds(placements) == _kinds(old)))
                for (_, mesh, placements), old_mesh, old in zip(parts, self._meshes, self._placements, strict=True)
            )
            is_equal = is_equal and _are_parameters(tensors) == self._are_parameters
            wholes = [self._whole(tensors[index], index) for index in self._wholes_at] if is_equal else []
        except Exception as error:  # of a torch that has other attributes
            raise Differs from error
        locals_ = [local for local, _, _ in itertools.compress(parts, self._is_sharded)]
        if not is_equal or not _PLAIN.issuperset(map(type, locals_)):
            raise Differs
        found, facts = self._locals.read(locals_)
        storages = [found[number] for number in self._storage_of]
        addresses = None
        if facts.addresses is not None:
            addresses = array("Q", map(facts.addresses.__getitem__, self._storage_of))
        for number in self._others:
            storages[number] = NO_ROWS
        sources = [source.of(tensors[index]) for source, index in zip(self._sources, self._firsts, strict=True)]
        rows = Rows(storages, self._offsets, addresses, facts.devices, self._others)
        return (sources, self._tensors, rows), wholes

    def _whole(self, tensor: Any, index: int) -> torch.Tensor:
        # A parameter is one of an attached state: other states with parameters are never kept, as they are not plain.
        return as_whole(tensor.detach() if self._are_parameters[index] else tensor)


def _are_parameters(tensors: list[Any]) -> list[bool]:
    """Return for each DTensor whether it is an ``nn.Parameter``; ``isinstance`` takes ten times as long."""
    return [bool(attributes.get("_is_param")) for attributes in map(_ATTACHED, tensors)]


def _kinds(placements: Sequence[Any]) -> list[type]:
    return list(map(type, placements))
