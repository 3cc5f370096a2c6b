"""The random number generators of all ranks, saved and loaded as an object among the others.

:class:`RngState` decides which state each rank gets. :mod:`distckpt.handlers.rng_generators` reads and sets the
generators.
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
from distckpt.handlers.data_loaders import find_generators, is_data_generator, resets_workers
from distckpt.handlers.engine_events import after_event
from distckpt.handlers.ignite_hooks import get_iterator


class RngState:
    """The states of all ranks' random number generators, for ``to_save`` and ``to_load``.

    Each rank has its own generators: Python's ``random``, NumPy's global one, torch's on the CPU and on the current
    CUDA device. A :class:`~distckpt.Checkpoint` gathers them when it saves; a load gives each rank its own back. In a
    job of another size, a new rank gets states derived from all ranks' states, with a warning.

    With the trainer, the state also holds the generators of the trainer's DataLoader, its samplers and its data set,
    and all generators as they were at the start of the pass over the data, and before its first batch.
    :func:`~distckpt.resume` then gives the rest of an interrupted epoch the same sample order, and a DataLoader's
    workers the same seeds. Without the trainer, the order is the same for a ``DistributedSampler`` or a
    :class:`~distckpt.ResumableSampler`, but not for ``DataLoader(shuffle=True)``.

    Args:
        trainer: the engine that draws from the data; None to leave out the data's generators.
        generators: further generators of the program, by name: torch's, Python's or NumPy's.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: an argument has the wrong type.
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
            raise TypeError(f"Argument trainer should be an instance of Engine or None, but given {type(trainer)}")
        named = {} if generators is None else dict(generators)
        for name, generator in named.items():
            if not isinstance(name, str) or not rng_generators.is_generator(generator):
                raise TypeError(
                    f"Argument generators should map names to torch.Generators, or to Python's or NumPy's generators, "
                    f"but holds {name!r}: {type(generator)}"
                )
        check_timeout(timeout_s)
        self.timeout_s = timeout_s
        self._named = named
        self._trainer = trainer
        self._loaded: Mapping[str, Any] | None = None  # this rank's loaded state
        self._pass: dict[str, Any] | None = None  # the generators at the start of the present pass
        self._is_pass_known = False
        if trainer is not None:
            # When ignite makes a new iterator: for the first epoch of a run, and after an exhausted one.
            trainer.add_event_handler(Events.EPOCH_STARTED, self._on_epoch_started)
            trainer.add_event_handler(Events.DATALOADER_STOP_ITERATION, self._on_pass_end)
            trainer.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_terminated)

    # -- saving and loading ------------------------------------------------------------------------

    def distckpt_consolidate(self, to: int) -> dict[str, Any]:
        """Collective. Return the states of all ranks, on every rank. A Checkpoint calls this before it saves."""
        backend = current()
        sync_point = phases.SyncPoint(handler="RngState", phase="gathering the generators' states", step=0)
        states = phases.run(backend, sync_point, self._capture, timeout_s=self.timeout_s)
        return {"world_size": backend.world_size, "ranks": dict(enumerate(states))}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state. Rank-local; a Checkpoint saves the states of all ranks instead.

        Returns:
            ``world_size``, and ``ranks``: a mapping of ranks to their states.
        """
        backend = current()
        return {"world_size": backend.world_size, "ranks": {backend.rank: self._capture()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set this rank's generators. Rank-local.

        In a job of another size, a rank without a state of its own gets a derived one. In a job of the same size,
        such a rank's generators stay as they are. Both cases give a warning.

        Args:
            state_dict: as :meth:`state_dict` returned it.

        Raises:
            TypeError: `state_dict` is not a mapping.
            ValueError: it holds no states of random number generators.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Argument state_dict should be a dictionary, but given {type(state_dict)}")
        if not isinstance(state_dict.get("ranks"), Mapping) or "world_size" not in state_dict:
            msg = f"Argument state_dict should hold 'world_size' and 'ranks', but has the keys {list(state_dict)}"
            raise ValueError(msg)
        backend = current()
        self._loaded = self._pass = None
        self._is_pass_known = False
        before, ranks = state_dict["world_size"], state_dict["ranks"]
        names = ", ".join(map(str, ranks)) or "no rank"
        state = ranks.get(backend.rank)
        if state is None and (before == backend.world_size or not ranks):
            self._warn(f"the checkpoint has the states of rank {names}, and none of rank {backend.rank}: not set")
            return
        if state is None:
            state = _derive([ranks[rank] for rank in sorted(ranks)], backend.rank)
        if before != backend.world_size:
            new = [rank for rank in range(backend.world_size) if rank not in ranks]
            effect = f"ranks {new} get states derived from all of these" if new else "each rank gets its own"
            self._warn(
                f"the checkpoint has the states of rank {names} of a job of {before} ranks, and this job has "
                f"{backend.world_size}: {effect}. The run draws other numbers than on {before} ranks"
            )
        if not isinstance(state, Mapping) or not isinstance(state.get("now"), Mapping):
            msg = f"the state of rank {backend.rank} is no state of random number generators: it lacks 'now'"
            raise ValueError(msg)  # noqa: TRY004 - an item of the argument has the wrong type
        now = state["now"]
        # The data are not known yet; resume() sets their generators when the run starts.
        program = {name: one for name, one in now.get("generators", {}).items() if not is_data_generator(name)}
        absent = rng_generators.restore(now | {"generators": program}, self._program_generators)
        if absent:
            self._warn(f"some of rank {backend.rank}'s are not set: {'; '.join(absent)}")
        self._loaded = state
        self._pass = state.get("pass")

    def distckpt_rollback(self) -> Callable[[], None]:
        """Return a function that reverts the next load. Rank-local."""
        restore, attributes = self.capture_current(), copy.copy(vars(self))

        def rollback() -> None:
            vars(self).update(attributes)
            restore()

        return rollback

    # -- for resume --------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Return True if a state was loaded for this rank."""
        return self._loaded is not None

    @property
    def pass_began_at(self) -> int | None:
        """Return the number of iterations trained at the start of the present pass; None if unknown."""
        return None if self._pass is None else int(self._pass["began_at"])

    @property
    def is_pass_begun_by_reset(self) -> bool:
        """Return True if persistent workers that already ran started the loaded pass."""
        return self._pass is not None and bool(self._pass.get("by_reset"))

    def missing_generators(self, data: Any) -> list[str]:
        """Return the names of the data's generators whose states were not loaded. Rank-local."""
        states = {} if self._loaded is None else self._loaded["now"].get("generators", {})
        known = {id(generator) for name, generator in self._named.items() if name in states}
        return [name for name, one in find_generators(data).items() if name not in states and id(one) not in known]

    def restore_loaded(self) -> None:
        """Set this rank's generators to the loaded state, if there is one. Rank-local."""
        if self._loaded is not None:
            rng_generators.restore(self._loaded["now"], self._generators)

    def restore_pass_start(self) -> None:
        """Set this rank's generators to their states from the start of the loaded pass, if known. Rank-local."""
        if self._pass is not None:
            rng_generators.restore(self._pass["state"], self._generators)

    def restore_first_batch(self) -> None:
        """Set this rank's generators to their states before the loaded pass's first batch, if known. Rank-local."""
        if self._pass is not None and self._pass.get("first_batch") is not None:
            rng_generators.restore(self._pass["first_batch"], self._generators)

    def begin_pass(self, began_at: int, *, is_order_drawn: bool) -> None:
        """Set this rank's generators for the rest of the loaded pass, before the iterator is made. Rank-local.

        Args:
            began_at: number of iterations trained at the pass's start, for a state that does not hold it.
            is_order_drawn: True if the pass's first batch was drawn before the save.
        """
        if self._loaded is not None and self._pass is not None:
            self.restore_pass_start()
        else:
            self._capture_pass_start(began_at)
        self._is_pass_known = True
        if not is_order_drawn:
            self._await_first_batch()

    def capture_current(self) -> Callable[[], None]:
        """Capture this rank's generators, and return a function that restores them. Rank-local."""
        state = rng_generators.capture(self._generators)

        def restore() -> None:
            rng_generators.restore(state, self._generators)

        return restore

    def keep_during_event(self, engine: Engine) -> None:
        """Restore this rank's present states after the handlers of the engine's present event. Rank-local."""
        restore = self.capture_current()
        after_event(engine, lambda _: restore())

    # -- the passes over the data ------------------------------------------------------------------

    def _on_epoch_started(self, engine: Engine) -> None:
        if get_iterator(engine) is None:  # ignite makes one after this event
            after_event(engine, self._before_iterator)

    def _on_pass_end(self, engine: Engine, *_args: Any, **_kwargs: Any) -> None:
        after_event(engine, lambda _: self._capture_pass_start(engine.state.iteration))

    def _on_epoch_terminated(self, engine: Engine, *_args: Any, **_kwargs: Any) -> None:
        self._on_pass_end(engine)
        self._await_first_batch()

    def _before_iterator(self, engine: Engine) -> None:
        if not self._is_pass_known:
            self._capture_pass_start(engine.state.iteration)
            self._await_first_batch()
        self._is_pass_known = False

    def _await_first_batch(self) -> None:
        """Capture the generators again before the first batch: a sampler draws then, after handlers that may draw.

        A new iterator has no event before its first batch if it follows DATALOADER_STOP_ITERATION.
        """
        event, trainer = Events.GET_BATCH_STARTED, self._trainer
        if trainer is not None and not trainer.has_event_handler(self._on_first_batch, event):
            trainer.add_event_handler(event, self._on_first_batch)

    def _on_first_batch(self, engine: Engine) -> None:
        engine.remove_event_handler(self._on_first_batch, Events.GET_BATCH_STARTED)
        after_event(engine, self._capture_first_batch)

    def _capture_first_batch(self, _engine: Engine) -> None:
        if self._pass is not None:
            self._pass = {**self._pass, "first_batch": rng_generators.capture(self._generators)}

    def _capture_pass_start(self, began_at: int) -> None:
        by_reset = resets_workers(self._data)
        self._pass = {"began_at": began_at, "state": rng_generators.capture(self._generators), "by_reset": by_reset}

    @property
    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self._trainer.state, "dataloader", None)

    @property
    def _program_generators(self) -> Mapping[str, Any]:
        return {**current().generators(), **self._named}

    @property
    def _generators(self) -> Mapping[str, Any]:
        return {**self._program_generators, **find_generators(self._data)}

    def _capture(self) -> dict[str, Any]:
        pass_start = None if self._trainer is None else self._pass  # without a trainer, a loaded one may be out of date
        return {"now": rng_generators.capture(self._generators), "pass": pass_start}

    def _warn(self, message: str) -> None:
        warnings.warn(f"RngState: random number generators: {message}", stacklevel=3)


def _derive(states: list[Any], rank: int) -> dict[str, Any]:
    """Return a rank's state, derived from all other ranks' states. Its pass starts where the first rank's does.

    Raises:
        ValueError: an item is no state of random number generators.
    """
    if not all(isinstance(one, Mapping) and isinstance(one.get("now"), Mapping) for one in states):
        raise ValueError("this is no state of random number generators: a rank's state lacks 'now'")
    derived: dict[str, Any] = {"now": rng_generators.derive([one["now"] for one in states], rank), "pass": None}
    passes = [one.get("pass") for one in states]
    if all(isinstance(one, Mapping) for one in passes):
        derived["pass"] = dict(passes[0])
        for key in ("state", "first_batch"):
            if all(one.get(key) is not None for one in passes):
                derived["pass"][key] = rng_generators.derive([one[key] for one in passes], rank)
    return derived
