"""Save and load the stages of a pipeline, which are on different ranks, as one state by name."""

import functools
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import rename_for_module, unwrap, without_compiled
from distckpt._values import check_timeout, copy_at
from distckpt.backends.detect import current
from distckpt.errors import state_mismatch_error
from distckpt.saving.sharded_objects import free_gathered_parameters, refuse_sharded_object
from distckpt.saving.shards import checksum_of, local_of
from distckpt.saving.stage_exchange import StageExchange, join_groups
from distckpt.saving.stage_parts import StagePart


class StageState:
    """The stages of a pipeline that the ranks hold, for ``to_save`` and ``to_load``.

    With pipeline parallelism each rank has other layers in its module, and another optimizer. A save joins them by
    name: the file holds one state of the whole model, as if it had never been split. Each rank writes the tensors that
    it holds; nothing is gathered. A load gives each rank the values whose names its objects have. So the file also
    loads into a model that is split in another way, over another number of ranks, or not at all.

    Names have to be those of the whole model. A tensor may be a DTensor over some ranks: a stage under FSDP2 or tensor
    parallelism. If several ranks have a tensor under one name, but not as its shards, such as tied embeddings or the
    replicas of a stage, its values have to be equal, and it is saved once. Buffers may differ; those of the lowest rank
    are saved.

    An optimizer's state is saved by the names of its parameters: those of `module`, or ``param_names`` in its groups,
    which it has if it was made of ``named_parameters()``. Groups of the same index are one group.

    Args:
        stage: this rank's module, or its optimizer. A list of modules if the rank has several stages, as interleaved
            schedules need; a list of optimizers if each has its own.
        module: the module with the parameters of an optimizer, or a list of modules; None if the optimizer's groups
            have ``param_names``.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a list is empty, the parameters of the optimizer have no names, or `timeout_s` is not positive.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"layer1": torch.nn.Linear(2, 2, bias=False)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> list(StageState(model).state_dict())
        ['layer1.weight']
        >>> StageState(optimizer, model).state_dict()["param_groups"][0]["params"]
        ['layer1.weight']
    """

    def __init__(
        self,
        stage: nn.Module | torch.optim.Optimizer | Sequence[nn.Module] | Sequence[torch.optim.Optimizer],
        module: nn.Module | Sequence[nn.Module] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        stages = _as_list(stage)
        if not any(all(isinstance(one, kind) for one in stages) for kind in (nn.Module, torch.optim.Optimizer)):
            kinds = "an nn.Module, an Optimizer, or a list of one of them"
            raise TypeError(f"Argument stage should be {kinds}, but given {_types(stage)}")
        if not stages:
            raise ValueError("Argument stage should hold at least one module or optimizer, but the list is empty")
        modules = [] if module is None else _as_list(module)
        if not all(isinstance(one, nn.Module) for one in modules) or (modules and isinstance(stages[0], nn.Module)):
            kinds = "the nn.Module of an optimizer, or a list of them"
            raise TypeError(f"Argument module should be {kinds}, but given {_types(module)}")
        for one in stages:
            if hasattr(one, "consolidate_state_dict"):
                msg = f"Argument stage: {type(one).__name__} keeps a part of its state on each rank; it has no names"
                raise TypeError(msg)
        check_timeout(timeout_s)
        self._exchange = StageExchange(timeout_s)
        self._stages = stages
        self._modules = modules
        for one in stages:
            if isinstance(one, torch.optim.Optimizer):
                self._names(one)

    @property
    def wrapped(self) -> list[Any]:
        """The modules, without wrappers, or the optimizers."""
        return list(map(unwrap, self._stages))

    def distckpt_consolidate(self, to: int) -> Any:
        """Collective. Return the state of all stages. A save calls this on all ranks.

        Raises:
            ShardedStateError: the ranks' states do not fit together; on every rank.
        """
        backend = current()
        make = functools.partial(self._parts, to)
        return self.state_dict() if backend.world_size == 1 else self._exchange.join(backend, make)

    def state_dict(self) -> Any:
        """Return this rank's part of the state. Rank-local; a save writes the parts of all ranks instead.

        Raises:
            ValueError: two stages of this rank have one name, with different tensors.
        """
        states = [self._state_of(one) for one in self.wrapped]
        if len(states) == 1:
            return states[0]
        if isinstance(self._stages[0], nn.Module):
            joined: Any = OrderedDict(_joined(states, "tensors", set[str]().union(*map(_buffer_names, self.wrapped))))
            versions = dict(item for state in states for item in getattr(state, "_metadata", {}).items())
            joined._metadata = OrderedDict(versions)  # noqa: SLF001 - torch's name for it
            return joined
        groups = [(current().rank, state["param_groups"]) for state in states]
        return {
            "state": _joined([one["state"] for one in states], "parameters"),
            "param_groups": join_groups("an optimizer", groups),
        }

    def _state_of(self, stage: Any) -> Any:
        if isinstance(stage, nn.Module):
            return stage.state_dict()
        state, names = stage.state_dict(), self._names(stage)
        by_number = {
            number: name
            for group, its_names in zip(state["param_groups"], names, strict=True)
            for number, name in zip(group["params"], its_names, strict=True)
        }
        strange = next((key for key in state["state"] if key not in by_number), None)
        if strange is not None:
            raise ValueError(f"the {type(stage).__name__} has a state {strange!r} that belongs to no parameter")
        groups = [
            {**{key: item for key, item in group.items() if key != "param_names"}, "params": list(its_names)}
            for group, its_names in zip(state["param_groups"], names, strict=True)
        ]
        by_name = _joined([{by_number[number]: one} for number, one in state["state"].items()], "parameters")
        return {"state": by_name, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load this rank's part of a state. Rank-local.

        Args:
            state_dict: of all stages, or of a model that was never split. It may hold more than this rank has.

        Raises:
            StateMismatchError: an optimizer's parameter or group is missing; a ValueError too.
            RuntimeError: a module's tensor is missing, or has another shape.
        """
        for stage, part, repeated in self.parts_of(state_dict):
            stage.load_state_dict(copy_at(part, repeated))

    def parts_of(self, state: Any, name: str = "") -> list[tuple[Any, Any, list[tuple[Any, ...]]]]:
        """Return this rank's objects, each with the part of a whole state that it loads, under the object's own names.

        Args:
            state: of all stages, or of a model that was never split.
            name: of this object, for messages.

        Returns:
            Each object, its part, and the keys that lead to values which other objects or parameters get too: these
            have to be copied, or an optimizer would step one tensor twice.

        Raises:
            StateMismatchError: an optimizer's parameter or group is missing; a ValueError too.
        """
        found, seen = [], set[str]()
        for stage in self.wrapped:
            paths: list[tuple[str, tuple[Any, ...]]] = []
            if isinstance(stage, nn.Module):
                part = self._module_part(stage, state)
                paths += [(key, (key,)) for key in part] if isinstance(part, Mapping) else []
            else:
                part = self._optimizer_part(stage, state, name)
                numbered = zip(part["param_groups"], self._names(stage), strict=True)
                paths += [
                    (key, ("state", number, inner))
                    for group, its_names in numbered
                    for number, key in zip(group["params"], its_names, strict=True)
                    for inner in part["state"].get(number, ())
                ]
            found.append((stage, part, _repeated(paths, seen)))
        return found

    def _module_part(self, stage: nn.Module, state: Any) -> Any:
        renamed = rename_for_module(stage, state)
        if not isinstance(renamed, Mapping) or (current().world_size == 1 and len(self._stages) == 1):
            return renamed
        found: Any = OrderedDict((key, renamed[key]) for key in stage.state_dict() if key in renamed)
        if hasattr(renamed, "_metadata"):
            found._metadata = renamed._metadata  # noqa: SLF001 - torch's name for it
        return found

    def _optimizer_part(self, optimizer: torch.optim.Optimizer, state: Any, name: str) -> Any:
        given = _by_name(state, name)
        group_of = {key: index for index, group in enumerate(given["param_groups"]) for key in group["params"]}
        names = self._names(optimizer)
        plain: dict[str, list[str]] = {}
        for key in group_of:
            plain.setdefault(without_compiled(key), []).append(key)
        for its_names in names:  # as the file has them, whether the saved module was compiled or not
            for index, key in enumerate(its_names):
                found = plain.get(without_compiled(key), [])
                its_names[index] = found[0] if key not in group_of and len(found) == 1 else key
        missing = [key for its_names in names for key in its_names if key not in group_of]
        if missing:
            msg = f"the checkpoint's {name!r} has no state of {', '.join(missing[:3])}{' ...' if missing[3:] else ''}"
            keys = [f"{name}.{key}".lstrip(".") for key in missing]
            raise state_mismatch_error(msg, ["ValueError"], missing=keys)
        groups, states = [], dict[int, Any]()
        own = optimizer.state_dict()["param_groups"]
        for index, (group, its_names) in enumerate(zip(own, names, strict=True)):
            sources = sorted({group_of[key] for key in its_names})
            if len(sources) > 1:
                msg = (
                    f"the parameters of group {index} of {name!r} are in the groups {sources} of the checkpoint: "
                    f"{next(key for key in its_names if group_of[key] != group_of[its_names[0]])!r} is in another one "
                    f"than {its_names[0]!r}"
                )
                raise state_mismatch_error(msg, ["ValueError"], mismatched=[f"{name}.param_groups".lstrip(".")])
            others = given["param_groups"]
            source = others[sources[0] if sources else index] if sources or index < len(others) else group
            kept = {key: group[key] for key in ("params", "param_names") if key in group}
            groups.append({**{key: item for key, item in source.items() if key != "param_names"}, **kept})
            pairs = zip(group["params"], its_names, strict=True)
            states |= {number: given["state"][key] for number, key in pairs if key in given["state"]}
        return {"state": states, "param_groups": groups}

    def _parts(self, save_on_rank: int) -> list[StagePart]:
        return [self._part_of(stage, save_on_rank) for stage in self.wrapped]

    def _part_of(self, stage: Any, save_on_rank: int) -> StagePart:
        refuse_sharded_object("StageState", stage, save_on_rank)
        state = self._state_of(stage)
        if isinstance(stage, torch.optim.Optimizer):
            return StagePart("an optimizer", state["state"], groups=state["param_groups"])
        versions = {path: one.get("version") for path, one in getattr(state, "_metadata", {}).items()}
        return StagePart("a module", state, versions=versions, unchecked=sorted(_buffer_names(stage)))

    def _names(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        """Return the names of the parameters of each group."""
        known: dict[int, str] = {}
        for module in map(unwrap, reversed(self._modules)):
            free_gathered_parameters(module)  # FSDP2: after a forward pass, the module holds gathered tensors
            known |= {id(one): name for name, one in reversed(list(module.named_parameters()))}
        found = []
        for index, group in enumerate(optimizer.param_groups):
            kind = type(optimizer).__name__
            if not self._modules and "param_names" not in group:
                raise ValueError(
                    f"group {index} of the {kind} has no names of parameters. Pass the module too, or make the "
                    "optimizer of named_parameters()"
                )
            absent = [number for number, one in enumerate(group["params"]) if self._modules and id(one) not in known]
            if absent:
                raise ValueError(f"parameter {absent[0]} of group {index} of the {kind} is not in the module")
            found.append([known[id(one)] for one in group["params"]] if self._modules else list(group["param_names"]))
        return found


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _types(given: Any) -> Any:
    return [type(one) for one in given] if isinstance(given, list | tuple) else type(given)


def _joined(states: Sequence[Mapping[str, Any]], what: str, unchecked: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of several states as one mapping by name.

    Args:
        states: of stages, or of parameters.
        what: phrase for what has a name.
        unchecked: names that may have different values.

    Raises:
        ValueError: two states have different values under one name.
    """
    found: dict[str, Any] = {}
    for state in states:
        for name, one in state.items():
            if name in found and name not in unchecked and not _is_equal(found[name], one):
                raise ValueError(f"two {what} of this rank are called {name!r}, with different values")
            found.setdefault(name, one)
    return found


def _buffer_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers(remove_duplicate=False)}


def _repeated(paths: Sequence[tuple[str, tuple[Any, ...]]], seen: set[str]) -> list[tuple[Any, ...]]:
    """Return the paths of names that are in `seen`, or that occurred before under another parent."""
    found, first = [], dict[str, tuple[Any, ...]]()
    for name, path in paths:
        if name in seen or first.setdefault(name, path[:-1]) != path[:-1]:
            found.append(path)
    seen.update(first)
    return found


def _is_equal(one: Any, other: Any) -> bool:
    """Return True if two values, which may hold tensors, are equal. Rank-local: of DTensors it compares the shards."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        held, its = local_of(one), local_of(other)
        is_alike = (one.shape, held.shape, held.dtype) == (other.shape, its.shape, its.dtype)
        return one is other or (is_alike and checksum_of(held) == checksum_of(its))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(item, other[key]) for key, item in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)


def _by_name(state: Any, name: str) -> Mapping[str, Any]:
    """Return an optimizer's state by the names of its parameters.

    Raises:
        StateMismatchError: it is no optimizer's state, or its parameters have no names; a ValueError too.
    """
    keys = [f"{name}.param_groups".lstrip(".")]
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, Sequence) or not isinstance(state.get("state"), Mapping):
        msg = f"the checkpoint's {name!r} is not an optimizer's state: it lacks 'state' or 'param_groups'"
        raise state_mismatch_error(msg, ["ValueError"], mismatched=keys)
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        by_name: Mapping[str, Any] = state
        return by_name
    if any(len(group.get("param_names", ())) != len(group["params"]) for group in groups):
        msg = (
            f"the checkpoint's {name!r} numbers its parameters, and its groups have no 'param_names': a part of the "
            "model numbers them otherwise"
        )
        raise state_mismatch_error(msg, ["ValueError"], mismatched=keys)
    names = {number: key for group in groups for number, key in zip(group["params"], group["param_names"], strict=True)}
    return {
        "state": {names[number]: one for number, one in state["state"].items() if number in names},
        "param_groups": [{**group, "params": list(group["param_names"])} for group in groups],
    }
