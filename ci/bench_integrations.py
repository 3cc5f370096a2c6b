"""Compare the callbacks of distckpt.integrations with the checkpointing of the Trainers that they are for.

    python ci/bench_integrations.py [--quick] [--width N] [--rounds N] [--kills N] [--directory DIR]

A small GPT-2 is trained on the CPU by Hugging Face's Trainer and by Lightning's, each with its own checkpoints and with
distckpt's, in turn. Printed for each, as medians over the saves:

* stall: by how much a save lengthens the time between two steps;
* durable: from the end of the step until the file is synced. The Trainers sync nothing: until they have written;
* kills: processes killed by SIGKILL at a random moment of their second or third save, and how many of these left a
  newest checkpoint that does not load. The Trainers resume from the newest.
"""

import argparse
import json
import logging
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning import Trainer as LightningTrainer
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import distckpt
from distckpt import CheckpointEvents
from distckpt.integrations.lightning import DistckptCallback as LightningDistckpt
from distckpt.integrations.transformers import DistckptCallback as TrainerDistckpt

EVERY, NUM_SAVES = 6, 3
NUM_STEPS = EVERY * (NUM_SAVES + 1) - 1
NUM_TOKENS, LENGTH, BATCH = 1000, 16, 2
LIMIT_S = 600.0


