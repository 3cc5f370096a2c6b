"""The backend of a Horovod job. The only module that imports horovod, and only after it was initialised.

Host values travel as Horovod's operations under names of our own, so that they never pair with the job's.

The ranks of a ``horovodrun`` job have a key-value store, which rank 0 hosts; the launcher's rendezvous server gives its
address. An elastic job has none, and no heartbeats: Horovod itself finds lost ranks there, and its
``HorovodInternalError`` and ``HostsUpdatedInterrupt`` have to reach ``hvd.elastic.run`` unchanged. A job under
``mpirun``, which has no such server, has none either.
"""

import http.client
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.common.process_sets import global_process_set

from distckpt.backends.base import KeyValueStore, TensorOp, default_timeout_s
from distckpt.backends.control_backend import ControlGroupBackend
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.backends.rendezvous import StoreRendezvous, clear_addresses, rendezvous_server
from distckpt.backends.transport import TensorMaxWork, Transport
from distckpt.errors import CollectiveTimeout

_REDUCE_OPS = {"SUM": hvd.Sum, "PRODUCT": hvd.Product, "MIN": hvd.Min, "MAX": hvd.Max}
_REDUCED_DTYPES = frozenset({torch.float64, torch.float32, torch.int64, torch.int32})
# An operation ends in Horovod's next cycle, one millisecond by default: it is polled often at first.
_BRISK_S = 0.005
_BRISK_PAUSE_S = 0.00005
_PAUSE_S = 0.001


class _MarkedRanks(list[int]):
    """A list of Horovod's ranks that marks one job: it equals no other list, and Horovod's next ``init`` replaces it.

    Horovod does not count its initialisations, and a job that is joined again may look like the one before.
    """

    __hash__ = None  # as of every list

    def __eq__(self, other: object) -> bool:
        return other is self

    def __ne__(self, other: object) -> bool:
        return other is not self


class _Live:
    """The backend of the live job, after its first use."""

    backend: "HorovodBackend | None" = None
    lock = threading.Lock()
    num_left = 0  # jobs that this process has left


def current() -> "HorovodBackend":
    """Return the backend of the live job. Rank-local; issues no collectives."""
    backend = _Live.backend
    if backend is None or backend.has_ended():
        with _Live.lock:
            backend = _Live.backend
            if backend is None or backend.has_ended():
                backend = _Live.backend = HorovodBackend()
    return backend


def join() -> None:
    """Join the launcher's job; without a launcher, a job of one rank."""
    server = rendezvous_server()
    if _Live.num_left and server is not None and not _is_elastic():
        clear_addresses(server, _Live.num_left)
    hvd.init()
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())


def leave() -> None:
    """All ranks. Leave the job."""
    hvd.shutdown()
    _Live.num_left += 1


def launch(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int | None, start_method: str
) -> None:
    """Run ``fn(local_rank, *args, **kwargs)`` in new processes on this machine, started by Horovod."""
    del start_method  # Horovod has its own
    horovod.run(_run_rank, args=(fn, tuple(args), dict(kwargs)), num_proc=num_ranks or 1, use_gloo=True)


