"""State -> live objects: all of them, or none.

Owns the order in which objects are loaded and how a failed load is undone. Must not know where the state came
from.

:func:`prepare` touches nothing live: every object is paired with its state; plain modules (see
:mod:`distckpt.loading.dry_run`) try theirs on a skeleton, plain optimizers compare their groups. All that does not fit
is told in one error. Tensors of theirs that can take their bytes straight from a file stand in the state's place.
:meth:`Prepared.fill` reads the rest, and :meth:`Prepared.load` changes the objects:

1. a copy is taken of the own state of every object that is not plain.
2. these are loaded by their own ``load_state_dict``, then plain optimizers, then objects that gave no copy. If one
   refuses, all that were loaded get back what they had.
3. plain modules are loaded: they are known to fit, and no copy of them is made.
4. the bytes that go straight into live tensors are read.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import unwrap
from distckpt.errors import (
    LoadError,
    PartialLoadError,
    StateMismatchError,
    partial_load_error,
    state_mismatch_error,
    type_names,
)
from distckpt.loading.dry_run import Unsure, try_on_skeleton
from distckpt.loading.inplace import (
    Claim,
    Unread,
    claims_of_module,
    claims_of_optimizer,
    read_into,
    with_tensors,
    without_overlap,
)
from distckpt.loading.pairing import Misfits, Pair, check_complete, pair_up
from distckpt.loading.plain_objects import is_plain_optimizer
from distckpt.loading.report import LoadReport, all_in_one, joined
from distckpt.loading.rollback import Undo, undo_of
from distckpt.saving.capture import whole_state
from distckpt.saving.optimizer_guard import wait_for_deferred_copies
from distckpt.saving.whole_objects import to_dtensors_like

__all__ = ["Prepared", "check_complete", "prepare"]

_OWN_WAY, _OPTIMIZER, _NOT_COPIED, _PLAIN = range(4)
"""When an object is loaded: the surest last, but for those that could not be put back."""


@dataclass(slots=True)
class _Turn:
    """One object, how it is loaded, what of its state is read straight into it, and what puts it back."""

    name: str
    obj: Any
    state: Any
    when: int
    claims: list[Claim] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)
    undo: Undo | None = None

    def note(self, options: Mapping[str, Any]) -> None:
        """Note what puts the object back; a plain module needs nothing, since its load does not fail."""
        if self.when == _OPTIMIZER:  # its ``load_state_dict`` makes new ones: keeping the old is enough
            held = {"state": self.obj.state, "param_groups": self.obj.param_groups}
            self.undo = functools.partial(vars(self.obj).update, held)
        elif self.when == _OWN_WAY:
            self.undo = undo_of(self.obj, options if isinstance(self.obj, nn.Module) else {})
            self.when = _OWN_WAY if self.undo else _NOT_COPIED

    def put_back(self) -> str:
        """Give the object what it held; return why that is impossible, if it is."""
        if self.undo is None:
            return "its state_dict() gave no copy" if self.when == _NOT_COPIED else "it was not expected to refuse"
        try:
            self.undo()
        except BaseException as error:  # noqa: BLE001 - a user's, or an interrupt: the others are put back all the same
            return f"{type(error).__name__}: {error}"
        return ""


def prepare(
    to_load: Mapping[str, Any],
    state: Any,
    module_options: Mapping[str, Any],
    unread: Unread | None = None,
    others: Iterable[tuple[Any, Any]] = (),
    only: Collection[Any] | None = None,
) -> "Prepared":
    """Find out whether `state` fits, and how it is to be loaded. Rank-local; issues no collectives, touches no object.

    Args:
        to_load: live objects, in mappings and lists nested at will.
        state: their states, in a tree of the same shape; it may hold more. A single object's bare state dict
            is accepted as it is.
        module_options: keyword arguments of ``nn.Module.load_state_dict``, e.g. ``strict``.
        unread: where the bytes are that the state's tensors do not hold yet; None if they hold all. The caller lets go
            of the state before the load: what is still referred to is read.
        others: more objects, each with its state; no modules or optimizers.
        only: which objects of `to_load` are to be loaded; None for all.

    Raises:
        ShardedStateError: a state holds a tensor of which this rank has a part.
        StateMismatchError: an object has no state, a list another length, an optimizer other groups (a ValueError
            too), or a module other keys or shapes, or tensors that cannot be written to (a RuntimeError too). It tells
            of all of them.
        Exception: what else a module's ``load_state_dict`` raises.
    """
    options = dict(module_options)
    pairs, misfits = pair_up(to_load, state)
    if only is not None:
        wanted = {id(unwrap(obj)) for obj in only}
        pairs = [one for one in pairs if id(one.obj) in wanted]
    pairs = [*(Pair(type(obj).__name__, obj, its_state) for obj, its_state in others), *pairs]
    pairs = [Pair(one.name, one.obj, whole_state(one.state, f"the checkpoint's {one.name!r}")) for one in pairs]
    turns = [_examine(pair, options, misfits) for pair in pairs]
    if misfits:
        raise all_in_one(misfits)
    if unread is not None and not options.get("assign"):
        _claim(turns, unread)
    return Prepared(turns, options, unread)


class Prepared:
    """A load of which all is known that can be known. Made by :func:`prepare`; used once."""

    def __init__(self, turns: list[_Turn], options: dict[str, Any], unread: Unread | None) -> None:
        self._turns = turns
        self._options = options
        self._unread = unread

    def fill(self) -> None:
        """Read what is not to go straight into live tensors. Touches no object.

        Raises:
            OSError: it cannot be read.
        """
        if self._unread is not None:
            self._unread.fill()

    def load(self) -> LoadReport:
        """Load all objects, or none.

        Returns:
            What was left as it was; nothing, if the load is strict.

        Raises:
            PartialLoadError: the bytes of live tensors could not be read, twice, or an object refused and others
                cannot be put back. The objects that it names have to be loaded again.
            Exception: what an object's own ``load_state_dict`` raises. No live object is left changed.
        """
        self.fill()
        wait_for_deferred_copies()  # what is being saved is the state of before
        for turn in self._turns:  # a metric of somebody's may gather here: before any object can refuse
            turn.note(self._options)
        self._turns.sort(key=lambda turn: turn.when)
        begun: list[_Turn] = []
        reports = []
        try:
            for turn in self._turns:
                begun.append(turn)
                reports.append(self._load_one(turn))
            self._read_the_rest()
        except BaseException as error:
            lost = [(turn.name, why) for turn in reversed(begun) if (why := turn.put_back())]
            back = [repr(turn.name) for turn in begun if turn.when == _OWN_WAY and turn.name not in dict(lost)]
            if back:
                error.add_note(
                    f"Put back by their own load_state_dict(): {', '.join(back)}. What their state_dict() does not "
                    "mention is as that left it."
                )
            if lost and not isinstance(error, PartialLoadError):
                _tell_lost(error, lost)
            raise
        return joined(reports)

    def _load_one(self, turn: _Turn) -> LoadReport:
        state = turn.state if turn.when == _PLAIN else to_dtensors_like(turn.obj, turn.state)
        if not isinstance(turn.obj, nn.Module):
            turn.obj.load_state_dict(state)
            return LoadReport()
        told = turn.obj.load_state_dict(state, **self._options)
        if turn.when == _PLAIN:
            return turn.report
        missing, unexpected = getattr(told, "missing_keys", ()), getattr(told, "unexpected_keys", ())
        return LoadReport(missing=tuple(missing), unexpected=tuple(unexpected)).under(turn.name)

    def _read_the_rest(self) -> None:
        claims = [claim for turn in self._turns for claim in turn.claims]
        if not claims or self._unread is None:
            return
        for is_last in (False, True):  # the same bytes were read a moment ago
            try:
                with torch.no_grad():
                    read_into(claims, self._unread)
            except (OSError, LoadError) as error:
                if is_last:
                    names = ", ".join(turn.name for turn in self._turns if turn.claims or turn.when == _PLAIN)
                    msg = (
                        f"reading failed after everything had been verified: {error}. Of {names} some tensors hold the "
                        "old values and some the new ones: load them again, from this or another checkpoint. All else "
                        "is as it was."
                    )
                    raise partial_load_error(msg, type_names(error)) from error
            else:
                return


def _tell_lost(error: BaseException, lost: Sequence[tuple[str, str]]) -> None:
    """Say which objects could not be put back.

    Raises:
        PartialLoadError: of the type of `error` too; unless that is an interrupt, which gets a note.
    """
    told = "; ".join(f"{name!r} could not be put back ({why})" for name, why in lost)
    msg = f"{error}. {told}: load it again, from this or another checkpoint. All else is as it was."
    if not isinstance(error, Exception):
        error.add_note(msg)
        return
    raise partial_load_error(msg, type_names(error)) from error


def _examine(pair: Pair, options: dict[str, Any], misfits: Misfits) -> _Turn:
    """Find out whether a state fits, as far as that can be known."""
    turn = _Turn(pair.name, pair.obj, pair.state, _OWN_WAY)
    try:
        if isinstance(pair.obj, nn.Module):
            turn.report = try_on_skeleton(pair.obj, pair.state, options).under(pair.name)
            turn.when = _PLAIN
        elif isinstance(pair.obj, torch.optim.Optimizer) and is_plain_optimizer(pair.obj):
            _check_groups(pair)
            turn.when = _OPTIMIZER
    except Unsure:
        pass
    except StateMismatchError as error:
        its = joined([error]).under(pair.name)
        kinds = [base.__name__ for base in type(error).__mro__]
        named = state_mismatch_error(str(error), kinds, its.missing, its.unexpected, its.mismatched)
        named.__cause__ = error.__cause__
        misfits.append((pair.name, named))
    return turn


def _claim(turns: Sequence[_Turn], unread: Unread) -> None:
    """Find out which tensors are read straight into live ones, and put these in their place."""
    proposed: list[tuple[_Turn, Claim]] = []
    for turn in turns:
        if turn.when == _PLAIN:
            proposed += [(turn, claim) for claim in claims_of_module(turn.obj, turn.state, unread)]
        elif turn.when == _OPTIMIZER:
            proposed += [(turn, claim) for claim in claims_of_optimizer(turn.obj, turn.state, unread)]
    good = {id(claim) for claim in without_overlap([claim for _, claim in proposed])}
    for turn, claim in proposed:
        if id(claim) in good:
            turn.claims.append(claim)
    for turn in turns:
        if turn.claims:
            turn.state = with_tensors(turn.state, ((claim.path, claim.live) for claim in turn.claims))


def _check_groups(pair: Pair) -> None:
    """Compare what ``Optimizer.load_state_dict`` compares, before anything is changed.

    Raises:
        StateMismatchError: it would refuse the state; a ValueError too.
    """
    groups = pair.state.get("param_groups") if isinstance(pair.state, Mapping) else None
    if not isinstance(groups, Sequence) or not isinstance(pair.state.get("state"), Mapping):
        msg = f"the checkpoint's {pair.name!r} is no optimizer's state: it lacks 'state' or 'param_groups'"
        raise state_mismatch_error(msg, ["ValueError"], mismatched=["param_groups"])
    ours, theirs = ([len(group["params"]) for group in one] for one in (pair.obj.param_groups, groups))
    if ours != theirs:
        told = "has a different number of parameter groups"
        if len(ours) == len(theirs):
            told = "contains a parameter group that doesn't match the size of optimizer's group"
        msg = f"loaded state dict {told} ({pair.name!r}: the checkpoint's hold {theirs}, the optimizer's {ours})"
        raise state_mismatch_error(msg, ["ValueError"], mismatched=["param_groups"])
