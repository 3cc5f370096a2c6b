"""Damage to a checkpoint that two ranks of a real job have saved, in each way of saving.

Each damage is reported as damage on every rank, before a live object changes; and both ranks resume from the same older
checkpoint. A small one is damaged in every way that `tests.crash.damage` knows, two ranks' shares swapped among them.
(What the file of one rank's has to stand is in `tests/unit/ptformat/test_verify.py`.)
"""

import contextlib
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import distckpt
from distckpt.ptformat.reader import read_pt
from tests.crash.damage import every_damage, some_damage
from tests.crash.modes import MODES, disk_saver, is_background, is_sharded
from tests.crash.subject import idle_engine
from tests.crash.trained import local_of, shard_parameters
from tests.support import run_ranks

pytestmark = pytest.mark.crash

WORLD_SIZE = 2
NUM_ON_RANKS = {False: 24, True: 1200}
QUICK_STEP = 211
OLD, NEW = "model_1.pt", "model_2.pt"


class _Model(nn.Module):
    """An object whose numbers, and so its blocks, all differ."""

    def __init__(self, *, is_sharded: bool = False) -> None:
        super().__init__()
        # A small tensor travels to the rank that writes it. Of a large one each rank writes its own shard.
        self.values = nn.ParameterList(torch.zeros(length) for length in (16_500 if is_sharded else 3500, 2000, 3))
        if is_sharded:
            shard_parameters(self.values)

    def fill(self, step: int) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(self.values):
                whole = torch.arange(len(parameter)) + step + number / 8
                if isinstance(parameter, DTensor):
                    whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(whole)

    def forward(self) -> torch.Tensor:
        return sum((values.sum() for values in self.values), torch.zeros(()))

    def numbers(self) -> torch.Tensor:
        return torch.cat([local_of(values).detach() for values in self.values])


def _save_two(directory: Path, mode: str) -> tuple[_Model, dict[str, Any]]:
    """Collective. Save an older and a newer checkpoint."""
    model = _Model(is_sharded=is_sharded(mode))
    to_save: dict[str, Any] = {"model": model if is_sharded(mode) else nn.parallel.DistributedDataParallel(model)}
    saver = disk_saver(directory, mode)
    handler = distckpt.Checkpoint(to_save, saver, n_saved=2)
    for step in (1, 2):
        model.fill(step)
        engine = idle_engine()
        engine.state.iteration = step
        handler(engine)
        if is_background(mode):
            handler.wait_until_finished()
    return model, to_save


def _save(directory: str, mode: str) -> None:
    _save_two(Path(directory), mode)


def _damage_on_ranks(root: str, mode: str, num: int, seed: int) -> list[str]:
    """Collective. Damage the newer of two checkpoints in many ways; return what was wrong."""
    directory = Path(root)
    model, to_save = _save_two(directory, mode)
    content, wrong = (directory / NEW).read_bytes(), []
    live = _Model(is_sharded=is_sharded(mode))
    live.fill(1)
    older = live.numbers()
    for what, damaged in [("nothing", content), *some_damage(content, num, random.Random(seed))]:
        dist.barrier()
        if dist.get_rank() == 0:
            (directory / NEW).write_bytes(damaged)
        dist.barrier()
        model.fill(7)
        before = model.numbers()
        try:
            distckpt.Checkpoint.load_objects(to_save, directory / NEW)
            outcome = "loaded"
        except distckpt.CorruptCheckpointError:
            outcome = "damaged"
        is_touched = not torch.equal(before, model.numbers())
        resumed = distckpt.resume(to_save, directory)
        name = resumed and resumed.name
        is_older = torch.equal(older, model.numbers())
        expected = ("loaded", True, NEW, False) if damaged is content else ("damaged", False, OLD, True)
        if (outcome, is_touched, name, is_older) != expected:
            wrong.append(
                f"{what}: {outcome}, live objects touched: {is_touched}, resumed from {name}, older: {is_older}"
            )
    return wrong


@pytest.mark.parametrize("mode", MODES)
def test_damage_is_reported_on_all_ranks_and_all_resume_from_the_older_one(
    tmp_path: Path,
    mode: str,
    is_whole: bool,  # noqa: FBT001
    seed: int,
    limit_s: float,
    report: Callable[[str], None],
) -> None:
    num, start = NUM_ON_RANKS[is_whole], time.monotonic()
    ends = run_ranks(_damage_on_ranks, WORLD_SIZE, str(tmp_path), mode, num, seed, timeout_s=limit_s)
    report(
        f"damage on two ranks, {mode}: {num} damages, seed {seed}, {len(ends[0])} with a wrong end; "
        f"{time.monotonic() - start:.0f} s"
    )
    assert ends == [[], []]


def _is_noticed(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        read_pt(path)
    except distckpt.CorruptCheckpointError:
        return True
    return False


@pytest.mark.parametrize("mode", MODES)
def test_every_damage_is_noticed(
    tmp_path: Path, mode: str, is_whole: bool, report: Callable[[str], None]  # noqa: FBT001
) -> None:  # fmt: skip
    run_ranks(_save, WORLD_SIZE, str(tmp_path / "saved"), mode)
    content, start = (tmp_path / "saved" / NEW).read_bytes(), time.monotonic()
    path = tmp_path / "damaged.pt"
    missed, num = [], 0
    for what, damaged in itertools.islice(every_damage(content), 0, None, 1 if is_whole else QUICK_STEP):
        num += 1
        if not _is_noticed(path, damaged):
            missed.append(what)
    report(
        f"damage, {mode}: {num} damages of {len(content)} bytes, {len(missed)} not noticed; "
        f"{time.monotonic() - start:.0f} s"
    )
    assert missed == []
    assert not _is_noticed(path, content), "the control: as it was written, it is whole"


def test_the_same_damages_are_missed_by_a_reader_that_trusts(tmp_path: Path, report: Callable[[str], None]) -> None:
    run_ranks(_save, WORLD_SIZE, str(tmp_path / "saved"), MODES[0])
    content, path = (tmp_path / "saved" / NEW).read_bytes(), tmp_path / "damaged.pt"
    missed, num = 0, 60
    for _, damaged in some_damage(content, num, random.Random(1)):
        path.write_bytes(damaged)
        with contextlib.suppress(Exception):  # torch may raise anything
            torch.load(path, weights_only=True)
            missed += 1
    report(f"damage, negative control: torch.load notices {num - missed} of {num}")
    assert missed > 0
