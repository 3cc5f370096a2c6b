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

from tests.crash.modes import MODES, is_sharded
from tests.crash.moments import Turns
from tests.crash.program import EXIT_LOST, EXIT_OTHERWISE, saving, typical_save_s
from tests.crash.subject import name_of, steps_in
from tests.crash.tally import Tally, others_in, place_of
from tests.support import run_ranks

pytestmark = [pytest.mark.crash, pytest.mark.slow]

WORLD_SIZE = 2
NUM_SERVERS = 2
CONTROL_KILLS = 60
NEVER = "never"
# Limit of the time until a survivor knows that the other rank is gone.
SURVIVOR_LIMIT_S = 30.0
# The other rank is killed within SOON_S seconds. In every SURVIVES_EACH-th trial it is not, which takes two seconds.
SOON_S = 0.2
SURVIVES_EACH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The moment of a kill, and its victims.

    Attributes:
        num_saves: number of saves before it.
        seconds: seconds after the last of these saves.
        victims: the ranks that are killed.
        survives_s: seconds after which the others are killed too; None to let them end by themselves.
    """

    num_saves: int
    seconds: float
    victims: tuple[int, ...]
    survives_s: float | None


@dataclass(kw_only=True)
class TallyOfRanks(Tally):
    """The results of one forking process.

    Attributes:
        one_rank: number of trials in which one rank was killed before the other.
        survivors: number of ranks that were left to end by themselves.
        stale: number of older checkpoints after the kills and a whole save: `resume` takes the newest into the history.
        informed: number of survivors that ended with distckpt's error.
    """

    one_rank: int = 0
    survivors: int = 0
    stale: int = 0
    informed: int = 0


def _kill_ranks(root: Path, saver: str, kills: int, seed: int, stop_at: str, span_s: float) -> TallyOfRanks:
    """Kill in `kills` jobs within `span_s` seconds after a save, or in as many until a finding contains `stop_at`."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}-{saver}")  # other moments for each way of saving
    directory = root / os.environ["RANK"]
    directory.mkdir(parents=True)
    tally, num_saves = TallyOfRanks(), Turns(3, moments)
    newest = 0
    for number in range(kills):
        survives = number % SURVIVES_EACH == 0
        is_one = survives or (number + int(os.environ["RANK"])) % 2 == 1
        moment = _moment(moments, span_s, num_saves.take(), is_one=is_one, survives=survives)
        newest = _kill_once(directory, saver, newest, moment, tally)
        if any(stop_at in finding for finding in tally.findings):
            return tally
    with saving(directory, saver, after=newest, num_saves=1, world_size=WORLD_SIZE) as job:
        assert set(job.finish()) == {0}
    tally.take(*(f"leftover: {name}, after a whole save" for name in others_in(directory)))
    if len(steps_in(directory)) > 1:
        tally.stale = len(steps_in(directory)) - 1
    return tally


def _moment(draw: random.Random, span_s: float, num_saves: int, *, is_one: bool, survives: bool) -> Moment:
    return Moment(
        num_saves=num_saves,
        seconds=draw.uniform(0.0, span_s),
        victims=(draw.randrange(WORLD_SIZE),) if is_one else tuple(range(WORLD_SIZE)),
        survives_s=None if survives else draw.uniform(0.0, SOON_S),
    )


def _kill_once(directory: Path, saver: str, newest: int, moment: Moment, tally: TallyOfRanks) -> int:
    """Run one trial; return the newest step known to be whole."""
    tally.trials += 1
    before, steps_before = others_in(directory), steps_in(directory)
    with saving(directory, saver, after=newest, world_size=WORLD_SIZE) as job:
        begun_at = [rank.acknowledged[0] for rank in job.ranks]
        job.wait_for(1 + moment.num_saves)
        time.sleep(moment.seconds)  # the random moment itself: this waits for no event
        for victim in moment.victims:
            job.ranks[victim].signal()
        for victim in moment.victims:
            job.ranks[victim].kill()
        if moment.survives_s is None:
            codes = job.finish(SURVIVOR_LIMIT_S)
            tally.survivors += len(codes)
            tally.informed += codes.count(EXIT_LOST)
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
        if step > found:  # a torn file would be found again
            (directory / name_of(step)).unlink()
    return found


