"""Every example in the docstrings of the installed ignite runs with the imports changed and nothing else.

The examples are read from ignite's docstrings, so nothing of them is kept here. What they leave open (`trainer = ...`)
is filled in from one stage, and what they only print (`> ...`) is left away.
"""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from tests.parity.ignite_sdist import OUR_NAMES, rewrite_imports
from tests.parity.libraries import IGNITE, OURS

_BLOCK = re.compile(r"^( *)\.\. (?:code-block::|testcode::) *python\n((?:\1 +.*\n|\s*\n)+)", re.MULTILINE)
_LEFT_OPEN = re.compile(r"^\s*(\w+ = \.\.\.|\.\.\.|> .*)$", re.MULTILINE)


def _examples() -> list[Any]:
    """Return every example; one with two branches is in the list twice."""
    found = []
    for name in sorted(OUR_NAMES):
        thing = getattr(IGNITE, name)
        docs = [(name, inspect.getdoc(thing) or "")]
        if inspect.isclass(thing):
            methods = [(f"{name}.{key}", getattr(thing, key)) for key in vars(thing) if not key.startswith("_")]
            docs += [(key, inspect.getdoc(method) or "") for key, method in methods if callable(method)]
        for key, doc in docs:
            blocks = [textwrap.dedent(match.group(2)) for match in _BLOCK.finditer(doc + "\n")]
            for number, block in enumerate(blocks):
                branches = [True, False] if "checkpoint_iters" in block else [True]
                found += [pytest.param(block, branch, id=f"{key}-{number}-{branch}") for branch in branches]
    return found


def _stage(folder: Path) -> dict[str, Any]:
    """Return the names that a program has before the example begins."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer, evaluator = Engine(lambda _engine, _batch: 0.0), Engine(lambda _engine, _batch: 0.0)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        evaluator.run([0])

    @evaluator.on(Events.COMPLETED)
    def measure() -> None:
        epoch = trainer.state.epoch
        evaluator.state.metrics = {"accuracy": epoch / 10, "loss": 1 / max(epoch, 1), "nll": 1 / max(epoch, 1)}

    return {
        "trainer": trainer,
        "evaluator": evaluator,
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
        "to_save": {"model": model},
        "save_handler": lambda _checkpoint, _filename: None,
        "save_dir": str(folder / "models"),
        "training_update_function": lambda _engine, _batch: 0.0,
        "data_loader": [0] * 1000,
        "data0": [0, 1],
        "data1": [0, 1],
        "max_epochs": 2,
        "work": lambda: None,
        "idle": lambda: None,
        "kwargs": {"pickle_protocol": 3},
        **{name: getattr(OURS, name) for name in OUR_NAMES},
        "Events": Events,
        "Engine": Engine,
    }


@pytest.mark.parametrize(("example", "checkpoint_iters"), _examples())
def test_examples_of_the_installed_ignite_run(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    checkpoint_iters: bool,
) -> None:
    # The timer's examples measure sleeps of seconds.
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    program = rewrite_imports(_LEFT_OPEN.sub("", example))
    program = program.replace("Checkpoint(...)", "Checkpoint(to_save, '/tmp/models', n_saved=2)")
    program = program.replace("/tmp/models", str(tmp_path / "models"))  # noqa: S108 - in the example
    namespace = {**_stage(tmp_path), "checkpoint_iters": checkpoint_iters}
    exec(compile(program, "example", "exec"), namespace)  # noqa: S102 - the example is the test
    for name in OUR_NAMES & namespace.keys():
        assert namespace[name] is getattr(OURS, name)
    trainer = namespace["trainer"]
    if trainer.state.iteration == 0:  # the example attached a handler and did not run the trainer
        trainer.run([0, 1], max_epochs=2)


def test_the_examples_of_ignite_0_5_5_are_found() -> None:
    assert len(_examples()) >= 22
