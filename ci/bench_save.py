"""Compare the cost of saving and loading: distckpt, torch, ignite and torchsnapshot, and the machine's limits.

A small GPT with AdamW is trained under DistributedDataParallel in an ignite Engine. In each round every contestant
saves once during the training and loads the checkpoint, in rotating order. The machine's limits are measured in
between. Figures are medians over rounds, ratios are of the same round. The restored state must be bit-equal to the
state at the call.

With ``--sharded`` the state is that of FSDP2. A second world, of another size, loads the same checkpoints.
With ``--device cuda`` it is on the GPU: each rank has one, or ranks share them over Gloo.

Run it as ``PYTHONPATH=. python ci/bench_save.py [--sharded] [--device cuda] [--quick] [--ranks 1 2 4] [--mib 512]
[--rounds 5] [--only NAME...] [--folder DIR] [--json FILE] [--picture FILE]``. torchsnapshot and torch_checkpointing
take part if they are installed, as in the environment of ``ci/setup.sh --print-python bench``.

The exit status is 1 if one of distckpt's contestants fails or restores another state.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ci.build_native import build_in_place
from ci.savebench.field import FIELD, names_of
from ci.savebench.files import file_system_of
from ci.savebench.first_touch import touch_free_memory
from ci.savebench.picture import picture_of
from ci.savebench.rank import MEMORY_ROUND, Plan
from ci.savebench.sharded_table import LEGEND as SHARDED_LEGEND
from ci.savebench.sharded_table import sharded_table_of
from ci.savebench.summary import Row, loads_of, rows_of
from ci.savebench.table import LEGEND, MIB, table_of
from ci.savebench.world import Measured, measure_world, progress, scratch_folder

FULL = {"ranks": [1, 2, 4], "mib": 512, "rounds": 5}
FULL_SHARDED = {"ranks": [2, 4], "mib": 1024, "rounds": 5}
QUICK = {"ranks": [2], "mib": 16, "rounds": 1}
QUICK_OTHERS = ("torch.save", "DCP save")
"""What a quick run compares distckpt with."""
OTHER_SIZES = {1: 2, 2: 4, 4: 2}
"""Number of ranks that load what so many ranks have saved."""
PICTURED = 2  # ranks
ENDED = 128 + signal.SIGTERM
PACKAGES = ("torch", "pytorch-ignite", "torchsnapshot", "torch_checkpointing", "isal")


def versions(folder: Path) -> dict[str, Any]:
    """Return what the figures depend on. Compiles the extension, which the ranks import later."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": file_system_of(folder),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": build_in_place() or "compiled",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def picture(worlds: list[Measured], about: dict[str, Any]) -> str:
    """Return the picture for two ranks; without these for the last world."""
    world = next((one for one in worlds if one.world_size == PICTURED), worlds[-1])
    order = list(FIELD)
    rows: list[Row] = sorted(rows_of(world), key=lambda row: order.index(row.name))
    size, where = f"{world.num_bytes / MIB:.0f} MiB", f"{about['num_cpus']} CPUs, {about['file_system']}"
    return picture_of(
        rows,
        title=f"Training time that a checkpoint of {size} costs on {world.world_size} ranks",
        notes=f"{where}, torch {about['torch']}; medians of one interleaved run; less is better",
    )


def is_sound(world: Measured) -> bool:
    """Return True if distckpt's contestants restored what they saved. A missing one is no failure."""
    failed = [name for name, why in world.left_out.items() if FIELD[name].is_ours and why.startswith("FAILED")]
    return not failed and not any(row.num_torn for row in rows_of(world) if FIELD[row.name].is_ours)


def loads_soundly(world: Measured) -> bool:
    """Return True if a world of another size has restored what distckpt's contestants saved."""
    failed = [name for name in world.left_out if FIELD[name].is_ours]
    return not failed and not any(row.num_torn for name, row in loads_of(world).items() if FIELD[name].is_ours)


def load_elsewhere(plan: Plan, saved: Measured, *, is_quick: bool, limit_s: float) -> Measured | None:
    """Load the checkpoints that a world has saved on another number of ranks; None if none can share the devices."""
    if plan.device == "cuda":
        return None
    names = [name for name in saved.rounds if name in FIELD and FIELD[name].reshards and name not in saved.left_out]
    found = {name: saved.rounds[name][plan.num_rounds] for name in names}
    plan = dataclasses.replace(
        plan,
        world_size=1 if is_quick else OTHER_SIZES.get(plan.world_size, 2),
        names=tuple(found),
        first_round=0,
        journal=plan.journal.with_name(f"{plan.journal.name}-loads"),
        saved={name: (one["where"], one["saved"]) for name, one in found.items()},
    )
    return measure_world(plan, limit_s=limit_s, tell=progress)


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharded", action="store_true", help="the state is that of FSDP2: each rank has a shard")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the state is (cpu)")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (1 2 4; 2 4 with --sharded)")
    parser.add_argument("--mib", type=int, help="size of the model and AdamW's state (512; 1024 with --sharded)")
    parser.add_argument("--rounds", type=int, help="number of timed rounds (5)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(FIELD), help=f"of: {', '.join(FIELD)}")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (a folder in the user's cache)")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--picture", type=Path, help="file for the bars of two ranks, as SVG")
    parser.add_argument("--no-touch", dest="touch", action="store_false", help="do not touch all free memory first")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one measurement of one contestant (150)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"16 MiB, 1 round, 2 ranks; of the others {' and '.join(QUICK_OTHERS)} only",
    )
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL_SHARDED if arguments.sharded else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.only is None:
        names = names_of(is_sharded=arguments.sharded, device=arguments.device)
        arguments.only = [name for name in names if not arguments.quick or FIELD[name].is_ours or name in QUICK_OTHERS]
    if arguments.picture is not None and arguments.sharded:
        parser.error("argument --picture: not with --sharded")
    return arguments


def main() -> int:
    """Measure, print the tables, and write the files."""
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # after ending the ranks and removing the folder
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    worlds, loads = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder or scratch_folder()) as text:
        folder = Path(text)
        about = versions(folder)
        if arguments.touch and not arguments.quick:
            progress(touch_free_memory())
        for world_size in arguments.ranks:
            plan = Plan(
                world_size=world_size,
                state_bytes=arguments.mib * MIB,
                names=tuple(arguments.only),
                first_round=0 if arguments.quick else MEMORY_ROUND,
                num_rounds=arguments.rounds,
                folder=folder / str(world_size),
                journal=folder / f"journal-{world_size}",
                port=0,
                is_sharded=arguments.sharded,
                device=arguments.device,
            )
            plan.folder.mkdir()
            world = measure_world(plan, limit_s=arguments.limit, tell=progress)
            worlds.append(world)
            if arguments.sharded:
                loaded = load_elsewhere(plan, world, is_quick=arguments.quick, limit_s=arguments.limit)
                if loaded is not None:
                    loads.append(loaded)
                print(sharded_table_of(world, loaded) + "\n", flush=True)
                shutil.rmtree(plan.folder)
            else:
                print(table_of(world) + "\n", flush=True)
    print(SHARDED_LEGEND if arguments.sharded else LEGEND)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if arguments.json is not None:
        found = {"about": about, "worlds": [dataclasses.asdict(world) for world in worlds]}
        found |= {"loads": [dataclasses.asdict(world) for world in loads]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        arguments.picture.write_text(picture(worlds, about), encoding="utf-8")
    return int(not (all(map(is_sound, worlds)) and all(map(loads_soundly, loads))))


if __name__ == "__main__":
    sys.exit(main())
