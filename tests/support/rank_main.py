"""Entry point of a rank process: `python -m tests.support.rank_main STACK_FILE STORE_PORT DESCRIPTOR`.

`tests.support.start` starts it. The process ends with its parent, even if the parent is killed.
"""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from tests.support.channel import open_channel
from tests.support.locate import rewrite_assertions_on_import
from tests.support.messages import STACK_SIGNAL
from tests.support.rank_loop import serve
from tests.support.store import connect

_PR_SET_PDEATHSIG = 1


def prepare(stack_file: Path) -> TextIO:
    """Make this process end with its parent, and write all threads' stacks on `STACK_SIGNAL` and on a crash."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    stacks = stack_file.open("a", encoding="utf-8")
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)
    rewrite_assertions_on_import()
    torch.set_num_threads(1)
    return stacks


def main(arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Run tasks that arrive on the pipe."""
    stack_file, store_port = arguments
    (descriptor,) = descriptors
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - the function takes it so
    with prepare(Path(stack_file)):
        return serve(open_channel(descriptor), connect(int(store_port)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:3], [int(text) for text in sys.argv[3:]]))
