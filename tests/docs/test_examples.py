"""Every Python block of the README and of the documentation runs in an environment made by the README's install lines.

A block that starts ranks by ``Parallel`` runs alone and on two ranks.
"""

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

from distckpt.ptformat.reader import verify
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import quick, torch_only

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = torch_only


def blocks_of(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = {f"{page.stem} {number}": block for page in PAGES for number, block in enumerate(blocks_of(page), start=1)}


def needs_extras(name: str) -> bool:
    """Return True for an example that needs packages of an extra: it runs in this process's environment."""
    return name.startswith("integrations ")


def starts_ranks(name: str) -> bool:
    """Return True for an example that may be started on several ranks."""
    return needs_extras(name) or "Parallel(backend=" in BLOCKS[name]


def saves(name: str) -> bool:
    """Return True for an example that saves."""
    return starts_ranks(name) or "keep=[" in BLOCKS[name]


RUNS = [(name, world_size) for name in BLOCKS for world_size in (1, 2) if world_size == 1 or starts_ranks(name)]


def starts() -> dict[int, list[str]]:
    """Return the commands with which the README starts its example, by number of ranks."""
    found = re.search(r"Start it with `(torchrun .*? (example\.py))`, or with plain `(python)` for one process", README)
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
    subprocess.run(command, check=True, timeout=PROGRAM_LIMIT_S)


def run(
    installed: Installed, example: str, world_size: int, folder: Path, *, programs: Path | None = None
) -> tuple[list[str], str, str]:
    """Run a program in `folder`; return the names of its checkpoints, standard output and standard error.

    Args:
        installed: the environment.
        example: the program.
        world_size: number of ranks.
        folder: the working folder.
        programs: where the commands are, if not in the user's environment.
    """
    (folder / "example.py").write_text(example)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**mine, "PYTHONPATH": str(installed.site), "OMP_NUM_THREADS": "1"}
    program, *arguments = starts()[world_size]
    done = subprocess.run(
        [(programs or installed.bin) / program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PROGRAM_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return sorted(path.name for path in folder.glob("checkpoints/*")), done.stdout, done.stderr


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
    _, stdout, _ = run(installed, "import distckpt; print(distckpt.__file__)", 1, tmp_path)
    assert Path(stdout.strip()).is_relative_to(installed.site)


def test_every_page_that_should_have_an_example_has_one() -> None:
    pages = {name.rsplit(" ", 1)[0] for name in BLOCKS}
    assert pages >= {"README", "quickstart", "what-to-save", "background", "stop-and-resume", "notebooks-and-tests"}


@quick(4)
@pytest.mark.parametrize(("name", "world_size"), RUNS, ids=[f"{name} on {number}" for name, number in RUNS])
def test_example_runs_and_its_checkpoints_are_whole(
    installed: Installed, name: str, world_size: int, tmp_path: Path
) -> None:
    programs = Path(sys.executable).parent if needs_extras(name) else None
    run(installed, BLOCKS[name], world_size, tmp_path, programs=programs)
    written = list(tmp_path.glob("**/*.pt"))
    assert bool(written) == saves(name)
    for path in written:
        verify(path)


@quick(1)
@pytest.mark.parametrize("world_size", [1, 2])
def test_example_of_the_readme_starts_a_second_time(installed: Installed, world_size: int, tmp_path: Path) -> None:
    example = BLOCKS["README 1"]
    names, _, stderr = run(installed, example, world_size, tmp_path)
    assert names == ["checkpoint_20.pt", "checkpoint_30.pt"]
    assert stderr.count("nothing to resume from in checkpoints") == 1
    names, _, _ = run(installed, example, world_size, tmp_path)
    assert names == ["checkpoint_20.pt", "checkpoint_30.pt"], "a finished run trains nothing"
    longer = example.replace("max_epochs=3", "max_epochs=4")
    names, _, stderr = run(installed, longer, world_size, tmp_path)
    assert names == ["checkpoint_30.pt", "checkpoint_40.pt"]
    assert stderr.count("checkpoint_30.pt of iteration 30, epoch 3") == 1
    first, second = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)["model"]["weight"] for name in names
    )
    assert torch.equal(first, second), "the model was loaded: nothing trains it in the example"


def test_example_of_background_saving_prints_the_last_checkpoint_on_each_rank(
    installed: Installed, tmp_path: Path
) -> None:
    names, stdout, _ = run(installed, BLOCKS["background 1"], 2, tmp_path)
    assert names == ["checkpoint_40.pt", "checkpoint_50.pt"]
    assert stdout.count("checkpoints/checkpoint_50.pt") == 2
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_50.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == 50
