"""Hooks into ``ignite.distributed`` and ``ignite.metrics``: a model of XLA jobs, and metrics that a save gathers.

*The model.* ignite 0.5.5 calls functions that torch_xla 2.9 has removed (``xm.get_ordinal``, ``xm.xrt_world_size``). So
``idist.get_rank()``, every metric and ``one_rank_only`` raise AttributeError wherever such a torch_xla is importable,
outside of XLA jobs too. :func:`register_xla_model` replaces ignite's model only if it cannot work.

*The metrics.* ``Metric.state_dict`` of ignite 0.5.5 gathers the states of all ranks. If another object's
``state_dict()`` failed on one rank, the other ranks would wait in that collective. So :func:`wrap_metric_state` gives
metrics the method that :func:`distckpt.saving.capture.consolidate` calls:

1. (all ranks) call ``state_dict()`` with a gather that only records, and agree that no rank failed.
2. (all ranks) gather the recorded states, as ignite does.
3. (all ranks) call ``state_dict()`` again with the gathered states, and agree again.

A subclass may do more in ``state_dict()``, since the collective runs outside of it.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import ignite.distributed as idist
import ignite.distributed.utils as idist_utils
import torch
from ignite.distributed import comp_models
from ignite.distributed.comp_models.base import ComputationModel
from ignite.metrics import Metric

from distckpt.backends import entry
from distckpt.backends.detect import current, import_runtime
from distckpt.backends.parallel import spawn
from distckpt.coordination import phases

_REMOVED = ("get_ordinal", "xrt_world_size")  # of torch_xla's xla_model
_STATES_KEY = "_Metric__state_dict_key_per_rank"  # ignite's attribute: the key of all ranks' states


class _XlaModel(ComputationModel):
    """An XLA job as :func:`distckpt.backends.detect.current` reports it.

    It has no state: ignite has one model per process, and replicas may be threads. `backend` is ``xla-tpu`` to join a
    job, None for the live one.
    """

    name = "xla-dist"
    available_backends = ("xla-tpu",)

    def __init__(self, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        del kwargs
        if backend is not None:
            import_runtime("xla").join()
            current().barrier(what="idist.initialize")

    @staticmethod
    def create_from_context() -> "_XlaModel | None":
        return _XlaModel() if current().name == "xla" else None

    @staticmethod
    def create_from_backend(backend: str, **kwargs: Any) -> "_XlaModel":
        return _XlaModel(backend, **kwargs)

    @staticmethod
    def spawn(
        fn: Any,
        args: tuple[Any, ...],
        kwargs_dict: dict[str, Any] | None = None,
        nproc_per_node: int = 1,
        nnodes: int = 1,
        node_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        spawn("xla", fn, args, kwargs_dict, nproc_per_node, nnodes=nnodes, node_rank=node_rank, **kwargs)

    def get_local_rank(self) -> int:
        return current().local_rank

    def get_rank(self) -> int:
        return current().rank

    def get_world_size(self) -> int:
        return current().world_size

    def get_nproc_per_node(self) -> int:
        return current().all_reduce_ints([current().local_rank], "MAX", what="idist.get_nproc_per_node")[0] + 1

    def get_nnodes(self) -> int:
        return current().all_reduce_ints([current().node], "MAX", what="idist.get_nnodes")[0] + 1

    def get_node_rank(self) -> int:
        return current().node

    def device(self) -> torch.device:
        return current().device()

    def backend(self) -> str:
        return self.available_backends[0]

    def finalize(self) -> None:
        entry.finalize()

    def all_reduce(self, tensor: Any, op: str = "SUM", group: Any = None) -> Any:
        _refuse_group(group)
        return entry.all_reduce(tensor, op.upper())  # type: ignore[call-overload]  # ignite's is any text

    def all_gather(self, tensor: Any, group: Any = None) -> Any:
        _refuse_group(group)
        return entry.all_gather(tensor)

    def broadcast(self, tensor: Any, src: int = 0, safe_mode: bool = False) -> Any:
        return entry.broadcast(tensor, src, safe_mode)

    def barrier(self) -> None:
        entry.barrier()

    # ignite's public methods call these; ours do not.
    _compute_nproc_per_node = get_nproc_per_node
    _do_all_reduce = all_reduce
    _do_all_gather = _do_all_gather_object = all_gather
    _do_broadcast = broadcast

    def _do_new_group(self, ranks: list[int], **kwargs: Any) -> Any:
        _refuse_group(ranks)

    def _rank_not_in_group(self, group: Any) -> bool:
        _refuse_group(group)
        return False


def _refuse_group(group: Any) -> None:
    if group is not None:
        msg = "distckpt's model of an XLA job reduces over all replicas; it has no groups of some replicas"
        raise NotImplementedError(msg)


def register_xla_model() -> bool:
    """Replace ignite's XLA model if it cannot work; return True if it was replaced.

    ignite finds the live job's model in ``registered_computation_models``.
    """
    if not idist.has_xla_support:
        return False
    xla: Any = comp_models.xla
    if all(hasattr(xla.xm, name) for name in _REMOVED):
        return False
    old = xla._XlaDistModel  # noqa: SLF001 - ignite has no public name
    models: Any = tuple(_XlaModel if one is old else one for one in idist_utils.registered_computation_models)
    module: Any
    for module in (idist_utils, comp_models, idist):
        module.registered_computation_models = models
    return True


class _Gather(threading.local):
    """The function that ``Metric.state_dict`` calls on this thread instead of a collective; None to call ignite's."""

    function: Callable[[Metric], list[Any]] | None = None


