"""Join the states of a pipeline's stages by name. Nothing but names, forms and plain values is exchanged.

1. (all ranks) send a digest of the names, dtypes, shapes, placements and plain values of this rank's parts, and
   hyperparameters. A rank with several stages has several parts.
2. (all ranks) unless all ranks know these digests from the last save: send what the digest stands for.
3. (all ranks) only if a name is on several ranks, and not as the shards of one tensor: compare checksums.
4. (all ranks) make the whole state, the same on every rank. In it a :class:`~distckpt.saving.shards.StageTensor`
   stands for each tensor: the ranks that hold it will write it.
"""

import functools
import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from distckpt.backends import wire
from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.coordination.phases import SyncPoint
from distckpt.errors import ShardedStateError
from distckpt.saving.shard_placement import MeshPlacement, RankPlacement, place_on_mesh
from distckpt.saving.shards import StageTensor, checksum_of, local_of
from distckpt.saving.stage_parts import KnownPart, Node, StagePart, TensorForm, form_of, numbers_in

_T = TypeVar("_T")


class StageExchange:
    """Joins the parts of all ranks. It keeps their forms for the next save; a copy of it has none.

    Args:
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._known = b""  # digest of the texts that the plan is made of
        self._plan = _StagePlan([])

    def __reduce__(self) -> tuple[Any, ...]:
        return (StageExchange, (self._timeout_s,))

    def join(self, backend: Backend, make: Callable[[], Sequence[StagePart]]) -> Any:
        """Collective. Return the whole state, the same on every rank but for the tensors that a rank holds.

        Args:
            backend: the job's backend.
            make: returns this rank's parts, of one kind; at least one.

        Raises:
            RemoteRankError: `make` failed on some rank; on every rank.
            ShardedStateError: the parts do not fit together; on every rank.
        """
        made: list[tuple[Sequence[StagePart], str]] = []

        def begin() -> dict[str, Any]:
            parts = make()
            text = json.dumps([part.describe() for part in parts])
            made.append((parts, text))
            groups = [[dict(group) for group in part.groups] for part in parts if part.groups is not None]
            return {"digest": _digest(text.encode()), "known": self._known, "groups": groups}

        def run(phase: str, work: Callable[[], _T]) -> list[_T]:
            point = SyncPoint(handler="StageState", phase=phase, step=0)
            return phases.run(backend, point, work, timeout_s=self._timeout_s)

        answers = run("comparing the forms of the stages", begin)
        ((own, text),) = made
        digest = _digest(b"".join(answer["digest"] for answer in answers))
        if any(answer["known"] != digest for answer in answers):
            self._known = b""
            texts = enumerate(run("exchanging names and shapes", lambda: text))
            parts = [KnownPart.of_plain(rank, part) for rank, one in texts for part in json.loads(one)]
            self._plan = _StagePlan(parts)
            self._known = digest
        plan = self._plan
        if plan.pairs:
            own_checksums = functools.partial(plan.checksums, backend.rank, own)
            plan.compare(run("comparing what several ranks hold", own_checksums))
        entries = _Joined(plan, backend.rank, own).entries()
        if own[0].groups is not None:
            groups = [(rank, one) for rank, answer in enumerate(answers) for one in answer["groups"]]
            return {"state": entries, "param_groups": join_groups(own[0].kind, groups)}
        state: Any = OrderedDict(entries)
        versions = dict(item for part in reversed(plan.parts) for item in part.versions.items())
        state._metadata = OrderedDict((path, {"version": one}) for path, one in versions.items())  # noqa: SLF001 - torch's name for it
        return state


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class _PartTensor(NamedTuple):
    """A tensor: the index of a part, and the tensor's number in it."""

    part: int
    number: int


_Shards = Mapping[int, _PartTensor]
"""The shards of one tensor by rank, or one whole tensor."""


class _Pair(NamedTuple):
    """Two tensors of one name that have to be equal, or two shards."""

    name: str
    first: _PartTensor
    other: _PartTensor


