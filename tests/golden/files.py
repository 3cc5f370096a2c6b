"""The state that the golden files hold, and the writing of one."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from distckpt.ptformat.manifest import SCHEMA, Manifest
from distckpt.ptformat.pickler import pickle_state
from distckpt.saving.snapshot import Snapshot, WriteRange
from distckpt.saving.staging import HostMemory
from distckpt.storage.local import LocalStorage

__all__ = ["FOLDER", "golden_state", "name_of", "write"]

FOLDER = Path(__file__).parent
ABOUT = Manifest(
    epoch=3,
    iteration=27,
    score=0.75,
    priority=0.75,
    reason="EPOCH_COMPLETED",
    world_size=2,
    backend="gloo",
    versions={"distckpt": "0.1.0", "torch": "2.13.0"},
    wall_time_s=1764374400.5,
)


def golden_state() -> dict[str, Any]:
    """Return a state with tensors that are small, empty, views, and long enough to be cut into two shares."""
    base = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    return {
        "own": torch.tensor([7, -7], dtype=torch.int16),
        "model": OrderedDict(weight=torch.arange(2250, dtype=torch.float32).reshape(50, 45) / 8, empty=torch.zeros(0)),
        "views": [base, base[1:], base.t()],
        "note": {"epoch": 3, "names": ["a", "ü"], "best": 0.25, "none": None},
    }


def name_of(num_writers: int, schema: int = SCHEMA) -> str:
    """Return the name of a golden file."""
    return f"schema_{schema}{'_shared' if num_writers > 1 else ''}.pt"


def write(folder: Path, *, num_writers: int) -> Path:
    """Write the state as a file of the present schema, in as many shares."""
    state = golden_state()
    replicated = [state["model"]["weight"].untyped_storage()._cdata] if num_writers > 1 else []
    ranks = tuple(range(num_writers))
    writers = [Snapshot(pickle_state(state), replicated=replicated) for _ in ranks]
    checked = []
    name = name_of(num_writers)
    with LocalStorage(folder).create(name) as new:
        for rank, writer in enumerate(writers):
            writer.bind_buffer(HostMemory(), WriteRange(rank, ranks))
            with writer.copying_to_host():
                checked.append(writer.write_image(new))
        new.commit(writers[-1].write_tail(new, checked, ABOUT))
    return folder / name
