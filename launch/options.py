"""The command line of the training scripts: options, defaults and help.

A wrong option ends the program before ranks are started.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What one run is to do. The same on every rank."""

    output_dir: Path
    epochs: int
    batch_size: int
    lr: float
    patience: int
    time_limit_s: int
    save_every: int
    seed: int
    resume: bool
    backend: str
    nproc_per_node: int | None
    summary: Path | None
    table: bool
    grace_s: float | None
    preempted_exit_code: int
    ballast_mb: int
    die_in_save: int | None
    fault: Fault | None
    tp: int = 1


def parse(argv: Sequence[str] | None = None, *, program: str = "train_digits.py") -> Config:
    """Read the command line.

    Args:
        argv: the arguments; ``None`` takes the process's own.
        program: the script; ``train_fsdp.py`` has ``--tp``.

    Raises:
        SystemExit: help was asked for, or an argument is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train a small network on scikit-learn's handwritten digits, on any number of ranks.",
    )
    add = parser.add_argument
    is_sharded = program == "train_fsdp.py"
    where = Path("runs/fsdp" if is_sharded else "runs/digits")
    add(
        "--output-dir",
        type=Path,
        default=where,
        metavar="DIR",
        help="for checkpoints; all ranks share it (%(default)s)",
    )
    add("--epochs", type=positive_number, default=12, metavar="N", help="passes over the data (%(default)s)")
    add(
        "--batch-size",
        type=positive_number,
        default=64,
        metavar="N",
        help="of all ranks together (%(default)s)",
    )
    add("--lr", type=positive_float, default=3e-3, metavar="X", help="learning rate at first (%(default)s)")
    add(
        "--patience",
        type=positive_number,
        default=5,
        metavar="N",
        help="stop after N epochs without a better accuracy (%(default)s)",
    )
    add(
        "--time-limit-s",
        type=positive_number,
        default=28800,
        metavar="N",
        help="stop after N seconds (%(default)s)",
    )
    add(
        "--save-every",
        type=positive_number,
        default=1,
        metavar="N",
        help="save the latest state every N epochs (%(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="for parameters, order of data, dropout (%(default)s)",
    )
    add("--resume", action="store_true", help="go on from the newest latest_*.pt in DIR, if there is one")
    add(
        "--grace-s",
        type=positive_float,
        metavar="X",
        help="seconds between SIGTERM and the end by force, if known: said in the log where a save takes longer",
    )
    add(
        "--preempted-exit-code",
        type=natural_number,
        default=0,
        metavar="N",
        help="end with this code when the run was told to stop, and saved (%(default)s; 75: put me back in the queue)",
    )
    add("--summary", type=Path, metavar="FILE", help="write what the run came to into FILE, as JSON")
    add("--no-table", dest="table", action="store_false", help="do not print what the run came to")

    add = parser.add_argument_group("ranks").add_argument
    add(
        "--backend",
        choices=["auto", "none", "gloo", "nccl", "horovod", "xla"],
        default="auto",
        help="how ranks talk (auto: horovod under horovodrun, else nccl with GPUs, else gloo); xla starts a replica of "
        "torch_xla's on each device of this machine",
    )
    add("--nproc-per-node", type=positive_number, metavar="N", help="start N ranks here, without any launcher")
    if is_sharded:
        add("--tp", type=positive_number, default=1, metavar="N", help="ranks that split each layer (%(default)s)")

    add = parser.add_argument_group("faults, for the demo and the tests").add_argument
    add(
        "--ballast-mb",
        type=natural_number,
        default=0,
        metavar="N",
        help="make the latest checkpoint N MiB larger",
    )
    add(
        "--die-in-save",
        type=positive_number,
        metavar="N",
        help="SIGKILL rank 0 in the middle of its N-th save",
    )
    add(
        "--fault",
        type=fault,
        metavar="KIND@ITERATION:RANK",
        help="nan, sigterm or sigkill, in one iteration of the first start, on one rank: nan@50:1",
    )

    options = parser.parse_args(argv)
    if options.backend == "none" and options.nproc_per_node is not None:
        parser.error("argument --nproc-per-node: needs a --backend other than none")
    if options.backend == "xla" and options.nproc_per_node is not None:
        parser.error("argument --nproc-per-node: torch_xla starts a replica on each device; limit those instead")
    return Config(**vars(options))


def fault(text: str) -> Fault:
    """Read a fault."""
    try:
        return Fault.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def natural_number(text: str) -> int:
    """Read an integer from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"should not be negative, but given {text}")
    return value


def positive_number(text: str) -> int:
    """Read an integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, but given {text}")
    return value


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a finite number above 0, but given {text}")
    return value
