"""SIGKILL at random moments of saving.

A process with torch imported forks children that resume, train and save with n_saved=1, and kills each at a
random moment. All of them work in one directory, one after the other, beside a writer that lives through it all
in the middle of its own save.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distckpt.storage.base import Chunk
from distckpt.storage.local import LocalStorage
from tests.crash.forked import forked
from tests.crash.modes import MODES, is_shared
from tests.crash.moments import Turns
from tests.crash.program import saving, typical_save_s
from tests.crash.subject import name_of, steps_in
from tests.crash.tally import Tally, others_in, place_of
from tests.support import run_ranks

pytestmark = pytest.mark.crash

NUM_SERVERS = 2
LIVE_NAME = "live.bin"
LIVE_HALF = b"x" * 5_000_000
CONTROL_KILLS = 200
NEVER = "never"


@contextmanager
def _live_writer(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """Keep a process in the middle of a save; yield a function that lets it finish and checks its file."""
    ours, theirs = os.pipe()

    def body(send: Callable[[int], None]) -> None:
        with LocalStorage(directory).create(LIVE_NAME) as new:
            new.write([Chunk(0, LIVE_HALF)])
            send(0)
            os.read(ours, 1)
            new.write([Chunk(len(LIVE_HALF), LIVE_HALF)])
            new.commit(2 * len(LIVE_HALF))

    def let_it_go_on() -> list[str]:
        os.write(theirs, b"!")
        code = child.finish()
        written = (directory / LIVE_NAME).read_bytes() if (directory / LIVE_NAME).exists() else b""
        return [] if code == 0 and written == 2 * LIVE_HALF else [f"live: its writer ended with {code}"]

    with forked(body) as child:
        yield let_it_go_on
    os.close(ours)
    os.close(theirs)


def _kill_savers(root: Path, saver: str, kills: int, seed: int, stop_at: str, span_s: float) -> Tally:
    """Kill `kills` savers within `span_s` seconds after a save, or as many until a finding contains `stop_at`."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}-{saver}")
    directory = root / os.environ["RANK"]
    directory.mkdir(parents=True)
    tally, num_saves = Tally(), Turns(3, moments)
    with _live_writer(directory) as let_it_go_on:
        (live,) = others_in(directory)
        newest = 0
        for _ in range(kills):
            moment = (num_saves.take(), moments.uniform(0.0, span_s))
            newest = _kill_one(directory, saver, newest, moment, live, tally)
            if any(stop_at in finding for finding in tally.findings):
                return tally
        with saving(directory, saver, after=newest, num_saves=1) as last:
            assert last.finish() == [0]
        tally.take(*(f"leftover: {name}, after a whole save" for name in others_in(directory) - {live}))
        tally.take(*let_it_go_on())
    return tally


def _kill_one(directory: Path, saver: str, newest: int, moment: tuple[int, float], live: str, tally: Tally) -> int:
    """Run one trial: kill after some saves and seconds (`moment`); return the newest step known to be whole."""
    before = others_in(directory)
    with saving(directory, saver, after=newest) as job:
        job.wait_for(1 + moment[0])
        time.sleep(moment[1])  # the random moment itself: this waits for no event
        job.kill()
    tally.trials += 1
    acknowledged = max(newest, *job.acknowledged, 0)
    saves = len(job.acknowledged)
    tally.acknowledged += saves
    found = tally.look(directory, acknowledged)
    after = others_in(directory)
    if live not in after:
        tally.take("live: the temporary file of a living writer was removed")
    if saves:
        tally.take(*(f"leftover: {name}, from before a save" for name in (before & after) - {live}))
    tally.cut_writing += bool(after - before)
    tally.cut_before_removal += len(steps_in(directory)) > 1
    for step in steps_in(directory):
        if step != found:  # the next run resumes from the newest; a torn file would be found again
            (directory / name_of(step)).unlink()
    return found or acknowledged


def _kill_each(root: str, savers: dict[str, str], kills: int, seed: int) -> dict[str, Tally]:
    """Kill the given savers, one kind after the other, each until a finding contains its text."""
    practice = Path(root) / f"practice-{os.environ['RANK']}"
    practice.mkdir()
    span_s = 1.5 * typical_save_s(practice, MODES[0])
    return {
        saver: _kill_savers(place_of(root, saver), saver, kills, seed, word, span_s) for saver, word in savers.items()
    }


def test_a_killed_saver_loses_no_acknowledged_checkpoint(
    tmp_path: Path, kills: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    modes = [mode for mode in MODES if not is_shared(mode)]
    share = -(-kills // NUM_SERVERS)
    start = time.monotonic()
    servers = run_ranks(
        _kill_each, NUM_SERVERS, str(tmp_path), dict.fromkeys(modes, NEVER), share, seed,
        backend=None, fresh=True, timeout_s=limit_s,
    )  # fmt: skip
    tallies = Tally.sums(servers)
    for mode, tally in tallies.items():
        report(
            f"SIGKILL, {mode}: {tally.trials} kills, seed {seed}: {tally.cut_writing} of them while a file was "
            f"written, {tally.cut_before_removal} between rename and removal; {tally.acknowledged} saves acknowledged, "
            f"{len(tally.findings)} lost or left behind"
        )
    report(f"SIGKILL: all in {time.monotonic() - start:.0f} s")
    assert {mode: tally.findings for mode, tally in tallies.items()} == {mode: [] for mode in modes}
    for tally in tallies.values():
        assert tally.trials >= kills
        assert tally.acknowledged > 0
    # Otherwise the moments lie elsewhere and prove nothing.
    assert sum(tally.cut_writing for tally in tallies.values()) > 0.1 * kills


def test_the_same_kills_find_out_broken_savers(tmp_path: Path, seed: int, report: Callable[[str], None]) -> None:
    controls = {
        "ignite": "lost:",
        "removes first": "lost:",
        "in place": "torn:",
        "never clears": "leftover:",
        "clears the living": "live:",
    }
    (tallies,) = run_ranks(
        _kill_each, 1, str(tmp_path), controls, CONTROL_KILLS, seed,
        backend=None, fresh=True,
    )  # fmt: skip
    report(
        "SIGKILL, negative controls, kills until the fault was found: "
        + ", ".join(f"{saver} {tally.trials}" for saver, tally in tallies.items())
    )
    for saver, expected in controls.items():
        assert any(expected in finding for finding in tallies[saver].findings), f"{saver} was not found out"
