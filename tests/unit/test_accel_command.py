"""The command for a GPU: its arguments, its plan, and what it says where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.limits import PROGRAM_LIMIT_S

COMMAND = Path(__file__).resolve().parents[2] / "ci" / "accel.sh"
STAGES = ["contracts", "tests", "train", "save", "sharded"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(COMMAND), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )


def test_the_list_needs_no_gpu_and_takes_at_most_six_minutes() -> None:
    ended = run("--list")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES
    assert sum(int(line.split()[1]) for line in lines) <= 360
    assert all(line.split()[2] == "s" for line in lines)


@pytest.mark.parametrize("name", STAGES)
def test_one_stage_can_be_chosen(name: str) -> None:
    (line,) = run("--only", name, "--list").stdout.splitlines()
    assert line.startswith(f"{name} ")


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--only"], ["--what"]], ids=" ".join)
def test_wrong_arguments_have_an_exit_code_of_their_own(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_that_nothing_was_run() -> None:
    ended = run()
    assert ended.returncode == 3
    (line,) = ended.stdout.splitlines()
    assert line.startswith("accel.sh: nothing was run: ")
