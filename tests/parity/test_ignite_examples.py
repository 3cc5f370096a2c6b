"""Programs of ignite's examples, with their imports replaced, write files equal to those with ignite's handlers.

They come from ignite's source archive. What they need of torchvision, tensorboardX and fire is stood in for, with
made-up data. Each rank runs them in a process that has torch imported already, as ``__main__``. Those that know nothing
of ranks get a folder for each.
"""

import runpy
import sys
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist

from tests.distributed.idist import fresh_idist
from tests.parity.ignite_sdist import VERSION, cached_archive, rewrite_imports
from tests.parity.libraries import IGNITE, OURS, Library
from tests.support import run_ranks
from tests.support.equality import equal

STAND_INS = Path(__file__).parent / "stand_ins"
WORLDS = pytest.mark.parametrize("world_size", [1, 2])
pytestmark = pytest.mark.slow


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _program(folder: Path, name: str, library: Library) -> Path:
    """Unpack an example and the files beside it, for one of the libraries."""
    root = folder / f"pytorch_ignite-{VERSION}"
    path = root / "examples" / name
    with tarfile.open(cached_archive()) as archive:
        start = f"{root.name}/examples/{Path(name).parent}/"
        wanted = [one for one in archive.getmembers() if one.name.startswith(start)]
        archive.extractall(folder, members=wanted, filter="data")
    source = path.read_text().replace("num_workers=4", "num_workers=0")
    if library is OURS:
        source = rewrite_imports(source).replace(
            "from ignite.contrib.engines import common", "from distckpt.handlers import common"
        )
        assert "from distckpt" in source
    path.write_text(source)
    return path


def _run(program: Path, arguments: Sequence[str]) -> None:
    """Run a program on this rank, with its own modules."""
    before, argv, path = set(sys.modules), sys.argv, list(sys.path)
    sys.argv = [str(program), *arguments]
    sys.path[:0] = [str(program.parent), str(STAND_INS)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(program), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith((str(program.parent), str(STAND_INS))):
                del sys.modules[name]
    _barrier()


def _with_both(folder: Path, name: str, work: str) -> Any:
    """Call `work` on this rank with the program on each library; compare the results and return them."""
    results = []
    for library in (IGNITE, OURS):
        own = folder / library.name
        if _rank() == 0:
            _program(own, name, library)
        _barrier()
        with fresh_idist():
            idist.get_rank()  # collective the first time
            results.append(globals()[work](own / f"pytorch_ignite-{VERSION}" / "examples" / name, own))
        _barrier()
    theirs, ours = results
    assert equal(theirs, ours)
    return ours


def _on_ranks(world_size: int, folder: Path, name: str, work: str) -> Any:
    backend = "gloo" if world_size > 1 else None
    return run_ranks(_with_both, world_size, folder, name, work, backend=backend)[0]


def _files(folder: Path) -> dict[str, Any]:
    found = sorted(folder.rglob("*.pt"))
    return {str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in found}


def _cifar10(program: Path, folder: Path) -> Any:
    common = ["run", f"--data_path={folder}/data", f"--output_path={folder}/out", "--batch_size=16", "--num_workers=0"]
    common += ["--num_epochs=4", "--num_warmup_epochs=1", "--validate_every=1", "--checkpoint_every=4"]
    _run(program, [*common, "--stop_iteration=15"])
    (latest,) = (folder / "out").rglob("training_checkpoint_*.pt")
    _run(program, [*common, "--stop_iteration=100", f"--resume_from={latest}"])
    return _files(folder / "out")


def _mnist(program: Path, folder: Path) -> Any:
    rank = _rank()
    common = ["--batch_size=16", "--val_batch_size=16", "--epochs=3", "--log_interval=3"]
    _run(program, [*common, f"--log_dir={folder}/first-{rank}", "--crash_iteration=15"])
    latest = folder / "first-0" / "checkpoint_2.pt"
    _run(program, [*common, f"--log_dir={folder}/second-{rank}", f"--resume_from={latest}"])
    logs = {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*run.log"))}
    return _files(folder), logs


def _dcgan(program: Path, folder: Path) -> Any:
    arguments = ["--dataset=fake", "--dataroot=none", "--workers=0", "--batch-size=16", "--epochs=2", "--seed=7"]
    arguments += ["--z-dim=8", "--g-filters=2", "--d-filters=2", f"--output-dir={folder}/out-{_rank()}"]
    _run(program, arguments)
    return _files(folder)


@WORLDS
def test_cifar10_stops_resumes_and_keeps_the_best(tmp_path: Path, world_size: int) -> None:
    files = _on_ranks(world_size, tmp_path, "cifar10/main.py", "_cifar10")
    assert len(files) == 5, "the latest of both runs, the two best of the second, the best of the first"


@WORLDS
def test_mnist_crashes_and_resumes(tmp_path: Path, world_size: int) -> None:
    files, _ = _on_ranks(world_size, tmp_path, "mnist/mnist_save_resume_engine.py", "_mnist")
    assert sorted(files) == ["first-0/checkpoint_1.pt", "first-0/checkpoint_2.pt", "second-0/checkpoint_3.pt"]


@WORLDS
def test_dcgan_saves_two_networks(tmp_path: Path, world_size: int) -> None:
    files = _on_ranks(world_size, tmp_path, "gan/dcgan.py", "_dcgan")
    assert sorted(files) == ["out-0/networks_checkpoint_16.pt", "out-0/networks_checkpoint_32.pt"]
