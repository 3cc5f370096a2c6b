"""SIGKILL at random moments of one training, as an Engine and as a Loop: resumed, it ends as the run left alone.

A process with torch imported forks a child for each start. The model has dropout, the loader shuffles, and saves run in
the background, so that a wrong position, a wrong random number or a wrong weight would change the result's bits.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, DiskSaver, Loop, RngState, resume
from tests.crash.forked import forked
from tests.support import run_ranks

pytestmark = pytest.mark.crash

FORMS = ("engine", "loop")
MOST_KILLS = 50
NUM_EPOCHS = 3
NUM_SAMPLES, BATCH_SIZE = 96, 4
NUM_ITERATIONS = NUM_EPOCHS * NUM_SAMPLES // BATCH_SIZE


class Training:
    """The objects of one training.

    Args:
        form: one of `FORMS`.
    """

    def __init__(self, form: str) -> None:
        torch.manual_seed(11)
        self._model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.3), nn.ReLU(), nn.Linear(64, 1))
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=0.01)
        self._scheduler = torch.optim.lr_scheduler.StepLR(self._optimizer, step_size=1, gamma=0.7)
        samples = torch.randn(NUM_SAMPLES, 8, generator=torch.Generator().manual_seed(5))
        self._loader = torch.utils.data.DataLoader(samples, batch_size=BATCH_SIZE, shuffle=True)  # type: ignore[arg-type, var-annotated]
        self.trainer = Loop(self._loader, max_epochs=NUM_EPOCHS) if form == "loop" else Engine(self._step)
        self.trainer.logger.disabled = True

    def _step(self, _engine: Engine, batch: torch.Tensor) -> float:
        self._optimizer.zero_grad()
        loss = (self._model(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def _end_epoch(self) -> None:
        torch.rand(3)  # as an evaluation may draw
        self._scheduler.step()

    def save_into(self, folder: Path) -> None:
        """Save every third iteration in the background, and resume what is there."""
        objects: dict[str, Any] = {
            "model": self._model,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "trainer": self.trainer,
            "rng": RngState(self.trainer),
        }
        saver = DiskSaver(folder, require_empty=False, background=True)
        checkpoint = Checkpoint(objects, saver, n_saved=2)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), checkpoint)
        resume(objects, checkpoint)

    def run(self) -> None:
        """Train to the end."""
        trainer = self.trainer
        if not isinstance(trainer, Loop):
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
            trainer.run(self._loader, max_epochs=NUM_EPOCHS)
            return
        with trainer:
            for _ in trainer.epochs():
                for batch in trainer.batches():
                    trainer.output = self._step(trainer, batch)
                self._end_epoch()

    def result(self) -> list[torch.Tensor]:
        """Return all that training has changed."""
        state = self._optimizer.state_dict()["state"]
        moments = [value for of_one in state.values() for value in of_one.values()]
        rate = torch.tensor(self._scheduler.get_last_lr())
        return [*self._model.state_dict().values(), *moments, rate, torch.get_rng_state()]


def _start(form: str, folder: Path, result: Path) -> Callable[[Callable[[int], None]], None]:
    def body(send: Callable[[int], None]) -> None:
        training = Training(form)
        training.save_into(folder)
        send(training.trainer.state.iteration)
        training.run()
        torch.save(training.result(), result.with_suffix(".part"))
        result.with_suffix(".part").rename(result)

    return body


def _kill_and_resume(root: str, kills: int, seed: int) -> dict[str, tuple[int, int, list[str]]]:
    """Run trainings until enough starts were killed, and enough resumed; return these numbers and findings by form.

    On a busy machine many kills come before the first save: then there are more of them.
    """
    torch.set_num_threads(1)
    moments, found = random.Random(seed), {}
    for form in FORMS:
        alone = Training(form)
        begin_s = time.monotonic()
        alone.run()
        span_s = time.monotonic() - begin_s
        num_kills, num_resumes, number, findings = 0, 0, 0, list[str]()
        while num_kills < kills or num_resumes <= kills // 4:
            number += 1
            folder, result = Path(root) / f"{form}{number}", Path(root) / f"{form}{number}.result"
            folder.mkdir()
            while not result.exists():
                with forked(_start(form, folder, result)) as child:
                    num_resumes += child.acknowledged[0] > 0
                    if (num_kills < kills or num_resumes <= kills // 4) and moments.random() < 0.9:
                        time.sleep(moments.uniform(0.0, span_s))  # the random moment itself, nothing is waited for
                        child.kill()
                        num_kills += not result.exists()
                    elif child.finish() != 0:
                        findings.append(f"{form}, run {number}: it failed after {num_kills} kills")
                        break
            if result.exists() and not _are_equal(torch.load(result), alone.result()):
                findings.append(f"{form}, run {number}: other results after {num_kills} kills")
        found[form] = (num_kills, num_resumes, findings)
    return found


def _are_equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def test_a_killed_training_ends_as_the_run_left_alone(
    tmp_path: Path, kills: int, seed: int, limit_s: float, report: Callable[[str], None]
) -> None:
    kills = min(kills, MOST_KILLS)
    (found,) = run_ranks(_kill_and_resume, 1, str(tmp_path), kills, seed, backend=None, fresh=True, timeout_s=limit_s)
    for form, (num_kills, num_resumes, findings) in found.items():
        report(
            f"SIGKILL of a training, {form}: {num_kills} kills, {num_resumes} resumes, seed {seed}: "
            f"{len(findings)} ended otherwise than the run left alone"
        )
    assert {form: findings for form, (_, _, findings) in found.items()} == {form: [] for form in FORMS}
