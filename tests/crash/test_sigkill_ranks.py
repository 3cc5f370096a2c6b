"""SIGKILL at random moments of a job of two ranks: one rank dies, or all at once.

A process with torch imported forks the ranks of a job. They meet over Gloo, resume, train a DDP-wrapped model and save
with n_saved=1. At a random moment both are killed, or one of them, and the other soon after, or never: then it has to
find out and to end by itself. All jobs work in one directory, one after the other, so that each begins with what the
kill before has left: both ranks have to go on from the same step, the newest that loads.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.modes import MODES
from tests.crash.program import EXIT_LOST, EXIT_OTHERWISE, saving, typical_save_s
from tests.crash.subject import name_of, steps_in
from tests.crash.tally import Tally, others_in, place_of
from tests.support import run_ranks

pytestmark = pytest.mark.crash

WORLD_SIZE = 2
NUM_SERVERS = 2
CONTROL_KILLS = 60
NEVER = "never"
# A survivor has to be told by then that the other rank is gone.
SURVIVOR_LIMIT_S = 30.0
LIMIT_S = 170.0
VICTIMS = ((0,), (1,), (0, 1), (0, 1))
# The other rank is killed after so many seconds at most; in each so-many-th trial it is not: that takes two seconds.
SOON_S = 0.2
SURVIVES_EACH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When who is killed.

    Attributes:
        num_saves: after so many.
        seconds: ... and so long.
        victims: who.
        survives_s: how long the others live on; None to let them end by themselves.
    """

    num_saves: int
    seconds: float
    victims: tuple[int, ...]
    survives_s: float | None


@dataclass(kw_only=True)
class TallyOfRanks(Tally):
    """What one forking process has seen.

    Attributes:
        one_rank: how often one rank was killed before the other.
        survivors: how often a rank was left to end by itself.
        stale: older checkpoints that stay after the kills and a whole save: `resume` takes the newest into the history.
        told: how many of the survivors were told by an error of distckpt's that the other was gone.
    """

    one_rank: int = 0
    survivors: int = 0
    stale: int = 0
    told: int = 0


