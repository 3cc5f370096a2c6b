"""Compare the forms of the modules and optimizers that the ranks save under one key.

Only the coordinator's state of such an object is saved. If another rank holds a different object under the key, such as
a stage of a pipeline, its state would be lost silently. So the ranks compare names, shapes and dtypes:

1. (all ranks) :meth:`CapturedObjects.digests`, after capture. They travel in the answers of that phase.
2. (all ranks) only if the digests say that state would be lost: exchange descriptions, and raise the same error.

Not compared: values; shapes of buffers, which may differ by rank as their values may; the states of optimizers, which
are made by the first step; sharded tensors, which :mod:`distckpt.saving.shard_exchange` compares; objects without a
state on some rank other than the coordinator; and objects that gather their state.
"""

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from distckpt._checksum import crc32
from distckpt._compare import have_values
from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.errors import ShardedStateError
from distckpt.ptformat.sharded import is_dtensor, is_replicated, none_sharded
from distckpt.saving.pending_save import SyncPointFactory

_DIGEST_BYTES: Final = 7
"""The ranks compare digests as numbers that fit into int64."""
_COMPARED: Final = ("__class__", "dtype", "shape")


class _NoTensor(NamedTuple):
    """Stands for a value that is no tensor. Attributes are those of tensors that are compared."""

    dtype: None = None
    shape: tuple[int, ...] = ()


_NO_TENSOR: Final = _NoTensor()


class _Known(NamedTuple):
    """What is known of an object: a weak reference, its names, the rows of its tensors, and the digest."""

    obj: "weakref.ref[Any]"
    names: Any
    rows: list[tuple[Any, ...]]
    digest: int


class FormDigests:
    """The digests of the objects that one thread has saved.

    An object is described again only if its names, or the type, dtype or shape of a tensor have changed.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def digest(self, obj: Any, state: Any) -> int | None:
        """Return a digest of an object's form; None if it has no state, or none with names.

        Args:
            obj: a module or an optimizer.
            state: what its ``state_dict()`` has returned.
        """
        names = _names_of(obj, state)
        if names is None:
            return None
        values = _values_of(obj, state)
        known = self._known.get(id(obj))
        if known is not None and known.obj() is obj and known.names == names and _have_rows(values, known.rows):
            return known.digest
        text = repr(sorted(describe_form(obj, state).items()))
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "little")
        self._known = {number: one for number, one in self._known.items() if one.obj() is not None}
        with contextlib.suppress(RuntimeError):  # a tensor without a shape is described in each save
            rows = [tuple(getattr(value, name) for name in _COMPARED) for value in values]
            self._known[id(obj)] = _Known(weakref.ref(obj), names, rows, digest)
        return digest


class _ThreadDigests(threading.local):
    """Per thread, since XLA replicas may be threads of one process."""

    def __init__(self) -> None:
        self.digests = FormDigests()


_THREAD_DIGESTS = _ThreadDigests()


class CapturedObjects:
    """The modules and optimizers of one save, on this rank.

    Args:
        digests: digests of earlier saves; None if there is no other rank to compare with.
    """

    def __init__(self, digests: FormDigests | None) -> None:
        self._digests = digests
        self._found: dict[str, int] = {}
        self._objects: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, obj: Any, state: Any) -> None:
        """Add an object if it is a module or an optimizer.

        Args:
            name: the keys that lead to the object.
            obj: the object, without wrappers.
            state: what its ``state_dict()`` has returned.
        """
        if self._digests is None or not isinstance(obj, nn.Module | torch.optim.Optimizer):
            return
        digest = self._digests.digest(obj, state)
        while name in self._found:  # {"a": {"b": one}, "a.b": other}
            name += " (another)"
        if digest is not None:
            self._found[name] = digest
            self._objects[name] = obj, state

    def digests(self) -> dict[str, int]:
        """Return the digests of the objects, by name."""
        return self._found

    def compare(
        self,
        backend: Backend,
        sync_point: SyncPointFactory,
        filename: str,
        answers: Sequence[Mapping[str, int]],
        coordinator: int,
        *,
        timeout_s: float | None,
    ) -> None:
        """Collective. Refuse objects of which the coordinator has another form, and drop all references.

        Args:
            backend: the job's backend.
            sync_point: makes a phase's sync point from its description.
            filename: name of the file, for messages.
            answers: the :meth:`digests` of each rank.
            coordinator: rank whose states are saved.
            timeout_s: seconds to wait for the other ranks; None for the default.

        Raises:
            ShardedStateError: state of some rank would be lost; on every rank.
        """
        objects, self._objects = self._objects, {}
        if len(answers) == 1:
            return  # also where one rank of several saves alone, for an exception
        ours = answers[coordinator]
        lost = sorted({name for answer in answers for name, one in answer.items() if ours.get(name) != one})
        if not lost:
            return

        def describe() -> dict[str, dict[str, str]]:
            return {name: describe_form(*objects[name]) for name in lost if name in objects}

        point = sync_point(f"comparing the objects of {filename}")
        descriptions = phases.run(backend, point, describe, timeout_s=timeout_s)
        for name in lost:
            difference = _find_difference([one.get(name) for one in descriptions], coordinator)
            if difference is not None:
                raise ShardedStateError(
                    f"to_save[{name!r}] is another object on some ranks: {difference}. The state of rank {coordinator} "
                    "alone would be saved, so nothing was saved. Wrap it in distckpt.StageState on all ranks if these "
                    "are stages of one model; else give all ranks the same object under one key"
                )


def captured_objects(world_size: int) -> CapturedObjects:
    """Return the object that collects for one save of this rank. It uses the digests of the thread's earlier saves."""
    return CapturedObjects(_THREAD_DIGESTS.digests if world_size > 1 else None)


