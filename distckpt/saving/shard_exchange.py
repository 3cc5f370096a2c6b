"""The part of a save in which the ranks bring the bytes of sharded tensors to their writers.

1. (all ranks) compare the sharded tensors. If they differ, all ranks raise an error that names the first difference.
   If replicas beside them differ, or have other numbers, the coordinator writes its replicas alone.
2. (all ranks) find the ranks that see the coordinator's storage, unless they are known. All ranks that hold rows have
   to be among them.
3. (all ranks) find this rank's rows, and memory for what it writes. If tensors have to be redistributed, do so in a
   phase of its own: a rank that has failed before would leave the others in that collective.
4. (all ranks) exchange the bytes that another rank writes: parts of blocks, and small tensors.
5. (all ranks) stage. An error is raised where the ranks exchange the results of writing.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.errors import SaveError, ShardedStateError
from distckpt.saving.pending_save import SyncPointFactory
from distckpt.saving.rank_writer import RankWriter
from distckpt.saving.shards import Shards
from distckpt.saving.writer_group import WriterGroup, WriterSearch


def exchange_shards(
    backend: Backend,
    sync_point: SyncPointFactory,
    filename: str,
    writer: RankWriter,
    shards: Shards,
    answers: Sequence[Mapping[str, Any]],
    shard_writers: WriterSearch,
    coordinator: int,
    *,
    timeout_s: float,
) -> tuple[int, ...]:
    """Collective. Run steps 1 to 5; return the ranks that write, the coordinator last; none without sharded tensors.

    Args:
        backend: the job's backend.
        sync_point: makes a phase's sync point from its description.
        filename: name of the file.
        writer: this rank's writer, after :meth:`RankWriter.prepare`.
        shards: this rank's sharded tensors.
        answers: what each rank's :meth:`RankWriter.prepare` returned, and whether it ``knows_writers``.
        shard_writers: finds the ranks that write.
        coordinator: rank that commits the file.
        timeout_s: seconds to wait for the other ranks.

    Raises:
        ShardedStateError: the ranks have different sharded tensors; on every rank.
        SaveError: a rank that holds rows does not see the directory; on every rank.
        RemoteRankError: a step failed on some rank; on every rank.
    """
    if all(answer["shards"] is None for answer in answers):
        return ()
    if len({answer["shards"] for answer in answers}) > 1:
        point = sync_point(f"comparing the shards of {filename}")
        _raise_difference(phases.run(backend, point, writer.describe_shards, timeout_s=timeout_s))
    if len({answer["replicas"] for answer in answers}) > 1:
        writer.drop_replicas()
    shards.settle(_agreed_homes(answers, coordinator))
    is_known = all(answer.get("knows_writers") for answer in answers)
    group = WriterGroup(ranks=shard_writers.find(sync_point, is_known=is_known))
    sent: list[tuple[list[bytearray], list[int]]] = []

    def bind() -> None:
        blind = sorted(shards.holders() - set(group.ranks))
        if blind:
            raise SaveError(
                f"{filename} was not written: rank {', '.join(map(str, blind))} holds shards, but does not see the "
                f"directory of rank {coordinator}. All ranks need the directory, on a shared file system"
            )
        writer.bind_shards(group.range_of(backend.rank))

    def gather() -> list[list[Any]]:
        if not shards.redistributed:
            bind()
        sent.append(writer.gather_shards(backend.world_size))
        return shards.cross_mesh_checksums()

    if shards.redistributed:
        phases.run(backend, sync_point(f"preparing the shards of {filename}"), bind, timeout_s=timeout_s)
    checksums = phases.run(backend, sync_point(f"gathering the shards of {filename}"), gather, timeout_s=timeout_s)
    _compare_across_meshes(writer, checksums)
    ((parts, num_received),) = sent
    point = sync_point(f"exchanging the shards of {filename}")
    writer.stage_shards(backend.exchange_host(parts, num_received, what=point, timeout_s=timeout_s))
    return group.ranks


def _agreed_homes(answers: Sequence[Mapping[str, Any]], coordinator: int) -> Sequence[int]:
    """Return the rank that saves each tensor whose device mesh has one rank."""
    homes: Sequence[int] = answers[coordinator]["homes"]
    for rank, answer in enumerate(answers):
        differ = [at for at, other in zip(homes, answer["homes"], strict=True) if at not in (other, coordinator)]
        if differ:
            msg = f"a sharded tensor is on rank {differ[0]} for rank {coordinator}, but elsewhere for rank {rank}"
            raise ShardedStateError(f"{msg}. Nothing was saved")
    return homes


def _raise_difference(descriptions: Sequence[Sequence[str]]) -> None:
    """Raise an error that names the first difference between the ranks' sharded tensors, which are given as text."""
    for rank, theirs in enumerate(descriptions):
        for ours, other in itertools.zip_longest(descriptions[0], theirs):
            if ours == other:
                continue
            difference = f"rank 0 has {ours}; rank {rank} has {other}"
            if ours is None or other is None:
                more, fewer = (0, rank) if other is None else (rank, 0)
                difference = f"rank {more} has {ours or other}; rank {fewer} does not have it"
            raise ShardedStateError(
                f"the ranks hold different sharded tensors: {difference}. Nothing was saved. All ranks have to save "
                "the same tensors, with the same placements over the same device mesh"
            )


def _compare_across_meshes(writer: RankWriter, checksums: Sequence[Sequence[Sequence[Any]]]) -> None:
    """Raise an error if ranks of different device meshes hold different rows under one key."""
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, found in enumerate(checksums):
        for number, place, checksum in found:
            if place is None:
                continue
            first, expected = known.setdefault((number, place), (rank, checksum))
            if checksum != expected:
                raise ShardedStateError(
                    f"rank {first} and rank {rank} hold different values of {writer.describe_shards()[number]}. "
                    "Nothing was saved. Give objects that differ between ranks keys of their own"
                )
