"""The README's example runs as it stands, alone and under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def example() -> str:
    """Return the README's only Python block."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"],
    ],
    ids=["alone", "torchrun"],
)
def test_example_of_the_readme_keeps_two_checkpoints(launcher: list[str], tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, "example.py"], cwd=tmp_path, env=environment, check=True, timeout=120)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint_20.pt", "checkpoint_30.pt"]
    state = torch.load(tmp_path / "checkpoints" / "checkpoint_30.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 30
    assert state["model"]["weight"].shape == (1, 4)


def test_example_of_the_readme_has_twelve_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) == 12
