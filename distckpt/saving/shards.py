"""The sharded tensors of a state: what stands for each in the pickle, and which bytes of it this rank holds.

A tensor that is sharded along its rows is read where it is. Any other is first redistributed, so that each rank holds
rows: one tensor at a time, by a collective of the tensor's own process group.

Source: ``torch.distributed.tensor`` of torch 2.13. Its types are not imported: a type that no module has defined yet
has no instances.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from distckpt._checksum import crc32, memory_at
from distckpt.ptformat.sharded import TensorShard, as_whole, is_dtensor, sharded_error
from distckpt.saving.shard_placement import RankPlacement, describe_misfit, find_rank_placement, is_shard
from distckpt.saving.sharding import ShardLayout, held_bytes, make_mesh

NO_ROWS: Final[torch.UntypedStorage] = torch.empty(0, dtype=torch.uint8).untyped_storage()
"""Stands for the rows of a rank that holds none, or holds none any more."""


class StageTensor(NamedTuple):
    """Stands for a tensor that only some ranks have, in a consolidated state that is the same on every rank.

    Attributes:
        placement: how these ranks hold it.
        shape: of the whole tensor.
        dtype: of the elements.
        held: the tensor or DTensor of a rank that has it; an empty tensor on other ranks.
    """

    placement: RankPlacement
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: torch.Tensor

    @property
    def requires_grad(self) -> bool:
        """Whether the saved tensor requires gradients; a module's state never does."""
        return False


