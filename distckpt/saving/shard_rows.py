"""Bring the bytes of sharded tensors to the ranks that write them: from this rank's rows, and from other ranks.

A rank copies most of its rows straight into its part of the image (:mod:`distckpt.saving.staging`). Here is the rest:
rows that exist only after a redistribution, and the few bytes that another rank writes.

1. (all ranks) :func:`gather_rows`: redistribute tensors where needed, collect what other ranks write.
2. (all ranks) exchange: :meth:`~distckpt.backends.base.Backend.exchange_host`.
3. (all ranks) place what was received: :meth:`~distckpt.saving.snapshot.Snapshot.place_received`.
"""

import functools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distckpt._checksum import crc32
from distckpt.ptformat.image import CopyItem, ImagePlan
from distckpt.saving.rank_plan import RankPlan, plan_rank
from distckpt.saving.sharding import ShardLayout
from distckpt.saving.shards import Rows, Shards
from distckpt.saving.staging import Copies, Staging, split_copies

_TARGET = operator.attrgetter("at")


@dataclass(frozen=True, slots=True, eq=False)
class RankCopies:
    """What a rank copies for a file, in items that threads can share.

    Attributes:
        plan: the rank's plan.
        own: into its memory, without rows of redistributed tensors.
        outgoing: by rank, into what is sent to it, without rows of redistributed tensors.
        num_outgoing: by rank, how many bytes are sent to it.
        redistributed: for each redistributed tensor, by number: its copies into the rank's memory, and by rank those
            into what is sent to it.
    """

    plan: RankPlan
    own: Copies
    outgoing: Mapping[int, Copies]
    num_outgoing: Mapping[int, int]
    redistributed: Mapping[int, tuple[Sequence[CopyItem], Mapping[int, Sequence[CopyItem]]]]


@functools.lru_cache(maxsize=8)
def plan_copies(
    plan: ImagePlan,
    layouts: tuple[ShardLayout, ...],
    writers: tuple[int, ...],
    rank: int,
    offsets: tuple[int, ...] = (),
    redistributed: frozenset[int] = frozenset(),
) -> RankCopies:
    """Return a rank's copies; the last few are cached.

    Args:
        plan: the image's.
        layouts: of the sharded tensors.
        writers: the ranks that write, the coordinator last.
        rank: this rank.
        offsets: of the first byte of this rank's rows in their storages.
        redistributed: the numbers of the sharded tensors that are redistributed.
    """
    found = plan_rank(plan, layouts, writers, rank)
    items = defaultdict[int, tuple[list[CopyItem], dict[int, list[CopyItem]]]](lambda: ([], defaultdict(list)))
    own, outgoing = list[CopyItem](), defaultdict[int, list[CopyItem]](list)
    for item in split_copies(found.copies):
        if item.storage in redistributed:
            items[item.storage][0].append(item._replace(storage=0))
        else:
            own.append(_shifted(item, offsets))
    for other, sent in found.sends.items():
        at = 0
        for number, begin, num_bytes in sent:
            if number in redistributed:
                items[number][1][other].append(CopyItem(0, begin, at, num_bytes))
            else:
                outgoing[other].append(_shifted(CopyItem(number, begin, at, num_bytes), offsets))
            at += num_bytes
    return RankCopies(
        found,
        Copies(own),
        {other: Copies(sorted(copies, key=_TARGET)) for other, copies in outgoing.items()},
        {other: sum(one.num_bytes for one in sent) for other, sent in found.sends.items()},
        {number: items[number] for number in sorted(redistributed)},
    )


def gather_rows(
    shards: Shards, rows: Rows, copies: RankCopies, view: memoryview, outgoing: Mapping[int, bytearray]
) -> dict[int, tuple[int, int]]:
    """Collective where tensors are redistributed. Collect what other ranks write of this rank's rows.

    Rows of a redistributed tensor are copied at once, and then dropped: one tensor is held at a time.

    Args:
        shards: the sharded tensors.
        rows: where this rank's rows are.
        copies: this rank's.
        view: this rank's memory.
        outgoing: memory for what other ranks write of this rank's rows, by rank.

    Returns:
        CRC-32 and length of what is in this rank's memory by now, by its offset.
    """
    checksums: dict[int, tuple[int, int]] = {}
    for number, (own, sent) in copies.redistributed.items():
        storage, offset = shards.sources[number].rows()
        for other, items in sent.items():
            _copy(storage, offset, items, memoryview(outgoing[other]))
        checksums.update(_copy(storage, offset, own, view))
    for other, items in copies.outgoing.items():
        target = memoryview(outgoing[other])
        Staging(rows.storages, items, target, 0, addresses=rows.addresses).run_on(1)
    return checksums


def _shifted(item: CopyItem, offsets: Sequence[int]) -> CopyItem:
    offset = offsets[item.storage] if item.storage < len(offsets) else 0
    return item._replace(begin=item.begin + offset) if offset else item


def _copy(
    storage: torch.UntypedStorage, offset: int, items: Sequence[CopyItem], target: memoryview
) -> dict[int, tuple[int, int]]:
    """Copy bytes of a storage, and return CRC-32 and length of each item, by its offset in `target`."""
    if not items:
        return {}
    Staging([storage], [one._replace(begin=one.begin + offset) for one in items], target, 0).run_on(1)
    ends = ((one.at, one.num_bytes) for one in items)
    return {at: (crc32(target[at : at + num_bytes]), num_bytes) for at, num_bytes in ends}
