"""Run the demo: an undisturbed run; the same run killed in a save and resumed; NaN, SIGTERM, a restart, sharded state.

After each act, its result is checked by directory listings and plain ``torch.load``, without distckpt.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from die_in_save import unfinished
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
NUM_RANKS = 2
EPOCHS = 8
DEADLY_SAVE = 4
BALLAST_MB = 96
# Where arithmetic is not deterministic (GPUs), a resumed run may end this far from the other one.
NOISE = 0.01
# On another number of ranks the batches are others.
OTHER_RANKS = 0.05
NUM_SAMPLES, BATCH_SIZE = 1437, 64
ACT_LIMIT_S = 180.0
# torchrun gives its ranks 30 s to end before it kills them.
END_LIMIT_S = 45.0
TIMED_OUT = 124
INTERRUPTED = 130

ALONE = "1  Train, left alone"
KILLED = "2  Train, killed in the middle of a save"
RESUMED = "3  Resume"
BROKEN = "4  Train, the loss of one rank becomes NaN"
TOLD = "5  Train, one rank is told to stop (SIGTERM) in the middle of an epoch; resume"
RESTARTED = "6  Train, one rank is killed, and torchrun starts all again (--max-restarts 1)"
MOVED = "7  Train on two ranks, told to stop in the middle of an epoch; resume on three"
SHARDED = (
    "8  Train with sharded state (FSDP2), killed in a save; resume on four ranks with tensor parallelism; open the file"
)

SHARDED_EPOCHS, DEADLY_SHARDED_SAVE = 4, 3

# In the middle of an epoch: one has 22 iterations.
NAN_AT, TOLD_AT, KILLED_AT = 50, 75, 120


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that had to be true, and whether it is."""

    act: str
    is_true: bool
    text: str


@dataclass(frozen=True, slots=True)
class Demo:
    """Where things lie, where they are shown, and what was found."""

    directory: Path
    console: Console
    findings: list[Finding] = field(default_factory=list)

    def find(self, act: str, text: str, *, is_true: bool) -> bool:
        """Keep a finding for the table, and hand `is_true` back."""
        self.findings.append(Finding(act, is_true, text))
        return is_true

    def summary(self, name: str) -> dict[str, Any]:
        """Return what a run wrote about itself."""
        content: dict[str, Any] = json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))
        return content

    def output(self, name: str) -> str:
        """Return what a run's ranks wrote on standard error."""
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def train(self, act: str, name: str, *arguments: str, epochs: int = EPOCHS, **variables: str) -> int:
        """Run a training script under torchrun.

        The ranks' standard output is shown; their standard error, full of tracebacks when one is killed, is
        added to a log.

        Returns:
            Its exit code, or :data:`TIMED_OUT` when it had to be ended.
        """
        self.console.print(f"\n[bold]{act}[/bold]")
        command = ["bash", str(HERE / "torchrun.sh"), "--epochs", str(epochs), "--no-table"]
        command += [
            "--output-dir",
            str(self.directory / name),
            "--summary",
            str(self.directory / f"{name}.json"),
        ]
        environment = os.environ | {"PYTHON": sys.executable, "NPROC_PER_NODE": str(NUM_RANKS), "NNODES": "1"}
        environment |= variables
        with (
            (self.directory / f"{name}.log").open("ab") as log,
            subprocess.Popen([*command, *arguments], env=environment, stderr=log) as process,  # noqa: S603 - ours
        ):
            try:
                return process.wait(ACT_LIMIT_S)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait(END_LIMIT_S)
                self.console.show_cursor()  # a rank that was killed with its progress bar leaves it hidden


def main() -> int:
    """Play the acts, show what came of them, and return the exit code."""
    begin = time.monotonic()
    console = Console(highlight=False)
    directory = Path(os.environ.get("DEMO_DIR") or tempfile.mkdtemp(prefix="distckpt-demo-")).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        console.print(f"DEMO_DIR should name an empty or new directory, but {directory} holds files", soft_wrap=True)
        return 2

    demo = Demo(directory, console)
    if train_alone(demo) and train_and_kill(demo) and resume(demo):
        break_one_rank(demo)
        tell_one_rank_to_stop(demo)
        kill_one_rank_and_restart(demo)
        go_on_with_another_number_of_ranks(demo)
        shard_and_open(demo)
        console.print(comparison(demo))
    console.print(happenings(demo))

    console.print(f"checkpoints and logs: {directory}", soft_wrap=True)
    failed = [finding for finding in demo.findings if not finding.is_true]
    if failed:
        console.print(f"[bold red]FAILED[/bold red] in act {failed[0].act}: {failed[0].text}", soft_wrap=True)
        return 1
    seconds = time.monotonic() - begin
    console.print(
        f"[bold green]OK[/bold green]: killed, broken and told to stop, and nothing was lost ({seconds:.0f} s)"
    )
    return 0


