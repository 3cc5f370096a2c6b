"""The README's examples run where its own install lines were followed, and nothing else: alone, and on two ranks."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch

from distckpt.ptformat.torch_format import verify
from tests.support.selection import of_torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

pytestmark = of_torch

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2])
LIMIT_S = 240


def examples() -> tuple[str, str, str]:
    """Return the README's three Python blocks: the first one, that of saving beside training, that of going on."""
    first, second, third = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(first), str(second), str(third)


def starts() -> dict[int, list[str]]:
    """Return the commands that the README starts an example with, by the number of ranks."""
    found = re.search(
        r"Start it with `(torchrun .*? (example\.py))`, or with plain `(python)` for a world of one", README
    )
    assert found is not None
    return {1: [found[3], found[2]], 2: shlex.split(found[1])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A user's environment.

    Attributes:
        bin: where its commands are; made by the README's install lines, and kept from run to run.
        site: where this tree is installed, for that one may have been made from another.
    """

    bin: Path
    site: Path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Follow the README's install lines, where that was not done before, and build and install this tree."""
    folder = tmp_path_factory.mktemp("installed")
    command = [str(ROOT / "ci" / "setup.sh"), "--print-python", "readme"]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1500)
    python = made.stdout.strip()
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("distckpt-*.whl")
    pip(python, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    return Installed(bin=Path(python).parent, site=folder / "site")


def pip(python: str, *arguments: str | Path) -> None:
    """Run pip, quietly and without a network."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "--no-input", *arguments]
    subprocess.run(command, check=True, timeout=LIMIT_S)


def run(installed: Installed, example: str, world_size: int, folder: Path) -> tuple[list[str], str, str]:
    """Run an example in `folder`; return the names of its checkpoints, and what it wrote to the standard streams."""
    (folder / "example.py").write_text(example)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**mine, "PYTHONPATH": str(installed.site), "OMP_NUM_THREADS": "1"}
    program, *arguments = starts()[world_size]
    done = subprocess.run(
        [installed.bin / program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return sorted(path.name for path in (folder / "checkpoints").iterdir()), done.stdout, done.stderr


def test_the_environment_holds_what_the_readme_installs_and_nothing_else(installed: Installed) -> None:
    (site,) = (installed.bin.parent / "lib").glob("python*/site-packages")
    there = {named(one.name): one for one in metadata.distributions(path=[str(site)])}
    wanted, todo = {"pip", "setuptools"}, ["torch", "distckpt"]  # a new environment has the first two
    while todo:
        name = todo.pop()
        if name in there and name not in wanted:
            wanted.add(name)
            todo += [named(one) for one in there[name].requires or () if "extra ==" not in one]
    assert sorted(set(there) - wanted) == []


def named(requirement: str) -> str:
    """Return the name in a requirement, as packages are compared by."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_what_runs_is_the_installed_package(installed: Installed, tmp_path: Path) -> None:
    program = "import pathlib, distckpt; pathlib.Path('checkpoints').mkdir(); print(distckpt.__file__)"
    _, stdout, _ = run(installed, program, 1, tmp_path)
    assert Path(stdout.strip()).is_relative_to(installed.site)


@WORLD_SIZES
def test_example_of_the_readme_keeps_two_checkpoints(installed: Installed, world_size: int, tmp_path: Path) -> None:
    names, _, _ = run(installed, examples()[0], world_size, tmp_path)
    assert names == ["checkpoint_20.pt", "checkpoint_30.pt"]
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_30.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 30
    assert state["model"]["weight"].shape == (1, 4)


def test_example_of_the_readme_has_twelve_lines() -> None:
    assert len([line for line in examples()[0].splitlines() if line.strip()]) == 12


@WORLD_SIZES
def test_example_of_the_readme_saves_beside_training(installed: Installed, world_size: int, tmp_path: Path) -> None:
    names, stdout, _ = run(installed, examples()[1], world_size, tmp_path)
    assert names == ["checkpoint_40.pt", "checkpoint_50.pt"]
    assert stdout.count("checkpoints/checkpoint_50.pt") == world_size
    verify(tmp_path / "checkpoints" / "checkpoint_50.pt")
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_50.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 50
    assert state["optimizer"]["state"][0]["step"] == 50


@WORLD_SIZES
def test_last_example_of_the_readme_goes_on_where_it_was(installed: Installed, world_size: int, tmp_path: Path) -> None:
    example = examples()[2]
    shorter = example.replace("max_epochs=3", "max_epochs=1")
    assert shorter != example
    names, _, stderr = run(installed, shorter, world_size, tmp_path)
    assert names == ["checkpoint_10.pt"]
    assert stderr.count("resume: nothing to resume from in checkpoints: starting afresh") == 1
    weight = torch.load(tmp_path / "checkpoints" / "checkpoint_10.pt", weights_only=True)["model"]["weight"]
    again = example.replace("max_epochs=3", "max_epochs=2").replace(
        "trainer.run(", "assert trainer.state.epoch == 1; trainer.state.max_epochs = 2; trainer.run("
    )
    names, _, stderr = run(installed, again, world_size, tmp_path)
    assert names == ["checkpoint_10.pt", "checkpoint_20.pt"]
    assert stderr.count("resume: going on from checkpoints/checkpoint_10.pt of iteration 10, epoch 1") == 1
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_20.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 20
    assert torch.equal(state["model"]["weight"], weight), "the model was loaded: nothing trains it in the example"
