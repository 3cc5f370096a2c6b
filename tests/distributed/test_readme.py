"""The README's example runs as it stands, alone and under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distckpt.storage.ptfile import verify
from tests.support.selection import of_torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = of_torch


LAUNCHERS = pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"],
    ],
    ids=["alone", "torchrun"],
)


def examples() -> tuple[str, str, str]:
    """Return the README's three Python blocks: the first one, that of saving beside training, that of going on."""
    text = (ROOT / "README.md").read_text()
    first, second, third = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(first), str(second), str(third)


def run(example: str, launcher: list[str], folder: Path) -> list[str]:
    """Run an example in `folder`, and return the names of its checkpoints."""
    (folder / "example.py").write_text(example)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, "example.py"], cwd=folder, env=environment, check=True, timeout=120)
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@LAUNCHERS
def test_example_of_the_readme_keeps_two_checkpoints(launcher: list[str], tmp_path: Path) -> None:
    assert run(examples()[0], launcher, tmp_path) == ["checkpoint_20.pt", "checkpoint_30.pt"]
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_30.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 30
    assert state["model"]["weight"].shape == (1, 4)


def test_example_of_the_readme_has_twelve_lines() -> None:
    assert len([line for line in examples()[0].splitlines() if line.strip()]) == 12


@LAUNCHERS
def test_example_of_the_readme_saves_beside_training(launcher: list[str], tmp_path: Path) -> None:
    assert run(examples()[1], launcher, tmp_path) == ["checkpoint_40.pt", "checkpoint_50.pt"]
    verify(tmp_path / "checkpoints" / "checkpoint_50.pt")
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_50.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 50
    assert state["optimizer"]["state"][0]["step"] == 50


@LAUNCHERS
def test_last_example_of_the_readme_goes_on_where_it_was(launcher: list[str], tmp_path: Path) -> None:
    example = examples()[2]
    shorter = example.replace("max_epochs=3", "max_epochs=1")
    assert shorter != example
    assert run(shorter, launcher, tmp_path) == ["checkpoint_10.pt"]
    weight = torch.load(tmp_path / "checkpoints" / "checkpoint_10.pt", weights_only=True)["model"]["weight"]
    again = example.replace("max_epochs=3", "max_epochs=2").replace(
        "trainer.run(", "assert trainer.state.epoch == 1; trainer.state.max_epochs = 2; trainer.run("
    )
    assert run(again, launcher, tmp_path) == ["checkpoint_10.pt", "checkpoint_20.pt"]
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_20.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 20
    assert torch.equal(state["model"]["weight"], weight), "the model was loaded: nothing trains it in the example"