def train_alone(demo: Demo) -> bool:
    """Act 1: train without a fault."""
    code = demo.train(ALONE, "alone")
    return demo.find(ALONE, f"trained {EPOCHS} epochs on {NUM_RANKS} ranks{_unless_zero(code)}", is_true=code == 0)


def train_and_kill(demo: Demo) -> bool:
    """Act 2: the same, but the saving rank is killed in its fourth save; look at what it left."""
    code = demo.train(KILLED, "killed", "--ballast-mb", str(BALLAST_MB), "--die-in-save", str(DEADLY_SAVE))
    directory = demo.directory / "killed"
    leftovers = unfinished(directory) if directory.is_dir() else {}
    if demo.console.is_terminal:
        demo.console.print()  # the progress bar ended with its rank, in the middle of the line
    written = " and ".join(f"{num_bytes / 1e6:.0f} MB" for num_bytes in leftovers.values()) or "nothing"
    demo.console.print(f"rank 0 is dead, {written} into a save; torchrun ended with exit code {code}")
    demo.find(
        KILLED,
        f"SIGKILL hit rank 0 in the middle of a save: {written} of an unfinished file left behind",
        is_true=code not in (0, TIMED_OUT) and bool(leftovers),
    )
    newest = max(directory.glob("latest_*.pt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        return demo.find(KILLED, "an earlier checkpoint is left", is_true=False)
    try:
        epoch = epoch_of(newest)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it belongs into the table
        return demo.find(KILLED, f"{newest.name} loads: {error}", is_true=False)
    size = newest.stat().st_size / 1e6
    return demo.find(KILLED, f"{newest.name} ({size:.0f} MB) stands: torch.load reads epoch {epoch}", is_true=True)


def resume(demo: Demo) -> bool:
    """Act 3: go on from what is left, and compare with the run that was left alone."""
    directory = demo.directory / "killed"
    before = unfinished(directory)
    code = demo.train(RESUMED, "killed", "--resume")
    if not demo.find(RESUMED, f"trained to the end{_unless_zero(code)}", is_true=code == 0):
        return False
    resumed = demo.summary("killed")
    first = resumed["first_epoch"]
    demo.find(
        RESUMED,
        f"went on from {resumed['resumed_from']} with epoch {first}",
        is_true=resumed["resumed_from"] is not None and first > 1,
    )
    after = unfinished(directory)
    demo.find(
        RESUMED,
        f"unfinished files: {len(before)} before, {len(after)} after",
        is_true=not after,
    )
    ended_as_act_1_did(demo, RESUMED, resumed)
    return True


def ended_as_act_1_did(demo: Demo, act: str, run: dict[str, Any]) -> None:
    """Compare how a run ended with the one that was left alone."""
    alone = demo.summary("alone")
    distance = abs(alone["val_acc"] - run["val_acc"])
    is_equal = alone["parameters_sha256"] == run["parameters_sha256"]
    how = "bit-equal parameters" if is_equal else f"accuracy {distance:.2%} apart"
    demo.find(act, f"ended where act 1 did: {how}", is_true=distance <= NOISE)


def break_one_rank(demo: Demo) -> None:
    """Act 4: the loss is NaN on rank 1; both ranks stop in that iteration, and it is not saved."""
    code = demo.train(BROKEN, "broken", "--fault", f"nan@{NAN_AT}:1")
    run = demo.summary("broken") if code == 0 else {}
    demo.find(
        BROKEN,
        f"rank 1 was broken in iteration {NAN_AT}: {run.get('stopped')}; the ranks stopped at iterations "
        f"{run.get('iterations')}{_unless_zero(code)}",
        is_true=run.get("iterations") == [NAN_AT] * NUM_RANKS and run["stopped"] == "the loss is no finite number",
    )
    told = f"rank 1, iteration {NAN_AT}: output is nan"
    demo.find(BROKEN, f"both logs name it: {told}", is_true=demo.output("broken").count(told) >= NUM_RANKS)
    files = sorted((demo.directory / "broken").glob("*.pt"))
    demo.find(BROKEN, f"none of the {len(files)} checkpoints holds a NaN", is_true=all(map(is_finite, files)))


def tell_one_rank_to_stop(demo: Demo) -> None:
    """Act 5: rank 1 gets SIGTERM in the middle of an epoch; both save and stop. Then resume."""
    code = demo.train(TOLD, "told", "--fault", f"sigterm@{TOLD_AT}:1")
    run = demo.summary("told") if code == 0 else {}
    demo.find(
        TOLD,
        f"rank 1 got SIGTERM in iteration {TOLD_AT}: the ranks stopped at iterations {run.get('iterations')}"
        f"{_unless_zero(code)}",
        is_true=run.get("iterations") == [TOLD_AT] * NUM_RANKS,
    )
    newest = max((demo.directory / "told").glob("latest_*.pt"), key=iteration_of, default=None)
    saved = None if newest is None else iteration_of(newest)
    demo.find(TOLD, f"{newest and newest.name} holds iteration {saved}", is_true=saved == TOLD_AT)
    code = demo.train(TOLD, "told", "--resume")
    if demo.find(TOLD, f"resumed, and trained to the end{_unless_zero(code)}", is_true=code == 0):
        ended_as_act_1_did(demo, TOLD, demo.summary("told"))


def kill_one_rank_and_restart(demo: Demo) -> None:
    """Act 6: rank 0 is killed between saves; torchrun starts both ranks again, and they go on."""
    code = demo.train(RESTARTED, "restarted", "--fault", f"sigkill@{KILLED_AT}:0", MAX_RESTARTS="1")
    if demo.find(
        RESTARTED, f"SIGKILL hit rank 0; trained to the end all the same{_unless_zero(code)}", is_true=code == 0
    ):
        run = demo.summary("restarted")
        epoch_length = run["iterations"][0] // run["epoch"]
        cost = KILLED_AT - (run["first_epoch"] - 1) * epoch_length
        demo.find(
            RESTARTED,
            f"went on from {run['resumed_from']}: the death cost {cost} iterations",
            is_true=0 < cost <= epoch_length,
        )
        ended_as_act_1_did(demo, RESTARTED, run)


def go_on_with_another_number_of_ranks(demo: Demo) -> None:
    """Act 7: two ranks are told to stop in the middle of an epoch; three go on, and no sample comes twice."""
    code = demo.train(MOVED, "moved", "--fault", f"sigterm@{TOLD_AT}:1")
    before = demo.summary("moved")["samples"] if code == 0 else {}
    code = code or demo.train(MOVED, "moved", "--resume", NPROC_PER_NODE=str(NUM_RANKS + 1))
    if not demo.find(MOVED, f"resumed, and trained to the end{_unless_zero(code)}", is_true=code == 0):
        return
    run = demo.summary("moved")
    epoch = str(run["first_epoch"])
    first, rest = before.get(epoch, []), run["samples"].get(epoch, [])
    num_left = NUM_SAMPLES - len({*first, *rest})
    demo.find(
        MOVED,
        f"epoch {epoch}: {len(first)} samples on {NUM_RANKS} ranks, {len(rest)} others on {run['world_size']}, none "
        f"twice; {num_left} at its end do not make a whole batch",
        is_true=bool(first) and len({*first, *rest}) == len(first) + len(rest) and num_left < BATCH_SIZE,
    )
    distance = abs(demo.summary("alone")["val_acc"] - run["val_acc"])
    demo.find(MOVED, f"accuracy {distance:.2%} apart from act 1's", is_true=distance <= OTHER_RANKS)


def shard_and_open(demo: Demo) -> None:
    """Act 8: two ranks have shards; one is killed in a save. Four go on, 2 x 2, and a plain script opens the file."""
    script, directory = str(HERE / "train_fsdp.py"), demo.directory / "sharded"
    fault = ("--ballast-mb", str(BALLAST_MB), "--die-in-save", str(DEADLY_SHARDED_SAVE))
    code = demo.train(SHARDED, "sharded", *fault, epochs=SHARDED_EPOCHS, SCRIPT=script)
    leftovers = unfinished(directory) if directory.is_dir() else {}
    demo.find(
        SHARDED,
        "SIGKILL hit rank 0 in the middle of a save that all ranks write",
        is_true=code not in (0, TIMED_OUT) and bool(leftovers),
    )
    ranks = {"SCRIPT": script, "NPROC_PER_NODE": str(2 * NUM_RANKS)}
    code = demo.train(SHARDED, "sharded", "--resume", "--tp", "2", epochs=SHARDED_EPOCHS, **ranks)
    if not demo.find(SHARDED, f"resumed, and trained to the end{_unless_zero(code)}", is_true=code == 0):
        return
    run = demo.summary("sharded")
    what = f"went on from {run['resumed_from']} on {run['world_size']} ranks, 2 shards x 2 halves of each layer"
    demo.find(SHARDED, what, is_true=run["resumed_from"] is not None and run["first_epoch"] > 1)
    newest = directory / run["checkpoints"][-1]
    plain = [sys.executable, str(HERE / "accuracy.py"), str(newest)]
    ended = subprocess.run(plain, capture_output=True, text=True, timeout=ACT_LIMIT_S, check=False)  # noqa: S603 - ours
    accuracy = float(ended.stdout.split()[-1]) if ended.returncode == 0 else None
    demo.find(
        SHARDED,
        f"{newest.name} is one plain file: a script without distckpt finds accuracy {accuracy}, as the ranks do",
        is_true=accuracy is not None and abs(accuracy - run["val_acc"]) <= NOISE,
    )


def is_finite(checkpoint: Path) -> bool:
    """Tell whether plain ``torch.load`` finds finite numbers only."""
    import torch  # noqa: PLC0415 - as below

    def is_fine(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return bool(torch.isfinite(value).all())
        if isinstance(value, dict):
            return all(map(is_fine, value.values()))
        return all(map(is_fine, value)) if isinstance(value, list | tuple) else value == value  # noqa: PLR0124 - NaN

    return is_fine(torch.load(checkpoint, weights_only=True, map_location="cpu"))


def iteration_of(checkpoint: Path) -> int:
    """Return the iteration after which `checkpoint` was written, as plain ``torch.load`` finds it."""
    import torch  # noqa: PLC0415 - as below

    return int(torch.load(checkpoint, weights_only=True, map_location="cpu")["trainer"]["iteration"])


def epoch_of(checkpoint: Path) -> int:
    """Return the epoch after which `checkpoint` was written, as plain ``torch.load`` finds it."""
    import torch  # noqa: PLC0415 - two seconds that nobody should wait for before the first act

    trainer = torch.load(checkpoint, weights_only=True, map_location="cpu")["trainer"]
    return int(trainer["iteration"]) // int(trainer["epoch_length"])


def comparison(demo: Demo) -> Table:
    """Return the two runs side by side."""
    alone, resumed = demo.summary("alone"), demo.summary("killed")
    table = Table(title="\nSide by side", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("left alone", overflow="fold")
    table.add_column("killed and resumed", overflow="fold")
    first = resumed["first_epoch"]
    table.add_row("epochs", f"1 to {alone['epoch']}", f"1 to {first - 1}, killed, {first} to {resumed['epoch']}")
    for title, key in (("val accuracy", "val_acc"), ("best", "best_val_acc")):
        table.add_row(title, f"{alone[key]:.2%}", f"{resumed[key]:.2%}")
    table.add_row("parameters", *(f"sha256 {run['parameters_sha256'][:12]}" for run in (alone, resumed)))
    table.add_row("checkpoints", "\n".join(alone["checkpoints"]), "\n".join(resumed["checkpoints"]))
    return table


def happenings(demo: Demo) -> Table:
    """Return all findings, act by act."""
    table = Table(title="\nWhat happened", title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    previous = None
    for finding in demo.findings:
        if finding.act != previous:
            table.add_row(finding.act[0], finding.act[3:], style="bold")
        table.add_row("[green]yes[/green]" if finding.is_true else "[bold red]NO[/bold red]", finding.text)
        previous = finding.act
    return table


def _unless_zero(code: int) -> str:
    return f", but it ended with exit code {code}: see the log" if code else ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
