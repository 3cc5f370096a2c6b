"""What the tests of faults share: one program, run by several ranks with ignite's handlers and with ours.

A program is a module-level function whose first argument names the library, so that the fault and its absence are
shown by the same lines. Where ignite hangs, the job's process group has a short timeout, and the hang is its end.
"""

import contextlib
import importlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn

from tests.distributed.idist import fresh_idist
from tests.support import job, run_ranks
from tests.support.runtime import RUNTIME

T = TypeVar("T")

IGNITE, OURS = "ignite.handlers", "distckpt"
HUNG = "hung"
"""What a program comes to on a rank whose collective was not answered."""
HANG_LIMIT_S = 2.0

_GLOO_GAVE_UP = re.compile(r"time[d ]*\s?out|connection closed|closed by peer", re.IGNORECASE)


def on_ranks(program: Callable[..., T], library: str, world_size: int, *args: object) -> list[T]:
    """Run ``program(library, *args)`` on every rank; the job's own collectives hang no longer than `HANG_LIMIT_S`."""
    __tracebackhide__ = True
    warm_up(world_size)
    limit_s = HANG_LIMIT_S if library == IGNITE else None
    call = (program.__module__, program.__qualname__, library, args)
    return cast("list[T]", run_ranks(_with_library, world_size, *call, collective_timeout_s=limit_s))


def warm_up(world_size: int) -> None:
    """Let the ranks import both libraries: to do so at different speeds is no hang."""
    run_ranks(_import_all, world_size)


def _import_all() -> None:
    importlib.import_module(IGNITE)
    importlib.import_module(OURS)


def _with_library(module: str, name: str, library: str, args: tuple[object, ...]) -> object:
    program: Callable[..., object] = getattr(importlib.import_module(module), name)
    with fresh_idist():
        if library == IGNITE:
            idist.get_rank()  # collective the first time
        return program(library, *args)


def unless_hung(program: Callable[[], T]) -> T | str:
    """Return what `program` returns, or `HUNG` if a collective of the job's is not answered."""
    try:
        return program()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _GLOO_GAVE_UP.search(str(error)):
            raise
        return HUNG


def handlers(library: str) -> Any:
    """Return the library's handlers."""
    return importlib.import_module(library)


def training_step(_engine: Engine | None = None, _batch: object = None) -> float:
    """Reduce a gradient over the ranks, as a step of data-parallel training does."""
    return job.all_reduce(torch.ones(1, device=job.device())).item()


def idle_engine() -> Engine:
    """Return an engine whose iterations do nothing."""
    return Engine(lambda _engine, _batch: None)


def fire(handler: Callable[..., object], *, times: int = 1, engine: Engine | None = None) -> Engine:
    """Call `handler` at the end of each of some epochs of one iteration."""
    engine = idle_engine() if engine is None else engine
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=times)
    return engine


def model_of(value: float) -> nn.Linear:
    """Return a module all of whose parameters are `value`."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def gather(value: object) -> list[Any]:
    """Collective of the job's. Return every rank's value."""
    return job.gather(value)


class _Warned:
    """Takes warnings to the rank that they are of: ranks may be threads, and `warnings` is of the process."""

    def __init__(self) -> None:
        self._lists: dict[int, list[list[str]]] = {}
        self._lock = threading.Lock()
        self._catching = warnings.catch_warnings()

    @contextlib.contextmanager
    def collected_into(self, messages: list[str]) -> Iterator[None]:
        """Collect the warnings of this thread; those of other threads too, where they are no ranks."""
        thread = threading.get_ident() if RUNTIME == "xla" else 0
        with self._lock:
            if not self._lists:
                self._catching = warnings.catch_warnings()
                self._catching.__enter__()
                warnings.simplefilter("always")
                vars(warnings)["showwarning"] = self._take
            self._lists.setdefault(thread, []).append(messages)
        try:
            yield
        finally:
            with self._lock:
                self._lists[thread].pop()
                if not self._lists[thread]:
                    del self._lists[thread]
                if not self._lists:
                    self._catching.__exit__(None, None, None)

    def _take(self, message: object, *_where: object, **_more: object) -> None:
        lists = self._lists.get(threading.get_ident() if RUNTIME == "xla" else 0)
        if lists:
            lists[-1].append(str(message))


_WARNED = _Warned()


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """Collect the messages of this rank's warnings instead of raising them. They are there once the block is left."""
    messages: list[str] = []
    with _WARNED.collected_into(messages):
        yield messages


@contextlib.contextmanager
def logged(name: str, level: int = logging.DEBUG) -> Iterator[list[str]]:
    """Collect the messages of a logger, and of those below it, from a level on."""
    messages: list[str] = []
    this_thread = threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_this_ranks = RUNTIME != "xla" or record.thread == this_thread  # there ranks are threads
            if is_this_ranks and record.levelno >= level:
                messages.append(record.getMessage())

    logger, collector = logging.getLogger(name), Collector()
    before = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        # Where another rank of this process may still collect, or be telling the handlers one by one, what was added
        # stays until the test's surroundings are put right.
        if RUNTIME != "xla":
            logger.removeHandler(collector)
            logger.setLevel(before)


class Stateful:
    """An object whose state is what the test says."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def raised(call: Callable[[], object]) -> BaseException | None:
    """Return the exception that `call` raises, or None."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return error
    return None


def kinds(error: BaseException | None) -> tuple[str, ...]:
    """Return the names of an error's type and of its bases, nearest first; nothing for None."""
    return () if error is None else tuple(base.__name__ for base in type(error).__mro__)


def all_equal(values: Sequence[object]) -> bool:
    """Tell whether every rank came to the same."""
    return all(value == values[0] for value in values)
