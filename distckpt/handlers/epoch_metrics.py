"""The numbers that EPOCH_COMPLETED's handlers read, for an epoch whose batches were all trained before a resume.

A checkpoint that was saved between an epoch's last batch and EPOCH_COMPLETED records the numbers in ``state.output``
and ``state.metrics``. What an ignite metric has accumulated over the epoch is in the checkpoint only if the metric was
saved. Otherwise its value is NaN: an error would end every resume of the run at the same place. Rank-local; issues no
collectives.
"""

import contextlib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events, State
from ignite.metrics import Metric

from distckpt.handlers.epoch_numbers import NOTHING, decode, encode, encode_all
from distckpt.handlers.ignite_hooks import get_handlers
from distckpt.handlers.resume_point import ResumePoint

_MOST_NAMES = 3


def shown_numbers(state: State) -> dict[str, Any]:
    """Return the numbers in ``state.output`` and ``state.metrics``, as plain JSON for a checkpoint's record."""
    output, metrics = getattr(state, "output", None), getattr(state, "metrics", None)
    lacking: list[str] = []
    form = NOTHING if output is None else encode(output, lacking, "output")
    found: dict[str, Any] = {} if form is NOTHING else {"output": form}
    if isinstance(metrics, Mapping):
        found["metrics"] = encode_all(metrics, lacking)
    return {**found, "lacking": lacking[:_MOST_NAMES]} if lacking else found


def show_trained_epoch(engine: Engine, point: ResumePoint, objects: Collection[Any]) -> None:
    """Let EPOCH_COMPLETED's handlers find the numbers of a record in the engine's state, and optimizers that stepped.

    Args:
        engine: the engine.
        point: the resume point of the record.
        objects: the restored objects.
    """
    show_numbers(engine.state, point.output, point.metrics, point.lacking)
    for one in objects:
        if isinstance(one, torch.optim.Optimizer):
            vars(one)["_opt_called"] = True  # it has stepped: torch's schedulers warn if it has not


def show_numbers(state: State, output: Any, metrics: Mapping[str, Any] | None, lacking: Sequence[str]) -> None:
    """Set what is missing in an engine's state to the numbers of a checkpoint's record; warn of those it lacks."""
    shown = NOTHING if output is None else decode(output)
    if state.output is None and shown is not NOTHING:
        state.output = shown
    for name, form in (metrics or {}).items():
        value = decode(form)
        if value is not NOTHING:
            state.metrics.setdefault(name, value)
    if lacking:
        warnings.warn(
            f"resume: all batches of epoch {state.epoch} were trained before, and the checkpoint does not hold "
            f"state.{', state.'.join(lacking)}: handlers of EPOCH_COMPLETED do not find it. Let the step return "
            "numbers, or save on EPOCH_COMPLETED",
            stacklevel=2,
        )


@contextlib.contextmanager
def unknown_as_nan(engine: Engine, known: Collection[Any]) -> Iterator[None]:
    """Within the body, let the epoch's metrics that were not loaded be NaN, and warn of them.

    Args:
        engine: the engine.
        known: the metrics that were loaded; they keep their values.
    """
    owners = [getattr(function, "__self__", None) for function in get_handlers(engine, Events.EPOCH_COMPLETED)]
    unknown = [one for one in owners if isinstance(one, Metric) and not any(one is other for other in known)]
    if unknown:
        kinds = ", ".join(sorted({type(one).__name__ for one in unknown}))
        warnings.warn(
            f"resume: all batches of epoch {engine.state.epoch} were trained before, and its metrics ({kinds}) are not "
            f"in the checkpoint: they are NaN for this epoch. Save them with the other objects",
            stacklevel=2,
        )
    for one in unknown:
        vars(one)["compute"] = lambda: math.nan
    try:
        yield
    finally:
        for one in unknown:
            vars(one).pop("compute", None)
