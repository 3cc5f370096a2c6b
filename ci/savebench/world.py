"""The parent of the ranks: starts a world, reads its journal, ends it in time.

Owns the processes. A contestant that fails or hangs is left out, and the world begun again with the others in the round
where it broke.
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

from ci.savebench.rank import MEMORY_ROUND, Plan, be_rank

__all__ = ["Measured", "gist_of", "measure_world", "progress", "scratch_folder"]

POLL_S = 0.05
START_S = 180  # for the imports of all ranks on a busy machine
GIST_LENGTH = 150
ENDING_S = 10  # between the first rank that failed and the end of the others: so long they may tell why


@dataclasses.dataclass(slots=True)
class Measured:
    """What a world measured.

    Attributes:
        world_size: how many ranks it has.
        num_tensors: of the state.
        num_bytes: of the state.
        rounds: by name, the numbers of each round; the first one warms up.
        extra_bytes: by name.
        left_out: by name, why.
    """

    world_size: int
    num_tensors: int = 0
    num_bytes: int = 0
    rounds: dict[str, dict[int, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    extra_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def read(self, line: dict[str, Any]) -> None:
        """Take in a line of the journal."""
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
    """Measure one world, beginning it again without those who broke it.

    Args:
        plan: of the world; its port is chosen here.
        limit_s: for one turn of one contestant.
        tell: is told of the progress.

    Raises:
        RuntimeError: the world fails without anybody's turn.
    """
    measured = Measured(plan.world_size)
    names, first_round = plan.names, plan.first_round
    while True:
        plan.journal.write_text("", encoding="utf-8")
        broke = _live_once(
            dataclasses.replace(plan, names=names, first_round=first_round), measured, limit_s=limit_s, tell=tell
        )
        if broke is None:
            return measured
        name, first_round, why = broke
        if name not in names:
            msg = f"{plan.world_size} ranks: {name}: {why}"
            raise RuntimeError(msg)
        measured.left_out[name] = f"FAILED: {why}"
        tell(f"{name} failed and is left out: {gist_of(why)}")
        names = tuple(one for one in names if one != name and one not in measured.left_out)


def _live_once(
    plan: Plan, measured: Measured, *, limit_s: float, tell: Callable[[str], None]
) -> tuple[str, int, str] | None:
    """Start the ranks; return None when all is measured, else whose turn it was, in which round, and what happened."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    plan = dataclasses.replace(plan, port=store.port)
    context = multiprocessing.get_context("spawn")
    # No daemons: a contestant may start processes.
    ranks = [context.Process(target=be_rank, args=(rank, plan)) for rank in range(plan.world_size)]
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
    turn, number, errors, num_read = "start", plan.first_round - 1, list[str](), 0
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
                turn, number = line["name"], line["round"]
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
            return turn, number, "\n".join(errors) or f"exit codes {codes}; {_last_words(plan)}"
        if any(codes):
            deadline = min(deadline, time.monotonic() + ENDING_S)
        if time.monotonic() > deadline:
            return turn, number, "\n".join(errors) or f"over its limit; exit codes {codes}; {_last_words(plan)}"
        time.sleep(POLL_S)


def gist_of(why: str) -> str:
    """Return the line of a failure that tells most: the error that was raised first, but for what Gloo says of it."""
    lines = why.strip().splitlines()
    raised = [before for before, line in zip(lines, [*lines[1:], "rank"], strict=True) if line.startswith("rank")]
    return next((line for line in raised if "gloo" not in line), raised[0])[:GIST_LENGTH]


def _last_words(plan: Plan) -> str:
    logs = [plan.log_of(rank) for rank in range(plan.world_size)]
    return " | ".join(log.read_text(errors="replace").strip().rpartition("\n")[2] for log in logs if log.exists())


def _end(rank: BaseProcess) -> None:
    """End a rank with its children, which are of its process group; it may not have come to make it."""
    if rank.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.kill()
    rank.join(ENDING_S)


def scratch_folder() -> Path:
    """Return where checkpoints go if nobody says: a disk, where /tmp may be memory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DISTCKPT_CACHE") or Path(cache) / "distckpt") / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def progress(text: str) -> None:
    """Print progress on standard error; standard output is for the table."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
