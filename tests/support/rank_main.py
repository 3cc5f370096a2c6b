"""Entry of a rank process: `python -m tests.support.rank_main <file for stacks> <port of store> <pipe>`.

Started by `tests.support.handle`. Ends with its parent, whatever that parent dies of.
"""

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

import torch

from tests.support.channel import open_channel
from tests.support.locate import rewrite_assertions_on_import
from tests.support.rank_loop import serve
from tests.support.signals import STACK_SIGNAL
from tests.support.store import connect

_PR_SET_PDEATHSIG = 1


def prepare(stack_file: Path) -> TextIO:
    """Let this process end with its parent, and write all threads' stacks on `STACK_SIGNAL`, or in a crash."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stacks = stack_file.open("a", encoding="utf-8")
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)
    rewrite_assertions_on_import()
    torch.set_num_threads(1)
    return stacks


def main(stack_file: Path, store_port: int, descriptor: int) -> int:
    """Serve tasks from the pipe."""
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function takes it so
    with prepare(stack_file):
        return serve(open_channel(descriptor), connect(store_port))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
