"""How the ranks of a device mesh hold the tensors of a placement.

Source: ``torch.distributed.tensor`` of torch 2.13. Its types are not imported.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch

from distckpt.ptformat.fast_pickle import is_freed
from distckpt.ptformat.shard_geometry import shard_shape
from distckpt.ptformat.sharded import describe_disorder, is_replicated, mesh_ranks
from distckpt.saving.sharding import Mesh, make_mesh


class RankPlacement(NamedTuple):
    """What DTensors with the same device mesh and placements have in common, as one rank sees it.

    Attributes:
        mesh: the mesh of the layout.
        place: the rank of `mesh` whose rows this rank holds; None if it holds none.
        is_on_other_meshes: whether other ranks hold the same rows on device meshes of their own.
        splits: see :class:`ShardLayout`, once a tensor is redistributed.
        num_replicas: see :class:`ShardLayout`.
        needs_redistribution: whether the ranks hold other parts than rows.
        is_plain: whether each rank of the job holds the whole tensor.
        text: phrase that is equal on ranks that can write a tensor together.
        refused: phrase for a DTensor that cannot be saved; empty if it can.
    """

    mesh: Mesh
    place: int | None
    is_on_other_meshes: bool
    splits: tuple[int, ...]
    num_replicas: int
    needs_redistribution: bool
    is_plain: bool
    text: str
    refused: str

    @property
    def is_on_one_rank(self) -> bool:
        """Whether the device mesh has one rank."""
        return len(self.mesh.ranks) == 1 and not self.is_on_other_meshes


class MeshPlacement(NamedTuple):
    """What all ranks of a device mesh know about one of its DTensors, in plain values.

    Attributes:
        ranks: of the mesh, in row-major order.
        shape: of the mesh.
        splits: see :class:`ShardLayout`, once the tensor is redistributed.
        needs_redistribution: whether the ranks hold other parts than rows.
        placements: as text.
        refused: phrase for a DTensor that cannot be saved; empty if it can.
    """

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    splits: tuple[int, ...]
    needs_redistribution: bool
    placements: str
    refused: str

    @classmethod
    def of(cls, tensor: Any) -> Self:
        """Return the placement of a DTensor."""
        placements = tensor.placements
        ranks, shape = mesh_ranks(tensor.device_mesh)
        used = [one for one, size in zip(placements, shape, strict=True) if size > 1]
        splits = [
            int(getattr(one, "split_factor", 1)) if size > 1 and is_shard(one) else 0
            for one, size in zip(placements, shape, strict=True)
        ]
        needs_redistribution = any(is_shard(one) and one.dim != 0 for one in used)
        if needs_redistribution:
            splits = [min(split, 1) for split in splits]
        return cls(
            ranks=ranks,
            shape=shape,
            splits=tuple(splits),
            needs_redistribution=needs_redistribution,
            placements=", ".join(map(str, placements)),
            refused=_describe_partial(used) or describe_disorder(tensor) or "",
        )

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Self:
        """Return the placement from the list that JSON has made of it."""
        ranks, shape, splits, *others = plain
        return cls(tuple(ranks), tuple(shape), tuple(splits), *others)

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold the same rows."""
        return math.prod(size for size, split in zip(self.shape, self.splits, strict=True) if not split)


def find_rank_placement(tensor: Any, rank: int, world_size: int) -> RankPlacement:
    """Return the placement of a DTensor that all ranks of the job have.

    Args:
        tensor: the DTensor.
        rank: this rank.
        world_size: number of ranks.
    """
    found = MeshPlacement.of(tensor)
    mesh, place, is_on_other_meshes = _mesh_of(tensor.device_mesh, rank)
    over = _describe_mesh(mesh)
    if len(mesh.ranks) == 1 and not is_on_other_meshes:
        over = "one rank"
    return RankPlacement(
        mesh=mesh,
        place=place,
        is_on_other_meshes=is_on_other_meshes,
        splits=found.splits,
        num_replicas=found.num_replicas,
        needs_redistribution=found.needs_redistribution,
        is_plain=is_replicated(tensor, world_size),
        text=f"placements ({found.placements}) over {over}",
        refused=found.refused,
    )


