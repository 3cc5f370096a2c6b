"""Jobs of one and two ranks under another package's training loop, forked from a process that has imported it.

The import takes seconds, a forked job less than one. ``python -m tests.integrations.jobs PROGRAM`` reads a job a line
from standard input, as JSON, and writes its result. PROGRAM is a module of this folder with a function ``train``.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.support.limits import PROGRAM_LIMIT_S

__all__ = ["Jobs"]

ROOT = Path(__file__).resolve().parents[2]
_READY = b"r"


class Jobs:
    """The forking process, seen from a test.

    Args:
        program: name of the module.
    """

    def __init__(self, program: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DISTCKPT_TIMEOUT_S": "20"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.jobs", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, and with it the ranks."""
        self._process.communicate(timeout=PROGRAM_LIMIT_S)

    def run(
        self, folder: Path, world_size: int = 1, *, kill_after_s: float | None = None, **plan: Any
    ) -> list[dict[str, Any] | None]:
        """Run a job; return each rank's result, None if it was killed.

        Args:
            folder: the working folder.
            world_size: number of ranks.
            kill_after_s: seconds from the first iteration to a SIGKILL of all ranks; None for none.
            plan: for the program.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"folder": str(folder), "world_size": world_size, "kill_after_s": kill_after_s, "plan": plan}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the forking process has ended"
        answer = json.loads(line)
        assert isinstance(answer, list), answer
        return answer


class _Rank:
    def __init__(self, train: Callable[..., dict[str, Any]], job: dict[str, Any], rank: int) -> None:
        self.pipe, theirs = os.pipe()
        self._received = b""
        self.is_done = False
        self.log = Path(job["folder"]) / f"log-{rank}"
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _be_a_rank(train, job, rank, theirs, self.log)
        os.close(theirs)

    @property
    def is_ready(self) -> bool:
        return bool(self._received)

    def take(self) -> None:
        data = os.read(self.pipe, 1 << 16)
        self._received += data
        if not data and not self.is_done:
            self.is_done = True
            os.waitpid(self.pid, 0)
            os.close(self.pipe)

    def result(self) -> Any:
        text = self._received.lstrip(_READY)
        return json.loads(text) if text else None


def _be_a_rank(train: Callable[..., dict[str, Any]], job: dict[str, Any], rank: int, pipe: int, log: Path) -> NoReturn:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    code = 1
    try:
        if job["world_size"] > 1:
            _join(job, rank)
        result = train(Path(job["folder"]), rank, lambda: os.write(pipe, _READY), **job["plan"])
        os.write(pipe, json.dumps(result).encode())
        code = 0
    except BaseException:  # noqa: BLE001 - the forked interpreter is not left
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _join(job: dict[str, Any], rank: int) -> None:
    import torch.distributed as dist  # noqa: PLC0415 - in the child

    world_size = job["world_size"]
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "TORCHELASTIC_RUN_ID": job["number"],  # Lightning starts no ranks itself then
    }
    os.environ |= {name: str(value) for name, value in names.items()}
    store = f"file://{job['folder']}/store-{job['number']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)


def _run_job(train: Callable[..., dict[str, Any]], job: dict[str, Any]) -> Any:
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    ranks = [_Rank(train, job, rank) for rank in range(job["world_size"])]
    deadline, end = time.monotonic() + PROGRAM_LIMIT_S, None
    with contextlib.ExitStack() as stack:
        for one in ranks:
            stack.callback(_kill, one)
        while any(not one.is_done for one in ranks):
            if end is None and job["kill_after_s"] is not None and all(one.is_ready for one in ranks):
                end = time.monotonic() + job["kill_after_s"]
            until = deadline if end is None else end
            open_pipes = {one.pipe: one for one in ranks if not one.is_done}
            ready, _, _ = select.select(list(open_pipes), [], [], max(0.0, until - time.monotonic()))
            for pipe in ready:
                open_pipes[pipe].take()
            if time.monotonic() >= until:
                break
        is_late = end is None and time.monotonic() >= deadline
    results = [one.result() for one in ranks]
    if is_late or (job["kill_after_s"] is None and None in results):
        return "\n".join(f"rank {at}:\n{one.log.read_text()[-3000:]}" for at, one in enumerate(ranks))
    return results


def _kill(rank: _Rank) -> None:
    if not rank.is_done:
        os.kill(rank.pid, signal.SIGKILL)
        while not rank.is_done:
            rank.take()


def _jobs() -> Iterator[dict[str, Any]]:
    for number, line in enumerate(sys.stdin):
        yield {**json.loads(line), "number": number}


def _main() -> None:
    train = importlib.import_module(f"tests.integrations.{sys.argv[1]}").train
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    gc.collect()
    gc.freeze()
    for job in _jobs():
        print(json.dumps(_run_job(train, job)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
