"""Load a state into live objects: all of them, or none; with several ranks, on all of them.

:func:`prepare` changes no object. It pairs each object with its state, tries plain modules in a dry run, and compares
the groups of plain optimizers. One error lists everything that does not fit. Then live tensors that can take their
bytes straight from the file replace the tensors of the state.

:meth:`PreparedLoad.load` changes the objects. Where several ranks load together
(:func:`distckpt.loading.api.load_on_all_ranks`), all ranks learn after steps 2 and 4 if a rank has failed:

1. copy the state of every object that is not plain, for a rollback. Give it DTensors where it has DTensors.
2. load these objects by their own ``load_state_dict``, then plain optimizers, then objects without a copy. If one
   refuses its state, on any rank, all loaded objects are rolled back.
3. load plain modules: they are known to fit, so they need no copy.
4. read the bytes that go straight into live tensors.
"""

import contextlib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from distckpt._unwrap import rename_for_module, unwrap
from distckpt._values import copy_at, replace_at
from distckpt.errors import (
    CollectiveError,
    LoadError,
    PartialLoadError,
    StateMismatchError,
    partial_load_error,
    state_mismatch_error,
    type_names,
)
from distckpt.loading import inplace
from distckpt.loading.dry_run import check_groups, refuse_names, try_load
from distckpt.loading.dtensors import find_dtensors, make_like_own, slice_like
from distckpt.loading.plain_objects import is_plain_optimizer
from distckpt.loading.report import LoadReport, join_mismatches, join_reports
from distckpt.loading.rollback import Rollback, make_rollback, own_state
from distckpt.ptformat.gc_pause import gc_paused
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.saving.plain_state import plain_state
from distckpt.saving.stage_state import StageState
from distckpt.saving.staging import wait_for_deferred_copies

_Mismatches = list[tuple[str, StateMismatchError]]  # with the objects' names


class _Order(IntEnum):
    """The order of loading: objects that are more likely to fail come first. Those without a rollback come late."""

    OWN_WAY = 0
    OPTIMIZER = 1
    WITHOUT_ROLLBACK = 2
    PLAIN_MODULE = 3


@dataclass(slots=True)
class _ObjectLoad:
    """One unwrapped object, its state under the object's own names, and how it is loaded.

    Attributes:
        name: the keys that lead to the object.
        targets: its tensors that are read straight from the file.
        new_targets: DTensors for its state, which are read before any object is changed.
        report: the keys that the dry run passed over.
        rollback: restores the object; None if that is impossible or not needed.
        repeated: the keys that lead to values that are given to other objects too.
    """

    name: str
    obj: Any
    state: Any
    order: _Order = _Order.OWN_WAY
    targets: list[inplace.InplaceTarget] = field(default_factory=list)
    new_targets: list[inplace.InplaceTarget] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)
    rollback: Rollback | None = None
    repeated: list[tuple[Any, ...]] = field(default_factory=list)

    def examine(self, options: dict[str, Any]) -> None:
        """Raise StateMismatchError if the state does not fit, as far as that can be known."""
        if isinstance(self.obj, nn.Module):
            report = try_load(self.obj, self.state, options, self.name)
            if report is not None:
                self.order, self.report = _Order.PLAIN_MODULE, report
        elif isinstance(self.obj, torch.optim.Optimizer):
            refuse_names(self.name, self.obj, self.state)
            if is_plain_optimizer(self.obj):
                check_groups(self.name, self.obj, self.state)
                self.order = _Order.OPTIMIZER

    def find_targets(self, file: OpenCheckpoint) -> list[inplace.InplaceTarget]:
        if self.order is _Order.PLAIN_MODULE:
            return inplace.find_module_targets(self.obj, self.state, file)
        if self.order is _Order.OPTIMIZER:
            return inplace.find_optimizer_targets(self.obj, self.state, file)
        return []

    def prepare_rollback(self, options: Mapping[str, Any]) -> None:
        if self.order is _Order.OPTIMIZER:  # its ``load_state_dict`` makes new containers: keep the old ones
            held = {"state": self.obj.state, "param_groups": self.obj.param_groups}
            self.rollback = Rollback(functools.partial(vars(self.obj).update, held))
        elif self.order is _Order.OWN_WAY:
            self.rollback = make_rollback(self.obj, options if isinstance(self.obj, nn.Module) else {})
            self.order = _Order.OWN_WAY if self.rollback else _Order.WITHOUT_ROLLBACK

    def use_new_targets(self, file: OpenCheckpoint) -> None:
        """Replace tensors of the state by DTensors, into which the file will be read before any object is changed."""
        self.new_targets = inplace.find_new_targets(self.obj, self.state, file)
        self.replace_tensors((target.path, target.live) for target in self.new_targets)

    def use_slices(self) -> None:
        """Replace tensors of the state, which have been read, by copies or by DTensors with this rank's part."""
        own = {target.path for target in (*self.targets, *self.new_targets)}
        self.state = copy_at(self.state, [path for path in self.repeated if path not in own])
        found = find_dtensors(self.obj, self.state)
        self.replace_tensors((path, slice_like(live, given)) for path, live, given in found)
        if self.rollback is not None:
            self.state = make_like_own(self.rollback.state, self.state)

    def replace_tensors(self, tensors: Iterable[tuple[tuple[Any, ...], torch.Tensor]]) -> None:
        """Replace tensors of the state, each given with the keys that lead to it."""
        replaced = list(tensors)
        if replaced:
            self.state = replace_at(self.state, replaced)

    def load(self, options: Mapping[str, Any]) -> LoadReport:
        if self.order is _Order.PLAIN_MODULE:
            self.obj.load_state_dict(self.state, **options)
            return self.report
        if not isinstance(self.obj, nn.Module):
            self.obj.load_state_dict(self.state)
            return LoadReport()
        keys: Any = self.obj.load_state_dict(self.state, **options)
        missing, unexpected = getattr(keys, "missing_keys", ()), getattr(keys, "unexpected_keys", ())
        return LoadReport(missing=tuple(missing), unexpected=tuple(unexpected)).with_prefix(self.name)

    def roll_back(self) -> str:
        """Restore the object; return why that failed, or an empty string."""
        if self.rollback is None:
            return "there is no copy of its state"
        try:
            self.rollback.restore()
        except BaseException as error:  # noqa: BLE001 - a user's code, or an interrupt: the others are rolled back too
            return f"{type(error).__name__}: {error}"
        return ""


