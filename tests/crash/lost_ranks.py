"""Start the ranks of jobs that lose a rank, as forks of a server that has imported torch.

    python -m tests.crash.lost_ranks serve          # orders on stdin, one JSON object a line; answers on stdout
    torchrun ... -m tests.crash.lost_ranks rank <plan.json>

Ranks start alone (as ``python train.py`` on each rank), spawned by a parent, or under torchrun's agent. They run a
program of `tests.crash.lost_programs`. The test starts jobs and reads their logs with `tests.crash.lost_jobs`.
"""

import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.crash.hosts import INTERFACE, address_of, enter
from tests.crash.lost_programs import PROGRAMS, Plan, Rank, form_group

__all__ = ["start_time_of"]

_LOOPBACK = "127.0.0.1"


def start_time_of(pid: int) -> int | None:
    """Return the start time of a process in kernel ticks; None if it has ended. It tells apart processes of one id."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    return None


def rank_main(plan: Plan, rank: int) -> None:
    """Run one rank: form the process group, run the program, report how it ended."""
    me = Rank(plan, rank)
    output = os.open(me.folder / f"output_{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's agent sends it to the others as soon as one is lost
    os.environ["DISTCKPT_TIMEOUT_S"] = str(plan.timeout_s)
    if plan.hosts:
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    me.report("started", pid=os.getpid(), start=start_time_of(os.getpid()))
    form_group(me, 0)
    me.report("formed")
    me.await_word("go")
    PROGRAMS[plan.program](me)


def _rank_of_agent(text: str) -> NoReturn:
    """Run a rank that torchrun's agent has forked. It does not return: the agent would read its result."""
    rank_main(Plan.decode(text), int(os.environ["RANK"]))
    sys.stderr.flush()
    os._exit(0)


# -- how a job begins --------------------------------------------------------------------------------


class _IsRank(BaseException):
    """Unwinds a process that has become a rank, so that its interpreter ends as that of a program."""

    def __init__(self, plan: Plan, rank: int) -> None:
        super().__init__(rank)
        self.plan, self.rank = plan, rank


def _job_main(plan: Plan) -> None:
    """Start the ranks, and wait for all of them.

    Raises:
        _IsRank: in each rank of a job without a launcher.
    """
    if plan.launcher == "nobody":
        _be_a_shell(plan)
    elif plan.launcher == "parent":
        _be_a_parent(plan)
    elif not plan.hosts:
        _be_an_agent(plan, 0)
    else:
        agents = []
        for host, namespace in enumerate(plan.hosts):
            pid = os.fork()
            if pid == 0:
                enter(namespace)
                _be_an_agent(plan, host)
                return
            agents.append(pid)
        for pid in agents:
            os.waitpid(pid, 0)


def _be_a_shell(plan: Plan) -> None:
    """Fork each rank as a separate program, and reap it.

    Raises:
        _IsRank: in each rank.
    """
    children = []
    for rank in range(plan.world_size):
        pid = os.fork()
        if pid == 0:
            if plan.hosts:
                enter(plan.hosts[plan.host_of(rank)])
            raise _IsRank(plan, rank)
        children.append(pid)
    for _ in children:
        pid, status = os.waitpid(-1, 0)
        Rank(plan, children.index(pid)).report("exited", code=os.waitstatus_to_exitcode(status))


def _be_a_parent(plan: Plan) -> None:
    """Start the ranks with `multiprocessing`, and wait for them."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_main, args=(plan, rank)) for rank in range(plan.world_size)]
    for process in processes:
        process.start()
    left = dict(enumerate(processes))
    while left:
        multiprocessing.connection.wait([process.sentinel for process in left.values()])
        for rank, process in list(left.items()):
            if process.exitcode is not None:
                Rank(plan, rank).report("exited", code=process.exitcode)
                del left[rank]


def _be_an_agent(plan: Plan, host: int) -> None:
    """Run torchrun's agent on a host, or replace this process by torchrun."""
    num_hosts = max(len(plan.hosts), 1)
    num_ranks = plan.world_size // num_hosts
    endpoint, own = f"{_LOOPBACK}:0", _LOOPBACK
    if plan.hosts:
        endpoint, own = f"{address_of(0)}:{plan.port}", address_of(host)
    if plan.launcher == "torchrun":
        path = Path(plan.folder) / f"plan_{host}.json"
        path.write_text(plan.encode(), encoding="utf-8")
        words = ["-m", "torch.distributed.run", f"--nnodes={num_hosts}", f"--nproc-per-node={num_ranks}"]
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--local-addr={own}"]
        if plan.hosts:
            words += [f"--rdzv-conf=is_host={'true' if host == 0 else 'false'}", "--rdzv-id=lost"]
        os.execv(sys.executable, [sys.executable, *words, "-m", "tests.crash.lost_ranks", "rank", str(path)])  # noqa: S606
    config = LaunchConfig(
        min_nodes=num_hosts,
        max_nodes=num_hosts,
        nproc_per_node=num_ranks,
        run_id="lost",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": host == 0} if plan.hosts else {},
        local_addr=own,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank_of_agent)(plan.encode())


def _fork_job(plan: Plan) -> int:
    """Fork the process that starts a job's ranks; return its id, which is its process group's too.

    Raises:
        _IsRank: in each rank of a job without a launcher.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        output = os.open(Path(plan.folder) / "output_of_launcher", os.O_WRONLY | os.O_CREAT, 0o644)
        for descriptor, instead in ((0, nothing), (1, output), (2, output)):
            os.dup2(instead, descriptor)
        _job_main(plan)
        code = 0
    except _IsRank:
        raise
    except BaseException:  # noqa: BLE001 - no error of a child may reach the server's code
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Start and end jobs on orders from stdin, until stdin is closed; then end all of them.

    Raises:
        _IsRank: in each rank of a job without a launcher.
    """
    jobs: set[int] = set()
    importlib.import_module("torch._dynamo")  # which DistributedDataParallel needs: half a second in each rank
    gc.freeze()  # or each fork's last collection copies all of torch's pages
    _answer("ready")
    buffer = b""
    while True:
        data = os.read(0, 65536)  # not sys.stdin, whose buffer a fork would copy
        buffer += data
        *orders, buffer = buffer.split(b"\n")
        for order in map(json.loads, orders):
            if "start" in order:
                pid = _fork_job(Plan.decode(order["start"]))
                jobs.add(pid)
                _answer(pid)
            else:
                _end_job(order["end"])
                jobs.discard(order["end"])
                _answer("ended")
        if not data:
            break
    for pid in jobs:
        _end_job(pid)


def _answer(value: object) -> None:
    os.write(1, f"{json.dumps(value)}\n".encode())


def _end_job(pid: int) -> None:
    """Kill a job's processes. The first one is reaped only here, so that no other process has its id."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main(arguments: list[str]) -> None:
    """Run the server, or one rank under the real torchrun."""
    torch.set_num_threads(1)
    if arguments[0] == "rank":
        rank_main(Plan.decode(Path(arguments[1]).read_text(encoding="utf-8")), int(os.environ["RANK"]))
        return

    try:
        serve()
    except _IsRank as become:
        plan, rank = become.plan, become.rank
    else:
        return
    rank_main(plan, rank)


if __name__ == "__main__":
    main(sys.argv[1:])