@dataclass
class Times:
    """When steps began and ended, and when saves were complete.

    Attributes:
        tell: called at the end of a step that a save follows.
    """

    tell: Callable[[], object]
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Note the beginning of a step."""
        self.begins.append(time.perf_counter())

    def end(self, step: int) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())
        if step % EVERY == 0:
            self.due.append(self.ends[-1])
            self.tell()

    def save(self, *_: Any) -> None:
        """Note that a save is complete."""
        self.done.append(time.perf_counter())

    def results(self) -> dict[str, float]:
        """Return stall and time until durable, in seconds."""
        gaps = [begin - end for end, begin in zip(self.ends, self.begins[1:], strict=False)]
        usual = statistics.median(gap for at, gap in enumerate(gaps, start=1) if at % EVERY)
        saves = statistics.median(gap for at, gap in enumerate(gaps, start=1) if at % EVERY == 0)
        durable = statistics.median(done - due for due, done in zip(self.due, self.done, strict=True))
        step = statistics.median(end - begin for begin, end in zip(self.begins, self.ends, strict=True))
        return {"stall_s": saves - usual, "durable_s": durable, "step_s": step}


def make_model(width: int) -> GPT2LMHeadModel:
    """Return a GPT-2 of four layers."""
    torch.manual_seed(1)
    sizes = {"vocab_size": NUM_TOKENS, "n_positions": LENGTH, "n_embd": width, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


class _Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return NUM_STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((LENGTH,), index)
        return {"input_ids": tokens, "labels": tokens}


class _TrainerTimes(TrainerCallback):  # type: ignore[misc]  # checked without transformers
    def __init__(self, times: Times) -> None:
        self._times = times

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._times.begin()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._times.end(state.global_step)

    def on_save(self, *_: Any, **__: Any) -> None:
        self._times.save()


class _LightningTimes(Callback):  # type: ignore[misc]  # checked without Lightning
    def __init__(self, times: Times) -> None:
        self._times = times

    def on_train_batch_start(self, *_: Any) -> None:
        self._times.begin()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._times.end(trainer.global_step)


class _TimedCheckpoint(ModelCheckpoint):  # type: ignore[misc]  # checked without Lightning
    def __init__(self, times: Times, **options: Any) -> None:
        super().__init__(**options)
        self._times = times

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._times.save()


class _Module(LightningModule):  # type: ignore[misc]  # checked without Lightning
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = make_model(width)

    def training_step(self, batch: Any, _batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def run_trainer(folder: Path, width: int, times: Times, *, is_ours: bool) -> None:
    """Train with Hugging Face's Trainer."""
    callbacks: list[Any] = [_TrainerTimes(times)]
    ours = TrainerDistckpt(folder, EVERY, preemption=False) if is_ours else None
    if ours is not None:
        ours.loop.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, times.save)
        callbacks.append(ours)
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no" if is_ours else "steps",
        save_steps=EVERY,
        save_total_limit=2,
        logging_strategy="no",
    )
    trainer = Trainer(make_model(width), arguments, train_dataset=_Data(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if ours is None else ours.resume(trainer))


def run_lightning(folder: Path, width: int, times: Times, *, is_ours: bool) -> None:
    """Train with Lightning's Trainer."""
    callbacks: list[Any] = [_LightningTimes(times)]
    if is_ours:
        ours = LightningDistckpt(folder, EVERY, preemption=False)
        ours.loop.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, times.save)
        callbacks.append(ours)
    else:
        options = {"every_n_train_steps": EVERY, "save_top_k": 2, "monitor": "step", "mode": "max"}
        callbacks.append(_TimedCheckpoint(times, dirpath=folder, **options))
    trainer = LightningTrainer(
        accelerator="cpu",
        max_steps=NUM_STEPS,
        callbacks=callbacks,
        enable_checkpointing=not is_ours,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(_Module(width), torch.utils.data.DataLoader(_Data(), BATCH))


CONTESTANTS: dict[str, tuple[Callable[..., None], bool]] = {
    "Trainer": (run_trainer, False),
    "Trainer, distckpt": (run_trainer, True),
    "Lightning": (run_lightning, False),
    "Lightning, distckpt": (run_lightning, True),
}


def run(name: str, folder: Path, width: int, kill_at: tuple[int, float] | None = None) -> dict[str, float] | None:
    """Run a contestant in a forked process; return its results, None if it was killed.

    Args:
        name: of the contestant.
        folder: for its files.
        width: the model's.
        kill_at: number of a save, and the seconds after its beginning when the process is killed; None for never.
    """
    function, is_ours = CONTESTANTS[name]
    pipe, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            times = Times(lambda: os.write(theirs, b"s"))
            function(folder, width, times, is_ours=is_ours)
            del times.done[NUM_SAVES:]  # the Trainer also saves at its end
            os.write(theirs, json.dumps(times.results()).encode())
        except BaseException:  # noqa: BLE001 - the forked interpreter is not left
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(theirs)
    received, number = b"", 0 if kill_at is None else kill_at[0]
    try:
        while data := os.read(pipe, 1 << 16):
            received += data
            if kill_at is not None and received.count(b"s") == number:
                select.select([pipe], [], [], kill_at[1])
                break
        else:
            kill_at = None
    finally:
        if kill_at is not None or sys.exc_info()[0] is not None:
            os.kill(pid, signal.SIGKILL)
        os.close(pipe)
        os.waitpid(pid, 0)
    if kill_at is not None:
        return None
    text = received.lstrip(b"s")
    return json.loads(text) if text else None


def newest_loads(name: str, folder: Path) -> bool:
    """Return True if the newest checkpoint loads, as the contestant's resume would find it."""
    try:
        if CONTESTANTS[name][1]:
            return distckpt.latest(folder) is not None
        if name == "Trainer":
            newest = Path(get_last_checkpoint(str(folder)) or "")
            GPT2LMHeadModel.from_pretrained(newest)
            json.loads((newest / "trainer_state.json").read_text())
            for part in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(newest / part, weights_only=part != "rng_state.pth")
        else:
            torch.load(max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever a damaged file raises
        return False
    return True


def main() -> int:
    """Run all contestants and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one round, no kills")
    parser.add_argument("--width", type=int, help="of the model (768; with --quick 64)")
    parser.add_argument("--rounds", type=int, help="runs of each contestant (3; with --quick 1)")
    parser.add_argument("--kills", type=int, help="kills of each contestant (10; with --quick 0)")
    parser.add_argument("--directory", type=Path, help="for the checkpoints")
    options = parser.parse_args()
    width = options.width or (64 if options.quick else 768)
    num_rounds, num_kills = options.rounds or (1 if options.quick else 3), options.kills or (0 if options.quick else 10)
    root = Path(tempfile.mkdtemp(prefix="bench-integrations-", dir=options.directory))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit: end what is forked
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    damaged = dict.fromkeys(CONTESTANTS, 0)
    draw = random.Random(0)  # noqa: S311 - moments of kills
    try:
        for at in range(num_rounds):
            for name in CONTESTANTS:
                found = run(name, root / f"{name}-{at}", width)
                if found is None:
                    sys.exit(f"{name} failed, see above")
                results[name].append(found)
                shutil.rmtree(root / f"{name}-{at}", ignore_errors=True)
        for at in range(num_kills):
            for name in CONTESTANTS:
                folder = root / f"{name}-kill-{at}"
                length_s = statistics.median(one["durable_s"] for one in results[name])
                run(name, folder, width, (2 + at % 2, draw.uniform(0.0, 1.2 * length_s)))
                damaged[name] += not newest_loads(name, folder)
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    num_bytes = 12 * sum(one.numel() for one in make_model(width).parameters())
    print(f"state of {num_bytes / 2**20:.0f} MiB, {num_rounds} rounds of {NUM_SAVES} saves")
    print(f"{'':20}  {'stall':>9}  {'durable':>9}  {'step':>9}  newest checkpoint damaged")
    for name, found_all in results.items():
        stall, durable, step = (
            1000 * statistics.median(one[key] for one in found_all) for key in ("stall_s", "durable_s", "step_s")
        )
        kills = f"after {damaged[name]} of {num_kills} kills" if num_kills else "-"
        print(f"{name:20}  {stall:6.0f} ms  {durable:6.0f} ms  {step:6.0f} ms  {kills}")
    ours = [name for name, (_, is_ours) in CONTESTANTS.items() if is_ours]
    return 1 if any(damaged[name] for name in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
