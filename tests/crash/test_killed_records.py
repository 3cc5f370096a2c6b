"""SIGKILL at random moments of two jobs that record their events in one directory.

Each is killed, and resumed by the next trial. Every save that a job took for done is in the record afterwards.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, resume
from distckpt.policy.naming import EVENTS_NAME, is_temp
from distckpt.storage.event_file import read_events
from tests.crash.forked import forked
from tests.crash.tally import Tally, others_in
from tests.support import run_ranks
from tests.unit.toys import Notebook, idle_engine

pytestmark = pytest.mark.crash

JOBS = ("a", "b")
MOST_KILLS = 100
LONGEST_S = 0.06


def _train(directory: Path, job: str, send: Callable[[int], None]) -> None:
    """Train and save without end; send each iteration that is saved."""
    trainer: Engine = idle_engine()
    objects = {"notes": Notebook({"w": torch.zeros(10)}), "trainer": trainer}
    handler = Checkpoint(objects, DiskSaver(directory, require_empty=False, record_events=True), job)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: send(trainer.state.iteration))
    resume(objects, handler, engine=trainer)
    trainer.run(range(1000), max_epochs=1000)


def _kill_all(root: str, kills: int, seed: int) -> Tally:
    torch.set_num_threads(1)
    moments, tally, directory = random.Random(seed), Tally(), Path(root)
    acknowledged: dict[str, set[int]] = {job: set() for job in JOBS}
    while tally.trials < kills:
        with (
            forked(lambda send: _train(directory, JOBS[0], send)) as one,
            forked(lambda send: _train(directory, JOBS[1], send)) as other,
        ):
            for child in (one, other):
                child.wait_for(1)
            time.sleep(moments.uniform(0.0, LONGEST_S))  # the random moment itself, nothing is waited for
            for child, job in zip((one, other), JOBS, strict=True):
                child.kill()
                tally.trials += 1
                acknowledged[job].update(child.acknowledged)
        record = read_events(directory)
        tally.cut_writing += record.num_dropped
        for job, steps in acknowledged.items():
            saved = {
                event["iteration"]
                for event in record.events
                if event["event"] == "save" and event["handler"].startswith(f"{job}_")
            }
            tally.take(*(f"lost: save {step} of {job}" for step in steps - saved))
            tally.acknowledged = sum(map(len, acknowledged.values()))
        left = {name for name in others_in(directory) if not is_temp(name)}
        tally.take(*(f"leftover: {name}" for name in left - {EVENTS_NAME}))
    kinds = [event["event"] for event in read_events(directory).events]
    if kinds.count("start") != tally.trials or kinds.count("resume") != tally.trials - len(JOBS):
        tally.take(f"{kinds.count('start')} starts and {kinds.count('resume')} resumes")
    return tally


def test_a_killed_job_leaves_a_record_of_all_that_it_has_done(
    tmp_path: Path, kills: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    kills = min(kills + kills % len(JOBS), MOST_KILLS)
    (tally,) = run_ranks(_kill_all, 1, str(tmp_path), kills, seed, backend=None, fresh=True, timeout_s=limit_s)
    report(
        f"SIGKILL, record of events: {tally.trials} kills, seed {seed}: {tally.acknowledged} saves acknowledged, "
        f"{tally.cut_writing} lines torn, {len(tally.findings)} lost"
    )
    assert tally.findings == []
    assert tally.acknowledged > kills