def _mesh_of(device_mesh: Any, rank: int) -> tuple[Mesh, int | None, bool]:
    """Return the layout's mesh, the rank in it whose place this rank has, and whether other meshes have that place too.

    The ``dp`` dimension of a mesh ``(dp, tp)`` stands for several meshes with equal tensors, one for each index of
    ``tp``. The mesh at the first index represents all of them here.
    """
    ranks, shape = mesh_ranks(device_mesh)
    whole = device_mesh._get_root_mesh().mesh  # noqa: SLF001 - no public way
    places = {one: index for index, one in enumerate(whole.flatten().tolist())}
    coordinates = [torch.unravel_index(torch.tensor(places[one]), whole.shape) for one in ranks]
    varies = [len({int(one[dim]) for one in coordinates}) > 1 for dim in range(whole.dim())]
    firsts = [
        int(whole[tuple(int(at) if is_own else 0 for at, is_own in zip(one, varies, strict=True))])
        for one in coordinates
    ]
    place = firsts[ranks.index(rank)] if rank in ranks else None
    return make_mesh(tuple(firsts), shape), place, len(ranks) < whole.numel()


def place_on_mesh(placement: MeshPlacement, rank: int) -> RankPlacement:
    """Return the placement of a tensor that only the ranks of a mesh have.

    Args:
        placement: of the tensor.
        rank: this rank.
    """
    mesh = make_mesh(placement.ranks, placement.shape)
    over = f"placements ({placement.placements}) over {_describe_mesh(mesh)}"
    return RankPlacement(
        mesh=mesh,
        place=rank if rank in placement.ranks else None,
        is_on_other_meshes=False,
        splits=placement.splits,
        num_replicas=placement.num_replicas,
        needs_redistribution=placement.needs_redistribution,
        is_plain=False,
        text=over if len(mesh.ranks) > 1 else "on one rank",
        refused=placement.refused,
    )


def place_on_rank(rank: int) -> MeshPlacement:
    """Return the placement of a whole tensor that one rank has."""
    return MeshPlacement((rank,), (1,), (0,), needs_redistribution=False, placements="", refused="")


def _describe_mesh(mesh: Mesh) -> str:
    return f"ranks {list(mesh.ranks)} as {'x'.join(map(str, mesh.shape))}"


def _describe_partial(placements: Sequence[Any]) -> str | None:
    partial = next((str(one) for one in placements if not (one.is_replicate() or is_shard(one))), None)
    return partial and f"a DTensor with placement {partial}: its ranks hold summands. Redistribute it first"


def describe_misfit(tensor: Any) -> str | None:
    """Return a phrase if a DTensor's placements do not match this rank's shard, or its storage was freed; else None.

    Rank-local.

    FSDP2 shards what tensor parallelism has sharded already. If a dimension does not divide evenly, a rank then holds
    another part than torch computes from the placements; see :mod:`distckpt.ptformat.shard_geometry`.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    local = tensor._local_tensor  # noqa: SLF001 - to_local() returns a new tensor
    shape, own = tuple(tensor.shape), tuple(local.shape)
    _, mesh_shape = mesh_ranks(tensor.device_mesh)
    try:
        expected = shard_shape(shape, mesh_shape, coordinate, tensor.placements)
    except ValueError as error:
        return f"a DTensor that cannot be saved: {error}"
    if expected is None:
        return (
            f"a DTensor of shape {shape} that FSDP2 and tensor parallelism share unevenly: its placements do not say "
            "which part a rank holds. Make the sharded dimension a multiple of the ranks"
        )
    if own != expected:
        return f"a DTensor of which this rank holds a shard of shape {own}, where its placements give {expected}"
    return "a DTensor whose storage was freed" if is_freed(local) else None


def is_shard(placement: Any) -> bool:
    """Return True for a placement that shards a dimension."""
    return hasattr(placement, "dim")