def describe_form(obj: Any, state: Any) -> dict[str, str]:
    """Return what has to be equal on all ranks: the form of each tensor by its name. Rank-local."""
    if isinstance(obj, torch.optim.Optimizer):
        found = {"the class": type(obj).__name__}
        for index, group in enumerate(obj.param_groups):
            names = group.get("param_names") or [str(number) for number in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=False):
                found[f"param_groups[{index}], {name}"] = _form_of(parameter)
        return found
    buffers = {name for name, _ in obj.named_buffers()}
    return {name: "a buffer" if name in buffers else _form_of(value) for name, value in state.items()}


def _names_of(obj: Any, state: Any) -> Any:
    """Return a key that changes with the names of an object's tensors; None if there is nothing to compare."""
    if isinstance(obj, torch.optim.Optimizer):
        # getattr: ignite's own tests use a stand-in for an optimizer.
        return [len(group["params"]) for group in getattr(obj, "param_groups", ())] or None
    if not isinstance(state, dict) or not state:
        return None
    try:
        return len(state), crc32("\0".join(state).encode())
    except TypeError:  # a state_dict() of the user's, with keys that are no names
        return None


def _values_of(obj: Any, state: Any) -> list[Any]:
    """Return an optimizer's parameters, or the values of a module's state."""
    if isinstance(obj, torch.optim.Optimizer):
        return [parameter for group in obj.param_groups for parameter in group["params"]]
    return [value if isinstance(value, torch.Tensor) else _NO_TENSOR for value in state.values()]


def _have_rows(values: list[Any], rows: list[tuple[Any, ...]]) -> bool:
    try:
        return len(values) == len(rows) and have_values(values, rows, _COMPARED, ())
    except RuntimeError:  # a tensor without a shape
        return False


def _form_of(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    if is_dtensor(value):
        if not is_replicated(value, torch.distributed.get_world_size()):
            return "sharded"
    elif not none_sharded([value]):
        return "sharded"
    if value.is_nested or nn.parameter.is_lazy(value):
        return "a tensor without a shape"
    return f"{value.dtype} {tuple(value.shape)}"


def _find_difference(descriptions: Sequence[Mapping[str, str] | None], coordinator: int) -> str | None:
    """Return the first difference from the coordinator's object as a phrase; None if there is none.

    Args:
        descriptions: of each rank's object; None if the rank has none there, which loses no state.
        coordinator: the rank whose state would be saved.
    """
    ours = descriptions[coordinator] or {}
    first = ""
    ranks = []
    for rank, theirs in enumerate(descriptions):
        if not theirs or theirs == ours:
            continue
        ranks.append(rank)
        if first:
            continue
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        has = {
            owner: f"has {name} ({form[name]})" for owner, form in ((coordinator, ours), (rank, theirs)) if name in form
        }
        first = "; ".join(f"rank {owner} {has.get(owner, f'has no {name}')}" for owner in (coordinator, rank))
    if not ranks:
        return None
    return first if len(ranks) == 1 else f"{first}. Ranks {', '.join(map(str, ranks))} differ from rank {coordinator}"