def _run_rank(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    join()
    try:
        fn(int(hvd.local_rank()), *args, **kwargs)
    finally:
        if hvd.is_initialized():
            current().close()
            leave()


def _is_elastic() -> bool:
    return os.environ.get("HOROVOD_ELASTIC") == "1"


class HorovodBackend(ControlGroupBackend):
    """One rank of the live Horovod job."""

    name = "horovod"

    def __init__(self) -> None:
        super().__init__(int(hvd.rank()), int(hvd.size()), int(hvd.local_rank()), int(hvd.cross_rank()))
        # Outside elastic jobs HorovodInternalError means a lost rank, which we can name.
        self.passthrough_errors = (HostsUpdatedInterrupt, *([HorovodInternalError] if _is_elastic() else []))
        self._ranks = _MarkedRanks(global_process_set.ranks or range(self.world_size))
        global_process_set.ranks = self._ranks

    def has_ended(self) -> bool:
        """Return True if Horovod was shut down, or initialised again, since this backend was made."""
        return not hvd.is_initialized() or global_process_set.ranks is not self._ranks

    def _can_reduce(self, tensor: torch.Tensor, op: TensorOp) -> bool:
        return op in _REDUCE_OPS and tensor.dtype in _REDUCED_DTYPES

    def _reduce_on_device(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        result: torch.Tensor = hvd.allreduce(tensor.detach().contiguous(), op=_REDUCE_OPS[op], name="distckpt.tensor")
        return result

    def _make_transport(self) -> "_HorovodTransport":
        return _HorovodTransport(self.passthrough_errors)

    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        server = rendezvous_server()
        if server is None or _is_elastic():
            return None
        rendezvous = StoreRendezvous(server, str(what), timeout_s)
        try:
            store = rendezvous.host_store() if self.rank == 0 else rendezvous.find_store()
        except (http.client.HTTPException, RuntimeError) as error:
            raise OSError(str(error)) from error
        if store is None:
            msg = (
                f"rank {self.rank}: waited {timeout_s:g} s in {what}, but rank 0 did not come. Is it still running, "
                "and does it do the same as the others? Handlers have to be built and attached on all ranks alike."
            )
            raise CollectiveTimeout(msg, (0,))
        ranks = self._ranks  # not through self, which the store's thread must not keep alive
        return TorchKeyValueStore(store, lambda: bool(hvd.is_initialized()) and global_process_set.ranks is ranks)


class _HorovodTransport(Transport):
    """Host values as Horovod's operations, with constant names: one of a kind is in progress at a time.

    Horovod waits without a limit; the control group looks at the clock.
    """

    def __init__(self, passthrough_errors: tuple[type[BaseException], ...]) -> None:
        self.passthrough_errors = passthrough_errors

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> "_Work":
        return _Work(hvd.allreduce_async_(result, op=_REDUCE_OPS[op], name=_operation_name("reduce", result)))

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> "_Work":

        def fill(output: torch.Tensor) -> None:
            for chunk, sent in zip(result, output.reshape(len(result), -1), strict=True):
                chunk.copy_(sent)

        return _Work(hvd.allgather_async(mine, name=_operation_name("gather", mine)), fill)

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> "_Work":
        return _Work(hvd.broadcast_async_(result, root_rank=src, name=_operation_name(f"broadcast.{src}", result)))

    def start_max(self, values: list[int], timeout_s: float) -> TensorMaxWork:
        result = torch.tensor(values)
        return TensorMaxWork(_Work(hvd.allreduce_async_(result, op=hvd.Max, name="distckpt.maximum")), result)


class _Work:
    """One of Horovod's operations in progress. `finish` is called with its output."""

    def __init__(self, handle: int, finish: Callable[[torch.Tensor], None] | None = None) -> None:
        self._handle = handle
        self._finish = finish
        self._has_ended = False
        self._error: HorovodInternalError | None = None

    def wait(self, timeout: timedelta | None = None) -> None:
        begin_s = time.monotonic()
        limit_s = default_timeout_s() if timeout is None else timeout.total_seconds()
        while not self.is_completed():
            elapsed_s = time.monotonic() - begin_s
            if elapsed_s > limit_s:
                raise RuntimeError(f"an operation of Horovod's has not ended within {limit_s:g} s")
            time.sleep(_BRISK_PAUSE_S if elapsed_s < _BRISK_S else _PAUSE_S)
        if not self._has_ended:
            self._has_ended = True
            try:
                output = hvd.synchronize(self._handle)
            except HorovodInternalError as error:
                self._error = error
            else:
                if self._finish is not None:
                    self._finish(output)
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        return self._has_ended or bool(hvd.poll(self._handle))


def _operation_name(kind: str, tensor: torch.Tensor) -> str:
    # With the shape: Horovod caches what the ranks have agreed on by name, and agrees anew on each other shape.
    return f"distckpt.{kind}.{tensor.dtype}.{tuple(tensor.shape)}"
