"""Gather the states of ignite's metrics where a save does its collective work.

``Metric.state_dict`` of pytorch-ignite 0.5.5 gathers every rank's state. Among the calls of ``state_dict()`` of a save,
of which any may fail on one rank, it would leave the other ranks waiting in that collective. So a metric says here, by
the method that :func:`distckpt.saving.capture.consolidate` looks for, that its state is spread over the ranks:

1. (all ranks) call ``state_dict()`` with a gather that gathers nothing, and agree that it failed nowhere.
2. (all ranks) gather what it was to gather, as ignite does.
3. (all ranks) call ``state_dict()`` again, which is given the gathered states, and agree again.

So a subclass may do more in ``state_dict()``, and none of it stands around the collective.

Changed of ignite's, once, as distckpt.handlers is imported: ``Metric.state_dict`` is wrapped, and ``Metric`` has a
method ``distckpt_consolidate``.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
from ignite.metrics import Metric

from distckpt.backends.detect import current
from distckpt.coordination import phases

__all__ = ["install"]

_KEY = "_Metric__state_dict_key_per_rank"  # ignite's name of the key under which all ranks' states are


class _Local(threading.local):
    """What a metric's ``state_dict`` does on this thread instead of gathering; None where it gathers."""

    gather: Callable[[Metric], list[Any]] | None = None


_LOCAL = _Local()


def install() -> None:
    """Let metrics be consolidated, where this ignite's gather in ``state_dict``. Does nothing the second time."""
    if hasattr(Metric, _KEY) and not hasattr(Metric, "distckpt_consolidate"):
        metric: Any = Metric  # whose class declares no such method
        metric.state_dict = _wrap(Metric.state_dict)
        metric.distckpt_consolidate = _consolidate


def _wrap(state_dict: Callable[[Metric], Any]) -> Callable[[Metric], Any]:
    @functools.wraps(state_dict)
    def state_dict_here(self: Metric) -> Any:
        gather = _LOCAL.gather
        return state_dict(self) if gather is None else OrderedDict([(getattr(Metric, _KEY), gather(self))])

    return state_dict_here


def _consolidate(self: Metric, to: int) -> Any:
    """Collective. Return the state with every rank's part in it. All ranks get it.

    Args:
        self: the metric.
        to: the rank that saves.

    Raises:
        RemoteRankError: the metric's ``state_dict`` failed on some rank; on every rank.
    """
    del to
    if idist.get_world_size() == 1:
        return None
    backend, name = current(), type(self).__name__
    states: list[Any] = []

    def keep(metric: Metric) -> list[Any]:
        states.append(metric._state_dict_per_rank())  # noqa: SLF001 - the part of it that is this rank's
        return [states[-1]]

    def look() -> int:
        _call(self, keep)
        return len(states)

    nums = phases.run(backend, phases.Place(who=name, doing="asking the metric for its state", step=0), look)
    if len(set(nums)) > 1:
        msg = f"{name}.state_dict() gathers another number of states on each rank: {nums}, by rank"
        raise RuntimeError(msg)
    gathered: list[Any] = [idist.all_gather(state) for state in states]
    found: list[Any] = []

    def take() -> None:
        rest = iter(gathered)
        found.append(_call(self, lambda _: next(rest)))

    phases.run(backend, phases.Place(who=name, doing="putting the metric's state together", step=0), take)
    return found[0]


def _call(metric: Metric, gather: Callable[[Metric], list[Any]]) -> Any:
    before, _LOCAL.gather = _LOCAL.gather, gather
    try:
        return metric.state_dict()
    finally:
        _LOCAL.gather = before
