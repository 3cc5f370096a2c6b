"""A run that was ended and resumed, for the commands to look at, and calls of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import Checkpoint, DiskSaver, resume
from distckpt.cli import listing, main

SCORES = (0.25, 0.75, float("nan"), 0.5)


class Result(NamedTuple):
    """How a call of the command ended: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON without NaN."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that calls the command in this process; ages are five seconds."""
    monkeypatch.setattr(listing, "format_age", lambda _age_s: "5 s")

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        found = capsys.readouterr()
        return Result(code, found.out, found.err)

    return call


def train(directory: Path, *, num_epochs: int) -> None:
    """Train for some epochs of ten iterations, go on from what is there, and save the last two and the best two."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3))
        model.bias.zero_()
    engine = Engine(lambda _engine, _batch: None)
    objects = {"model": model, "trainer": engine}
    last = Checkpoint(objects, DiskSaver(directory, require_empty=False), n_saved=2)
    best = Checkpoint(
        {"model": model},
        DiskSaver(directory, require_empty=False),
        n_saved=2,
        filename_prefix="best",
        score_name="acc",
        score_function=lambda engine: SCORES[engine.state.epoch - 1],
        global_step_transform=lambda engine, _event: engine.state.epoch,
    )
    engine.add_event_handler(Events.EPOCH_COMPLETED, last)
    engine.add_event_handler(Events.EPOCH_COMPLETED, best)
    resume(objects, last, engine=engine)
    engine.run(range(10), max_epochs=num_epochs)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of two runs, which no test changes."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(directory, num_epochs=2)
    train(directory, num_epochs=4)
    return directory


def flip(path: Path, data: bytes) -> None:
    """Flip a bit of the first of some bytes of a file."""
    content = bytearray(path.read_bytes())
    content[content.index(data)] ^= 1
    path.write_bytes(content)
