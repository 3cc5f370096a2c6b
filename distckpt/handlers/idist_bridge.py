"""Let ignite's own ``ignite.distributed`` answer under torch_xla, from our backend.

Owns a computation model of ignite's, and when it takes its place. ignite 0.5.5 asks torch_xla for functions that 2.9 no
longer has (``xm.get_ordinal``, ``xm.xrt_world_size``): ``idist.get_rank()``, and with it every metric and
``one_rank_only``, raise AttributeError wherever such a torch_xla can be imported, also outside of XLA jobs. The model
is registered where ignite registers its own, in place of that one, and only where that one cannot work.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import ignite.distributed.utils as idist_utils
import torch
from ignite.distributed import comp_models
from ignite.distributed.comp_models.base import ComputationModel
from ignite.metrics import Metric

from distckpt.backends import entry
from distckpt.backends.detect import current
from distckpt.backends.others import module_of
from distckpt.backends.parallel import spawn
from distckpt.coordination import phases

_GONE = ("get_ordinal", "xrt_world_size")
_NO_GROUPS = "distckpt's model of an XLA job reduces over all replicas; it has no groups of some of them"


class XlaModel(ComputationModel):
    """An XLA job, as :func:`distckpt.backends.detect.current` sees it.

    It keeps nothing of its own: ignite has one model for a process, whose replicas may be threads.

    Args:
        backend: ``xla-tpu`` to join a job; None to tell of the live one.
    """

    name = "xla-dist"
    available_backends = ("xla-tpu",)

    def __init__(self, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        del kwargs
        if backend is not None:
            module_of("xla").join()
            current().barrier(what="idist.initialize")

    @staticmethod
    def create_from_context() -> "XlaModel | None":
        """Return a model if this process is part of an XLA job, else None."""
        return XlaModel() if current().name == "xla" else None

    @staticmethod
    def create_from_backend(backend: str, **kwargs: Any) -> "XlaModel":
        """Return a model that has joined the job."""
        return XlaModel(backend, **kwargs)

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
        """Run ``fn(local_rank, *args, **kwargs_dict)`` on this machine's devices."""
        spawn("xla", fn, args, kwargs_dict, nproc_per_node, nnodes=nnodes, node_rank=node_rank, **kwargs)

    def get_local_rank(self) -> int:
        """Return the ordinal among this machine's replicas."""
        return current().local_rank

    def get_rank(self) -> int:
        """Return this replica's rank."""
        return current().rank

    def get_world_size(self) -> int:
        """Return the number of replicas."""
        return current().world_size

    def get_nproc_per_node(self) -> int:
        """Collective, the first time. Return the number of this machine's replicas."""
        return self._compute_nproc_per_node()

    def get_nnodes(self) -> int:
        """Collective. Return the number of machines."""
        return current().all_reduce_ints([current().node], "MAX", what="idist.get_nnodes")[0] + 1

    def get_node_rank(self) -> int:
        """Return the number of this machine."""
        return current().node

    def device(self) -> torch.device:
        """Return this replica's device."""
        return current().device()

    def backend(self) -> str:
        """Return ``xla-tpu``, as ignite calls it."""
        return self.available_backends[0]

    def finalize(self) -> None:
        """Leave the job."""
        entry.finalize()

    def all_reduce(self, tensor: Any, op: str = "SUM", group: Any = None) -> Any:
        """Collective. Reduce a tensor or a number over all replicas."""
        _refuse(group)
        return entry.all_reduce(tensor, op.upper())  # type: ignore[call-overload]  # ignite's is any text

    def all_gather(self, tensor: Any, group: Any = None) -> Any:
        """Collective. Give every replica every replica's tensor or object."""
        _refuse(group)
        return entry.all_gather(tensor)

    def broadcast(self, tensor: Any, src: int = 0, safe_mode: bool = False) -> Any:
        """Collective. Give every replica what replica `src` has."""
        return entry.broadcast(tensor, src, safe_mode)

    def barrier(self) -> None:
        """Collective. Return when every replica has come."""
        entry.barrier()

    def _compute_nproc_per_node(self) -> int:
        return current().all_reduce_ints([current().local_rank], "MAX", what="idist.get_nproc_per_node")[0] + 1

    def _do_all_reduce(self, tensor: torch.Tensor, op: str = "SUM", group: Any = None) -> torch.Tensor:
        reduced: torch.Tensor = self.all_reduce(tensor, op, group)
        return reduced

    def _do_all_gather(self, tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
        gathered: torch.Tensor = self.all_gather(tensor, group)
        return gathered

    def _do_all_gather_object(self, tensor: Any, group: Any = None) -> list[Any]:
        gathered: list[Any] = self.all_gather(tensor, group)
        return gathered

    def _do_broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        sent: torch.Tensor = self.broadcast(tensor, src)
        return sent

    def _do_new_group(self, ranks: list[int], **kwargs: Any) -> Any:
        del ranks, kwargs
        raise NotImplementedError(_NO_GROUPS)

    def _rank_not_in_group(self, group: Any) -> bool:
        _refuse(group)
        return False


def _refuse(group: Any) -> None:
    if group is not None:
        raise NotImplementedError(_NO_GROUPS)


def register_xla_model() -> bool:
    """Let ignite know the model, where its own cannot work; tell whether it is so.

    Changed of ignite's (pytorch-ignite 0.5.5): ``registered_computation_models``, in which it looks for the model of
    the live job.
    """
    if not idist.has_xla_support:
        return False
    xla: Any = comp_models.xla
    if all(hasattr(xla.xm, name) for name in _GONE):
        return False
    broken = xla._XlaDistModel  # noqa: SLF001 - it has no public name
    models: Any = tuple(XlaModel if one is broken else one for one in idist_utils.registered_computation_models)
    idist_utils.registered_computation_models = models
    comp_models.registered_computation_models = models
    idist.registered_computation_models = models
    return True


_KEY = "_Metric__state_dict_key_per_rank"  # ignite's name of the key under which all ranks' states are


class _Local(threading.local):
    """What a metric's ``state_dict`` does on this thread instead of gathering; None where it gathers."""

    gather: Callable[[Metric], list[Any]] | None = None


_LOCAL = _Local()


def wrap_metric_state() -> None:
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

    nums = phases.run(backend, phases.SyncPoint(handler=name, phase="asking the metric for its state", step=0), look)
    if len(set(nums)) > 1:
        msg = f"{name}.state_dict() gathers another number of states on each rank: {nums}, by rank"
        raise RuntimeError(msg)
    gathered: list[Any] = [idist.all_gather(state) for state in states]
    found: list[Any] = []

    def take() -> None:
        rest = iter(gathered)
        found.append(_call(self, lambda _: next(rest)))

    phases.run(backend, phases.SyncPoint(handler=name, phase="putting the metric's state together", step=0), take)
    return found[0]


def _call(metric: Metric, gather: Callable[[Metric], list[Any]]) -> Any:
    before, _LOCAL.gather = _LOCAL.gather, gather
    try:
        return metric.state_dict()
    finally:
        _LOCAL.gather = before
