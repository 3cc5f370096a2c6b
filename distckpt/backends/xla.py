"""The backend of a torch_xla job. Imported only in a job that uses torch_xla.

Replicas are processes of their own, or threads of one process. If all are threads of one process they have a key-value
store, in that process. Replicas in several processes have none: torch_xla offers no store, and its own waiting has no
limit.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from distckpt.backends.base import Backend, KeyValueStore, TensorOp, default_timeout_s
from distckpt.backends.control_backend import ControlGroupBackend
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.backends.serial import SerialBackend
from distckpt.backends.xla_transport import REDUCE_OPS, ReplicaGroup, XlaTransport, trace_all_reduce

_XLAC: Any = torch_xla._XLAC  # noqa: SLF001 - torch_xla's own functions use it; some have no public name
# What every device reduces: a CPU reduces neither bfloat16 nor by AND and OR (torch_xla 2.9).
_REDUCED_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.int64, torch.int32})


class _Current(threading.local):
    """This thread's job: its number in the process, and its backend after the first use."""

    def __init__(self) -> None:
        self.job_number = 0
        self.backend: Backend | None = None


_CURRENT = _Current()  # per thread: replicas may be threads of one process


def current() -> Backend:
    """Return the backend of this replica. Rank-local; issues no collectives."""
    backend = _CURRENT.backend
    if backend is None:
        backend = _CURRENT.backend = _SingleReplica() if xr.world_size() == 1 else XlaBackend(_CURRENT.job_number)
    return backend


def join() -> None:
    """Join the job of this process's or thread's replica; without a launcher, a job of one rank."""
    torch_xla.device()  # from here on the runtime is live


def leave() -> None:
    """All replicas. Leave the job."""
    backend, _CURRENT.backend = _CURRENT.backend, None
    if isinstance(backend, XlaBackend):
        _CURRENT.job_number += 1
        backend.end()


def launch(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int | None, start_method: str
) -> None:
    """Run ``fn(local_rank, *args, **kwargs)`` on the devices of this machine, started by torch_xla.

    Args:
        fn: a function at the top level of a module.
        args: its arguments after the local rank.
        kwargs: its keyword arguments.
        num_ranks: 1 for one device; their number, or None, for all.
        start_method: how the processes are started.

    Raises:
        ValueError: `num_ranks` is neither 1 nor the number of devices; raised in the replicas.
    """
    replica = functools.partial(_run_replica, fn, tuple(args), dict(kwargs), num_ranks)
    torch_xla.launch(replica, start_method=start_method, debug_single_process=num_ranks == 1)


def _run_replica(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_ranks: int | None, rank: int
) -> None:
    del rank  # among the replicas of all machines
    join()
    num_devices = int(xr.local_device_count())
    if num_ranks not in (None, 1, num_devices):
        raise ValueError(
            f"torch_xla starts one replica or one for each of the {num_devices} devices here, but nproc_per_node is "
            f"{num_ranks}; limit the devices by its own variables (CPU_NUM_DEVICES, TPU_VISIBLE_CHIPS)"
        )
    try:
        fn(int(xr.local_ordinal()), *args, **kwargs)
    finally:
        current().close()
        leave()


class _XlaDevice(Backend):
    """The methods of a backend that concern the XLA device."""

    name = "xla"

    def __init__(self, *identity: int) -> None:
        super().__init__(*identity)
        self._device: torch.device = torch_xla.device()  # another thread may have another one

    def device(self) -> torch.device:
        return self._device

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        return _sync_device(tree, to_host=to_host)

    def generators(self) -> Mapping[str, Any]:
        return {"xla": _Generator(self._device)}


