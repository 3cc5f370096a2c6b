"""The parent of the ranks: starts a world, reads its journal, and ends it at a time limit.

A contestant that fails or hangs is excluded, and the world starts again in the same round with the others.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import multiprocessing

from ci.savebench.rank import MEMORY_ROUND, Plan, run_rank

POLL_S = 0.05
START_S = 180  # for the imports of all ranks on a busy machine
SUMMARY_LENGTH = 150
ENDING_S = 10  # the other ranks have so long to report after the first failure


@dataclasses.dataclass(slots=True)
class Measured:
    """Results of one world.

    Attributes:
        world_size: number of ranks.
        num_tensors: number of tensors in the state.
        num_bytes: size of the state.
        rounds: results of each round by contestant; round 0 warms up.
        extra_bytes: additional memory by contestant.
        left_out: why contestants have no results.
    """

    world_size: int
    num_tensors: int = 0
    num_bytes: int = 0
    rounds: dict[str, dict[int, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    extra_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def read(self, line: dict[str, Any]) -> None:
        """Add a line of the journal."""
        kind = line.pop("kind")
        if kind == "state":
            self.num_tensors, self.num_bytes = line["num_tensors"], line["num_bytes"]
        elif kind == "measured":
            self.rounds.setdefault(line.pop("name"), {})[line.pop("round")] = line
        elif kind == "memory":
            self.extra_bytes[line["name"]] = line["extra_bytes"]
        elif kind == "missing":
            self.left_out[line["name"]] = f"missing: {line['why']}"


def measure_world(plan: Plan, *, limit_s: float, tell: Callable[[str], None]) -> Measured:
    """Measure one world, restarting it without the contestants that break it.

    Args:
        plan: the measurements; the port is chosen here.
        limit_s: seconds for one measurement of one contestant.
        tell: called with progress messages.

    Raises:
        RuntimeError: the world fails outside of the measurements.
    """
    measured = Measured(plan.world_size)
    names, first_round = plan.names, plan.first_round
    while True:
        plan.journal.write_text("", encoding="utf-8")
        broke = _run_once(
            dataclasses.replace(plan, names=names, first_round=first_round), measured, limit_s=limit_s, tell=tell
        )
        if broke is None:
            return measured
        name, first_round, why = broke
        if name not in names:
            msg = f"{plan.world_size} ranks: {name}: {why}"
            raise RuntimeError(msg)
        measured.left_out[name] = f"FAILED: {why}"
        tell(f"{name} failed and is left out: {summary_of(why)}")
        names = tuple(one for one in names if one != name and one not in measured.left_out)


def _run_once(
    plan: Plan, measured: Measured, *, limit_s: float, tell: Callable[[str], None]
) -> tuple[str, int, str] | None:
    """Start the ranks. Return None after all measurements, else contestant, round and reason of the failure."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    plan = dataclasses.replace(plan, port=store.port)
    context = multiprocessing.get_context("spawn")
    # Not daemons: a contestant may start processes.
    ranks = [context.Process(target=run_rank, args=(rank, plan)) for rank in range(plan.world_size)]
    try:
        for rank in ranks:
            rank.start()
        return _follow(plan, measured, ranks, limit_s=limit_s, tell=tell)
    finally:
        for rank in ranks:
            _end(rank)


def _follow(
    plan: Plan, measured: Measured, ranks: Sequence[BaseProcess], *, limit_s: float, tell: Callable[[str], None]
) -> tuple[str, int, str] | None:
    name, number, errors, num_read = "start", plan.first_round - 1, list[str](), 0
    deadline = time.monotonic() + max(limit_s, START_S)
    while True:
        has_ended = [rank.exitcode is not None for rank in ranks]
        text = plan.journal.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in map(json.loads, lines[num_read:]):
            if line["kind"] == "begin":
                if line["round"] != number:
                    what = "memory" if line["round"] == MEMORY_ROUND else f"round {line['round']} of {plan.num_rounds}"
                    tell(f"{plan.world_size} ranks: {what}")
                name, number = line["name"], line["round"]
                deadline = time.monotonic() + limit_s
            elif line["kind"] == "error":
                errors.append(f"rank {line['rank']}: {line['text'].strip()}")
                deadline = min(deadline, time.monotonic() + ENDING_S)
            else:
                measured.read(line)
        num_read = len(lines)
        codes = [rank.exitcode for rank in ranks]
        if all(has_ended):
            if not any(codes):
                return None
            return name, number, "\n".join(errors) or f"exit codes {codes}; {_last_log_lines(plan)}"
        if any(codes):
            deadline = min(deadline, time.monotonic() + ENDING_S)
        if time.monotonic() > deadline:
            return name, number, "\n".join(errors) or f"over its limit; exit codes {codes}; {_last_log_lines(plan)}"
        time.sleep(POLL_S)


def summary_of(why: str) -> str:
    """Return the most telling line of a failure: the first error that was raised, unless it is Gloo's."""
    lines = why.strip().splitlines()
    raised = [before for before, line in zip(lines, [*lines[1:], "rank"], strict=True) if line.startswith("rank")]
    return next((line for line in raised if "gloo" not in line), raised[0])[:SUMMARY_LENGTH]


def _last_log_lines(plan: Plan) -> str:
    logs = [plan.log_of(rank) for rank in range(plan.world_size)]
    return " | ".join(log.read_text(errors="replace").strip().rpartition("\n")[2] for log in logs if log.exists())


def _end(rank: BaseProcess) -> None:
    """Kill a rank and its children, which are in its process group if it got so far."""
    if rank.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.kill()
    rank.join(ENDING_S)


def scratch_folder() -> Path:
    """Return the default folder for checkpoints: on a disk, since /tmp may be in memory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DISTCKPT_CACHE") or Path(cache) / "distckpt") / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def progress(text: str) -> None:
    """Print progress to standard error. Standard output is for the table."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