def loaded_objects(obj: Any) -> list[Any]:
    """Return the objects that a load changes: `obj` without wrappers, or what a :class:`StageState` wraps."""
    inner = unwrap(obj)
    return inner.wrapped if isinstance(inner, StageState) else [inner]


@gc_paused()
def prepare(
    to_load: Mapping[str, Any],
    state: Any,
    module_options: Mapping[str, Any],
    file: OpenCheckpoint | None = None,
    others: Iterable[tuple[Any, Any]] = (),
    only: Collection[Any] | None = None,
) -> "PreparedLoad":
    """Find out whether `state` fits, and how to load it. Rank-local; issues no collectives, changes no object.

    Args:
        to_load: live objects, in nested mappings and lists.
        state: their states, in a tree of the same shape; it may hold more. A single object's bare state dict works too.
        module_options: keyword arguments of ``nn.Module.load_state_dict``, such as ``strict``.
        file: holds the data of the state's tensors; None if they have it. The caller must drop its reference to the
            state before the load: tensors that nothing refers to are not read.
        others: more objects, each with its state; no modules or optimizers.
        only: the objects of `to_load` to load; None for all.

    Raises:
        ShardedStateError: a state holds a tensor that is sharded over ranks.
        StateMismatchError: some objects have no state, or one that does not fit; the error lists all. Also a ValueError
            for missing objects, list lengths and optimizer groups, a RuntimeError for a module.
    """
    options = dict(module_options)
    loads, mismatches = _pair_objects(to_load, state, file)
    if only is not None:
        wanted = {id(one) for obj in only for one in loaded_objects(obj)}
        loads = [one for one in loads if id(one.obj) in wanted]
    loads = [*(_ObjectLoad(type(obj).__name__, obj, its_state) for obj, its_state in others), *loads]
    for one in loads:
        one.state = plain_state(one.state, f"the checkpoint's {one.name!r}", convert_numpy=False)
    for one in loads:
        try:
            one.examine(options)
        except StateMismatchError as error:
            mismatches.append((one.name, error))
    if mismatches:
        raise join_mismatches(mismatches)
    if file is not None:
        if not options.get("assign"):
            _use_targets(loads, file)
        for one in loads:
            one.use_new_targets(file)
    return PreparedLoad(loads, options, file)


