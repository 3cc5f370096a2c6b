"""A program of Horovod's elastic mode, with distckpt's handlers: the rank that a file names kills itself once.

Started by `tests/distributed/test_horovod.py` under horovodrun. Writes what the first rank came to as JSON.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import horovod.torch as hvd

from distckpt import Checkpoint, DiskSaver, TerminateOnNan, resume

NUM_EPOCHS, EPOCH_LENGTH = 4, 5


def main(folder: Path) -> None:
    """Train in elastic mode."""
    hvd.init()
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters())
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, attempt=0)
    seen: list[Any] = []

    @hvd.elastic.run  # type: ignore[untyped-decorator]  # Horovod has no types
    def train(state: Any) -> None:
        state.attempt += 1
        engine = Engine(lambda engine, _batch: step(engine))

        def step(engine: Engine) -> float:
            once = folder / "killed"
            if engine.state.iteration == 2 * EPOCH_LENGTH + 3 and hvd.rank() == 1 and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        to_save = {"model": model, "optimizer": optimizer, "trainer": engine}
        handler = Checkpoint(to_save, DiskSaver(folder / "checkpoints", require_empty=False), n_saved=2)
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
        engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
        found = resume(to_save, handler, engine=engine)
        seen.append([hvd.size(), None if found is None else found.name])
        engine.run([0] * EPOCH_LENGTH, max_epochs=NUM_EPOCHS)
        seen.append(engine.state.iteration)

    train(state)
    if hvd.rank() == 0:
        result = {"seen": seen, "files": sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
