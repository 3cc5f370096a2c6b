"""Entry of a process of torch_xla's: `python -m tests.support.xla_main <file for stacks> <port of store> <pipe>...`.

Its replicas are threads, each with a pipe, and serve tasks as rank processes do. What a task may change of the process
(environment, signal handlers, random numbers) is put right once around all of them. Started by `tests.support.start`.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tests.support.channel import Channel, open_channel
from tests.support.messages import Task
from tests.support.rank_loop import Isolation, serve
from tests.support.rank_main import prepare
from tests.support.store import connect

_LAUNCH = Path(__file__).resolve().parents[2] / "launch"


class Together(Isolation):
    """A clean process for one task on all replicas: begun by the last that comes, ended by the last that goes.

    Args:
        num_replicas: how many they are.
    """

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._meeting = threading.Barrier(num_replicas)
        self._here: Any = None
        self._errors: list[str] = []

    @contextlib.contextmanager
    def isolated(self, task: Task) -> Iterator[list[str]]:
        """Give the task a clean process. Where a replica has failed the process is soon killed."""
        if self._meeting.wait() == 0:
            self._here = super().isolated(task)
            self._errors = self._here.__enter__()
        self._meeting.wait()
        yield self._errors
        if self._meeting.wait() == 0:
            self._here.__exit__(None, None, None)
        self._meeting.wait()

    def fail(self, channel: Channel) -> NoReturn:
        """Wait to be killed, after the other replicas have told their side."""
        with contextlib.suppress(EOFError):
            channel.receive()
        os._exit(1)


def main(stack_file: Path, store_port: int, descriptors: list[int]) -> int:
    """Serve tasks on all replicas; return the exit code once fresh ones are done."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function takes it so
    sys.path.insert(0, str(_LAUNCH))
    with prepare(stack_file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_xla.runtime as xr  # noqa: PLC0415 - only here
        import xla_on_cpu  # noqa: PLC0415 - launch/'s
        from torch_xla._internal import pjrt  # noqa: PLC0415 - what xmp.spawn runs in each process it starts

        xla_on_cpu.take_turns()
        together, codes = Together(len(descriptors)), []

        def replica() -> None:
            channel = open_channel(descriptors[xr.global_ordinal()])
            codes.append(serve(channel, connect(store_port), together))

        pjrt._run_thread_per_device(0, 1, replica, pjrt.initialize_multiprocess)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), [int(text) for text in sys.argv[3:]]))
