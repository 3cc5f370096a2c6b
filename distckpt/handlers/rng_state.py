"""The random number generators of all ranks, as an object that is saved and loaded with the others.

:class:`RngState` says which rank's state is whose. The generators are read and set in
:mod:`distckpt.handlers.rng_generators`.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ignite.engine import Engine, Events

from distckpt._values import check_timeout
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers import rng_generators
from distckpt.handlers.data_loaders import begins_by_reset, generators_in, is_of_data
from distckpt.handlers.engine_events import after_event
from distckpt.handlers.ignite_hooks import get_iterator

__all__ = ["RngState"]


class RngState:
    """The states of every rank's random number generators, to be put into ``to_save`` and ``to_load``.

    Each rank has generators of its own: Python's ``random``, NumPy's global one, torch's on the CPU and on the current
    CUDA device. A :class:`~distckpt.Checkpoint` gathers them when it saves, and each rank gets its own back when they
    are loaded. In a job of another size a rank that did not exist before gets states derived from all others', and a
    warning says so.

    Given the trainer, it also notes what the generators were when the pass over the data began, and includes those that
    the trainer's data hold: of a DataLoader, its samplers and its data set. With it :func:`~distckpt.resume` gives the
    rest of a begun epoch the same order of samples, and workers of a DataLoader the same seeds. Without, that is so for
    a ``DistributedSampler`` and a :class:`~distckpt.ResumableSampler`, but not for a ``DataLoader(shuffle=True)``.

    Args:
        trainer: the engine whose passes over its data are noted.
        generators: more generators of the program's own, by name: torch's, Python's or NumPy's.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `timeout_s` is not positive.

    Example:
        >>> import torch
        >>> state = RngState().state_dict()
        >>> first = torch.rand(1)
        >>> RngState().load_state_dict(state)
        >>> bool(torch.rand(1) == first)
        True
    """

    distckpt_saves_alone: ClassVar[bool] = True

    def __init__(
        self,
        trainer: Engine | None = None,
        *,
        generators: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if trainer is not None and not isinstance(trainer, Engine):
            msg = f"Argument trainer should be an instance of Engine or None, but given {type(trainer)}"
            raise TypeError(msg)
        named = {} if generators is None else dict(generators)
        for name, generator in named.items():
            if not isinstance(name, str) or not rng_generators.is_generator(generator):
                msg = (
                    f"Argument generators should map names to torch.Generators, or to Python's or NumPy's generators, "
                    f"but holds {name!r}: {type(generator)}"
                )
                raise TypeError(msg)
        check_timeout(timeout_s)
        self.timeout_s = timeout_s
        self._named = named
        self._trainer = trainer
        self._mine: Mapping[str, Any] | None = None  # what was loaded for this rank
        self._pass: dict[str, Any] | None = None  # when the present pass over the data began
        self._is_pass_known = False
        self._notes_passes = trainer is not None
        if trainer is not None:
            # When ignite makes a new iterator: for the first epoch of a run, and after one that came to its end.
            trainer.add_event_handler(Events.EPOCH_STARTED, self._at_epoch)
            trainer.add_event_handler(Events.DATALOADER_STOP_ITERATION, self._at_end_of_pass)
            trainer.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._at_end_of_pass)

    # -- saving and loading ------------------------------------------------------------------------

    def distckpt_consolidate(self, to: int) -> dict[str, Any]:
        """Collective. Return all ranks' states, as :meth:`state_dict` returns this one's; a Checkpoint calls it.

        Args:
            to: the rank that saves. All ranks get them.

        Raises:
            RemoteRankError: a generator of some rank could not be read; on every rank.
        """
        del to
        backend = current()
        place = phases.SyncPoint(handler="RngState", phase="gathering the random number generators' states", step=0)
        states = phases.run(backend, place, self._capture, timeout_s=self.timeout_s)
        return {"world_size": backend.world_size, "ranks": dict(enumerate(states))}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state. Rank-local; a Checkpoint saves what :meth:`distckpt_consolidate` returns instead.

        Returns:
            ``world_size``, and ``ranks``: a mapping of ranks to their states.
        """
        backend = current()
        return {"world_size": backend.world_size, "ranks": {backend.rank: self._capture()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set this rank's generators. Rank-local.

        Args:
            state_dict: what :meth:`state_dict` returned. Where it was saved by a job of another size, a rank without a
                part of its own gets one derived from the others'. In a job of the same size its generators are left
                alone. A warning is given in both cases.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is no state of random number generators.
        """
        if not isinstance(state_dict, Mapping):
            msg = f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            raise TypeError(msg)
        if not isinstance(state_dict.get("ranks"), Mapping) or "world_size" not in state_dict:
            msg = f"Argument state_dict should hold 'world_size' and 'ranks', but has the keys {list(state_dict)}"
            raise ValueError(msg)
        backend = current()
        self._mine = self._pass = None
        self._is_pass_known = False
        before, ranks = state_dict["world_size"], state_dict["ranks"]
        told = ", ".join(map(str, ranks)) or "no rank"
        mine = ranks.get(backend.rank)
        if mine is None and (before == backend.world_size or not ranks):
            self._warn(f"the states of rank {told} were saved, and none of rank {backend.rank}: left as they are")
            return
        if mine is None:
            mine = _derived([ranks[rank] for rank in sorted(ranks)], backend.rank)
        if before != backend.world_size:
            new = [rank for rank in range(backend.world_size) if rank not in ranks]
            dealt = f"ranks {new} get states derived from all of these" if new else "each rank gets its own"
            self._warn(
                f"they were saved by a job of {before} ranks, and this one has {backend.world_size}: of those of rank "
                f"{told}, {dealt}. The run draws other numbers than one on {before} ranks"
            )
        if not isinstance(mine, Mapping) or not isinstance(mine.get("now"), Mapping):
            msg = f"the state of rank {backend.rank} is no state of random number generators: it lacks 'now'"
            raise ValueError(msg)  # noqa: TRY004 - of the state that was given, not of the argument's type
        now = mine["now"]
        absent = rng_generators.put(now | {"generators": self._without_data(now)}, self._own)
        if absent:
            self._warn(f"some of rank {backend.rank}'s are not set: {'; '.join(absent)}")
        self._mine = mine
        self._pass = mine.get("pass")

    def distckpt_rollback(self) -> Callable[[], None]:
        """Note what the generators are, before a load. Rank-local.

        Returns:
            Puts it back.
        """
        state, held = rng_generators.capture(self._generators), copy.copy(vars(self))

        def undo() -> None:
            vars(self).update(held)
            rng_generators.put(state, self._generators)

        return undo

    # -- for resume --------------------------------------------------------------------------------

    @property
    def pass_began_at(self) -> int | None:
        """The iteration after which the present pass over the data began, if it was noted."""
        return None if self._pass is None else int(self._pass["began_at"])

    @property
    def has_state(self) -> bool:
        """Whether a state was loaded for this rank."""
        return self._mine is not None

    @property
    def is_pass_begun_by_reset(self) -> bool:
        """Whether the loaded pass was begun by a loader whose persistent workers were there already."""
        return self._pass is not None and bool(self._pass.get("by_reset"))

    def missing_of(self, data: Any) -> list[str]:
        """Return the generators of the data whose states were not loaded, by name. Rank-local."""
        held = {} if self._mine is None else self._mine["now"].get("generators", {})
        known = {id(generator) for name, generator in self._named.items() if name in held}
        return [name for name, one in generators_in(data).items() if name not in held and id(one) not in known]

    def put_back(self) -> None:
        """Set this rank's generators again to what was loaded, if anything was. Rank-local."""
        if self._mine is not None:
            rng_generators.put(self._mine["now"], self._generators)

    def begin_pass(self, began_at: int) -> None:
        """Set this rank's generators to what they were as the loaded pass began, where known. Rank-local.

        Called where the iterator over the data is about to be made anew.

        Args:
            began_at: the iteration after which the pass began, where that was not noted.
        """
        if self._mine is not None and self._pass is not None:
            self.put_back_pass()
        else:
            self._note(began_at)
        self._is_pass_known = True

    def put_back_pass(self) -> None:
        """Set this rank's generators to what they were as the loaded pass began. Rank-local."""
        if self._pass is not None:
            rng_generators.put(self._pass["state"], self._generators)

    def now(self) -> Callable[[], None]:
        """Note what the generators are now; returns what sets them to it. Rank-local."""
        state = rng_generators.capture(self._generators)

        def put_back() -> None:
            rng_generators.put(state, self._generators)

        return put_back

    # -- the passes over the data ------------------------------------------------------------------

    def _at_epoch(self, engine: Engine) -> None:
        if get_iterator(engine) is None:  # ignite makes one after this event
            after_event(engine, self._note_unless_known)

    def _at_end_of_pass(self, engine: Engine, *_args: Any, **_kwargs: Any) -> None:
        after_event(engine, self._note_now)

    def _note_unless_known(self, engine: Engine) -> None:
        if not self._is_pass_known:
            self._note_now(engine)
        self._is_pass_known = False

    def _note_now(self, engine: Engine) -> None:
        self._note(engine.state.iteration)

    def _note(self, began_at: int) -> None:
        by_reset = begins_by_reset(self._data)
        self._pass = {"began_at": began_at, "state": rng_generators.capture(self._generators), "by_reset": by_reset}

    @property
    def _data(self) -> Any:
        """What the trainer draws its batches from."""
        return None if self._trainer is None else getattr(self._trainer.state, "dataloader", None)

    @property
    def _own(self) -> Mapping[str, Any]:
        """The runtime's own generators, and those that the program names."""
        return {**current().generators(), **self._named}

    @property
    def _generators(self) -> Mapping[str, Any]:
        """All that are saved: these, and those that the trainer's data hold."""
        return {**self._own, **generators_in(self._data)}

    def _without_data(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """Return the states of generators that are known before the data are."""
        return {name: held for name, held in now.get("generators", {}).items() if not is_of_data(name)}

    def _capture(self) -> dict[str, Any]:
        begun = self._pass if self._notes_passes else None  # one that was loaded is soon over
        return {"now": rng_generators.capture(self._generators), "pass": begun}

    def _warn(self, what: str) -> None:
        warnings.warn(f"RngState: random number generators: {what}", stacklevel=3)


def _derived(states: list[Any], rank: int) -> dict[str, Any]:
    """Return a rank's state from the others'. The pass over the data began when it did for the first one.

    Raises:
        ValueError: one of them is no state of random number generators.
    """
    if not all(isinstance(one, Mapping) and isinstance(one.get("now"), Mapping) for one in states):
        msg = "this is no state of random number generators: a rank's lacks 'now'"
        raise ValueError(msg)
    mine: dict[str, Any] = {"now": rng_generators.derived([one["now"] for one in states], rank), "pass": None}
    passes = [one.get("pass") for one in states]
    if all(isinstance(one, Mapping) for one in passes):
        mine["pass"] = {**passes[0], "state": rng_generators.derived([one["state"] for one in passes], rank)}
    return mine
