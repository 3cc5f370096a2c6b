"""Start rank processes: one per rank, or one for all ranks where ranks are threads (torch_xla)."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path

from tests.support.fork_server import ForkedProcess, Request, can_fork, server_for
from tests.support.handle import RankHandle
from tests.support.runtime import RUNTIME
from tests.support.store import shared_store

_ROOT = Path(__file__).resolve().parents[2]


def start(
    world_size: int,
    directory: Path,
    *,
    first: int = 0,
    environment: Mapping[str, str] | None = None,
) -> list[RankHandle]:
    """Start ranks and return their handles, in rank order, without waiting for them.

    Args:
        world_size: number of ranks of the job.
        directory: for logs and stacks.
        first: the first rank to start; earlier ranks run already.
        environment: additional variables.
    """
    # Importing Horovod's launcher sets variables in this process that a rank under horovodrun does not have.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    variables = {**inherited, **(environment or {}), "PYTHONUNBUFFERED": "1"}
    fork = can_fork(environment or {})
    ranks = range(first, world_size)
    if RUNTIME == "xla":
        # The calling thread executes; each replica that waits takes a thread, and two cores have only two by default.
        variables |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(world_size)}
        variables |= {"PJRT_CPU_ASYNC_CLIENT": "0", "XLA_THREAD_POOL_SIZE": str(4 + 2 * world_size)}
        return _start(ranks, "tests.support.xla_main", directory, variables, fork=fork)
    handles = []
    for rank in ranks:
        handles += _start([rank], "tests.support.rank_main", directory, variables, fork=fork)
    return handles


def _start(
    ranks: Sequence[int],
    module: str,
    directory: Path,
    variables: dict[str, str],
    *,
    fork: bool,
) -> list[RankHandle]:
    """Start one process for `ranks`."""
    log_file, stacks = directory / f"rank{ranks[0]}.log", directory / f"rank{ranks[0]}.stacks"
    log_file.touch()
    stacks.touch()
    pipes = [Pipe() for _ in ranks]
    descriptors = [child.fileno() for _, child in pipes]
    arguments = (str(stacks), str(shared_store().port))
    process: subprocess.Popen[bytes] | ForkedProcess
    if fork:
        request = Request(module, arguments, variables, str(log_file))
        process = server_for(RUNTIME).start(request, descriptors)
    else:
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *map(str, descriptors)],
                cwd=_ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                start_new_session=True,  # kill() then reaches the rank and the processes it started, and no others
            )
    for _, child in pipes:
        child.close()
    return [
        RankHandle(rank, process, connection, log_file, stacks)
        for rank, (connection, _) in zip(ranks, pipes, strict=True)
    ]
