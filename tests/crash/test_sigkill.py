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
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distckpt.storage.disk import Directory
from distckpt.storage.sink import Sink
from tests.crash.forked import forked, save_for_ever, typical_save_s
from tests.crash.subject import name_of, steps_in, whole_steps
from tests.support import run_ranks

pytestmark = pytest.mark.crash

NUM_SERVERS = 2
LIVE_NAME = "live.bin"
LIVE_HALF = b"x" * 5_000_000
CONTROL_KILLS = 200
LIMIT_S = 170.0


@dataclass(kw_only=True)
class Tally:
    """What one forking process has seen."""

    kills: int = 0
    acknowledged: int = 0
    cut_writing: int = 0
    """Kills that left a temporary file."""
    cut_before_removal: int = 0
    """Kills between the rename and the removal of the older checkpoint."""
    findings: list[str] = field(default_factory=list)

    def take(self, *findings: str) -> None:
        """Note what was found at the present kill."""
        self.findings += [f"kill {self.kills}: {finding}" for finding in findings]


def _others_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix != ".pt"}


@contextmanager
def _live_writer(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """Keep a process in the middle of a save; the block is given a function that lets it go on and looks."""
    ours, theirs = os.pipe()

    def body(send: Callable[[int], None]) -> None:
        def fill(sink: Sink) -> None:
            sink.write(LIVE_HALF)
            send(0)
            os.read(ours, 1)
            sink.write(LIVE_HALF)

        Directory(directory).write(LIVE_NAME, fill)

    def let_it_go_on() -> list[str]:
        os.write(theirs, b"!")
        code = child.finish()
        written = (directory / LIVE_NAME).read_bytes() if (directory / LIVE_NAME).exists() else b""
        return [] if code == 0 and written == 2 * LIVE_HALF else [f"live: its writer ended with {code}"]

    with forked(body) as child:
        yield let_it_go_on
    os.close(ours)
    os.close(theirs)


def _kill_savers(root: str, saver: str, kills: int, seed: int, stop_at: str = "never") -> Tally:
    """Kill `kills` savers, or as many as it takes until a finding begins with `stop_at`."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}")
    directory = Path(root) / os.environ["RANK"]
    directory.mkdir(parents=True)
    practice = directory.with_name(f"{directory.name}-practice")
    practice.mkdir()
    span_s = 1.5 * typical_save_s(practice, "distckpt")
    tally = Tally()
    with _live_writer(directory) as let_it_go_on:
        (live,) = _others_in(directory)
        newest = 0
        for _ in range(kills):
            moment = (moments.randrange(3), moments.uniform(0.0, span_s))
            newest = _kill_one(directory, saver, newest, moment, live, tally)
            if any(stop_at in finding for finding in tally.findings):
                return tally
        with forked(save_for_ever(directory, saver, after=newest, num_saves=1)) as last:
            assert last.finish() == 0
        tally.take(*(f"leftover: {name}, after a whole save" for name in _others_in(directory) - {live}))
        tally.take(*let_it_go_on())
    return tally


def _kill_one(directory: Path, saver: str, newest: int, moment: tuple[int, float], live: str, tally: Tally) -> int:
    """One trial: kill after so many saves and so many seconds; returns the newest step known to be whole."""
    before = _others_in(directory)
    with forked(save_for_ever(directory, saver, after=newest)) as child:
        child.wait_for(1 + moment[0])
        time.sleep(moment[1])  # the random moment itself, nothing is waited for
        child.kill()
    tally.kills += 1
    acknowledged = max(newest, *child.acknowledged)
    saves = len(child.acknowledged) - 1
    tally.acknowledged += saves
    whole, problems = whole_steps(directory)
    found = max(whole, default=0)
    tally.take(*problems)
    if found < acknowledged:
        tally.take(f"lost: step {acknowledged} was acknowledged, the newest that loads is {found or None}")
    after = _others_in(directory)
    if live not in after:
        tally.take("live: the temporary file of a living writer was removed")
    if saves:
        tally.take(*(f"leftover: {name}, from before a save" for name in (before & after) - {live}))
    tally.cut_writing += bool(after - before)
    tally.cut_before_removal += len(steps_in(directory)) > 1
    for step in steps_in(directory):
        if step != found:  # what the next run resumes from is the newest; a torn one would be found again
            (directory / name_of(step)).unlink()
    return found or acknowledged


def test_a_killed_saver_loses_no_acknowledged_checkpoint(
    tmp_path: Path, kills: int, seed: int, limit_s: float, tell: Callable[[str], None]
) -> None:
    share = -(-kills // NUM_SERVERS)
    start = time.monotonic()
    tallies = run_ranks(
        _kill_savers, NUM_SERVERS, str(tmp_path), "distckpt", share, seed, backend=None, fresh=True, timeout_s=limit_s
    )
    tell(
        f"SIGKILL: {sum(t.kills for t in tallies)} kills, seed {seed}: "
        f"{sum(t.cut_writing for t in tallies)} of them while a file was written, "
        f"{sum(t.cut_before_removal for t in tallies)} between rename and removal; "
        f"{sum(t.acknowledged for t in tallies)} saves acknowledged, "
        f"{sum(len(t.findings) for t in tallies)} lost or left behind; {time.monotonic() - start:.0f} s"
    )
    assert [finding for tally in tallies for finding in tally.findings] == []
    assert sum(tally.kills for tally in tallies) >= kills
    assert sum(tally.acknowledged for tally in tallies) > 0
    # Otherwise the moments lie elsewhere and prove nothing.
    assert sum(tally.cut_writing for tally in tallies) > 0.1 * kills


def _kill_all_broken_savers(root: str, controls: dict[str, str], kills: int, seed: int) -> dict[str, Tally]:
    return {
        saver: _kill_savers(f"{root}/{saver.replace(' ', '-')}", saver, kills, seed, stop_at=expected)
        for saver, expected in controls.items()
    }


def test_the_same_kills_find_out_broken_savers(tmp_path: Path, seed: int, tell: Callable[[str], None]) -> None:
    controls = {
        "ignite": "lost:",
        "removes first": "lost:",
        "in place": "torn:",
        "never clears": "leftover:",
        "clears the living": "live:",
    }
    (tallies,) = run_ranks(
        _kill_all_broken_savers, 1, str(tmp_path), controls, CONTROL_KILLS, seed,
        backend=None, fresh=True, timeout_s=LIMIT_S,
    )  # fmt: skip
    tell(
        "SIGKILL, negative controls, kills until the fault was found: "
        + ", ".join(f"{saver} {tally.kills}" for saver, tally in tallies.items())
    )
    for saver, expected in controls.items():
        assert any(expected in finding for finding in tallies[saver].findings), f"{saver} was not found out"