class XlaBackend(_XlaDevice, ControlGroupBackend):
    """One replica of several.

    Args:
        job_number: the number of the job in this process.
    """

    can_reduce_lazily = True

    def __init__(self, job_number: int) -> None:
        super().__init__(int(xr.global_ordinal()), int(xr.world_size()), int(xr.local_ordinal()), int(xr.host_index()))
        self._has_ended = threading.Event()
        self._replicas = ReplicaGroup.of_job(job_number, int(xr.addressable_device_count()))

    def end(self) -> None:
        """Leave this process's other replicas. Rank-local; the backend cannot be used after it."""
        self._has_ended.set()
        self._replicas.leave()

    def _can_reduce(self, tensor: torch.Tensor, op: TensorOp) -> bool:
        return tensor.device.type != "xla" or (op in REDUCE_OPS and tensor.dtype in _REDUCED_DTYPES)

    def _reduce_on_device(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def exchange() -> None:
            found.append(trace_all_reduce(REDUCE_OPS[op], tensor.detach()))
            torch_xla.sync()

        limit_s = default_timeout_s()
        self._control_group.run(lambda transport: transport.begin(exchange), what="all_reduce", timeout_s=limit_s)
        return found[0]

    def _make_transport(self) -> XlaTransport:
        return XlaTransport(self.rank, self.world_size, self._device, self._replicas.gate)

    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        del what, timeout_s  # the store is in this process
        if self._replicas.num_replicas < self.world_size:
            return None
        has_ended = self._has_ended  # not through self, which the store's thread must not keep alive
        return TorchKeyValueStore(self._replicas.store, lambda: not has_ended.is_set())


class _SingleReplica(_XlaDevice, SerialBackend):
    """The only rank of a job, with an XLA device."""


def _sync_device(tree: Any, *, to_host: bool) -> Any:
    """Compute the pending values of a state once, and copy its XLA tensors to the host if `to_host`.

    Tensors that are one on the device, such as tied weights, are one on the host.
    """
    torch_xla.sync()
    if not to_host:
        xm.wait_device_ops()
        return tree
    found: dict[int, torch.Tensor] = {}
    _collect(tree, found)
    on_host = dict(zip(found, _XLAC._xla_get_cpu_tensors(list(found.values())), strict=True))  # noqa: SLF001 - as above
    return _replace(tree, on_host)


def _xla_id(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.device.type != "xla":
        return None
    number: int = _XLAC._xla_get_tensor_id(value)  # noqa: SLF001 - as above
    return number


def _collect(value: Any, found: dict[int, torch.Tensor]) -> None:
    number = _xla_id(value)
    if number is not None:
        found.setdefault(number, value.detach())
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            _collect(item, found)


def _replace(value: Any, on_host: Mapping[int, torch.Tensor]) -> Any:
    """Return `value` with host tensors; containers without XLA tensors are the same objects as before."""
    number = _xla_id(value)
    if number is not None:
        tensor = on_host[number]
        return torch.nn.Parameter(tensor, value.requires_grad) if isinstance(value, torch.nn.Parameter) else tensor
    if isinstance(value, Mapping):
        new = {key: _replace(item, on_host) for key, item in value.items()}
        return value if all(new[key] is value[key] for key in new) else _like(value, new)
    if isinstance(value, list | tuple):
        items = [_replace(item, on_host) for item in value]
        if all(after is before for after, before in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _like(mapping: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    """Return a mapping of the same type and attributes, as ``state_dict``'s OrderedDict with its ``_metadata``."""
    if type(mapping) is dict:
        return new
    copied = mapping.copy() if hasattr(mapping, "copy") else dict(mapping)
    copied.update(new)
    for name, attribute in getattr(mapping, "__dict__", {}).items():
        setattr(copied, name, attribute)
    return copied


class _Generator:
    """XLA's random number generator, with the methods of a torch.Generator."""

    def __init__(self, device: torch.device) -> None:
        self._device = str(device)

    def get_state(self) -> torch.Tensor:
        data = int(xm.get_rng_state(self._device)).to_bytes(8, "little")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()

    def set_state(self, state: torch.Tensor) -> None:
        xm.set_rng_state(int.from_bytes(bytes(state.tolist()), "little"), self._device)
