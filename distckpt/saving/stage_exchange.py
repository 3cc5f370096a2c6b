"""Join the states of a pipeline's stages by name. Nothing but names, forms and plain values is exchanged.

1. (all ranks) send a digest of the names, dtypes, shapes and plain values of this rank's part, and hyperparameters.
2. (all ranks) unless all ranks know these digests from the last save: send what the digest stands for.
3. (all ranks) only if several ranks have a name: compare checksums of its tensors.
4. (all ranks) make the whole state, the same on every rank. In it an :class:`~distckpt.saving.shards.OwnedTensor`
   stands for each tensor: the rank that holds it will write it.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch

from distckpt.backends import wire
from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.coordination.phases import SyncPoint
from distckpt.errors import ShardedStateError
from distckpt.ptformat.sharded import as_whole, describe_shard, none_sharded
from distckpt.saving.shards import OwnedTensor, checksum_of

_T = TypeVar("_T")
_KEYS: Final = frozenset({str, int, float, bool, type(None)})
_Node = Sequence[Any]
"""A value: its kind, and the number of a tensor, a plain value, or the nodes inside it."""


@dataclass(slots=True)
class StagePart:
    """One rank's part of a state.

    Attributes:
        kind: phrase for the object; the same on all ranks.
        entries: values by name.
        groups: an optimizer's parameter groups, with names; None for a module.
        versions: of a module's parts, by path: the ``version`` in its ``_metadata``.
        unchecked: names that may differ in value between the ranks that have them.
        tensors: the tensors in `entries`. Set by :meth:`describe`.
    """

    kind: str
    entries: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Sequence[str] = ()
    tensors: list[torch.Tensor] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _nodes: dict[str, _Node] = field(default_factory=dict)

    def describe(self) -> str:
        """Return what the other ranks need, as JSON. Rank-local.

        Raises:
            ShardedStateError: a value cannot be saved by name.
        """
        self._nodes = {name: self._node_of(value, name) for name, value in self.entries.items()}
        part = {
            "kind": self.kind,
            "nodes": self._nodes,
            "tensors": [[str(one.dtype).removeprefix("torch."), one.shape] for one in self.tensors],
            "versions": self.versions,
            "unchecked": self.unchecked,
        }
        return json.dumps(part)

    def checksums(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the checksums of the tensors of each name that this rank has."""
        return {
            name: [checksum_of(self.tensors[number]) for number in _numbers_in(self._nodes[name])]
            for name in names
            if name in self._nodes
        }

    def _node_of(self, value: Any, name: str) -> _Node:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return ["tensor", self._number_of(value, name)]
        if kind is dict and _KEYS.issuperset(map(type, value)):
            return ["dict", [[key, self._node_of(item, name)] for key, item in value.items()]]
        if kind in (list, tuple):
            return [kind.__name__, [self._node_of(item, name) for item in value]]
        return ["value", wire.encode(value).decode()]

    def _number_of(self, tensor: torch.Tensor, name: str) -> int:
        problem = None if none_sharded([tensor]) else describe_shard(tensor)
        whole = tensor if problem is not None else as_whole(tensor).detach()
        if problem is None and (whole.layout is not torch.strided or whole.is_quantized or whole.is_nested):
            problem = f"a tensor of layout {whole.layout}, quantized or nested"
        if problem is None and whole.is_meta:
            problem = "a tensor on the meta device"
        if problem is not None:
            msg = f"{self.kind}, {name!r}: {problem}. A stage's tensors have to be whole, dense tensors"
            raise ShardedStateError(msg)
        storage = whole.untyped_storage()._cdata  # noqa: SLF001 - torch's identity of a storage
        key = storage, whole.storage_offset(), whole.shape, whole.stride(), whole.dtype
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(whole)
        return self._numbers[key]


class StageExchange:
    """Joins the parts of all ranks. It keeps their forms for the next save; a copy of it has none.

    Args:
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._known = b""  # digest of the texts that `_parts` holds
        self._parts: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (StageExchange, (self._timeout_s,))

    def join(self, backend: Backend, make: Callable[[], StagePart]) -> Any:
        """Collective. Return the whole state, the same on every rank but for the tensors that a rank holds.

        Args:
            backend: the job's backend.
            make: returns this rank's part.

        Raises:
            RemoteRankError: `make` failed on some rank; on every rank.
            ShardedStateError: the parts do not fit together; on every rank.
        """
        made: list[tuple[StagePart, str]] = []

        def begin() -> dict[str, Any]:
            part = make()
            text = part.describe()
            made.append((part, text))
            groups = None if part.groups is None else [dict(group) for group in part.groups]
            return {"digest": _digest(text.encode()), "known": self._known, "groups": groups}

        def run(phase: str, work: Callable[[], _T]) -> list[_T]:
            point = SyncPoint(handler="StageState", phase=phase, step=0)
            return phases.run(backend, point, work, timeout_s=self._timeout_s)

        answers = run("comparing the forms of the stages", begin)
        ((own, text),) = made
        digest = _digest(b"".join(answer["digest"] for answer in answers))
        if any(answer["known"] != digest for answer in answers):
            self._known = b""
            self._parts = [json.loads(one) for one in run("exchanging names and shapes", lambda: text)]
            self._known = digest
        parts = self._parts
        holders = _find_holders(parts)
        unchecked = {name for part in parts for name in part["unchecked"]}
        shared = [name for name, ranks in holders.items() if len(ranks) > 1 and name not in unchecked]
        if shared:
            checksums = run("comparing what several ranks hold", lambda: own.checksums(shared))
            for name in shared:
                first, *others = holders[name]
                differ = [rank for rank in others if checksums[rank][name] != checksums[first][name]]
                if differ:
                    raise _differ(own.kind, name, first, differ[0], "other values")
        joined = _Joined(backend.rank, parts, own.tensors, unchecked)
        entries = {name: joined.value(name, ranks) for name, ranks in holders.items()}
        if own.groups is not None:
            return {"state": entries, "param_groups": _join_groups(own.kind, [answer["groups"] for answer in answers])}
        state: Any = OrderedDict(entries)
        versions = dict(item for part in reversed(parts) for item in part["versions"].items())
        state._metadata = OrderedDict((path, {"version": one}) for path, one in versions.items())  # noqa: SLF001 - torch's name for it
        return state


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _find_holders(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the ranks that have each name.

    Raises:
        ShardedStateError: the ranks have objects of different kinds, or different forms under one name.
    """
    kinds = [part["kind"] for part in parts]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            msg = (
                f"rank 0 has {kinds[0]}, rank {rank} has {kind}. Nothing was saved. Give all ranks objects of one kind"
            )
            raise ShardedStateError(msg)
    holders: dict[str, list[int]] = {}
    for rank, part in enumerate(parts):
        for name in part["nodes"]:
            holders.setdefault(name, []).append(rank)
    for name, (first, *others) in holders.items():
        if not others:
            continue
        form = _form_of(parts[first]["nodes"][name], parts[first]["tensors"])
        for rank in others:
            if _form_of(parts[rank]["nodes"][name], parts[rank]["tensors"]) != form:
                raise _differ(kinds[0], name, first, rank, "another form or value")
    return holders


