"""Entry point of a torch_xla process: `python -m tests.support.xla_main STACK_FILE STORE_PORT DESCRIPTOR...`.

Its replicas are threads. Each has a pipe and runs tasks as a rank process does. What a task may change in the process
(environment, signal handlers, random numbers) is restored once for all replicas. `tests.support.start` starts it.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support.channel import Channel, open_channel
from tests.support.messages import Task
from tests.support.rank_loop import TaskScope, serve
from tests.support.rank_main import prepare
from tests.support.store import connect

_LAUNCH = Path(__file__).resolve().parents[2] / "launch"


class SharedTaskScope(TaskScope):
    """A scope around one task on all replicas, entered when the last replica arrives and left when the last leaves.

    Args:
        num_replicas: number of replicas.
    """

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._barrier = threading.Barrier(num_replicas)
        self._scope: Any = None
        self._errors: list[str] = []

    @contextlib.contextmanager
    def enter(self, task: Task) -> Iterator[list[str]]:
        """Isolate the task. After a failure on a replica the scope is not left: the process is about to be killed."""
        if self._barrier.wait() == 0:
            self._scope = super().enter(task)
            self._errors = self._scope.__enter__()
        self._barrier.wait()
        yield self._errors
        if self._barrier.wait() == 0:
            self._scope.__exit__(None, None, None)
        self._barrier.wait()

    def fail(self, channel: Channel) -> NoReturn:
        """Wait to be killed, which the parent does when the other replicas have reported."""
        with contextlib.suppress(EOFError):
            channel.receive()
        os._exit(1)


def main(arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Run tasks on all replicas; return the exit code of fresh ones."""
    stack_file, store_port = arguments
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function takes it so
    sys.path.insert(0, str(_LAUNCH))
    with prepare(Path(stack_file)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_xla.runtime as xr  # noqa: PLC0415 - only in ranks of torch_xla's
        import xla_on_cpu  # noqa: PLC0415 - from launch/
        from torch_xla._internal import pjrt  # noqa: PLC0415 - what xmp.spawn runs in each process it starts

        xla_on_cpu.take_turns()
        scope, codes = SharedTaskScope(len(descriptors)), []

        def run_replica() -> None:
            channel = open_channel(descriptors[xr.global_ordinal()])
            codes.append(serve(channel, connect(int(store_port)), scope))

        pjrt._run_thread_per_device(0, 1, run_replica, pjrt.initialize_multiprocess)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:3], [int(text) for text in sys.argv[3:]]))
