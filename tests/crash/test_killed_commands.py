"""SIGKILL at random moments of ``distckpt convert`` and ``distckpt prune``.

A process with torch imported forks children that run a command, and kills each at a random moment. What has its final
name afterwards is whole, and what prune has to keep is there.
"""

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from distckpt import save
from distckpt.cli import main
from distckpt.policy.naming import is_temp
from tests.crash.forked import forked
from tests.crash.tally import Tally
from tests.support import run_ranks
from tests.unit.toys import Notebook

pytestmark = pytest.mark.crash

OUTS = ("b.safetensors", "b.pt", "b")
STEPS = (1, 2, 3, 4, 5, 6)
NUM_KEPT = 2
MOST_KILLS = 100


def _call(arguments: Sequence[str]) -> int:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return main(arguments)


def _kill_one(arguments: Sequence[str], moment_s: float) -> None:
    def body(send: Callable[[int], None]) -> int:
        send(0)
        return _call(arguments)

    with forked(body) as child:
        child.wait_for(1)
        time.sleep(moment_s)  # the random moment itself, nothing is waited for
        child.kill()


def _kill_conversions(directory: Path, out: str, kills: int, moments: random.Random) -> Tally:
    """Kill conversions of one file; look at the result after each."""
    tally, target = Tally(), directory / out
    arguments = ["convert", str(directory / "a.pt"), str(target)]
    span_s = 0.0
    for _ in range(2):  # the first call imports what a child has from the start
        _clear(directory)
        begin_s = time.monotonic()
        assert _call(arguments) == 0
        span_s = 1.2 * (time.monotonic() - begin_s)
    for _ in range(kills):
        _clear(directory)
        _kill_one(arguments, moments.uniform(0.0, span_s))
        tally.trials += 1
        names = set(os.listdir(directory))
        tally.cut_writing += any(map(is_temp, names))
        if target.exists() and _call(["diff", str(directory / "a.pt"), str(target)]) != 0:
            tally.take(f"torn: {out}")
        tally.take(*(f"leftover: {name}" for name in names - {"a.pt", out} if not is_temp(name)))
    return tally


def _clear(directory: Path) -> None:
    """Delete all but the source."""
    for path in directory.iterdir():
        if path.name != "a.pt":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _kill_prunes(directory: Path, kills: int, moments: random.Random) -> Tally:
    """Kill prunes of one directory; look at what is left after each."""
    tally = Tally()
    names = [f"step_{step}.pt" for step in STEPS]
    for step, name in zip(STEPS, names, strict=True):
        save({"all": Notebook({"w": torch.full((10_000,), float(step))})}, directory / name, step=step)
    contents = {name: (directory / name).read_bytes() for name in names}
    arguments = ["prune", str(directory), "--keep-last", str(NUM_KEPT), "--yes"]
    begin_s = time.monotonic()
    assert _call(arguments) == 0
    span_s = 1.5 * (time.monotonic() - begin_s)
    for _ in range(kills):
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        _kill_one(arguments, moments.uniform(0.0, span_s))
        tally.trials += 1
        left = {path.name: path.read_bytes() for path in directory.iterdir()}
        tally.take(*(f"lost: {name}" for name in names[-NUM_KEPT:] if left.get(name) != contents[name]))
        tally.take(*(f"torn: {name}" for name, content in left.items() if contents.get(name) != content))
        tally.cut_before_removal += NUM_KEPT < len(left) < len(names)
    return tally


def _kill_all(root: str, kills: int, seed: int) -> dict[str, Tally]:
    torch.set_num_threads(1)
    moments, tallies = random.Random(seed), dict[str, Tally]()
    for out in OUTS:
        directory = Path(root) / f"to {out}"
        directory.mkdir()
        state = {f"w{at}": torch.rand(50_000) for at in range(100)}
        save({"all": Notebook(state)}, directory / "a.pt")
        tallies[out] = _kill_conversions(directory, out, kills, moments)
    directory = Path(root) / "prune"
    directory.mkdir()
    tallies["prune"] = _kill_prunes(directory, kills, moments)
    return tallies


def test_a_killed_command_leaves_nothing_half_done(
    tmp_path: Path, kills: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    kills = min(kills, MOST_KILLS)
    (tallies,) = run_ranks(_kill_all, 1, str(tmp_path), kills, seed, backend=None, fresh=True, timeout_s=limit_s)
    for what, tally in tallies.items():
        report(
            f"SIGKILL, distckpt {what}: {tally.trials} kills, seed {seed}: {tally.cut_writing} while a file was "
            f"written, {tally.cut_before_removal} between removals, {len(tally.findings)} lost, torn or left behind"
        )
    assert {what: tally.findings for what, tally in tallies.items()} == {what: [] for what in tallies}
    assert all(tally.trials == kills for tally in tallies.values())
    # Otherwise the moments lie elsewhere and prove nothing.
    assert sum(tallies[out].cut_writing for out in OUTS) > 0.1 * kills
