"""Processes that save until they are killed, forked from one that has imported torch.

A fork costs some ten milliseconds where a fresh Python with torch costs seconds. The forking process runs no
threads of its own and computes on one, so the children start clean.
"""

import contextlib
import ctypes
import os
import select
import signal
import statistics
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from ignite.engine import Engine, Events

from tests.crash.savers import SAVERS
from tests.crash.subject import Counted, name_of, steps_in

__all__ = ["Child", "forked", "save_for_ever", "typical_save_s"]

_ACK = struct.Struct("<q")
_READY = 0
_PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None)
_LIMIT_S = 60.0
# Its tensor is larger than what the writer gathers: a save is several writes.
_NUM_FLOATS = 300_000


class Child:
    """A forked process that says on a pipe which steps it takes for saved.

    Args:
        body: runs in the child and is given a function that sends a step.
    """

    def __init__(self, body: Callable[[Callable[[int], None]], None]) -> None:
        self._pipe, theirs = os.pipe()
        self.acknowledged: list[int] = []
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _run_and_leave(body, lambda step: _send(theirs, step))
        os.close(theirs)

    def wait_for(self, num_acks: int) -> None:
        """Wait until so many steps were sent, counting the first one, which only says that the child is ready."""
        deadline = time.monotonic() + _LIMIT_S
        while len(self.acknowledged) < num_acks:
            if not self._take(deadline - time.monotonic()):
                self.kill()
                raise RuntimeError(f"a saving child sent {self.acknowledged} and then no more")

    def kill(self) -> None:
        """SIGKILL it, reap it, and take in what it has sent before. Does nothing the second time."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.finish()

    def finish(self) -> int:
        """Wait for its end and take in what it has sent; returns the exit code, minus the signal's number if killed."""
        while self._take(_LIMIT_S):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(status)

    def _take(self, patience_s: float) -> bool:
        ready, _, _ = select.select([self._pipe], [], [], max(0.0, patience_s))
        data = os.read(self._pipe, _ACK.size) if ready else b""
        if data:
            self.acknowledged.append(_ACK.unpack(data)[0])
        return bool(data)


@contextlib.contextmanager
def forked(body: Callable[[Callable[[int], None]], None]) -> Iterator[Child]:
    """Fork a :class:`Child`, wait until it is ready, and kill it in the end."""
    child = Child(body)
    try:
        child.wait_for(1)
        yield child
    finally:
        child.kill()


def _send(pipe: int, step: int) -> None:
    os.write(pipe, _ACK.pack(step))  # eight bytes go through a pipe whole or not at all


def _run_and_leave(body: Callable[[Callable[[int], None]], None], send: Callable[[int], None]) -> NoReturn:
    code = 1
    try:
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the process that forked it
        body(send)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may reach the forking process's own code
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def save_for_ever(
    directory: Path, saver: str, after: int, num_saves: int = 10**6
) -> Callable[[Callable[[int], None]], None]:
    """Return a body that trains and saves, as a run does that was resumed.

    Args:
        directory: where to.
        saver: which of `SAVERS`.
        after: steps go on from this one.
        num_saves: how many, if it is to end by itself.
    """

    def body(send: Callable[[int], None]) -> None:
        counted = Counted(_NUM_FLOATS)
        handler = SAVERS[saver](counted, directory)
        handler.load_state_dict({"_saved": [(step, name_of(step)) for step in steps_in(directory)]})
        engine = Engine(lambda engine, _batch: setattr(counted, "step", after + engine.state.iteration))
        engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: send(counted.step))
        send(_READY)
        engine.run([0], max_epochs=num_saves)

    return body


def typical_save_s(directory: Path, saver: str) -> float:
    """Measure how long a save takes here; leaves its files in `directory`."""
    seconds = []
    with forked(save_for_ever(directory, saver, after=0, num_saves=8)) as child:
        for count in range(2, 10):
            start = time.monotonic()
            child.wait_for(count)
            seconds.append(time.monotonic() - start)
    return statistics.median(seconds)