class ShardSource:
    """A sharded tensor, and this rank's rows of it.

    Args:
        name: of the object and the key, for messages.
        text: a phrase that is equal on ranks that can write the tensor together.
        tensor: the tensor; None in a source that :meth:`of` is called on.
        placement: of the tensor.
        layout: how the ranks hold the tensor's rows, once it is redistributed.

    Attributes:
        name: see above.
        layout: see above.
        placement: see above.
        place: the rank of the layout's mesh whose rows this rank holds; None if it holds none.
    """

    __slots__ = ("_tensor", "_text", "layout", "name", "place", "placement")

    def __init__(self, name: str, text: str, tensor: Any, placement: RankPlacement, layout: ShardLayout) -> None:
        self.name = name
        self.place = placement.place
        self.layout = layout
        self._text = text
        self._tensor = tensor
        self.placement = placement

    def of(self, tensor: Any) -> "ShardSource":
        """Return the source of another tensor of the same name, shape, dtype and placements. Call it before `move`."""
        return ShardSource(self.name, self._text, tensor, self.placement, self.layout)

    @property
    def has_fixed_rows(self) -> bool:
        """Whether this rank's rows are the memory of its tensor, whatever other ranks decide."""
        if self.place is None or self.placement.needs_redistribution or self.placement.is_on_one_rank:
            return False
        local = _memory_of(self._tensor)
        return type(local) is torch.Tensor and local.is_contiguous() and local.nbytes == self._num_held(self.place)

    def __str__(self) -> str:
        """Return a phrase that is equal on ranks that can write the tensor together."""
        return self._text

    def move(self, home: int, rank: int) -> None:
        """Take the tensor of rank `home`, whose device mesh has one rank. `rank` is this rank."""
        self.place = home if home == rank and self.place is not None else None
        self.layout = self.layout._replace(mesh=make_mesh((home,), self.layout.mesh.shape))

    @property
    def device(self) -> str:
        """Type of the device that holds the rows."""
        return str(_memory_of(self._tensor).device.type)

    def rows(self) -> tuple[torch.UntypedStorage, int]:
        """Return the storage of this rank's rows, and the offset of the first byte. Collective if redistributed."""
        if self.place is None:
            return NO_ROWS, 0
        local = self._rows(self.place)
        return local.untyped_storage(), int(local.storage_offset()) * local.dtype.itemsize

    def checksum(self) -> int:
        """Return a checksum of this rank's rows. Collective if redistributed."""
        if self.place is None:
            return 0
        return checksum_of(self._rows(self.place))

    def _rows(self, place: int) -> torch.Tensor:
        if self.placement.needs_redistribution:
            with torch.no_grad():
                local = self._redistributed(place)
        else:
            local = local_of(self._tensor)
        if not local.is_contiguous() or local.is_conj() or local.is_neg():
            local = local.detach().resolve_conj().resolve_neg().contiguous()
        num_bytes = self._num_held(place)
        if local.nbytes != num_bytes:
            problem = f"a DTensor of which this rank holds {local.nbytes} bytes, where {num_bytes} were expected"
            raise sharded_error(self.name, problem)
        return local

    def _num_held(self, place: int) -> int:
        return sum(end - begin for begin, end in held_bytes(self.layout, place))

    def _redistributed(self, rank: int) -> torch.Tensor:
        types: Any = torch.distributed.tensor  # loaded: there is a DTensor
        tensor, dtype = self._tensor, self._tensor.dtype
        if dtype.is_floating_point and dtype.itemsize == 1:  # Gloo does not know float8
            form = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
            local = local_of(tensor).view(torch.uint8)
            tensor = type(tensor).from_local(local, tensor.device_mesh, tensor.placements, **form)
        if not any(hasattr(one, "split_factor") for one in tensor.placements):
            placements = [types.Shard(0) if is_shard(one) else types.Replicate() for one in tensor.placements]
            return local_of(tensor.redistribute(placements=placements)).view(dtype)
        # torch redistributes strided shards to whole tensors only.
        whole = local_of(tensor.redistribute(placements=[types.Replicate()] * len(tensor.placements))).view(dtype)
        row_bytes = max(self.layout.row_bytes, 1)
        rows = [whole[begin // row_bytes : end // row_bytes] for begin, end in held_bytes(self.layout, rank)]
        return torch.cat(rows) if rows else whole[:0]


class Rows(NamedTuple):
    """Where this rank's rows of some tensors are, by the tensors' numbers.

    Attributes:
        storages: the storages that hold the rows.
        offsets: offset of the first byte in each storage.
        addresses: of the storages' bytes; None if they are not known, or not in host memory.
        devices: types of the devices, except for those of `others`.
        others: numbers of the tensors whose rows only their sources can find.
    """

    storages: list[torch.UntypedStorage]
    offsets: list[int]
    addresses: "array[int] | None"
    devices: frozenset[str]
    others: Sequence[int]


class Shards:
    """The sharded tensors of one state, in the order of their numbers.

    Args:
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        rank: see above.
        world_size: see above.
        sources: the tensors, by their numbers.
        tensors: what stands for each.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._numbers: dict[Any, int] = {}
        self._placements: dict[Any, RankPlacement] = {}
        self._meshes: list[Any] = []  # of the placements: an id must not be reused
        self._by_id: dict[int, tuple[Any, TensorShard]] = {}  # holds the tensors: an id must not be reused
        self._known: Rows | None = None
        self.sources: list[ShardSource] = []
        self.tensors: list[TensorShard] = []

    def reuse(self, sources: list[ShardSource], tensors: list[TensorShard], rows: "Rows") -> None:
        """Take over the tensors of a state whose form an earlier save had, instead of calling :meth:`replace`.

        Args:
            sources: the sharded tensors.
            tensors: what stands for each.
            rows: where the rows are; :data:`NO_ROWS` for sources whose rows are not fixed.
        """
        self.sources, self.tensors, self._known = sources, tensors, rows

    def rows(self) -> "Rows":
        """Return where this rank's rows are; :data:`NO_ROWS` for tensors that are redistributed."""
        storages, offsets, addresses, devices, others = self._before_asking()
        for number in others:
            if not self.sources[number].placement.needs_redistribution:
                storages[number], offsets[number] = self.sources[number].rows()
                if storages[number].device.type != "cpu":
                    addresses = None
                elif addresses is not None:
                    addresses[number] = storages[number].data_ptr()
        return Rows(storages, offsets, addresses, devices, others)

    @property
    def devices(self) -> frozenset[str]:
        """Types of the devices that hold the rows."""
        known = self._before_asking()
        return known.devices.union(self.sources[number].device for number in known.others)

    def _before_asking(self) -> "Rows":
        if self._known is None:
            addresses = None if self.sources else array("Q")
            return Rows([NO_ROWS] * len(self), [0] * len(self), addresses, frozenset(), range(len(self)))
        storages, offsets, addresses, devices, others = self._known
        return Rows(list(storages), list(offsets), addresses and array("Q", addresses), devices, others)

    @property
    def redistributed(self) -> frozenset[int]:
        """Numbers of the tensors that are redistributed."""
        numbers = range(len(self)) if self._known is None else self._known.others
        return frozenset(number for number in numbers if self.sources[number].placement.needs_redistribution)

    def __len__(self) -> int:
        """Return the number of sharded tensors."""
        return len(self.sources)

    def __iter__(self) -> Iterator[ShardSource]:
        """Yield the sharded tensors."""
        return iter(self.sources)

    @property
    def by_id(self) -> dict[int, TensorShard]:
        """What stands for each tensor, by the tensor's id."""
        return {key: shard for key, (_, shard) in self._by_id.items()}

    @property
    def homes(self) -> list[int]:
        """The rank of each tensor whose device mesh has one rank, as this rank sees it."""
        return [source.layout.mesh.ranks[0] for source in self.sources if source.placement.is_on_one_rank]

    def settle(self, homes: Sequence[int]) -> None:
        """Adopt the coordinator's choice of the rank that saves each tensor whose device mesh has one rank.

        Each rank may have such a mesh of its own; then the coordinator's tensor is saved.

        Args:
            homes: the coordinator's :attr:`homes`.
        """
        single = [source for source in self.sources if source.placement.is_on_one_rank]
        for source, home in zip(single, homes, strict=True):
            source.move(home, self.rank)

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """How the ranks hold each tensor."""
        return tuple(source.layout for source in self.sources)

    def holders(self) -> set[int]:
        """Return the ranks that hold sharded tensors."""
        return {rank for mesh in {layout.mesh for layout in self.layouts} for rank in mesh.ranks}

    def cross_mesh_checksums(self) -> list[list[Any]]:
        """Return number, place and checksum of this rank's rows of each tensor that other meshes hold too."""
        found = [(number, one) for number, one in enumerate(self) if one.placement.is_on_other_meshes]
        return [[number, one.place, one.checksum()] for number, one in found]

    def replace(self, tensor: torch.Tensor, name: str) -> TensorShard | torch.Tensor | None:
        """Return what stands for a tensor in the state; None if it is no DTensor, or each rank holds the whole.

        Args:
            tensor: any tensor.
            name: of the object and the key, for messages.

        Raises:
            ShardedStateError: it is a DTensor that cannot be saved.
        """
        if not is_dtensor(tensor):
            return None
        it: Any = tensor
        placement = self._placement_of(it)
        if placement.is_plain:
            return None
        known = self._by_id.get(id(tensor))
        return self._add(it, name, placement) if known is None else known[1]

    def replace_staged(self, tensor: StageTensor, name: str) -> TensorShard:
        """Return what stands for a tensor that only some ranks have.

        Args:
            tensor: the tensor; the same one for each of its names.
            name: of the object and the key, for messages.

        Raises:
            ShardedStateError: it is a DTensor that cannot be saved.
        """
        known = self._by_id.get(id(tensor))
        return self._add(tensor, name, tensor.placement) if known is None else known[1]

    def _add(self, it: Any, name: str, placement: RankPlacement) -> TensorShard:
        held: Any = it.held if isinstance(it, StageTensor) else it
        problem = placement.refused or (is_dtensor(held) and describe_misfit(held))
        if problem:
            raise sharded_error(name, problem)
        shape, dtype = tuple(it.shape), it.dtype
        key: Any = id(it)
        if held is it:  # of a StageTensor, other ranks do not see the storage, and have to count alike
            local = local_of(it)
            # A parameter's state_dict entries are new tensors of one storage, of which each rank holds its shard.
            storage = local.untyped_storage()._cdata  # noqa: SLF001 - torch's identity of a storage
            signs = local.is_conj(), local.is_neg()
            strides = it.stride(), local.stride()
            key = storage, local.storage_offset(), shape, strides, dtype, signs, id(placement)
        number = self._numbers.setdefault(key, len(self.sources))
        shard = TensorShard(number, dtype, shape, it.requires_grad, isinstance(it, torch.nn.Parameter))
        if number == len(self.sources):
            num_rows, row_bytes = shape[0] if shape else 1, math.prod(shape[1:]) * dtype.itemsize
            layout = ShardLayout(num_rows, row_bytes, placement.mesh, placement.splits, placement.num_replicas)
            text = f"{name}: {dtype} {shape}, {placement.text}"
            self.sources.append(ShardSource(name, text, held, placement, layout))
            self.tensors.append(shard)
        self._by_id[id(it)] = it, shard
        return shard

    def _placement_of(self, it: Any) -> RankPlacement:
        device_mesh, placements = it.device_mesh, it.placements
        key = id(device_mesh), placements
        found = self._placements.get(key)
        if found is None:
            found = self._placements[key] = find_rank_placement(it, self.rank, self.world_size)
            self._meshes.append(device_mesh)
        return found


def checksum_of(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's elements, row by row."""
    rows = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).cpu()
    return crc32(memory_at(rows.data_ptr(), rows.numel()))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a DTensor, or another tensor itself. Waits if a collective computes it."""
    local = _memory_of(tensor)
    return local if type(local) is torch.Tensor else as_whole(local.detach())


def _memory_of(tensor: Any) -> torch.Tensor:
    """Return what :func:`local_of` does, without waiting."""
    local: torch.Tensor = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor  # noqa: SLF001 - to_local() returns a new tensor
    return local
