"""The power is cut while a disk reorders its writes: unflushed blocks are lost in part, or half-written.

Each state that is looked at is a real ext4, mounted, with what a disk may have made of the writes up to some moment of
a run that trains and saves. An acknowledged save has to be on it, whole; and nothing that is there may be torn.
"""

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.loop_disk import unshare_mounts
from tests.crash.modes import MODES, world_size_of
from tests.crash.program import saving
from tests.crash.reordered import RecordedDisk, why_no_recorder
from tests.crash.tally import Tally, others_in, place_of
from tests.support import fresh_ranks

pytestmark = pytest.mark.crash

NUM_SERVERS = 2
NUM_SAVES = 8
STATES_OF_A_RUN = 100
LOST_OF_A_STATE = 5  # else the moments lie elsewhere and prove nothing
MOST_TURNS = 4
CONTROL_STATES = 60
CONTROL_LOSSES = 3


@dataclass(kw_only=True)
class TallyOfStates(Tally):
    """The results of one process that examines states.

    Attributes:
        blocks: number of unflushed blocks in all states.
        lost_blocks: number of these that were lost.
        torn_blocks: number of these that were half-written.
        with_acknowledged: number of states with an acknowledged save.
        repaired: number of states that ext4 refused until e2fsck repaired them.
    """

    blocks: int = 0
    lost_blocks: int = 0
    torn_blocks: int = 0
    with_acknowledged: int = 0
    repaired: int = 0


@pytest.fixture(autouse=True)
def _disks_can_be_recorded(tmp_path: Path) -> None:
    reason = why_no_recorder(tmp_path)
    if reason is not None:
        pytest.skip(f"this machine does not allow to record what is written to a disk: {reason}")


def _look_at_states(root: Path, saver: str, num: int, seed: int, stop_at: float) -> TallyOfStates:
    """Examine `num` states of recorded runs, or as many as it takes until `stop_at` saves are lost.

    A few states may by chance have few blocks to lose. Then as many again are examined.
    """
    draw = random.Random(f"{seed}-{os.environ['RANK']}")
    tally = TallyOfStates()
    while tally.trials < num or (tally.lost_blocks <= LOST_OF_A_STATE * num and tally.trials < MOST_TURNS * num):
        directory = root / f"{os.environ['RANK']}-{tally.trials}"
        directory.mkdir(parents=True)
        disk = RecordedDisk(directory)
        place = disk.root / "runs" / "checkpoints"
        with (
            disk.recording(),
            saving(
                place, saver, after=0, num_saves=NUM_SAVES, world_size=world_size_of(saver), on_saved=disk.acknowledge
            ) as job,
        ):
            assert set(job.finish()) == {0}
            tally.acknowledged += len(job.acknowledged)
        for state in disk.states(min(STATES_OF_A_RUN, num - tally.trials % num), draw):
            tally.trials += 1
            tally.blocks += state.num_blocks
            tally.lost_blocks += state.num_lost
            tally.torn_blocks += state.num_torn
            tally.with_acknowledged += state.acknowledged > 0
            tally.repaired += state.is_repaired
            tally.cut_writing += bool(others_in(place))
            tally.look(place, state.acknowledged)
            if tally.lost >= stop_at:
                return tally
    return tally


def _look_at_states_of_each(
    root: str, savers: Sequence[str], num: int, seed: int, stop_at: float = math.inf
) -> dict[str, TallyOfStates]:
    """Examine states that the given savers leave, one kind after the other."""
    unshare_mounts()
    return {saver: _look_at_states(place_of(root, saver), saver, num, seed, stop_at) for saver in savers}


def test_no_order_of_blocks_loses_or_tears_a_checkpoint(
    tmp_path: Path, states: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    share = -(-states // NUM_SERVERS)
    start = time.monotonic()
    with fresh_ranks(
        _look_at_states_of_each, NUM_SERVERS, str(tmp_path), MODES, share, seed, backend=None
    ) as servers:  # fmt: skip
        tallies = TallyOfStates.sums([end.value for end in servers.finish(timeout_s=limit_s)])
    for mode, tally in tallies.items():
        report(
            f"reordered blocks, {mode}: {tally.trials} states, seed {seed}: of {tally.blocks} blocks that were not "
            f"flushed {tally.lost_blocks} lost, {tally.torn_blocks} half-written; {tally.cut_writing} states with a "
            f"temporary file, {tally.with_acknowledged} with an acknowledged save, {tally.repaired} that e2fsck had to "
            f"repair, {len(tally.findings)} lost or torn"
        )
    report(f"reordered blocks: all in {time.monotonic() - start:.0f} s")
    assert {mode: tally.findings for mode, tally in tallies.items()} == {mode: [] for mode in MODES}
    for tally in tallies.values():
        assert tally.trials >= states
        assert tally.lost_blocks > LOST_OF_A_STATE * states
        assert tally.torn_blocks > states // 2
        assert tally.with_acknowledged > states // 3


def test_the_same_states_find_out_savers_that_do_not_sync(
    tmp_path: Path, seed: int, report: Callable[[str], None]
) -> None:
    savers = ("syncs nothing", "syncs no directory", "ignite")
    with fresh_ranks(
        _look_at_states_of_each, 1, str(tmp_path), savers, CONTROL_STATES, seed, CONTROL_LOSSES, backend=None
    ) as servers:  # fmt: skip
        tallies = servers.finish()[0].value
    report(
        "reordered blocks, negative controls, acknowledged saves lost: "
        + ", ".join(f"{saver} {tally.lost} in {tally.trials} states" for saver, tally in tallies.items())
    )
    assert all(tally.lost > 0 for tally in tallies.values()), "a saver that does not sync was not found out"