def _kill_ranks(root: Path, saver: str, kills: int, seed: int, stop_at: str, span_s: float) -> TallyOfRanks:
    """Kill in `kills` jobs within `span_s` seconds after a save, or in as many until a finding contains `stop_at`."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}-{saver}")  # other moments for each way of saving
    directory = root / os.environ["RANK"]
    directory.mkdir(parents=True)
    tally = TallyOfRanks()
    newest = 0
    for number in range(kills):
        moment = _moment(moments, span_s, survives=number % SURVIVES_EACH == 0)
        newest = _kill_once(directory, saver, newest, moment, tally)
        if any(stop_at in finding for finding in tally.findings):
            return tally
    with saving(directory, saver, after=newest, num_saves=1, world_size=WORLD_SIZE) as job:
        assert set(job.finish()) == {0}
    tally.take(*(f"leftover: {name}, after a whole save" for name in others_in(directory)))
    if len(steps_in(directory)) > 1:
        tally.stale = len(steps_in(directory)) - 1
    return tally


def _moment(draw: random.Random, span_s: float, *, survives: bool) -> Moment:
    return Moment(
        num_saves=draw.randrange(3),
        seconds=draw.uniform(0.0, span_s),
        victims=(draw.randrange(WORLD_SIZE),) if survives else draw.choice(VICTIMS),
        survives_s=None if survives else draw.uniform(0.0, SOON_S),
    )


def _kill_once(directory: Path, saver: str, newest: int, moment: Moment, tally: TallyOfRanks) -> int:
    """One trial; returns the newest step known to be whole."""
    tally.trials += 1
    before, steps_before = others_in(directory), steps_in(directory)
    with saving(directory, saver, after=newest, world_size=WORLD_SIZE) as job:
        begun_at = [rank.acknowledged[0] for rank in job.ranks]
        job.wait_for(1 + moment.num_saves)
        time.sleep(moment.seconds)  # the random moment itself, nothing is waited for
        for victim in moment.victims:
            job.ranks[victim].signal()
        for victim in moment.victims:
            job.ranks[victim].kill()
        if moment.survives_s is None:
            codes = job.finish(SURVIVOR_LIMIT_S)
            tally.survivors += len(codes)
            tally.told += codes.count(EXIT_LOST)
            stood_at = "".join(f", {rank.stood_at}" for rank in job.ranks if rank.stood_at)
            bad = [code for code in codes if code not in {EXIT_LOST, EXIT_OTHERWISE}]
            tally.take(*(f"survivor: ended with {code}{stood_at}" for code in bad))
        elif len(moment.victims) < WORLD_SIZE:
            time.sleep(moment.survives_s)  # as above
        job.kill()
    tally.one_rank += len(moment.victims) < WORLD_SIZE
    if set(begun_at) != {newest}:
        tally.take(f"resumed: the ranks went on from {begun_at}, the newest that loads is {newest or None}")
    acknowledged = max(newest, *job.acknowledged, 0)
    tally.acknowledged += len(job.acknowledged)
    found = tally.look(directory, acknowledged)
    after = others_in(directory)
    if job.acknowledged:
        tally.take(*(f"leftover: {name}, from before a save" for name in before & after))
    tally.cut_writing += bool(after - before)
    tally.cut_before_removal += len(steps_in(directory)) > max(1, len(steps_before))
    for step in steps_in(directory):
        if step > found:  # torn: it would be found again
            (directory / name_of(step)).unlink()
    return found


def _kill_ranks_of_each(root: str, savers: dict[str, str], kills: int, seed: int) -> dict[str, TallyOfRanks]:
    """Kill ranks of the given savers, one kind after the other, each until its word stands in a finding."""
    practice = Path(root) / f"practice-{os.environ['RANK']}"
    span_s = 1.5 * typical_save_s(practice, MODES[0], WORLD_SIZE)
    return {
        saver: _kill_ranks(place_of(root, saver), saver, kills, seed, word, span_s) for saver, word in savers.items()
    }


def test_killed_ranks_lose_no_acknowledged_checkpoint_and_all_go_on_from_the_same(
    tmp_path: Path, rank_kills: int, seed: int, limit_s: float, tell: Callable[[str], None]
) -> None:
    share = -(-rank_kills // NUM_SERVERS)
    start = time.monotonic()
    servers = run_ranks(
        _kill_ranks_of_each, NUM_SERVERS, str(tmp_path), dict.fromkeys(MODES, NEVER), share, seed,
        backend=None, fresh=True, timeout_s=limit_s,
    )  # fmt: skip
    tallies = TallyOfRanks.sums(servers)
    for mode, tally in tallies.items():
        tell(
            f"SIGKILL of ranks, {mode}: {tally.trials} jobs of {WORLD_SIZE} ranks, seed {seed}: in {tally.one_rank} "
            f"one was killed first, in the others all; {tally.cut_writing} while a file was written, "
            f"{tally.cut_before_removal} between rename and removal; {tally.acknowledged} saves acknowledged, "
            f"{len(tally.findings)} lost, left behind or seen differently; {tally.told} of {tally.survivors} survivors "
            f"were told by distckpt; {tally.stale} older checkpoints stay"
        )
        for finding in tally.findings:
            tell(f"SIGKILL of ranks, {mode}: {finding}")
    tell(f"SIGKILL of ranks: all in {time.monotonic() - start:.0f} s")
    assert {mode: tally.findings for mode, tally in tallies.items()} == {mode: [] for mode in MODES}
    for tally in tallies.values():
        assert tally.trials >= rank_kills
        assert tally.acknowledged > 0
    # Otherwise the moments lie elsewhere and prove nothing. A few jobs of one mode may all lose one rank.
    total = TallyOfRanks.sum(list(tallies.values()))
    assert 0 < total.survivors < total.one_rank < total.trials
    assert total.cut_writing + total.cut_before_removal > 0.02 * rank_kills


def test_the_same_kills_of_ranks_find_out_broken_savers(
    tmp_path: Path, is_whole: bool, seed: int, tell: Callable[[str], None]  # noqa: FBT001
) -> None:  # fmt: skip
    controls = {"ignite": "lost:", "hasty": "lost:"}
    if is_whole:  # a quick run finds these out in test_sigkill.py
        controls |= {"removes first": "lost:", "in place": "torn:"}
    (tallies,) = run_ranks(
        _kill_ranks_of_each, 1, str(tmp_path), controls, CONTROL_KILLS, seed,
        backend=None, fresh=True, timeout_s=LIMIT_S,
    )  # fmt: skip
    tell(
        "SIGKILL of ranks, negative controls, kills until the fault was found: "
        + ", ".join(f"{saver} {tally.trials}" for saver, tally in tallies.items())
    )
    for saver, expected in controls.items():
        assert any(expected in finding for finding in tallies[saver].findings), f"{saver} was not found out"
