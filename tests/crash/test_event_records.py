"""The record of events of jobs that are killed, and on disks that take no more.

Two jobs that share a directory are killed at random moments, and resumed by the next trial. Every save that a job took
for done is in the record afterwards.
"""

import contextlib
import errno
import logging
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
from tests.crash.loop_disk import mounted_tmpfs, must, unshare_mounts, why_no_mounts
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


def _train_with_bad_records(root: str) -> dict[str, tuple[list[str], list[str]]]:
    """Train where saves succeed and the record does not; return the names of the files, and what was logged."""
    unshare_mounts()
    found = {}
    for kind in ("ENOSPC", "EROFS"):
        directory, disk = Path(root) / kind, Path(root) / f"disk {kind}"
        directory.mkdir()
        disk.mkdir()
        record, messages = directory / EVENTS_NAME, list[str]()
        record.touch()
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda one, messages=messages: messages.append(one.getMessage())  # type: ignore[method-assign, misc]
        with mounted_tmpfs(disk, "64k"), contextlib.ExitStack() as stack:
            (disk / "record").touch()
            must("mount", "--bind", str(disk / "record"), str(record))
            stack.callback(must, "umount", str(record))
            if kind == "EROFS":
                must("mount", "-o", "remount,ro,bind", str(record))
            else:
                _fill(disk / "rest")
            logging.getLogger("distckpt").addHandler(handler)
            stack.callback(logging.getLogger("distckpt").removeHandler, handler)
            trainer = idle_engine()
            saver = DiskSaver(directory, record_events=True)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, Checkpoint({"notes": Notebook({})}, saver))
            trainer.run(range(5), max_epochs=1)
        found[kind] = (sorted(path.name for path in directory.iterdir()), messages)
    return found


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def test_a_record_that_cannot_be_written_costs_no_save_and_is_logged_once(tmp_path: Path) -> None:
    reason = why_no_mounts(tmp_path, kind="tmpfs")
    if reason is not None:
        pytest.skip(f"this machine does not allow to mount a small tmpfs: {reason}")
    (found,) = run_ranks(_train_with_bad_records, 1, str(tmp_path), backend=None, fresh=True)
    for kind, (names, messages) in found.items():
        assert names == [EVENTS_NAME, "notes_5.pt"]
        (message,) = messages
        assert f"cannot be written ({kind}" in message
