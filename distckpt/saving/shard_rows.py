"""Bring the bytes of sharded tensors to the ranks that write them: from this rank's rows, and from other ranks.

A rank copies most of its rows straight into its part of the image (:mod:`distckpt.saving.staging`). Here is the rest:
rows that exist only after a redistribution, and the few bytes that another rank writes.

1. (all ranks) :func:`gather_rows`: find this rank's rows, redistribute where needed, collect what other ranks write.
2. (all ranks) exchange: :meth:`~distckpt.backends.base.Backend.exchange_host`.
3. (all ranks) :func:`place_received`.
"""

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from distckpt._checksum import crc32
from distckpt.ptformat.image import CopyItem
from distckpt.saving.rank_plan import RankPlan, split_received
from distckpt.saving.shards import NO_ROWS, Shards
from distckpt.saving.staging import Staging

_TARGET = operator.attrgetter("at")


@dataclass(slots=True)
class GatheredRows:
    """What :func:`gather_rows` has found.

    Attributes:
        storages: of this rank's rows, by the tensors' numbers; empty where nothing is left to copy.
        offsets: of the first byte in each storage.
        outgoing: by rank, what it writes of this rank's rows.
        checksums: CRC-32 and length of what is in this rank's memory by now, by its offset.
    """

    storages: list[torch.UntypedStorage] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    outgoing: dict[int, bytearray] = field(default_factory=dict)
    checksums: dict[int, tuple[int, int]] = field(default_factory=dict)


def gather_rows(shards: Shards, plan: RankPlan, copies: Sequence[CopyItem], view: memoryview) -> GatheredRows:
    """Collective where tensors are redistributed. Find this rank's rows of all sharded tensors.

    Rows of a redistributed tensor are copied at once, and then dropped: one tensor is held at a time.

    Args:
        shards: the sharded tensors.
        plan: this rank's.
        copies: what is to be copied into `view`.
        view: this rank's memory.
    """
    found = GatheredRows()
    found.outgoing = {other: bytearray(sum(one.num_bytes for one in sent)) for other, sent in plan.sends.items()}
    sends: dict[int, list[tuple[int, CopyItem]]] = defaultdict(list)
    for other, sent in plan.sends.items():
        at = 0
        for number, begin, num_bytes in sent:
            sends[number].append((other, CopyItem(0, begin, at, num_bytes)))
            at += num_bytes
    own = _by_number(copies, {number for number, source in enumerate(shards) if source.needs_redistribution})
    outgoing: dict[int, list[CopyItem]] = defaultdict(list)
    for number, source in enumerate(shards):
        storage, offset = source.rows()
        if source.needs_redistribution:
            for other, item in sends.get(number, ()):
                _copy(storage, offset, [item], memoryview(found.outgoing[other]))
            found.checksums |= _copy(storage, offset, own.get(number, ()), view)
            storage, offset = NO_ROWS, 0
        else:
            for other, item in sends.get(number, ()):
                outgoing[other].append(item._replace(storage=number, begin=item.begin + offset))
        found.storages.append(storage)
        found.offsets.append(offset)
    for other, items in outgoing.items():
        Staging(found.storages, sorted(items, key=_TARGET), memoryview(found.outgoing[other]), 0).run_on(1)
    return found


def place_received(received: Mapping[int, memoryview], plan: RankPlan, view: memoryview) -> dict[int, tuple[int, int]]:
    """Copy what other ranks have sent into this rank's memory; return CRC-32 and length of each part, by its offset."""
    checksums = {}
    for at, data in split_received(list(received.values()), plan, list(received)):
        view[at : at + len(data)] = data
        checksums[at] = crc32(data), len(data)
    return checksums


def _by_number(copies: Sequence[CopyItem], numbers: set[int]) -> dict[int, list[CopyItem]]:
    found: dict[int, list[CopyItem]] = defaultdict(list)
    for item in copies if numbers else ():
        if item.storage in numbers:
            found[item.storage].append(item._replace(storage=0))
    return found


def _copy(
    storage: torch.UntypedStorage, offset: int, items: Sequence[CopyItem], target: memoryview
) -> dict[int, tuple[int, int]]:
    """Copy bytes of a storage, and return CRC-32 and length of each item, by its offset in `target`."""
    if not items:
        return {}
    Staging([storage], [one._replace(begin=one.begin + offset) for one in items], target, 0).run_on(1)
    ends = ((one.at, one.num_bytes) for one in items)
    return {at: (crc32(target[at : at + num_bytes]), num_bytes) for at, num_bytes in ends}
