"""Digests of what a run left."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def digests_of(state: Any) -> dict[str, str]:
    """Return digests of a state, every bit, and of the process's generators."""
    generators = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002 - the global ones
    return {"state": _digest(state), "generators": _digest(generators)}


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(key, _plain(one)) for key, one in value.items() if not callable(one)]
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
