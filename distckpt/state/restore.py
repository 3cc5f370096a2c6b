"""State -> live objects: all of them, or none.

Owns the order in which objects are loaded and how a failed load is undone. Must not know where the state came
from. Layer L2.

:func:`prepare` touches nothing live:

1. every object is paired with its state; modules try their state on a skeleton, optimizers compare their groups. All
   that does not fit is told in one error.
2. of a state whose bytes are still in a file, those that can go straight into live tensors are left there.

:meth:`Prepared.fill` reads the others, and :meth:`Prepared.load` then changes the objects:

3. those that cannot be asked beforehand are loaded first, after a note of what they held; if one refuses, all of them
   get that back.
4. optimizers, then modules that load in a way of their own, are loaded; their notes are used like those of 3.
5. plain modules are loaded: they are known to fit, and no copy of them is made.
6. the bytes of 2 are read into the live tensors of plain modules and optimizers.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distckpt.errors import DoesNotFit, LoadError, PartlyLoaded, does_not_fit
from distckpt.state.fence import hold_all
from distckpt.state.inplace import (
    Claim,
    Unread,
    claims_of_module,
    claims_of_optimizer,
    parameters_by_number,
    read_into,
    storages_in,
    with_live,
    without_overlap,
)
from distckpt.state.pairing import Misfits, Pair, check_complete, pair_up
from distckpt.state.report import LoadReport, all_in_one, joined, under
from distckpt.state.skeleton import NotCopyable, try_on_skeleton
from distckpt.state.undo import undo_module, undo_object, undo_optimizer

__all__ = ["Prepared", "check_complete", "prepare", "restore"]

Undo = Callable[[], None]

_FIRST, _OPTIMIZER, _OWN_WAY, _PLAIN = range(4)
"""When an object is loaded: the surest last."""


def restore(to_load: Mapping[str, Any], state: Any, module_options: Mapping[str, Any]) -> LoadReport:
    """Load `state` into the objects of `to_load`, all or none. Rank-local; issues no collectives.

    The same as :func:`prepare` and :meth:`Prepared.load`.
    """
    return prepare(to_load, state, module_options).load()


@dataclass(slots=True)
class _Turn:
    """One object, how it is loaded, and what of its state is read straight into it."""

    pair: Pair
    when: int
    claims: list[Claim] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)

    def undo(self) -> Undo | None:
        """Note what the object holds; None where loading cannot fail."""
        obj = self.pair.obj
        if self.when == _PLAIN:
            return None
        if self.when == _OWN_WAY:
            return undo_module(obj)
        if self.when == _OPTIMIZER:
            return undo_optimizer(obj)
        if hasattr(type(obj), "distckpt_undo"):  # what it loads lies outside of it, as with RngState
            undo: Undo = obj.distckpt_undo()
            return undo
        return undo_object(obj)


def prepare(
    to_load: Mapping[str, Any], state: Any, module_options: Mapping[str, Any], unread: Unread | None = None
) -> "Prepared":
    """Find out whether `state` fits, and how it is to be loaded. Rank-local; issues no collectives, touches no object.

    Args:
        to_load: live objects, in mappings and lists nested at will.
        state: their states, in a tree of the same shape; it may hold more. A single object's bare state dict
            is accepted as it is.
        module_options: keyword arguments of ``nn.Module.load_state_dict``, e.g. ``strict``.
        unread: where the bytes are that the state's tensors do not hold yet; None if they hold all.

    Raises:
        DoesNotFit: an object has no state, a list another length, an optimizer other groups (a ValueError too), or a
            module other keys or shapes (a RuntimeError too). It tells of all of them.
        Exception: what else a module's ``load_state_dict`` raises.
    """
    options = dict(module_options)
    pairs, misfits = pair_up(to_load, state)
    turns = [_examine(pair, options, misfits) for pair in pairs]
    if misfits:
        raise all_in_one(misfits)
    turns.sort(key=lambda turn: turn.when)
    if unread is not None and not options.get("assign") and not torch.__future__.get_swap_module_params_on_conversion():
        _claim(turns, unread)
    return Prepared(turns, options, unread)


class Prepared:
    """A load of which all is known that can be known. Made by :func:`prepare`; used once."""

    def __init__(self, turns: Sequence[_Turn], options: dict[str, Any], unread: Unread | None) -> None:
        self._turns = turns
        self._options = options
        self._unread = unread
        self._states = [
            with_live(turn.pair.state, ((claim.path, claim.live) for claim in turn.claims))
            if turn.claims
            else turn.pair.state
            for turn in turns
        ]

    def fill(self) -> None:
        """Read what is not to go straight into live tensors. Touches no object.

        Raises:
            OSError: it cannot be read.
        """
        if self._unread is None:
            return
        try:
            storages: list[torch.UntypedStorage] | None = [one for state in self._states for one in storages_in(state)]
        except LookupError:
            storages = None
        self._unread.fill(storages)

    def load(self, others: Iterable[tuple[Any, Any]] = ()) -> LoadReport:
        """Load all objects, or none.

        Args:
            others: objects that are loaded before all others, each with its state; no modules or optimizers.

        Returns:
            What was left as it was; nothing, if the load is strict.

        Raises:
            PartlyLoaded: the bytes of live tensors could not be read, twice. Their objects have to be loaded again.
            Exception: what an object's own ``load_state_dict`` raises. No live object is left changed.
        """
        reports = []
        self.fill()
        hold_all()  # what is being saved is the state of before
        with contextlib.ExitStack() as undo:  # every step is taken, also when one of them fails
            for obj, state in others:
                undo.callback(undo_object(obj))
                obj.load_state_dict(state)
            for step in [turn.undo() for turn in self._turns]:
                if step is not None:
                    undo.callback(step)
            for turn, state in zip(self._turns, self._states, strict=True):
                reports.append(self._load_one(turn, state))
            self._read_the_rest()
            undo.pop_all()
        return joined(reports)

    def _load_one(self, turn: _Turn, state: Any) -> LoadReport:
        pair = turn.pair
        if isinstance(pair.obj, nn.Module):
            keys = pair.obj.load_state_dict(state, **self._options)
            return turn.report if turn.when == _PLAIN else _told(pair.name, keys)
        if turn.claims and self._unread is not None:
            undo = undo_optimizer(pair.obj)
            pair.obj.load_state_dict(state)
            if _holds(pair, turn.claims):
                return LoadReport()
            undo()  # it made other tensors of them, as of a step's that moves to another device
            turn.claims.clear()
            self._unread.fill(storages_in(pair.state["state"]))
        pair.obj.load_state_dict(pair.state if not turn.claims else state)
        return LoadReport()

    def _read_the_rest(self) -> None:
        claims = [claim for turn in self._turns for claim in turn.claims]
        if not claims or self._unread is None:
            return
        with torch.no_grad():
            try:
                read_into(claims, self._unread)
            except (OSError, LoadError):  # the same bytes were read a moment ago
                try:
                    read_into(claims, self._unread)
                except (OSError, LoadError) as error:
                    names = ", ".join(turn.pair.name for turn in self._turns if turn.claims or turn.when == _PLAIN)
                    msg = (
                        f"reading failed after everything had been verified: {error}. Of {names} some tensors hold the "
                        "old values and some the new ones: load them again, from this or another checkpoint. All else "
                        "is as it was."
                    )
                    raise PartlyLoaded(msg) from error


def _examine(pair: Pair, options: dict[str, Any], misfits: Misfits) -> _Turn:
    """Find out whether a state fits, as far as that can be known."""
    obj = pair.obj
    try:
        if isinstance(obj, nn.Module):
            try:
                report = try_on_skeleton(obj, pair.state, options)
            except NotCopyable:
                return _Turn(pair, _OWN_WAY)
            return _Turn(pair, _PLAIN, report=_under(pair.name, report))
        if isinstance(obj, torch.optim.Optimizer) and _loads_as_torch_does(obj):
            _check_groups(pair)
            return _Turn(pair, _OPTIMIZER)
    except DoesNotFit as error:
        its = _under(pair.name, joined([error]))
        kinds = [base.__name__ for base in type(error).__mro__]
        named = does_not_fit(str(error), kinds, its.missing, its.unexpected, its.mismatched)
        named.__cause__ = error.__cause__
        misfits.append((pair.name, named))
    return _Turn(pair, _FIRST)


def _claim(turns: Sequence[_Turn], unread: Unread) -> None:
    """Find out which tensors of plain modules and optimizers are read straight into live ones."""
    proposed: list[tuple[_Turn, Claim]] = []
    for turn in turns:
        obj, state = turn.pair.obj, turn.pair.state
        if turn.when == _PLAIN:
            proposed += [(turn, claim) for claim in claims_of_module(obj, state, unread)]
        elif turn.when == _OPTIMIZER and _is_torchs(obj):
            proposed += [(turn, claim) for claim in claims_of_optimizer(obj, state, unread)]
    good = {id(claim) for claim in without_overlap([claim for _, claim in proposed])}
    for turn, claim in proposed:
        if id(claim) in good:
            turn.claims.append(claim)


def _holds(pair: Pair, claims: Sequence[Claim]) -> bool:
    """Tell whether an optimizer has taken the tensors that it was handed as they are."""
    parameters = dict(parameters_by_number(pair.obj, pair.state))
    return all(
        pair.obj.state[parameters[number]].get(key) is claim.live
        for claim in claims
        for _, number, key in (claim.path,)
    )


def _under(name: str, report: LoadReport) -> LoadReport:
    return LoadReport(
        missing=under(name, report.missing),
        unexpected=under(name, report.unexpected),
        mismatched=under(name, report.mismatched),
    )


def _told(name: str, keys: Any) -> LoadReport:
    """Return what a module's own ``load_state_dict`` tells, if it does as torch's."""
    missing, unexpected = getattr(keys, "missing_keys", ()), getattr(keys, "unexpected_keys", ())
    return _under(name, LoadReport(missing=tuple(missing), unexpected=tuple(unexpected)))


def _loads_as_torch_does(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether no code but torch's sees what is loaded."""
    hooks = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    return type(optimizer).__module__.startswith("torch.optim.") and not any(vars(optimizer).get(one) for one in hooks)


def _check_groups(pair: Pair) -> None:
    """Compare what ``Optimizer.load_state_dict`` compares, before anything is changed.

    Raises:
        DoesNotFit: it would refuse the state; a ValueError too.
    """
    groups = pair.state.get("param_groups") if isinstance(pair.state, Mapping) else None
    if not isinstance(groups, Sequence) or "state" not in pair.state:
        msg = f"the checkpoint's {pair.name!r} is no optimizer's state: it lacks 'state' or 'param_groups'"
        raise does_not_fit(msg, ["ValueError"], mismatched=["param_groups"])
    ours = [len(group["params"]) for group in pair.obj.param_groups]
    theirs = [len(group["params"]) for group in groups]
    told = f"({pair.name!r}: the checkpoint's groups hold {theirs} parameters, the optimizer's {ours})"
    if len(ours) != len(theirs):
        msg = f"loaded state dict has a different number of parameter groups {told}"
        raise does_not_fit(msg, ["ValueError"], mismatched=["param_groups"])
    if ours != theirs:
        msg = f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group {told}"
        raise does_not_fit(msg, ["ValueError"], mismatched=["param_groups"])