def _use_targets(loads: Sequence[_ObjectLoad], file: OpenCheckpoint) -> None:
    """Replace tensors of the states by live tensors, into which the file will be read directly."""
    proposed = [(one, target) for one in loads for target in one.find_targets(file)]
    kept = {id(target) for target in inplace.drop_overlapping([target for _, target in proposed])}
    for one in loads:
        one.targets = [target for owner, target in proposed if owner is one and id(target) in kept]
        one.replace_tensors((target.path, target.live) for target in one.targets)


@dataclass(slots=True)
class PreparedLoad:
    """A load that fits, as far as that can be known. Made by :func:`prepare`; used once."""

    _loads: list[_ObjectLoad]
    _options: dict[str, Any]
    _file: OpenCheckpoint | None
    _begun: list[_ObjectLoad] = field(default_factory=list)
    _reports: list[LoadReport] = field(default_factory=list)
    _has_read: bool = False  # whether live tensors may have been read into

    def fill(self) -> None:
        """Read the data that does not go straight into live tensors. Changes no object."""
        if self._file is not None:
            for one in self._loads:
                if one.new_targets:
                    inplace.read_into(one.new_targets, self._file)
                    one.new_targets = []
            self._file.fill()

    def load(self) -> LoadReport:
        """Load all objects of this rank, or none. Rank-local; issues no collectives.

        Returns:
            The keys that were passed over; none if the load is strict.

        Raises:
            PartialLoadError: reading into live tensors failed twice, or an object refused its state and others could
                not be rolled back. The objects that it names have to be loaded again.
            Exception: an object's ``load_state_dict`` raised it. No object is changed.
        """
        try:
            self.load_refusable()
            return self.load_rest()
        except BaseException as error:
            self.roll_back(error)
            raise

    @gc_paused()
    def load_refusable(self) -> None:
        """Run steps 1 and 2: load the objects that may refuse their state.

        If it fails, :meth:`roll_back` has to follow.

        Raises:
            Exception: an object's ``load_state_dict`` raised it.
        """
        self.fill()
        wait_for_deferred_copies()  # a pending save must get the former state
        for one in self._loads:  # before any object can refuse: a user's metric may gather here
            one.prepare_rollback(self._options)
        for one in self._loads:
            one.use_slices()
        self._loads.sort(key=lambda one: one.order)
        self._load([one for one in self._loads if one.order is not _Order.PLAIN_MODULE])

    @gc_paused()
    def load_rest(self) -> LoadReport:
        """Run steps 3 and 4. If it fails, :meth:`roll_back` has to follow.

        Returns:
            The keys that were passed over; none if the load is strict.

        Raises:
            PartialLoadError: reading into live tensors failed twice.
        """
        self._load([one for one in self._loads if one.order is _Order.PLAIN_MODULE])
        self._read_in_place()
        return join_reports(self._reports)

    def _load(self, loads: Sequence[_ObjectLoad]) -> None:
        for one in loads:
            self._begun.append(one)
            self._reports.append(one.load(self._options))

    def roll_back(self, error: BaseException) -> None:
        """Restore the objects whose load has begun, and say in the error which ones.

        Args:
            error: the reason, raised on any rank.

        Raises:
            PartialLoadError: some objects could not be restored. It is also of the type of `error`. An interrupt and
                the error of a lost rank get a note instead.
        """
        begun = self._begun
        failed = {}
        for one in reversed(begun):
            why = one.roll_back() or ("its tensors have new values" if self._has_read and one.targets else "")
            if why:
                failed[one.name] = why
        restored = [repr(one.name) for one in begun if one.order is _Order.OWN_WAY and one.name not in failed]
        if restored:
            error.add_note(
                f"Restored by their own load_state_dict(): {', '.join(restored)}. Their attributes that state_dict() "
                "does not return may have changed."
            )
        if not failed or isinstance(error, PartialLoadError):
            return
        reasons = "; ".join(f"{name!r} could not be restored ({why})" for name, why in failed.items())
        msg = f"{error}. {reasons}: load it again, from this or another checkpoint. All other objects are unchanged."
        if isinstance(error, Exception) and not isinstance(error, CollectiveError):
            raise partial_load_error(msg, type_names(error)) from error
        error.add_note(msg)

    def _read_in_place(self) -> None:
        targets = [target for one in self._loads for target in one.targets]
        if not targets or self._file is None:
            return
        self._has_read = True
        with contextlib.suppress(OSError, LoadError):  # then a second try: the bytes could be read a moment ago
            inplace.read_into(targets, self._file)
            return
        try:
            inplace.read_into(targets, self._file)
        except (OSError, LoadError) as error:
            names = ", ".join(one.name for one in self._loads if one.targets or one.order is _Order.PLAIN_MODULE)
            msg = (
                f"reading failed after everything had been verified: {error}. Of {names} some tensors hold the old "
                "values and some the new ones: load them again, from this or another checkpoint. All other objects "
                "are unchanged."
            )
            raise partial_load_error(msg, type_names(error)) from error


