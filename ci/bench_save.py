"""What a checkpoint costs: distckpt beside torch.save, ignite and torch.distributed.checkpoint, in one run.

Each contestant saves the same state of a model and its AdamW from 1 or 2 Gloo ranks, and loads it into live objects
with a cold cache. The limits are measured between them, by the same ranks: a memcpy of the state into touched memory,
a raw O_DIRECT write with fsync and a raw O_DIRECT read, each rank its part. Rounds of all are interleaved, so that a
busy machine or disk slows all alike; the figures are medians over rounds. Run it as
``PYTHONPATH=. python ci/bench_save.py [--quick] [--ranks 1 2] [--mib N] [--rounds N] [--folder DIR] [--json FILE]``.

Columns: *stall*, for how long the slowest rank's training stands still, s; *durable*, until file and directory are
synced, s (those that do not sync get an fsync at the end); *load*, s; *read*, bytes read from storage by all ranks over
those of the checkpoint; *memory*, the most host memory that the saving rank took on top of what it had before, in its
first save or a later one, over the state's size. Nothing is asserted of times. Exit status 1 where a contestant's
checkpoint does not give back the state.
"""

import argparse
import ctypes
import json
import logging
import mmap
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import ignite
import torch
import torch.distributed as dist
from torch import multiprocessing

from ci.save_contestants import CONTESTANTS, MIB, Contestant, Objects

CHUNK_BYTES: Final = 8 * MIB
LIMIT_S: Final = 900.0
COLUMNS: Final = ("stall", "durable", "load", "read", "memory")

Figures = dict[str, float]


# -- measures ----------------------------------------------------------------------------------------


