"""A program that saves a checkpoint of many kinds of state, or loads those that others saved, under any launcher.

Started by `tests/matrix/test_matrix.py` through the scripts in `launch/`, which take it in place of train_digits.py.
What it finds it writes as JSON: one file for each rank.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

import launchers  # noqa: E402 - launch/'s, found by the line above
import options  # noqa: E402 - as above

from distckpt import Checkpoint, DiskSaver, backend, barrier, device, get_rank, get_world_size  # noqa: E402


class Extras:
    """State of other kinds than modules and optimizers have."""

    def __init__(self, *, is_blank: bool) -> None:
        generator = torch.Generator().manual_seed(11)
        values = torch.randn(3, 5, generator=generator)
        self.state: dict[str, Any] = {
            "dtypes": {
                str(dtype): (values * 0 if is_blank else values).to(dtype)
                for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)
            },
            "on the device": (values * 0 if is_blank else values + 1).to(device()),
            "scalars": [0, 0.0, ""] if is_blank else [2**53 + 1, 0.1, "naïve"],
            "empty": torch.empty(0, 3),
            "transposed": (values * 0 if is_blank else values).t(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self.state = dict(state)


def objects(seed: int, *, is_blank: bool) -> dict[str, Any]:
    """Return what is saved, or blank twins of it."""
    net = launchers.initial(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), seed)
    model = launchers.parallelize(net)
    optimizer = launchers.distribute(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    if not is_blank:
        model(torch.ones(8, 6).to(device())).sum().backward()
        launchers.step(optimizer)
        optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, last_epoch=-1)
    trainer = Engine(lambda _engine, _batch: None)
    extras = Extras(is_blank=is_blank)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer, "extras": extras}


def digests(made: dict[str, Any]) -> dict[str, str]:
    """Return a hash of each object's state."""
    states = {name: one.state_dict() for name, one in made.items()}
    states["model"] = {key.removeprefix("module."): value for key, value in states["model"].items()}
    states["optimizer"] = {"state": states["optimizer"]["state"]}
    states["scheduler"] = {"last_epoch": states["scheduler"]["last_epoch"]}
    states["trainer"] = {"iteration": states["trainer"]["iteration"]}
    return {name: hashlib.sha256(json.dumps(_plain(state)).encode()).hexdigest()[:16] for name, state in states.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        host = value.detach().cpu().contiguous()
        return [str(host.dtype), list(host.shape), bytes(host.reshape(-1).view(torch.uint8).tolist()).hex()]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else repr(value)


def main(_local_rank: int, config: options.Config) -> None:
    """Save, or load, as the environment says."""
    folder = Path(os.environ["MATRIX_FOLDER"])
    told: dict[str, Any] = {"backend": backend() or "serial", "world_size": get_world_size()}
    if os.environ["MATRIX_DO"] == "save":
        made = objects(config.seed, is_blank=False)
        handler = Checkpoint(made, DiskSaver(folder / str(told["backend"]), create_dir=True))
        made["trainer"].add_event_handler(Events.EPOCH_COMPLETED, handler)
        made["trainer"].run([0, 0, 0], max_epochs=1)
        told["digests"] = digests(made)
    else:
        told["loaded"] = {}
        for path in sorted(folder.glob("*/checkpoint_*.pt")):
            made = objects(config.seed + 1, is_blank=True)
            Checkpoint.load_objects(made, path)
            told["loaded"][path.parent.name] = digests(made)
    barrier()
    name = f"{os.environ['MATRIX_DO']}.{told['backend']}.{get_rank()}.json"
    (folder / name).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    launchers.run(main, options.parse(sys.argv[1:]))
