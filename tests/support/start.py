"""Starting rank processes: one for each rank, or one for all where ranks are threads (torch_xla).

Owns the command lines, the pipes and the files of a rank. What is said over the pipes is not its business.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path

from tests.support.handle import RankHandle
from tests.support.runtime import RUNTIME
from tests.support.store import shared_store

_ROOT = Path(__file__).resolve().parents[2]


def start(
    world_size: int,
    directory: Path,
    *,
    first: int = 0,
    prefix: Callable[[int], Sequence[str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[RankHandle]:
    """Start ranks and return their handles, in rank order; none is waited for.

    Args:
        world_size: number of ranks of the job.
        directory: for logs and stacks.
        first: the first rank to start; those before it run already.
        prefix: rank -> command in front of that rank's Python.
        environment: more variables.
    """
    # Not what importing Horovod's launcher leaves in this process: it is not in a rank that horovodrun starts.
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    variables = {**own, **(environment or {}), "PYTHONUNBUFFERED": "1"}
    ranks = range(first, world_size)
    if RUNTIME == "xla":
        # Executed by whoever asks, and with a thread for each replica that waits: two cores have two.
        variables |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(world_size)}
        variables |= {"PJRT_CPU_ASYNC_CLIENT": "0", "XLA_THREAD_POOL_SIZE": str(4 + 2 * world_size)}
        return _start(ranks, "tests.support.xla_main", directory, prefix(0) if prefix else (), variables)
    handles = []
    for rank in ranks:
        command = prefix(rank) if prefix else ()
        handles += _start([rank], "tests.support.rank_main", directory, command, variables)
    return handles


def _start(
    ranks: Sequence[int], module: str, directory: Path, prefix: Sequence[str], variables: Mapping[str, str]
) -> list[RankHandle]:
    """Start one process for `ranks`."""
    log_file, stacks = directory / f"rank{ranks[0]}.log", directory / f"rank{ranks[0]}.stacks"
    log_file.touch()
    stacks.touch()
    pipes = [Pipe() for _ in ranks]
    descriptors = [child.fileno() for _, child in pipes]
    command = [sys.executable, "-m", module, str(stacks), str(shared_store().port), *map(str, descriptors)]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*prefix, *command],
            cwd=_ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            start_new_session=True,  # so that kill() reaches what the rank started, and only that
        )
    for _, child in pipes:
        child.close()
    return [
        RankHandle(rank, process, connection, log_file, stacks)
        for rank, (connection, _) in zip(ranks, pipes, strict=True)
    ]
