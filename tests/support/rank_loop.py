"""What a rank process does: take a task, run it in a fresh process group, say how it ended.

Runs inside the rank. Knows the messages and nothing of pools, limits or reports: a rank never decides
that it takes too long, its parent does.
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

from tests.support.channel import Channel, keep_store
from tests.support.isolate import background_errors, isolated, leftover_threads
from tests.support.locate import find
from tests.support.messages import Idle, Outcome, Ready, Release, Task, pack, unpack
from tests.support.runtime import join, leave
from tests.support.store import beside

_OWN_FILES = (os.path.dirname(__file__) + os.sep,)  # noqa: PTH120 - compared with strings of tracebacks


class Isolation:
    """What a rank that is a process does around a task. Ranks that are threads have one of their own."""

    @contextlib.contextmanager
    def isolated(self, task: Task) -> Iterator[list[str]]:
        """Give the task a clean process; yield the list of errors that no caller sees."""
        with isolated(task.environment, task.warning_filters), background_errors() as errors:
            yield errors

    def fail(self, channel: Channel) -> NoReturn:
        """End as a failing program does."""
        del channel
        _leave(1)


def serve(channel: Channel, store: Store, isolation: Isolation | None = None) -> int:
    """Run tasks until the parent hangs up.

    Returns:
        The exit code of a fresh rank, once its only task is over.
    """
    around = isolation or Isolation()
    channel.send(Ready(pid=os.getpid()))
    while True:
        try:
            task = channel.receive()
        except EOFError:
            _leave(0)
        if not isinstance(task, Task):
            raise TypeError(f"a rank expects a Task, got {task!r}")
        outcome = _serve_one(task, channel, store, around)
        if task.fresh:
            return _exit_code(outcome)


def _serve_one(task: Task, channel: Channel, store: Store, around: Isolation) -> Outcome:
    threads = set(threading.enumerate())
    with around.isolated(task) as errors:
        outcome = _run(task, store)
        if errors and outcome.kind == "returned":
            outcome = Outcome(kind="raised", reason=errors[0], traceback="\n".join(errors))
        channel.send(outcome)
        if outcome.kind in {"raised", "exited"}:
            return outcome if task.fresh else around.fail(channel)
        try:
            message = channel.receive()
        except EOFError:
            _leave(0)
        if not isinstance(message, Release):
            raise TypeError(f"a rank with an outcome expects Release, got {message!r}")
        leave()
    if not task.fresh:
        channel.send(Idle(leftovers=leftover_threads(threads)))
    return outcome


def _run(task: Task, store: Store) -> Outcome:
    try:
        function = find(task.function)
        arguments: Any = unpack(task.arguments)
        args, kwargs = arguments
        keep_store(beside(store, task.number))
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
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is this rank's outcome
        return Outcome(kind="raised", reason=_one_line(error), traceback=_trace(error))
    return Outcome(kind="returned", value=value)


def _one_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def _trace(error: BaseException) -> str:
    """Format a traceback that begins where the test's own code does."""
    first = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OWN_FILES):
        first = first.tb_next
    return "".join(traceback.format_exception(type(error), error, first or error.__traceback__))


def _exit_code(outcome: Outcome) -> int:
    if outcome.kind == "exited":
        return outcome.exit_code
    return 1 if outcome.kind == "raised" else 0


def _leave(code: int) -> NoReturn:
    """End now: no handlers at exit, no waiting for threads that a task may have left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
