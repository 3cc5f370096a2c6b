"""The power is cut at random moments of saving, on a real ext4 and on a real xfs.

The ioctl that shuts a file system down drops everything that has not reached the disk: that is a power cut as
far as the kernel's caches go. Then the file system is mounted again, which replays its journal, and read. Each
trial begins in a directory that does not exist: what DiskSaver makes must survive too. (Either commits a new
directory's parents when it syncs a file in it, so that they are synced is shown by `test_order_of_calls`.)
"""

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.loop_disk import KINDS, LoopDisk, unshare_mounts, why_no_mounts
from tests.crash.modes import MODES, world_size_of
from tests.crash.moments import Turns
from tests.crash.program import saving, typical_save_s
from tests.crash.tally import Tally, others_in, place_of
from tests.support import fresh_ranks

pytestmark = pytest.mark.crash

NUM_SERVERS = 2
CONTROL_CUTS = 50
CONTROL_LOSSES = 3


@dataclass(kw_only=True)
class TallyOfCuts(Tally):
    """The results of one process that cuts the power.

    Attributes:
        acknowledged_after: number of cuts after which a save was acknowledged that is not on the disk.
    """

    acknowledged_after: int = 0


@pytest.fixture(params=KINDS)
def kind(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    found = str(request.param)
    reason = why_no_mounts(tmp_path, kind=found)
    if reason is not None:
        pytest.skip(f"this machine does not allow to mount an {found} on a loop device: {reason}")
    return found


def _cut_power(root: Path, kind: str, saver: str, cuts: int, seed: int, stop_at: float, span_s: float) -> TallyOfCuts:
    """Cut the power `cuts` times, or until `stop_at` saves were lost, within `span_s` seconds after a save."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}-{saver}")
    directory = root / os.environ["RANK"]
    directory.mkdir(parents=True)
    disk = LoopDisk(directory, kind)
    tally, num_saves = TallyOfCuts(), Turns(4, moments)
    while tally.trials < cuts and tally.lost < stop_at:
        _cut_once(disk, saver, world_size_of(saver), (num_saves.take(), moments.uniform(0.0, span_s)), tally)
    return tally


def _cut_once(disk: LoopDisk, saver: str, world_size: int, moment: tuple[int, float], tally: TallyOfCuts) -> None:
    """Run one trial: cut the power after some saves and seconds (`moment`), then read the disk."""
    tally.trials += 1
    directory = disk.root / "runs" / f"run{tally.trials}" / "checkpoints"
    with disk.powered(), saving(directory, saver, after=0, world_size=world_size) as job:
        job.wait_for(1 + moment[0])
        time.sleep(moment[1])  # the random moment itself: this waits for no event
        job.take_in()
        acknowledged = max(job.acknowledged, default=0)
        tally.acknowledged += len(job.acknowledged)
        disk.cut()
        job.kill()
    with disk.powered():
        found = tally.look(directory, acknowledged)
        # Not a loss: no process survives a real power cut. An fsync of a directory after the shutdown of an xfs may
        # return 0, because it has nothing to wait for.
        tally.acknowledged_after += found < max(job.acknowledged, default=0)
        tally.cut_writing += bool(others_in(directory))
        with saving(directory, saver, after=max(found, acknowledged), num_saves=1, world_size=world_size) as job:
            assert set(job.finish()) == {0}
        tally.take(*(f"leftover: {name}, after a whole save" for name in others_in(directory)))
        for path in directory.iterdir():
            path.unlink()


def _cut_power_of_each(
    root: str, kind: str, savers: Sequence[str], cuts: int, seed: int, stop_at: float = math.inf
) -> dict[str, TallyOfCuts]:
    """Cut the power of the given savers, one kind after the other."""
    unshare_mounts()
    directory = Path(root) / f"practice-{os.environ['RANK']}"
    directory.mkdir()
    disk, spans_s = LoopDisk(directory, kind), dict[int, float]()
    with disk.powered():
        for world_size in sorted(set(map(world_size_of, savers))):
            practice = disk.root / str(world_size)
            practice.mkdir()
            spans_s[world_size] = 1.5 * typical_save_s(practice, MODES[0], world_size)
    return {
        saver: _cut_power(place_of(root, saver), kind, saver, cuts, seed, stop_at, spans_s[world_size_of(saver)])
        for saver in savers
    }


def test_a_power_cut_loses_no_acknowledged_checkpoint(
    tmp_path: Path, kind: str, cuts: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    share = -(-cuts // NUM_SERVERS)
    start = time.monotonic()
    with fresh_ranks(
        _cut_power_of_each, NUM_SERVERS, str(tmp_path), kind, MODES, share, seed, backend=None
    ) as servers:  # fmt: skip
        tallies = TallyOfCuts.sums([end.value for end in servers.finish(timeout_s=limit_s)])
    for mode, tally in tallies.items():
        report(
            f"power cut, {kind}, {mode}: {tally.trials} cuts, seed {seed}: {tally.cut_writing} of them left a "
            f"temporary file; {tally.acknowledged} saves acknowledged, {len(tally.findings)} lost or left behind, "
            f"{tally.acknowledged_after} acknowledged after the cut and not there"
        )
    report(f"power cut, {kind}: all in {time.monotonic() - start:.0f} s")
    assert {mode: tally.findings for mode, tally in tallies.items()} == {mode: [] for mode in MODES}
    for tally in tallies.values():
        assert tally.trials >= cuts
        assert tally.acknowledged >= cuts // 2


def test_the_same_cuts_find_out_savers_that_do_not_sync(
    tmp_path: Path, kind: str, seed: int, report: Callable[[str], None]
) -> None:
    savers = ("syncs nothing", "syncs no directory", "ignite")
    with fresh_ranks(
        _cut_power_of_each, 1, str(tmp_path), kind, savers, CONTROL_CUTS, seed, CONTROL_LOSSES, backend=None
    ) as servers:  # fmt: skip
        tallies = servers.finish()[0].value
    report(
        f"power cut, {kind}, negative controls, acknowledged saves lost: "
        + ", ".join(f"{saver} {tally.lost} in {tally.trials} cuts" for saver, tally in tallies.items())
    )
    assert all(tally.lost > 0 for tally in tallies.values()), "a saver that does not sync was not found out"