def _differ(kind: str, name: str, first: int, other: int, what: str) -> ShardedStateError:
    return ShardedStateError(
        f"{kind}: {name!r} is on rank {first} and on rank {other}, with {what}. Nothing was saved. Names have to be "
        "those of the whole model; tied tensors have to be equal"
    )


def _form_of(node: _Node, tensors: Sequence[Any]) -> Any:
    """Return what two ranks compare of a value: the forms of its tensors, and all else."""
    return _without_numbers(node), [tensors[number] for number in _numbers_in(node)]


def _without_numbers(node: _Node) -> Any:
    kind, content = node
    if kind == "dict":
        return [kind, [[key, _without_numbers(item)] for key, item in content]]
    if kind in ("list", "tuple"):
        return [kind, [_without_numbers(item) for item in content]]
    return [kind, None if kind == "tensor" else content]


def _numbers_in(node: _Node) -> list[int]:
    """Return the numbers of the tensors in a value, in its order."""
    kind, content = node
    if kind == "tensor":
        return [content]
    if kind == "value":
        return []
    inner = (item for _, item in content) if kind == "dict" else content
    return [number for one in inner for number in _numbers_in(one)]


class _Joined:
    """Makes the values of the whole state. A tensor that has two names on its rank is one tensor."""

    def __init__(
        self, rank: int, parts: Sequence[Mapping[str, Any]], own: Sequence[torch.Tensor], unchecked: set[str]
    ) -> None:
        self._rank = rank
        self._parts = parts
        self._own = own
        self._unchecked = unchecked
        self._made: dict[tuple[int, int], OwnedTensor] = {}
        self._nothing = torch.empty(0)

    def value(self, name: str, ranks: Sequence[int]) -> Any:
        """Return the value of a name that some ranks have. They take turns in writing."""
        numbers = _numbers_in(self._parts[ranks[0]]["nodes"][name])
        turn = numbers[0] if numbers and name not in self._unchecked else 0
        owner = ranks[turn % len(ranks)]
        return self._make(self._parts[owner]["nodes"][name], owner)

    def _make(self, node: _Node, owner: int) -> Any:
        kind, content = node
        if kind == "tensor":
            if (owner, content) not in self._made:
                dtype, shape = self._parts[owner]["tensors"][content]
                local = self._own[content] if owner == self._rank else self._nothing
                self._made[owner, content] = OwnedTensor(owner, tuple(shape), getattr(torch, dtype), local)
            return self._made[owner, content]
        if kind == "dict":
            return {key: self._make(item, owner) for key, item in content}
        if kind == "value":
            return wire.decode(content.encode())
        items = [self._make(item, owner) for item in content]
        return items if kind == "list" else tuple(items)


def _join_groups(kind: str, groups_of: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the parameter groups of all stages: those of one index are one group.

    Args:
        kind: phrase for the object, for messages.
        groups_of: of each rank.

    Raises:
        ShardedStateError: they have different hyperparameters, or a parameter is in two groups.
    """
    joined = list[dict[str, Any]]()
    first_ranks: list[int] = []
    group_of: dict[str, int] = {}
    for rank, groups in enumerate(groups_of):
        for index, group in enumerate(groups):
            if index == len(joined):
                joined.append({**group, "params": []})
                first_ranks.append(rank)
            ours = joined[index]
            for key in (ours.keys() | group.keys()) - {"params"}:
                if wire.encode([key in ours, ours.get(key)]) != wire.encode([key in group, group.get(key)]):
                    msg = (
                        f"{kind}: param_groups[{index}] has {key} {ours.get(key)!r} on rank {first_ranks[index]} and "
                        f"{group.get(key)!r} on rank {rank}. Nothing was saved. Groups of the same index are one group "
                        "of the whole model, so they need the same hyperparameters"
                    )
                    raise ShardedStateError(msg)
            for name in group["params"]:
                if group_of.setdefault(name, index) != index:
                    msg = f"{kind}: {name!r} is in param_groups[{group_of[name]}] on one rank and [{index}] on another"
                    raise ShardedStateError(f"{msg}. Nothing was saved")
            ours["params"] += group["params"]
    return [{**group, "params": list(dict.fromkeys(group["params"]))} for group in joined]
