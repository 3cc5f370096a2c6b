"""Measure file size, saving and loading of many small tensors, with distckpt, torch.save and ignite.

Interleaved rounds; times are medians, ratios are of medians of the same run:

* 50,000 tensors of 64 bytes. The file is at most 1.3 times as large as torch.save's. Saving and loading take no longer
  than torch.save and torch.load, although distckpt syncs the file and checks each byte before it loads it.
* 4,000 small layers with AdamW's state: the size of the file.
* A background save of a state that was saved before: how long training waits. 10,000 tensors of 16 KiB: at most
  twice as long as one memcpy of their bytes. 50,000 tensors of 64 bytes: at most 60 ms. For both as a state, and as the
  buffers of a module, whose ``state_dict()`` is timed too.
* 596 tensors of 16 MiB together: a load with the file dropped from the page cache takes no longer than ignite's
  ``Checkpoint.load_objects``. Free memory is touched first, since which of the two gets memory that a hypervisor has
  to provide anew decides more than the loads themselves.
* A tiny save on two Gloo ranks by a handler that keeps 20,000 checkpoints, all or by policies that combine, takes at
  most 1.2 times as long as by the same handler without them. By policies a save removes a file, too.

Run it as ``PYTHONPATH=. python ci/bench_small.py [--quick] [--rounds 7] [--folder DIR]``. ``--quick`` takes a tenth of
the tensors and 3 rounds. Exit status 1 if a file is larger than its limit. Times are printed and not judged, because
other work on the machine changes them.
"""

import argparse
import ctypes
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.handlers
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import multiprocessing, nn

from ci.savebench.first_touch import touch_free_memory
from distckpt import BestN, Checkpoint, DiskSaver, EveryNSteps, LastN, async_save
from distckpt.saving.staging import HostMemory

MAX_SIZE_RATIO = 1.3
MAX_HISTORY_RATIO = 1.2
NUM_KEPT = 20_000
STALL_BY_MEMCPY, STALL_S = 2.0, 0.060
NUM_SMALL, NUM_LAYERS, NUM_MEDIUM, MEDIUM_BYTES = 50_000, 4_000, 596, 16 << 20
WIDTH = 8


class Holder:
    """An object with a given state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        """Return the state."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Set the state."""
        self.state = state