class _StagePlan:
    """How the parts of all ranks fit together.

    Args:
        parts: of all ranks.

    Attributes:
        parts: see above.
        holders: the parts that have each name.
        unchecked: names that may differ in value between the ranks that have them.
        pairs: what has to be compared.

    Raises:
        ShardedStateError: the ranks have objects of different kinds, or different forms under one name.
    """

    def __init__(self, parts: Sequence[KnownPart]) -> None:
        self.parts = parts
        self.holders = _find_holders(parts)
        unchecked = [frozenset(part.unchecked) for part in parts]
        self.unchecked = {
            name for name, holders in self.holders.items() if all(name in unchecked[index] for index in holders)
        }
        self.pairs: list[_Pair] = []
        self._shards: dict[str, list[Mapping[int, _Shards]]] = {}
        for name, holders in self.holders.items():
            numbers = [numbers_in(parts[index].nodes[name]) for index in holders]
            places = (
                [_PartTensor(*one) for one in zip(holders, place, strict=True)] for place in zip(*numbers, strict=True)
            )
            self._shards[name] = [self._group(name, tensors) for tensors in places]

    def _group(self, name: str, tensors: Sequence[_PartTensor]) -> dict[int, _Shards]:
        """Return the shards that belong together, by part. Tensors on different meshes are copies of each other."""
        groups = defaultdict[Any, dict[int, _PartTensor]](dict)
        for one in tensors:
            rank, ranks = self.parts[one.part].rank, self.form(one).placement.ranks
            number = 0  # a rank may have the name in several parts
            while rank in groups[ranks, number]:
                number += 1
            groups[ranks, number][rank] = one
        found: dict[int, _Shards] = {}
        copies = []
        for (ranks, _), group in groups.items():
            absent = set(ranks).difference(group)
            if absent:
                raise ShardedStateError(
                    f"{self.parts[0].kind}: {name!r} is a DTensor over the ranks {list(ranks)}, but rank {min(absent)} "
                    "does not have it. Nothing was saved"
                )
            found |= {one.part: group for one in group.values()}
            copies.append([group[rank] for rank in ranks])
        if name not in self.unchecked:
            first, *others = copies
            self.pairs += [_Pair(name, *pair) for other in others for pair in zip(first, other, strict=True)]
        return found

    def form(self, tensor: _PartTensor) -> TensorForm:
        """Return what all ranks know of a tensor."""
        return self.parts[tensor.part].tensors[tensor.number]

    def shards_of(self, name: str, part: int) -> Iterator[_Shards]:
        """Yield the shards of each tensor that a part has under a name."""
        return (shards[part] for shards in self._shards[name])

    def parts_of(self, rank: int) -> list[int]:
        """Return the indices of a rank's parts."""
        return [index for index, part in enumerate(self.parts) if part.rank == rank]

    def _compared_on(self, rank: int) -> Iterator[_PartTensor]:
        """Yield the tensors of a rank that are compared, each once."""
        found = (one for pair in self.pairs for one in (pair.first, pair.other))
        return (one for one in dict.fromkeys(found) if self.parts[one.part].rank == rank)

    def checksums(self, rank: int, own: Sequence[StagePart]) -> list[int]:
        """Return the checksums of a rank's tensors that are compared. Rank-local.

        Args:
            rank: this rank.
            own: its parts.
        """
        parts = dict(zip(self.parts_of(rank), own, strict=True))
        return [checksum_of(local_of(parts[part].tensors[number])) for part, number in self._compared_on(rank)]

    def compare(self, checksums: Sequence[Sequence[int]]) -> None:
        """Compare the :meth:`checksums` of all ranks.

        Raises:
            ShardedStateError: two ranks have different values.
        """
        known: dict[_PartTensor, int] = {}
        for rank, found in enumerate(checksums):
            known |= zip(self._compared_on(rank), found, strict=True)
        for name, first, other in self.pairs:
            if known[first] != known[other]:
                one, two = self.parts[first.part], self.parts[other.part]
                raise _differ(one.kind, name, one.rank, two.rank, "other values")


def _find_holders(parts: Sequence[KnownPart]) -> dict[str, list[int]]:
    """Return the parts that have each name.

    Raises:
        ShardedStateError: the ranks have objects of different kinds, or different forms under one name.
    """
    kind = parts[0].kind if parts else ""
    for part in parts:
        if part.kind != kind:
            msg = f"rank 0 has {kind}, rank {part.rank} has {part.kind}. Nothing was saved"
            raise ShardedStateError(f"{msg}. Give all ranks objects of one kind")
    holders: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for name in part.nodes:
            holders.setdefault(name, []).append(index)
    for name, (first, *others) in holders.items():
        if not others:
            continue
        form = form_of(parts[first], name)
        for other in others:
            if form_of(parts[other], name) != form:
                raise _differ(kind, name, parts[first].rank, parts[other].rank, "another form or value")
    return holders


