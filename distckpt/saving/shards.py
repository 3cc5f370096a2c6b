"""The sharded tensors of a state: what stands for each in the pickle, and which bytes of it this rank holds.

A tensor that is sharded along its rows is read where it is. Any other is first redistributed, so that each rank holds
rows: one tensor at a time, by a collective of the tensor's own process group.

Source: ``torch.distributed.tensor`` of torch 2.13. Its types are not imported: a type that no module has defined yet
has no instances.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from distckpt._checksum import crc32
from distckpt.ptformat.sharded import TensorShard, as_whole, is_dtensor, sharded_error
from distckpt.saving.sharding import Mesh, ShardLayout, held_bytes, make_mesh

NO_ROWS: Final[torch.UntypedStorage] = torch.empty(0, dtype=torch.uint8).untyped_storage()
"""Stands for the rows of a rank that holds none, or holds none any more."""


class ShardSource:
    """A sharded tensor, and this rank's rows of it.

    Attributes:
        name: of the object and the key, for messages.
        layout: how the ranks hold the tensor's rows, once it is redistributed.
        needs_redistribution: whether the ranks hold other parts than rows.
        place: the rank of the layout's mesh whose rows this rank holds; None if it holds none.
        has_twins: whether other ranks hold the same rows on device meshes of their own.
    """

    def __init__(self, name: str, tensor: Any, mesh: Mesh, place: int | None, *, has_twins: bool) -> None:
        self.name = name
        self.place = place
        self.has_twins = has_twins
        self._tensor = tensor
        splits, dims = _splits_of(tensor)
        self.needs_redistribution = any(dim != 0 for dim in dims)
        if self.needs_redistribution:
            splits = tuple(map(int, map(bool, splits)))
        shape = tensor.shape
        num_rows = int(shape[0]) if shape else 1
        row_bytes = shape[1:].numel() * tensor.dtype.itemsize
        replicas = torch.Size(size for size, split in zip(mesh.shape, splits, strict=True) if not split).numel()
        self.layout = ShardLayout(num_rows, row_bytes, mesh, splits, replicas)

    def __str__(self) -> str:
        """Return a phrase that is equal on ranks that can write the tensor together."""
        tensor = self._tensor
        placements = ", ".join(map(str, tensor.placements))
        mesh = f"ranks {list(self.layout.mesh.ranks)} as {'x'.join(map(str, self.layout.mesh.shape))}"
        if self.is_on_one_rank:
            mesh = "one rank"
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype} {list(tensor.shape)}, placements ({placements}) over {mesh}"

    @property
    def is_on_one_rank(self) -> bool:
        """Whether the tensor's device mesh has one rank."""
        return len(self.layout.mesh.ranks) == 1 and not self.has_twins

    def move(self, home: int, rank: int) -> None:
        """Take the tensor of rank `home`, whose device mesh has one rank. `rank` is this rank."""
        self.place = home if home == rank and self.place is not None else None
        self.layout = self.layout._replace(mesh=make_mesh((home,), self.layout.mesh.shape))

    @property
    def device(self) -> str:
        """Type of the device that holds the rows."""
        return str(self._tensor._local_tensor.device.type)  # noqa: SLF001 - to_local() returns a new tensor

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
        rows = self._rows(self.place).reshape(-1).view(torch.uint8).cpu()
        memory = memoryview((ctypes.c_char * rows.numel()).from_address(rows.data_ptr())).cast("B")
        return crc32(memory) if rows.numel() else 0

    def _rows(self, place: int) -> torch.Tensor:
        with torch.no_grad():
            local = self._redistributed(place) if self.needs_redistribution else _local_of(self._tensor)
        local = local.resolve_conj().resolve_neg().contiguous()
        num_bytes = sum(end - begin for begin, end in held_bytes(self.layout, place))
        if local.nbytes != num_bytes:
            problem = f"a DTensor of which this rank holds {local.nbytes} bytes, where {num_bytes} were expected"
            raise sharded_error(self.name, problem)
        return local

    def _redistributed(self, rank: int) -> torch.Tensor:
        types: Any = torch.distributed.tensor  # loaded: there is a DTensor
        tensor, dtype = self._tensor, self._tensor.dtype
        if dtype.is_floating_point and dtype.itemsize == 1:  # Gloo does not know float8
            form = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
            local = _local_of(tensor).view(torch.uint8)
            tensor = type(tensor).from_local(local, tensor.device_mesh, tensor.placements, **form)
        if not any(hasattr(one, "split_factor") for one in tensor.placements):
            placements = [types.Shard(0) if _is_shard(one) else types.Replicate() for one in tensor.placements]
            return _local_of(tensor.redistribute(placements=placements)).view(dtype)
        # torch redistributes strided shards to whole tensors only.
        whole = _local_of(tensor.redistribute(placements=[types.Replicate()] * len(tensor.placements))).view(dtype)
        row_bytes = max(self.layout.row_bytes, 1)
        rows = [whole[begin // row_bytes : end // row_bytes] for begin, end in held_bytes(self.layout, rank)]
        return torch.cat(rows) if rows else whole[:0]


class Shards:
    """The sharded tensors of one state, in the order of their numbers.

    Args:
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._numbers: dict[Any, int] = {}
        self._meshes: dict[int, tuple[Any, Mesh, int | None, bool]] = {}
        self._by_id: dict[int, tuple[Any, TensorShard]] = {}  # holds the tensors: an id must not be reused
        self.sources: list[ShardSource] = []
        self.tensors: list[TensorShard] = []

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
        return [source.layout.mesh.ranks[0] for source in self.sources if source.is_on_one_rank]

    def settle(self, homes: Sequence[int]) -> None:
        """Let other ranks than this one decide which rank has each tensor whose device mesh has one rank.

        Each rank may have such a mesh of its own: then the coordinator's tensor is saved.

        Args:
            homes: the coordinator's :attr:`homes`.
        """
        single = [source for source in self.sources if source.is_on_one_rank]
        for source, home in zip(single, homes, strict=True):
            source.move(home, self._rank)

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """How the ranks hold each tensor."""
        return tuple(source.layout for source in self.sources)

    def replace(self, tensor: torch.Tensor, name: str) -> TensorShard | torch.Tensor | None:
        """Return what stands for a tensor in the state; None if :func:`as_whole` finds it.

        Args:
            tensor: any tensor.
            name: of the object and the key, for messages.

        Raises:
            ShardedStateError: it is a DTensor that cannot be saved.
        """
        if not is_dtensor(tensor):
            return None
        it: Any = tensor
        mesh = it.device_mesh
        is_whole = all(one.is_replicate() or mesh.size(dim) == 1 for dim, one in enumerate(it.placements))
        if is_whole and mesh.size() == self._world_size:
            return None
        return self._by_id[id(tensor)][1] if id(tensor) in self._by_id else self._add(it, name)

    def _add(self, it: Any, name: str) -> TensorShard:
        for dim, one in enumerate(it.placements):
            if not (one.is_replicate() or _is_shard(one)) and it.device_mesh.size(dim) > 1:
                problem = (
                    f"a DTensor with placement {one}: its ranks hold summands. Call redistribute() before the save"
                )
                raise sharded_error(name, problem)
        local = _local_of(it)
        # A parameter's state_dict entries are new tensors of one storage, of which each rank holds its shard.
        key = (
            local.untyped_storage()._cdata,  # noqa: SLF001 - torch's identity of a storage
            local.storage_offset(),
            tuple(it.shape),
            it.dtype,
            it.placements,
        )
        number = self._numbers.setdefault(key, len(self.sources))
        if number == len(self.sources):
            mesh, place, has_twins = self._mesh_of(it.device_mesh)
            self.sources.append(ShardSource(name, it, mesh, place, has_twins=has_twins))
        shard = TensorShard(number, it.dtype, tuple(it.shape), it.requires_grad, isinstance(it, torch.nn.Parameter))
        self.tensors += [shard] if number == len(self.tensors) else []
        self._by_id[id(it)] = it, shard
        return shard

    def _mesh_of(self, device_mesh: Any) -> tuple[Mesh, int | None, bool]:
        """Return a mesh, the rank in it whose place this rank has, and whether other ranks have that place too.

        A part of a larger mesh, such as the ``dp`` dimension of a mesh ``(dp, tp)``, has twins: the parts at the other
        places of ``tp``. All of them are one mesh here, the one at the first place.
        """
        if id(device_mesh) not in self._meshes:
            ranks = device_mesh.mesh.flatten().tolist()
            whole = device_mesh._get_root_mesh().mesh  # noqa: SLF001 - no public way
            places = {rank: index for index, rank in enumerate(whole.flatten().tolist())}
            coordinates = [torch.unravel_index(torch.tensor(places[rank]), whole.shape) for rank in ranks]
            varies = [len({int(one[dim]) for one in coordinates}) > 1 for dim in range(whole.dim())]
            firsts = [
                int(whole[tuple(int(at) if is_own else 0 for at, is_own in zip(one, varies, strict=True))])
                for one in coordinates
            ]
            mesh = make_mesh(tuple(firsts), tuple(device_mesh.shape))
            own = device_mesh.get_coordinate()
            place = None if own is None else firsts[ranks.index(torch.distributed.get_rank())]
            self._meshes[id(device_mesh)] = device_mesh, mesh, place, len(ranks) < whole.numel()
        return self._meshes[id(device_mesh)][1:]


def find_shard_difference(descriptions: Sequence[Sequence[str]]) -> str | None:
    """Return the first difference between the ranks' sharded tensors as a phrase; None if there is none.

    Args:
        descriptions: the sharded tensors of each rank, as text.
    """
    for rank, theirs in enumerate(descriptions):
        for ours, other in zip(descriptions[0], theirs, strict=False):
            if ours != other:
                return f"rank 0 has {ours}; rank {rank} has {other}"
        if len(theirs) != len(descriptions[0]):
            more, fewer = (0, rank) if len(descriptions[0]) > len(theirs) else (rank, 0)
            extra = descriptions[more][len(descriptions[fewer])]
            return f"rank {more} has {extra}; rank {fewer} does not have it"
    return None


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")


def _splits_of(tensor: Any) -> tuple[tuple[int, ...], list[int]]:
    """Return how each dimension of the mesh splits (see :class:`ShardLayout`), and the split tensor dimensions."""
    splits, dims = [], []
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if size == 1 or not _is_shard(placement):
            splits.append(0)
            continue
        splits.append(int(getattr(placement, "split_factor", 1)))
        dims.append(placement.dim)
    return tuple(splits), dims


def _local_of(tensor: Any) -> torch.Tensor:
    """Return a DTensor's local tensor; waits for a collective that computes it."""
    local = tensor._local_tensor  # noqa: SLF001 - to_local() returns a new tensor
    return as_whole(local.detach())