def slowest(seconds: float) -> float:
    """Collective. Return the most that any rank took."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def in_all(amount: float) -> float:
    """Collective. Return the sum over the ranks."""
    value = torch.tensor(amount, dtype=torch.float64)
    dist.all_reduce(value)
    return float(value)


def timed(work: Callable[[], object]) -> float:
    """Collective. Do it on all ranks at once; return the slowest's seconds."""
    dist.barrier()
    begin_s = time.perf_counter()
    work()
    return slowest(time.perf_counter() - begin_s)


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def sync_all(folder: Path | None) -> None:
    """Sync every file, and the folder; None for nothing."""
    for path in () if folder is None else (*files_in(folder), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(folder: Path) -> None:
    """Take every file out of the page cache."""
    for path in files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def of_status(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def bytes_read() -> int:
    """Return how many bytes this process has had read from storage."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def measure(contestant: Contestant, step: int, expected: list[torch.Tensor]) -> tuple[Figures, bool]:
    """Collective. Save and load once; return the figures, and whether the state came back."""
    objects, rank = contestant.objects, dist.get_rank()
    state_bytes = sum(tensor.nbytes for tensor in expected)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = of_status("VmRSS")
    stall_s = timed(lambda: contestant.save(step))
    extra_bytes = in_all(max(of_status("VmHWM") - before, 0) if rank == 0 else 0)
    sync_s = 0.0 if contestant.syncs else timed(lambda: sync_all(contestant.folder if rank == 0 else None))
    if rank == 0:
        forget(contestant.folder)
    size = sum(path.stat().st_size for path in files_in(contestant.folder))
    objects.spoil()
    dist.barrier()
    read = bytes_read()
    load_s = timed(contestant.load)
    read_bytes = in_all(bytes_read() - read)
    is_back = all(map(torch.equal, objects.tensors(), expected))
    return {
        "stall": stall_s,
        "durable": stall_s + sync_s,
        "load": load_s,
        "read": read_bytes / size,
        "memory": extra_bytes / state_bytes,
    }, in_all(float(not is_back)) == 0


class Limits:
    """What the machine can do, with as many bytes as the state has."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self._path = folder / "raw"
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        share = num_bytes // num_ranks // CHUNK_BYTES * CHUNK_BYTES
        self._begin = rank * share
        self._num_bytes = num_bytes
        self._share = num_bytes - self._begin if rank == num_ranks - 1 else share
        self._share = -(-self._share // mmap.PAGESIZE) * mmap.PAGESIZE
        self._source, self._target = mmap.mmap(-1, num_bytes), mmap.mmap(-1, num_bytes)
        for memory in (self._source, self._target):
            torch.frombuffer(memory, dtype=torch.uint8).fill_(3)
        self._block = mmap.mmap(-1, CHUNK_BYTES)
        torch.frombuffer(self._block, dtype=torch.uint8).fill_(3)

    def measure(self) -> Figures:
        """Collective. Measure each once."""
        target, source = (
            ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (self._target, self._source)
        )
        if dist.get_rank() == 0:
            self._path.unlink(missing_ok=True)
            self._path.touch()
        figures = {
            "memcpy of all": timed(lambda: ctypes.memmove(target, source, self._num_bytes)),
            "memcpy of a share": timed(lambda: ctypes.memmove(target, source, self._share)),
            "raw write": timed(self._write),
            "raw read": timed(self._read),
        }
        if dist.get_rank() == 0:
            self._path.unlink()
        return figures

    def _write(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        view = memoryview(self._block)
        for at in range(0, self._share, CHUNK_BYTES):
            os.pwrite(fd, view[: min(CHUNK_BYTES, self._share - at)], self._begin + at)
        os.fsync(fd)
        os.close(fd)

    def _read(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        view = memoryview(self._block)
        for at in range(0, self._share, CHUNK_BYTES):
            os.preadv(fd, [view[: min(CHUNK_BYTES, self._share - at)]], self._begin + at)
        os.close(fd)


def work(rank: int, num_ranks: int, options: argparse.Namespace, folder: str) -> None:
    """Be one rank: measure everything, round by round; rank 0 leaves the figures in a file."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the contestants' own, of what they will drop
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=LIMIT_S))
    objects = Objects(options.mib)
    expected = [tensor.clone() for tensor in objects.tensors()]
    contestants = [make(objects, Path(folder)) for make in CONTESTANTS]
    limits = Limits(sum(tensor.nbytes for tensor in expected), Path(folder))
    rounds: dict[str, list[Figures]] = {}
    lost: set[str] = set()
    most: dict[str, float] = {}
    for number in range(options.rounds + 1):
        order = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        found = {"limits": limits.measure()}
        for contestant in order:
            figures, is_back = measure(contestant, number + 1, expected)
            found[contestant.name] = figures
            # Memory that a contestant keeps is taken in its first save.
            figures["memory"] = most[contestant.name] = max(figures["memory"], most.get(contestant.name, 0.0))
            if not is_back:
                lost.add(contestant.name)
        if number:  # the first round is to warm up: memory is touched, the disk is found
            for name, figures in found.items():
                rounds.setdefault(name, []).append(figures)
    if rank == 0:
        result = {"rounds": rounds, "lost": sorted(lost), "num_bytes": sum(tensor.nbytes for tensor in expected)}
        Path(folder, "figures.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# -- the table ---------------------------------------------------------------------------------------


def run(num_ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one world, and return its figures."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        multiprocessing.spawn(work, (num_ranks, options, folder), nprocs=num_ranks)  # type: ignore[no-untyped-call]  # torch ships it without types
        found: dict[str, Any] = json.loads(Path(folder, "figures.json").read_text(encoding="utf-8"))
    return found


def median_ratio(above: list[Figures], column: str, below: list[Figures], *limits: str) -> float:
    """Return the median over rounds of a column over the sum of limits of the same round."""
    pairs = zip(above, below, strict=True)
    return statistics.median(one[column] / sum(other[limit] for limit in limits) for one, other in pairs)


def show(num_ranks: int, found: dict[str, Any]) -> None:
    """Print one world's table."""
    rounds: dict[str, list[Figures]] = found["rounds"]
    limits = rounds.pop("limits")
    print(f"\n{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, {found['num_bytes'] / MIB:.0f} MiB; medians of "
          f"{len(limits)} rounds")  # fmt: skip
    told = (f"{name} {statistics.median(one[name] for one in limits):.3f} s" for name in limits[0])
    print(f"  limits: {', '.join(told)}")
    print(
        f"  {'':20}" + "".join(f"{column:>10}" for column in COLUMNS) + "   stall / memcpy  durable / raw  load / raw"
    )
    for name, figures in rounds.items():
        cells = "".join(f"{statistics.median(one[column] for one in figures):10.3f}" for column in COLUMNS)
        ratios = (
            median_ratio(figures, "stall", limits, "memcpy of all"),
            median_ratio(figures, "durable", limits, "raw write"),
            median_ratio(figures, "load", limits, "raw read", "memcpy of all"),
        )
        lost = "   DOES NOT GIVE BACK THE STATE" if name in found["lost"] else ""
        print(f"  {name:20}{cells}{ratios[0]:17.2f}{ratios[1]:15.2f}{ratios[2]:12.2f}{lost}")


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small state and two rounds")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mib", type=int, default=None, help="size of the state (512)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds that count (5)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is meant; removed from again")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.mib = options.mib or (48 if options.quick else 512)
    options.rounds = options.rounds or (2 if options.quick else 5)
    results = {num_ranks: run(num_ranks, options) for num_ranks in options.ranks}
    if options.json is not None:
        about = {"torch": torch.__version__, "ignite": ignite.__version__, "mib": options.mib}
        options.json.write_text(json.dumps({"about": about, "ranks": results}, indent=1), encoding="utf-8")
    for num_ranks, found in results.items():
        show(num_ranks, found)
    return int(any(found["lost"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
