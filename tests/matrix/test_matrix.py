"""A checkpoint written under any backend loads under any other, bit for bit, on every rank.

Needs the three environments of `ci/setup.sh all`, whose Pythons `ci/test.sh` names in DISTCKPT_PYTHONS: of the base, of
Horovod and of torch_xla, with colons between them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import PROGRAM_LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("program.py")
BACKENDS = ("serial", "gloo", "horovod", "xla")


def pythons() -> dict[str, str]:
    base, horovod, xla = os.environ["DISTCKPT_PYTHONS"].rstrip(":").split(":")
    return {"serial": base, "gloo": base, "horovod": horovod, "xla": xla}


def start(backend: str, what: str, folder: Path) -> list[dict[str, Any]]:
    """Run the program under a backend's launcher; return what each rank told."""
    python = pythons()[backend]
    scripts = {"gloo": "torchrun.sh", "horovod": "horovodrun.sh", "xla": "xla_spawn.sh"}
    command = ["bash", str(ROOT / "launch" / scripts[backend])] if backend in scripts else [python, str(PROGRAM)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DISTCKPT_"))}
    environment |= {"PYTHON": python, "SCRIPT": str(PROGRAM), "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "2", "NP": "2"}
    environment |= {"MATRIX_DO": what, "MATRIX_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(python).parent}:{environment['PATH']}"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    paths = sorted(folder.glob(f"{what}.{backend}.*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Return the folder with a checkpoint of each backend, and the digests of what they hold."""
    folder = tmp_path_factory.mktemp("matrix")
    told = {backend: start(backend, "save", folder) for backend in BACKENDS}
    for backend, ranks in told.items():
        assert [rank["world_size"] for rank in ranks] == [1 if backend == "serial" else 2] * len(ranks)
        assert all(rank["digests"] == ranks[0]["digests"] for rank in ranks), "replicas"
    return folder, {backend: ranks[0]["digests"] for backend, ranks in told.items()}


@pytest.fixture(scope="module")
def loaded(saved: tuple[Path, dict[str, dict[str, str]]]) -> dict[str, list[dict[str, Any]]]:
    """Return what the ranks of each backend found in all checkpoints."""
    return {backend: start(backend, "load", saved[0]) for backend in BACKENDS}


@pytest.mark.parametrize("written_by", BACKENDS)
@pytest.mark.parametrize("loaded_by", BACKENDS)
def test_written_by_one_loads_under_the_other(
    saved: tuple[Path, dict[str, dict[str, str]]],
    loaded: dict[str, list[dict[str, Any]]],
    written_by: str,
    loaded_by: str,
) -> None:
    ranks = loaded[loaded_by]
    assert len(ranks) == (1 if loaded_by == "serial" else 2)
    for rank in ranks:
        assert rank["backend"] == loaded_by
        assert rank["loaded"][written_by] == saved[1][written_by]


def test_every_backend_runs_in_its_own_environment() -> None:
    assert sys.executable == pythons()["serial"]
    assert len(set(pythons().values())) == 3