def _kill_ranks_of_each(root: str, savers: dict[str, str], kills: int, seed: int) -> dict[str, TallyOfRanks]:
    """Kill ranks of the given savers, one kind after the other, each until a finding contains its text."""
    practice = Path(root) / f"practice-{os.environ['RANK']}"
    span_s = 1.5 * typical_save_s(practice, MODES[0], WORLD_SIZE)
    return {
        saver: _kill_ranks(place_of(root, saver), saver, kills, seed, word, span_s) for saver, word in savers.items()
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
def test_killed_ranks_lose_no_acknowledged_checkpoint_and_all_go_on_from_the_same(
    tmp_path: Path,
    *,
    sharded: bool,
    rank_kills: int,
    is_whole: bool,
    seed: int,
    limit_s: float,
    report: Callable[[str], None],
) -> None:
    modes = [mode for mode in MODES if is_sharded(mode) == sharded]
    share = -(-rank_kills // NUM_SERVERS)
    start = time.monotonic()
    servers = run_ranks(
        _kill_ranks_of_each, NUM_SERVERS, str(tmp_path), dict.fromkeys(modes, NEVER), share, seed,
        backend=None, fresh=True, timeout_s=limit_s,
    )  # fmt: skip
    tallies = TallyOfRanks.sums(servers)
    for mode, tally in tallies.items():
        report(
            f"SIGKILL of ranks, {mode}: {tally.trials} jobs of {WORLD_SIZE} ranks, seed {seed}: in {tally.one_rank} "
            f"one was killed first, in the others all; {tally.cut_writing} while a file was written, "
            f"{tally.cut_before_removal} between rename and removal; {tally.acknowledged} saves acknowledged, "
            f"{len(tally.findings)} lost, left behind or seen differently; distckpt informed {tally.informed} of "
            f"{tally.survivors} survivors; {tally.stale} older checkpoints stay"
        )
        for finding in tally.findings:
            report(f"SIGKILL of ranks, {mode}: {finding}")
    report(f"SIGKILL of ranks, {', '.join(modes)}: all in {time.monotonic() - start:.0f} s")
    assert {mode: tally.findings for mode, tally in tallies.items()} == {mode: [] for mode in modes}
    for tally in tallies.values():
        assert tally.trials >= rank_kills
        assert tally.acknowledged > 0
        assert 0 < tally.survivors < tally.one_rank < tally.trials
        # Otherwise the moments lie elsewhere and prove nothing. A few of them may all do so.
        assert not is_whole or tally.cut_writing + tally.cut_before_removal > 0.02 * rank_kills


def test_the_same_kills_of_ranks_find_out_broken_savers(
    tmp_path: Path, is_whole: bool, seed: int, report: Callable[[str], None]  # noqa: FBT001
) -> None:  # fmt: skip
    controls = {"ignite": "lost:", "hasty": "lost:"}
    if is_whole:  # a quick run finds these out in test_sigkill.py
        controls |= {"removes first": "lost:", "in place": "torn:"}
    (tallies,) = run_ranks(
        _kill_ranks_of_each, 1, str(tmp_path), controls, CONTROL_KILLS, seed,
        backend=None, fresh=True,
    )  # fmt: skip
    report(
        "SIGKILL of ranks, negative controls, kills until the fault was found: "
        + ", ".join(f"{saver} {tally.trials}" for saver, tally in tallies.items())
    )
    for saver, expected in controls.items():
        assert any(expected in finding for finding in tallies[saver].findings), f"{saver} was not found out"
