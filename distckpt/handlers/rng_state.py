"""The random number generators of all ranks, as an object that is saved and loaded with the others.

Owns :class:`RngState`: which rank's state is whose. The generators lie in :mod:`distckpt.state.rng`. Layer L5.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from ignite.engine import Engine, Events

from distckpt.backends.detect import current
from distckpt.consensus import agree
from distckpt.handlers.arguments import check_timeout
from distckpt.handlers.firing import after_event
from distckpt.state import rng

__all__ = ["RngState"]


class RngState:
    """The states of every rank's random number generators, to be put into ``to_save`` and ``to_load``.

    Each rank has generators of its own: Python's ``random``, NumPy's global one, torch's on the CPU and on the current
    CUDA device. A :class:`~distckpt.Checkpoint` gathers them when it saves, and each rank gets its own back when they
    are loaded. In a job of another size they are left alone, and a warning says so.

    Given the trainer, it also notes what the generators were when the pass over the data began. With it
    :func:`~distckpt.resume` gives the rest of a begun epoch the same order of samples, and workers of a DataLoader the
    same seeds. Without, that is so for a ``DistributedSampler``, but not for a ``DataLoader(shuffle=True)``.

    Args:
        trainer: the engine whose passes over its data are noted.
        generators: generators of the program's own, by name: ``DataLoader(generator=...)``'s for one.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `timeout_s` is not positive.

    Example:
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
        generators: Mapping[str, torch.Generator] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if trainer is not None and not isinstance(trainer, Engine):
            msg = f"Argument trainer should be an instance of Engine or None, but given {type(trainer)}"
            raise TypeError(msg)
        named = {} if generators is None else dict(generators)
        for name, generator in named.items():
            if not isinstance(name, str) or not isinstance(generator, torch.Generator):
                msg = f"Argument generators should map names to torch.Generators, but holds {name!r}: {type(generator)}"
                raise TypeError(msg)
        check_timeout(timeout_s)
        self.timeout_s = timeout_s
        self._named = named
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
            PhaseError: a generator of some rank could not be read; on every rank.
        """
        del to
        backend = current()
        place = agree.Place(who="RngState", doing="gathering the random number generators' states", step=0)
        states = agree.run(backend, place, self._capture, timeout_s=self.timeout_s)
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
            state_dict: what :meth:`state_dict` returned. Where it was saved by a job of another size, or without this
                rank's part, the generators are left alone and a warning is given.

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
        before, world_size = state_dict["world_size"], backend.world_size
        if before != world_size:
            self._warn(f"they were saved by a job of {before} ranks, and this one has {world_size}: left as they are")
            return
        mine = state_dict["ranks"].get(backend.rank)
        if mine is None:
            told = ", ".join(map(str, state_dict["ranks"])) or "no rank"
            self._warn(f"the states of rank {told} were saved, and none of rank {backend.rank}: left as they are")
            return
        if not isinstance(mine, Mapping) or not isinstance(mine.get("now"), Mapping):
            msg = f"the state of rank {backend.rank} is no state of random number generators: it lacks 'now'"
            raise ValueError(msg)  # noqa: TRY004 - of the state that was given, not of the argument's type
        absent = rng.put(mine["now"], self._generators)
        if absent:
            self._warn(f"some of rank {backend.rank}'s are not set: {'; '.join(absent)}")
        self._mine = mine
        self._pass = mine.get("pass")

    def distckpt_undo(self) -> Callable[[], None]:
        """Note what the generators are, before a load. Rank-local.

        Returns:
            Puts it back.
        """
        state, held = rng.capture(self._generators), copy.copy(vars(self))

        def undo() -> None:
            vars(self).update(held)
            rng.put(state, self._generators)

        return undo

    # -- for resume --------------------------------------------------------------------------------

    @property
    def pass_began_at(self) -> int | None:
        """The iteration after which the present pass over the data began, if it was noted."""
        return None if self._pass is None else int(self._pass["began_at"])

    def put_back(self) -> None:
        """Set this rank's generators again to what was loaded, if anything was. Rank-local."""
        if self._mine is not None:
            rng.put(self._mine["now"], self._generators)

    def begin_pass(self, began_at: int) -> None:
        """Set this rank's generators to what they were as the loaded pass began, where known. Rank-local.

        Called where the iterator over the data is about to be made anew.

        Args:
            began_at: the iteration after which the pass began, where that was not noted.
        """
        if self._mine is not None and self._pass is not None:
            rng.put(self._pass["state"], self._generators)
        else:
            self._note(began_at)
        self._is_pass_known = True

    def now(self) -> Callable[[], None]:
        """Note what the generators are now; returns what sets them to it. Rank-local."""
        state = rng.capture(self._generators)

        def put_back() -> None:
            rng.put(state, self._generators)

        return put_back

    # -- the passes over the data ------------------------------------------------------------------

    def _at_epoch(self, engine: Engine) -> None:
        # After this event ignite makes an iterator if it has none; there is no public way to ask (0.5.5).
        if engine._dataloader_iter is None:  # noqa: SLF001
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
        self._pass = {"began_at": began_at, "state": rng.capture(self._generators)}

    @property
    def _generators(self) -> Mapping[str, Any]:
        """The runtime's own generators, and the program's."""
        return {**current().generators(), **self._named}

    def _capture(self) -> dict[str, Any]:
        begun = self._pass if self._notes_passes else None  # one that was loaded is soon over
        return {"now": rng.capture(self._generators), "pass": begun}

    def _warn(self, what: str) -> None:
        warnings.warn(f"RngState: random number generators: {what}", stacklevel=3)