class Buffers(nn.Module):
    """A module of equal buffers.

    Args:
        num: number of buffers.
        num_bytes: size of all buffers together.
    """

    def __init__(self, num: int, num_bytes: int) -> None:
        super().__init__()
        for number in range(num):
            self.register_buffer(f"buffer_{number}", torch.full((num_bytes // num // 4,), float(number)))


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    works: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Return the median seconds of two functions, which run alternately; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            before()
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    ours, theirs = (statistics.median(one[1:]) for one in seconds.values())
    return ours, theirs


def print_ratio(what: str, times: tuple[float, float], whose: str) -> None:
    """Print two times and their ratio."""
    ours, theirs = times
    mark = "" if ours <= theirs else "  ABOVE 1"
    print(f"  {what:12s} {ours:8.3f} s   {whose} {theirs:8.3f} s   x {ours / theirs:.2f}{mark}")


def print_sizes(own: Path, torchs: Path, bar: float) -> bool:
    """Print the sizes of two files; return True if distckpt's is within its limit."""
    ours, theirs = own.stat().st_size, torchs.stat().st_size
    print(f"  {'file':12s} {ours / 1e6:8.2f} MB  torch.save {theirs / 1e6:8.2f} MB  x {ours / theirs:.2f}")
    return ours <= bar * theirs


def bench_small_tensors(folder: Path, num: int, rounds: int) -> bool:
    """Save and load many tensors of 64 bytes."""
    state = {"m": {f"layer.{number}.weight": torch.full((16,), float(number)) for number in range(num)}}
    own, torchs, saver = folder / "own" / "a.pt", folder / "torch.pt", DiskSaver(folder / "own")
    print(f"{num} tensors of 64 bytes")
    times = measure({"own": lambda: saver(state, "a.pt"), "torch": lambda: torch.save(state, torchs)}, rounds)
    is_small_enough = print_sizes(own, torchs, MAX_SIZE_RATIO)
    print_ratio("saving", times, "torch.save")
    works = {
        "own": lambda: Checkpoint.load_objects({"m": Holder()}, own),
        "torch": lambda: torch.load(torchs, weights_only=True),
    }
    print_ratio("loading", measure(works, rounds), "torch.load")
    return is_small_enough


def bench_layers(folder: Path, num: int) -> bool:
    """Save small layers with AdamW's state."""
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    DiskSaver(folder / "layers")(state, "a.pt")
    torch.save(state, folder / "layers.pt")
    print(f"{num} layers of {WIDTH} x {WIDTH} with AdamW")
    return print_sizes(folder / "layers" / "a.pt", folder / "layers.pt", MAX_SIZE_RATIO)


def bench_stall(
    folder: Path, num: int, num_bytes: int, rounds: int, *, memcpy_limit: float = 0.0, limit_s: float = 0.0
) -> None:
    """Save equal tensors in the background, again and again.

    Args:
        folder: an existing folder.
        num: number of tensors.
        num_bytes: size of each.
        rounds: how often.
        memcpy_limit: longest stall, in times of one memcpy of all bytes.
        limit_s: longest stall in seconds, if that is more.
    """
    size = num * num_bytes
    source, target = (HostMemory().view(size) for _ in range(2))
    source[:], target[:] = bytes(size), bytes(size)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (target, source)]
    module = Buffers(num, size)
    objects: dict[str, Any] = {
        "a state": Holder({key: torch.clone(one) for key, one in module.state_dict().items()}),
        "a module": module,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", "state_dict()", *objects)}

    def clock(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - begin)
        return result

    for _ in range(rounds + 2):
        clock("memcpy", lambda: ctypes.memmove(addresses[0], addresses[1], size))
        clock("state_dict()", module.state_dict)
        for name, one in objects.items():
            clock(name, functools.partial(async_save, {"m": one}, folder / "stall.pt")).result()
    memcpy_s, state_dict_s, *stalls = (statistics.median(one[2:]) for one in seconds.values())
    print(f"{num} tensors of {num_bytes} bytes in the background, memcpy {1e3 * memcpy_s:.1f} ms")
    for name, stall_s in zip(objects, stalls, strict=True):
        mark = "" if stall_s <= max(memcpy_limit * memcpy_s, limit_s) else "  ABOVE THE LIMIT"
        first_s, part = (
            seconds[name][0],
            f", state_dict() {1e3 * state_dict_s:.1f} ms of it" if name == "a module" else "",
        )
        per_tensor = f"{1e6 * (stall_s - memcpy_s) / num:.2f} us a tensor beside the memcpy"
        print(
            f"  {name:12s} stall {1e3 * stall_s:7.1f} ms, x {stall_s / memcpy_s:.2f} memcpy, {per_tensor}; "
            f"the first save {1e3 * first_s:.1f} ms{part}{mark}"
        )


def bench_cold_load(folder: Path, num: int, num_bytes: int, rounds: int) -> bool:
    """Load tensors of some kilobytes each from storage."""
    model = Buffers(num, num_bytes)
    own, torchs = folder / "medium" / "a.pt", folder / "medium.pt"
    DiskSaver(folder / "medium")({"m": model.state_dict()}, "a.pt")
    torch.save({"m": model.state_dict()}, torchs)

    def drop_both() -> None:
        drop_from_page_cache(own)
        drop_from_page_cache(torchs)

    print(f"{num} tensors of {num_bytes >> 20} MiB together, from storage")
    is_small_enough = print_sizes(own, torchs, MAX_SIZE_RATIO)
    works = {
        "own": lambda: Checkpoint.load_objects({"m": model}, own),
        "ignite": lambda: ignite.handlers.Checkpoint.load_objects({"m": model}, torchs),
    }
    print_ratio("cold load", measure(works, rounds, drop_both), "ignite")
    return is_small_enough


def time_saves(rank: int, folder: Path, num_saves: int, results: Any) -> None:
    """Save by two handlers with `NUM_KEPT` older checkpoints and by their like without, in turn, on each rank."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trainer = Engine(lambda _engine, _batch: None)
    options: dict[str, dict[str, Any]] = {
        "all": {"n_saved": None},
        "policies": {"keep": [LastN(3), BestN(3), EveryNSteps(2)], "score_function": lambda _: 0.5},
    }
    handlers = {
        f"{name}{what}": Checkpoint(
            {"model": Holder({"weight": torch.ones(16)})},
            DiskSaver(folder / f"{name}{what}"),
            global_step_transform=lambda engine, _event: 2 * NUM_KEPT + engine.state.iteration,
            **options[name],
        )
        for name in options
        for what in ("", ", none kept")
    }
    seconds: dict[str, list[float]] = {name: [] for name in handlers}
    older = [(2 * number, f"model_{2 * number}.pt") for number in range(NUM_KEPT)]
    handlers["all"].load_state_dict({"_saved": older})
    # Their steps are in no file: they count as wanted.
    handlers["policies"].load_state_dict({"_saved": [(number / NUM_KEPT, name) for number, name in older]})

    @trainer.on(Events.EPOCH_COMPLETED)
    def save(engine: Engine) -> None:
        for name, handler in handlers.items():
            dist.barrier()
            begin = time.perf_counter()
            handler(engine)
            seconds[name].append(time.perf_counter() - begin)

    trainer.run([0], max_epochs=num_saves + 3)
    if rank == 0:
        results.put({name: statistics.median(times[3:]) for name, times in seconds.items()})
    dist.destroy_process_group()


def bench_long_history(folder: Path, num_saves: int) -> None:
    """Print what a long history adds to a save."""
    (folder / "history").mkdir()
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(time_saves, (folder / "history", num_saves, results), nprocs=2)  # type: ignore[no-untyped-call]  # torch ships it without types
    found = results.get()
    print(f"a tiny save on 2 ranks, {num_saves} in turn")
    for name, what in (("all", "all of"), ("policies", "by policies")):
        without = found[f"{name}, none kept"]
        ratio = found[name] / without
        mark = "" if ratio <= MAX_HISTORY_RATIO else f"  ABOVE {MAX_HISTORY_RATIO}"
        print(
            f"  {what:>11} {NUM_KEPT} kept {found[name] * 1e3:8.2f} ms, none kept {without * 1e3:8.2f} ms"
            f"  x {ratio:.2f}{mark}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="number of timed rounds (7)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (the working directory)")
    parser.add_argument("--history", action="store_true", help="measure the saves of a long history alone")
    parser.add_argument("--stalls", action="store_true", help="measure the stalls of background saves alone")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tensors, 3 rounds")
    arguments = parser.parse_args()
    divisor, rounds = (10, arguments.rounds or 3) if arguments.quick else (1, arguments.rounds or 7)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd(), prefix=".bench-small-") as text:
        folder = Path(text)
        if not arguments.stalls:
            bench_long_history(folder, 50 if arguments.quick else 300)
        if arguments.history:
            return 0
        bench_stall(folder, 10_000 // divisor, 16 << 10, rounds, memcpy_limit=STALL_BY_MEMCPY)
        bench_stall(folder, 50_000 // divisor, 64, rounds, limit_s=STALL_S)
        if arguments.stalls:
            return 0
        good = [
            bench_small_tensors(folder, NUM_SMALL // divisor, rounds),
            bench_layers(folder, NUM_LAYERS // divisor),
        ]
        if not arguments.quick:
            print(touch_free_memory(), flush=True)
        good.append(bench_cold_load(folder, NUM_MEDIUM, MEDIUM_BYTES, rounds))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
