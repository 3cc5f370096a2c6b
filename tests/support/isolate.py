"""Restore a pooled rank's process after each task.

Restored: environment, working directory, umask, signal handlers, warning filters, loggers, random numbers, the default
dtype. Not restored: resource limits and modules' globals (use `fresh_ranks`), and threads (`leftover_threads` names
them, and the pool starts new ranks).
"""

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from tests.support.messages import unpack

_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCHLD,
)


@contextlib.contextmanager
def isolate(environment: dict[str, str], warning_filters: tuple[bytes, ...]) -> Iterator[None]:
    """Run a task with these variables and warning filters, and restore what it changes."""
    with _environment(environment), _signals(), _loggers(), warnings.catch_warnings(), _torch_settings():
        _set_warning_filters(warning_filters)
        yield


@contextlib.contextmanager
def collect_background_errors() -> Iterator[list[str]]:
    """Collect exceptions that no caller sees: those of threads and finalizers."""
    seen: list[str] = []

    def note_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread is not None else "unknown"
        seen.append(f"uncaught exception in thread {name}: {args.exc_type.__name__}: {args.exc_value}")
        threading.__excepthook__(args)

    def note_finalizer(args: "sys.UnraisableHookArgs") -> None:
        seen.append(f"exception ignored in {args.object!r}: {args.exc_type.__name__}: {args.exc_value}")
        sys.__unraisablehook__(args)

    threading.excepthook, sys.unraisablehook = note_thread, note_finalizer
    try:
        yield seen
    finally:
        threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__


def leftover_threads(before: set[threading.Thread], *, limit_s: float = 0.5) -> tuple[str, ...]:
    """Return the names of threads started since `before` that do not end within `limit_s`.

    tqdm's monitor thread, which never ends, is not counted.
    """
    deadline = time.monotonic() + limit_s
    left = []
    for thread in set(threading.enumerate()) - before:
        if type(thread).__module__.startswith("tqdm"):
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(f"thread {thread.name}")
    return tuple(sorted(left))


def forget_runs() -> list[str]:
    """Forget the runs that are under way on this thread; return what to tell of them.

    A test has to end its runs: engines of later tests would count as nested in them. A background save, for one, would
    be awaited at the end of the outer run.
    """
    events = sys.modules.get("distckpt.handlers.engine_events")
    if events is None:
        return []
    runs, events.FIRINGS.runs = events.FIRINGS.runs, []
    engines = [reference() for _, reference in runs]
    return [f"the test left a run of {engine} under way" for engine in engines if engine is not None]


@contextlib.contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    environment, directory, umask = dict(os.environ), os.getcwd(), os.umask(0o022)  # noqa: PTH109 - chdir's twin
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        os.umask(umask)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def _loggers() -> Iterator[None]:
    def known() -> list[logging.Logger]:
        loggers = logging.Logger.manager.loggerDict.values()
        return [logging.root, *(item for item in loggers if isinstance(item, logging.Logger))]

    before = {item: (item.level, list(item.handlers), item.propagate, item.disabled) for item in known()}
    try:
        yield
    finally:
        for item in known():
            handlers: list[logging.Handler]
            if item in before:
                item.level, handlers, item.propagate, item.disabled = before[item]
                item.handlers[:] = handlers
        logging.disable(logging.NOTSET)
        logging.Logger.manager._clear_cache()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _torch_settings() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - programs use the legacy generator
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic, grad = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_grad_enabled(grad)


def _set_warning_filters(packed: tuple[bytes, ...]) -> None:
    """Set the parent's filters, except those whose category cannot be imported: they cannot match here."""
    filters = []
    for data in packed:
        with contextlib.suppress(ImportError, AttributeError):
            filters.append(unpack(data))
    warnings.resetwarnings()
    # The modules' caches of seen warnings are keyed by a version, which resetwarnings() has advanced. No warning is
    # raised between these two lines, so that version is right for the new list too.
    cast("list[Any]", warnings.filters).extend(filters)