def _differ(kind: str, name: str, first: int, other: int, what: str) -> ShardedStateError:
    return ShardedStateError(
        f"{kind}: {name!r} is on rank {first} and on rank {other}, with {what}. Nothing was saved. Names have to be "
        "those of the whole model; tied tensors have to be equal"
    )


class _Joined:
    """Makes the values of the whole state. A tensor that has two names in its part is one tensor.

    Args:
        plan: how the parts fit together.
        rank: this rank.
        own: its parts.
    """

    def __init__(self, plan: _StagePlan, rank: int, own: Sequence[StagePart]) -> None:
        self._plan = plan
        self._rank = rank
        self._own = dict(zip(plan.parts_of(rank), own, strict=True))
        self._made: dict[tuple[_PartTensor, ...], StageTensor] = {}
        self._placements: dict[MeshPlacement, RankPlacement] = {}
        self._nothing = torch.empty(0)

    def entries(self) -> dict[str, Any]:
        """Return the values by name. The parts that have a name take turns in writing it."""
        return {name: self._value(name, holders) for name, holders in self._plan.holders.items()}

    def _value(self, name: str, holders: Sequence[int]) -> Any:
        parts = self._plan.parts
        numbers = numbers_in(parts[holders[0]].nodes[name])
        turn = numbers[0] if numbers and name not in self._plan.unchecked else 0
        writer = holders[turn % len(holders)]
        return self._make(parts[writer].nodes[name], self._plan.shards_of(name, writer))

    def _make(self, node: Node, shards: Iterator[_Shards]) -> Any:
        kind, content = node
        if kind == "tensor":
            return self._tensor(next(shards))
        if kind == "dict":
            return {key: self._make(item, shards) for key, item in content}
        if kind == "value":
            return wire.decode(content.encode())
        items = [self._make(item, shards) for item in content]
        return items if kind == "list" else tuple(items)

    def _tensor(self, shards: _Shards) -> StageTensor:
        key = tuple(shards.values())  # tied on all ranks that have it, or not tied
        if key not in self._made:
            dtype, shape, placement = self._plan.form(key[0])
            own = shards.get(self._rank)
            held = self._nothing if own is None else self._own[own.part].tensors[own.number]
            if placement not in self._placements:
                self._placements[placement] = place_on_mesh(placement, self._rank)
            self._made[key] = StageTensor(self._placements[placement], shape, getattr(torch, dtype), held)
        return self._made[key]


def join_groups(kind: str, groups_of: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Return the parameter groups of all stages: groups of the same index become one group.

    Args:
        kind: phrase for the object, for messages.
        groups_of: the groups of each stage, with its rank.

    Raises:
        ShardedStateError: they have different hyperparameters, or a parameter is in two groups.
    """
    joined = list[dict[str, Any]]()
    first_ranks: list[int] = []
    group_of: dict[str, int] = {}
    for rank, groups in groups_of:
        for index, group in enumerate(groups):
            if index == len(joined):
                joined.append({**group, "params": []})
                first_ranks.append(rank)
            ours = joined[index]
            for key in sorted((ours.keys() | group.keys()) - {"params"}):
                if wire.encode([key in ours, ours.get(key)]) != wire.encode([key in group, group.get(key)]):
                    raise ShardedStateError(
                        f"{kind}: param_groups[{index}] has {key} {ours.get(key)!r} on rank {first_ranks[index]} and "
                        f"{group.get(key)!r} on rank {rank}. Nothing was saved. Groups of the same index are one group "
                        "of the whole model, so they need the same hyperparameters"
                    )
            for name in group["params"]:
                if group_of.setdefault(name, index) != index:
                    msg = f"{kind}: {name!r} is in param_groups[{group_of[name]}] on one rank and [{index}] on another"
                    raise ShardedStateError(f"{msg}. Nothing was saved")
            ours["params"] += group["params"]
    return [{**group, "params": list(dict.fromkeys(group["params"]))} for group in joined]