def check_complete(to_load: Mapping[str, Any], state: Any, file: OpenCheckpoint | None = None) -> None:
    """Refuse a state that lacks some of the objects. Rank-local; issues no collectives, changes no object.

    Args:
        to_load: the objects.
        state: the state.
        file: it was read from; None if it was not.

    Raises:
        StateMismatchError: an object has no state, or a list has another length. It is a ValueError too.
    """
    _, mismatches = _pair_objects(to_load, state, file)
    if mismatches:
        raise join_mismatches(mismatches)


def _pair_objects(
    to_load: Mapping[str, Any], state: Any, file: OpenCheckpoint | None
) -> tuple[list[_ObjectLoad], _Mismatches]:
    """Find each object's state; return the pairs, and an error for each object or list without one."""
    loads: list[_ObjectLoad] = []
    mismatches: _Mismatches = []
    if len(to_load) == 1:
        ((key, obj),) = to_load.items()
        is_bare = not isinstance(state, Mapping) or key not in state
        is_bare = is_bare or (file is not None and file.bare_key() == key)
        if is_bare or _is_bare(obj, state, key):
            _walk(key, obj, state, loads, mismatches)
            return loads, mismatches
    _walk("", dict(to_load), state, loads, mismatches)
    return loads, mismatches


def _is_bare(obj: Any, state: Mapping[str, Any], key: str) -> bool:
    """Return True if `state` is a single object's bare state that happens to hold `key`, not a mapping of states."""
    inner = state[key]
    if isinstance(obj, Mapping):
        is_inner = isinstance(inner, Mapping) and obj.keys() <= inner.keys()
        return obj.keys() <= state.keys() and not is_inner
    if isinstance(obj, torch.optim.Optimizer):
        return "param_groups" in state and not (isinstance(inner, Mapping) and "param_groups" in inner)
    if isinstance(inner, Mapping) or not hasattr(obj, "load_state_dict"):
        return False
    try:
        own = own_state(obj)
    except Exception:  # noqa: BLE001 - a user's code; ignite takes the item at the key
        return False
    return isinstance(own, Mapping) and (key in own or isinstance(obj, nn.Module))  # else the item is such a state


def _walk(name: str, obj: Any, state: Any, loads: list[_ObjectLoad], mismatches: _Mismatches) -> None:
    if hasattr(obj, "load_state_dict"):
        inner = unwrap(obj)
        try:
            parts = inner.parts_of(state, name) if isinstance(inner, StageState) else [(inner, state, [])]
        except StateMismatchError as error:
            mismatches.append((name, error))
            return
        for one, part, repeated in parts:
            its_state = rename_for_module(one, part) if isinstance(one, nn.Module) else part
            loads.append(_ObjectLoad(name, one, its_state, repeated=repeated))
        return
    if isinstance(obj, Mapping) and isinstance(state, Mapping):
        for key, item in obj.items():
            path = f"{name}.{key}".lstrip(".")
            if key in state:
                _walk(path, item, state[key], loads, mismatches)
                continue
            msg = f"Key '{key}' from x is not found in y: {state.keys()}"
            mismatches.append((path, state_mismatch_error(msg, ["ValueError"], missing=[path])))
        return
    if isinstance(obj, Sequence) and isinstance(state, Sequence) and not isinstance(state, str | bytes):
        if len(obj) == len(state):
            for index, (item, its_state) in enumerate(zip(obj, state, strict=True)):
                _walk(f"{name}[{index}]", item, its_state, loads, mismatches)
            return
        msg = f"Size of y: {len(state)} does not match the size of x: '{len(obj)}'"
    else:
        where = repr(name) if name else "its top level"
        msg = f"Argument to_load holds {type(obj)} at {where}, but the checkpoint holds {type(state)} there"
    mismatches.append((name, state_mismatch_error(msg, ["ValueError"], mismatched=[name])))
