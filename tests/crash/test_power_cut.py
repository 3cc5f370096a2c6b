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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.crash.forked import forked, save_for_ever, typical_save_s
from tests.crash.loop_disk import KINDS, OWN_MOUNTS, LoopDisk, why_no_mounts
from tests.crash.subject import whole_steps
from tests.support import fresh_ranks

pytestmark = pytest.mark.crash

NUM_SERVERS = 2
CONTROL_CUTS = 50
CONTROL_LOSSES = 3
LIMIT_S = 170.0


@dataclass(kw_only=True)
class Tally:
    """What one process that cuts the power has seen."""

    cuts: int = 0
    acknowledged: int = 0
    cut_writing: int = 0
    """Cuts that left a temporary file."""
    findings: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """How many acknowledged saves were lost."""
        return sum("lost:" in finding for finding in self.findings)

    def take(self, *findings: str) -> None:
        """Note what was found at the present cut."""
        self.findings += [f"cut {self.cuts}: {finding}" for finding in findings]


@pytest.fixture(params=KINDS)
def kind(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    found = str(request.param)
    reason = why_no_mounts(tmp_path, kind=found)
    if reason is not None:
        pytest.skip(f"this machine does not allow to mount an {found} on a loop device: {reason}")
    return found


def _cut_power(root: str, kind: str, saver: str, cuts: int, seed: int, stop_at: float = math.inf) -> Tally:
    """Cut the power `cuts` times, or as often as it takes until so many saves were lost."""
    moments = random.Random(f"{seed}-{os.environ['RANK']}")
    directory = Path(root) / os.environ["RANK"]
    directory.mkdir(parents=True)
    disk = LoopDisk(directory, kind)
    with disk.powered():
        practice = disk.root / "practice"
        practice.mkdir()
        span_s = 1.5 * typical_save_s(practice, "distckpt")
    tally = Tally()
    while tally.cuts < cuts and tally.lost < stop_at:
        _cut_once(disk, saver, (moments.randrange(4), moments.uniform(0.0, span_s)), tally)
    return tally


def _cut_once(disk: LoopDisk, saver: str, moment: tuple[int, float], tally: Tally) -> None:
    """One trial: cut after so many saves and so many seconds, then look at what is on the disk."""
    tally.cuts += 1
    directory = disk.root / "runs" / f"run{tally.cuts}" / "checkpoints"
    with disk.powered(), forked(save_for_ever(directory, saver, after=0)) as child:
        child.wait_for(1 + moment[0])
        time.sleep(moment[1])  # the random moment itself, nothing is waited for
        disk.cut()
        child.kill()
    # What was acknowledged between the cut and the kill was synced before the cut: it counts.
    acknowledged = max(child.acknowledged)
    tally.acknowledged += len(child.acknowledged) - 1
    with disk.powered():
        whole, problems = whole_steps(directory)
        found = max(whole, default=0)
        tally.take(*problems)
        if found < acknowledged:
            tally.take(f"lost: step {acknowledged} was acknowledged, the newest that loads is {found or None}")
        tally.cut_writing += bool(_others_in(directory))
        with forked(save_for_ever(directory, saver, after=acknowledged, num_saves=1)) as child:
            assert child.finish() == 0
        tally.take(*(f"leftover: {name}, after a whole save" for name in _others_in(directory)))
        for path in directory.iterdir():
            path.unlink()


def _others_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.suffix != ".pt"] if directory.exists() else []


def test_a_power_cut_loses_no_acknowledged_checkpoint(
    tmp_path: Path, kind: str, cuts: int, seed: int, limit_s: float, tell: Callable[[str], None]
) -> None:
    share = -(-cuts // NUM_SERVERS)
    start = time.monotonic()
    with fresh_ranks(
        _cut_power, NUM_SERVERS, str(tmp_path), kind, "distckpt", share, seed, backend=None, prefix=lambda _: OWN_MOUNTS
    ) as servers:
        tallies = [end.value for end in servers.finish(timeout_s=limit_s)]
    tell(
        f"power cut, {kind}: {sum(t.cuts for t in tallies)} cuts, seed {seed}: "
        f"{sum(t.cut_writing for t in tallies)} of them left a temporary file; "
        f"{sum(t.acknowledged for t in tallies)} saves acknowledged, "
        f"{sum(len(t.findings) for t in tallies)} lost or left behind; {time.monotonic() - start:.0f} s"
    )
    assert [finding for tally in tallies for finding in tally.findings] == []
    assert sum(tally.cuts for tally in tallies) >= cuts
    assert sum(tally.acknowledged for tally in tallies) >= cuts // 2


def _cut_power_of_broken_savers(
    root: str, kind: str, savers: tuple[str, ...], cuts: int, seed: int
) -> dict[str, Tally]:
    places = {saver: f"{root}/{saver.replace(' ', '-')}" for saver in savers}
    return {saver: _cut_power(place, kind, saver, cuts, seed, CONTROL_LOSSES) for saver, place in places.items()}


def test_the_same_cuts_find_out_savers_that_do_not_sync(
    tmp_path: Path, kind: str, seed: int, tell: Callable[[str], None]
) -> None:
    savers = ("syncs nothing", "syncs no directory", "ignite")
    with fresh_ranks(
        _cut_power_of_broken_savers, 1, str(tmp_path), kind, savers, CONTROL_CUTS, seed,
        backend=None, prefix=lambda _: OWN_MOUNTS,
    ) as servers:  # fmt: skip
        tallies = servers.finish(timeout_s=LIMIT_S)[0].value
    tell(
        f"power cut, {kind}, negative controls, acknowledged saves lost: "
        + ", ".join(f"{saver} {tally.lost} in {tally.cuts} cuts" for saver, tally in tallies.items())
    )
    assert all(tally.lost > 0 for tally in tallies.values()), "a saver that does not sync was not found out"
