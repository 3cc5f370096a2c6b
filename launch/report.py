"""Show a run's progress bar, the table at its end, and a summary for programs.

Only rank 0 shows anything. The module issues no collectives, so that the other ranks never wait for a terminal.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ignite.engine import Engine, Events
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What one run came to.

    Attributes:
        stopped: why it stopped, in words.
        resumed_from: name of the checkpoint it went on from, if any.
        first_epoch: the first epoch this process trained.
        epoch: the last complete epoch.
        iterations: the last iteration of each rank.
        samples: the numbers of the samples that all ranks trained in this process's first and last epoch, by epoch.
        val_acc: accuracy on the validation samples after it; ``None`` before the first.
        best_val_acc: the best accuracy of any epoch, those before a resume included.
        parameters_sha256: digest of the final parameters: two runs are bit-equal where it is the same.
        checkpoints: names of the checkpoint files there are now.
        best_checkpoint: the one of them with the best accuracy.
        world_size: number of ranks.
        backend: how they talked.
        seconds: wall time of training, evaluation and saves.
    """

    stopped: str
    resumed_from: str | None
    first_epoch: int
    epoch: int
    iterations: Sequence[int]
    samples: Mapping[str, Sequence[int]]
    val_acc: float | None
    best_val_acc: float | None
    parameters_sha256: str
    checkpoints: Sequence[str]
    best_checkpoint: str | None
    world_size: int
    backend: str
    seconds: float

    def write(self, path: Path) -> None:
        """Write it to `path`, as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class Display:
    """The progress of one training run, on the terminal; a line for each epoch where there is none.

    Args:
        title: a few words before the bar.
        is_shown: whether this rank shows anything; on the others every method only passes.
    """

    def __init__(self, title: str, *, is_shown: bool) -> None:
        self._console = Console(quiet=not is_shown, highlight=False)
        self._has_bar = is_shown and sys.stdout.isatty()
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._has_bar,
            redirect_stderr=sys.stderr.isatty(),
            expand=True,
        )
        self._bar = self._progress.add_task(title, total=None, facts="")

    def say(self, text: str) -> None:
        """Print one line, above the bar."""
        self._progress.console.print(text, soft_wrap=True, markup=False)

    def attach(self, trainer: Engine) -> None:
        """Follow `trainer`. Its handlers that put ``val_acc`` among its metrics are to be attached before."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=5), self._advance)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def close(self) -> None:
        """Leave the terminal as it was, whatever happened."""
        self._progress.stop()

    def _start(self, trainer: Engine) -> None:
        state = trainer.state
        self._progress.update(
            self._bar, total=(state.max_epochs or 0) * (state.epoch_length or 0), completed=state.iteration
        )
        self._progress.start()

    def _advance(self, trainer: Engine) -> None:
        self._progress.update(self._bar, completed=trainer.state.iteration, facts=_facts(trainer))

    def _epoch(self, trainer: Engine) -> None:
        self._advance(trainer)
        if not self._has_bar:
            self.say(_facts(trainer))

    def table(self, summary: Summary, directory: Path) -> None:
        """Print what the run came to, and which checkpoints exist."""
        table = Table(title=self._title, title_justify="left", show_header=False, title_style="bold")
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("stopped", summary.stopped)
        epochs = f"epochs {summary.first_epoch} to {summary.epoch}"
        if summary.epoch < summary.first_epoch:
            epochs = "no whole epoch"
        origin = f"from {summary.resumed_from}, " if summary.resumed_from else ""
        table.add_row("trained", f"{origin}{epochs}, {summary.seconds:.1f} s")
        table.add_row("val accuracy", f"{_percent(summary.val_acc)}, best {_percent(summary.best_val_acc)}")
        for index, name in enumerate(summary.checkpoints):
            size = (directory / name).stat().st_size
            best = "  (best)" if name == summary.best_checkpoint else ""
            table.add_row("" if index else "checkpoints", f"{name}  {size / 1024:,.0f} KiB{best}")
        self._console.print(table)


def _facts(trainer: Engine) -> str:
    state = trainer.state
    accuracy = _percent(state.metrics.get("val_acc"))
    return f"epoch {state.epoch:>2}/{state.max_epochs}  loss {state.output:.4f}  val accuracy {accuracy}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over all tensors of a state, so that two runs can be told to be bit-equal."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.cpu().numpy().tobytes())
    return sha.hexdigest()