_GATHER = _Gather()


def wrap_metric_state() -> None:
    """Let saves consolidate metrics, if this ignite's ``Metric.state_dict`` gathers and is not wrapped yet."""
    if hasattr(Metric, _STATES_KEY) and not hasattr(Metric, "distckpt_consolidate"):
        metric: Any = Metric  # whose class declares no such method
        metric.state_dict = _wrap_state_dict(Metric.state_dict)
        metric.distckpt_consolidate = _consolidate


def _wrap_state_dict(state_dict: Callable[[Metric], Any]) -> Callable[[Metric], Any]:
    @functools.wraps(state_dict)
    def get_state(self: Metric) -> Any:
        gather = _GATHER.function
        return state_dict(self) if gather is None else OrderedDict([(getattr(Metric, _STATES_KEY), gather(self))])

    return get_state


def _consolidate(self: Metric, to: int) -> Any:
    """Collective. Return the metric's state with the states of all ranks, on every rank.

    Raises:
        RemoteRankError: the metric's ``state_dict`` failed on a rank; raised on every rank.
    """
    del to
    if idist.get_world_size() == 1:
        return None
    backend, name = current(), type(self).__name__
    states: list[Any] = []

    def record(metric: Metric) -> list[Any]:
        states.append(metric._state_dict_per_rank())  # noqa: SLF001 - this rank's state
        return [states[-1]]

    def record_states() -> int:
        _call_state_dict(self, record)
        return len(states)

    point = phases.SyncPoint(handler=name, phase="calling the metric's state_dict()", step=0)
    counts = phases.run(backend, point, record_states)
    if len(set(counts)) > 1:
        raise RuntimeError(f"{name}.state_dict() gathers a different number of states on each rank: {counts}, by rank")
    gathered: Iterator[Any] = iter([idist.all_gather(state) for state in states])
    found: list[Any] = []
    point = phases.SyncPoint(handler=name, phase="combining the metric's state", step=0)
    phases.run(backend, point, lambda: found.append(_call_state_dict(self, lambda _: next(gathered))))
    return found[0]


def _call_state_dict(metric: Metric, gather: Callable[[Metric], list[Any]]) -> Any:
    before, _GATHER.function = _GATHER.function, gather
    try:
        return metric.state_dict()
    finally:
        _GATHER.function = before
