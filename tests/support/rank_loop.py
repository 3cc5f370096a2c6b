"""The loop of a rank process: receive a task, run it in a new process group, send its outcome.

A rank has no time limit of its own; its parent decides that it takes too long.
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import _pytest.outcomes
from torch.distributed import Store

from tests.support.channel import Channel, set_call_store
from tests.support.isolate import collect_background_errors, forget_runs, isolate, leftover_threads
from tests.support.locate import load_function
from tests.support.messages import Idle, Outcome, Ready, Release, Task, pack, unpack
from tests.support.runtime import join, leave
from tests.support.store import call_namespace

_OWN_FILES = (os.path.dirname(__file__) + os.sep,)  # noqa: PTH120 - compared with strings of tracebacks


class TaskScope:
    """Isolates each task of a rank that is a process. Ranks that are threads have a subclass."""

    @contextlib.contextmanager
    def enter(self, task: Task) -> Iterator[list[str]]:
        """Isolate the task; yield a list that receives errors of threads and finalizers."""
        with isolate(task.environment, task.warning_filters), collect_background_errors() as errors:
            yield errors

    def fail(self, channel: Channel) -> NoReturn:
        """End the process as a failing program ends."""
        del channel
        _exit_now(1)


def serve(channel: Channel, store: Store, scope: TaskScope | None = None) -> int:
    """Run tasks until the parent closes the pipe.

    Returns:
        The exit code of a fresh rank, after its only task.
    """
    scope = scope or TaskScope()
    channel.send(Ready(pid=os.getpid()))
    while True:
        try:
            task = channel.receive()
        except EOFError:
            _exit_now(0)
        if not isinstance(task, Task):
            raise TypeError(f"a rank expects a Task, got {task!r}")
        outcome = _serve_one(task, channel, store, scope)
        if task.fresh:
            return _exit_code(outcome)


def _serve_one(task: Task, channel: Channel, store: Store, scope: TaskScope) -> Outcome:
    threads = set(threading.enumerate())
    with scope.enter(task) as errors:
        outcome = _run(task, store)
        errors.extend(forget_runs())
        if errors and outcome.kind == "returned":
            outcome = Outcome(kind="raised", reason=errors[0], traceback="\n".join(errors))
        channel.send(outcome)
        if outcome.kind in {"raised", "exited"}:
            return outcome if task.fresh else scope.fail(channel)
        try:
            message = channel.receive()
        except EOFError:
            _exit_now(0)
        if not isinstance(message, Release):
            raise TypeError(f"a rank with an outcome expects Release, got {message!r}")
        leave()
    if not task.fresh:
        channel.send(Idle(leftovers=leftover_threads(threads)))
    return outcome


def _run(task: Task, store: Store) -> Outcome:
    try:
        function = load_function(task.function)
        arguments: Any = unpack(task.arguments)
        args, kwargs = arguments
        set_call_store(call_namespace(store, task.number))
        join(task, store)
        value = pack(function(*args, **kwargs))
    except _pytest.outcomes.Skipped as skip:
        return Outcome(kind="skipped", reason=str(skip))
    except _pytest.outcomes.XFailed as xfail:
        return Outcome(kind="xfailed", reason=str(xfail))
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        reason = f"SystemExit: {leave.code}"
        return Outcome(kind="exited", reason=reason, traceback=_trace(leave), exit_code=code)
    except BaseException as error:  # noqa: BLE001 - any exception is the rank's outcome
        return Outcome(kind="raised", reason=_one_line(error), traceback=_trace(error))
    return Outcome(kind="returned", value=value)


def _one_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def _trace(error: BaseException) -> str:
    """Return the traceback without the harness's own leading frames."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OWN_FILES):
        first = first.tb_next
    return "".join(traceback.format_exception(type(error), error, first or error.__traceback__))


def _exit_code(outcome: Outcome) -> int:
    if outcome.kind == "exited":
        return outcome.exit_code
    return 1 if outcome.kind == "raised" else 0


def _exit_now(code: int) -> NoReturn:
    """End without running exit handlers or waiting for the task's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
