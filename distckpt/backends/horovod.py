"""Ranks of a Horovod job. The only file that imports horovod, and only once it was initialised.

Owns the backend over Horovod's global process set. Host values travel as operations of Horovod's under names of our
own, so that they never pair with the job's.

In a job of ``horovodrun``'s the ranks have a board, in a store that rank 0 serves; the launcher's rendezvous server
tells its address. In an elastic job there is none, and nobody watches: Horovod itself finds out who is gone there, and
its ``HorovodInternalError`` and ``HostsUpdatedInterrupt`` have to reach ``hvd.elastic.run`` as they are. Nor is there
one under ``mpirun``, which has no such server.
"""

import functools
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
from distckpt.backends.control_backend import FOLD, ControlGroupBackend
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.backends.rendezvous import Meeting, clear_addresses, rendezvous_server
from distckpt.backends.transport import Transport
from distckpt.errors import CollectiveTimeout

__all__ = ["HorovodBackend", "current", "join", "launch", "leave"]

_REDUCES = {"SUM": hvd.Sum, "PRODUCT": hvd.Product, "MIN": hvd.Min, "MAX": hvd.Max}
_REDUCED_DTYPES = frozenset({torch.float64, torch.float32, torch.int64, torch.int32})
# An operation ends in Horovod's next cycle, a millisecond by default. How long it is asked for in quick succession.
_BRISK_S = 0.005
_BRISK_PAUSE_S = 0.00005
_PAUSE_S = 0.001


class _Ranks(list[int]):
    """The ranks that Horovod knows, marked: equal to nothing, so that its next ``init`` puts others in their place.

    Horovod does not count how often it was initialised, and a job begun anew may look like the one before.
    """

    __hash__ = None  # as of every list

    def __eq__(self, other: object) -> bool:
        return other is self

    def __ne__(self, other: object) -> bool:
        return other is not self


class _Live:
    """The backend of the live job, once it was asked for."""

    backend: "HorovodBackend | None" = None
    lock = threading.Lock()
    num_left = 0  # jobs that this process has left


def current() -> "HorovodBackend":
    """Return the backend of the live job. Rank-local; issues no collectives."""
    backend = _Live.backend
    if backend is None or backend.is_over():
        with _Live.lock:
            backend = _Live.backend
            if backend is None or backend.is_over():
                backend = _Live.backend = HorovodBackend()
    return backend


def join() -> None:
    """Join the job that the launcher started; a world of one without a launcher."""
    server = rendezvous_server()
    if _Live.num_left and server is not None and not _is_elastic():
        clear_addresses(server, _Live.num_left)
    hvd.init()
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())


def leave() -> None:
    """Leave the job, all ranks."""
    hvd.shutdown()
    _Live.num_left += 1


def launch(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int | None, start_method: str
) -> None:
    """Run ``fn(local_rank, *args, **kwargs)`` in new processes on this machine, by Horovod."""
    del start_method  # Horovod has one of its own
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
        super().__init__(int(hvd.rank()), int(hvd.size()))
        self._is_elastic = _is_elastic()
        # Elsewhere it means that a rank is lost, and which one can be said.
        self.passthrough_errors = (
            (HorovodInternalError, HostsUpdatedInterrupt) if self._is_elastic else (HostsUpdatedInterrupt,)
        )
        self._local_rank, self._node = int(hvd.local_rank()), int(hvd.cross_rank())
        self._mark = _Ranks(global_process_set.ranks or range(self._world_size))
        global_process_set.ranks = self._mark

    def is_over(self) -> bool:
        """Tell whether Horovod was shut down, or initialised anew, since this backend was made."""
        return not hvd.is_initialized() or global_process_set.ranks is not self._mark

    @property
    def local_rank(self) -> int:
        """Horovod's."""
        return self._local_rank

    @property
    def node(self) -> int:
        """Horovod's cross rank."""
        return self._node

    def device(self) -> torch.device:
        """Return the current CUDA device if there is one, else the CPU."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce by Horovod."""
        if tensor.dtype is torch.bool:
            instead: TensorOp = {"AND": "MIN", "OR": "MAX"}.get(op, op)  # type: ignore[assignment]
            return self.reduce_tensor(tensor.to(torch.uint8), instead).to(torch.bool)
        if op not in _REDUCES or tensor.dtype not in _REDUCED_DTYPES:
            return functools.reduce(FOLD[op], self.gather_tensor(tensor))
        if tensor.device.type == "cpu":
            return self._control_group.reduce(tensor, op, what="all_reduce", timeout_s=default_timeout_s())
        result: torch.Tensor = hvd.allreduce(tensor.detach().contiguous(), op=_REDUCES[op], name="distckpt.tensor")
        return result

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Gather by Horovod, as bytes, through the host."""
        parts = self._control_group.gather(tensor.detach().cpu(), what="all_gather", timeout_s=default_timeout_s())
        return [part.to(tensor.device) for part in parts]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Broadcast by Horovod, as bytes, through the host."""
        sent = self._control_group.broadcast(
            tensor.detach().cpu(), src, what="broadcast", timeout_s=default_timeout_s()
        )
        return sent.to(tensor.device)

    def _make_transport(self) -> "_HorovodTransport":
        return _HorovodTransport(self.passthrough_errors)

    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        server = rendezvous_server()
        if server is None or self._is_elastic:
            return None
        meeting = Meeting(server, str(what), timeout_s)
        try:
            store = meeting.open() if self._rank == 0 else meeting.find()
        except (http.client.HTTPException, RuntimeError) as error:
            raise OSError(str(error)) from error
        if store is None:
            msg = (
                f"rank {self._rank}: waited {timeout_s:g} s in {what}, but rank 0 did not come. Is it still running, "
                "and does it do the same as the others? Handlers have to be built and attached on all ranks alike."
            )
            raise CollectiveTimeout(msg, (0,))
        mark = self._mark  # not through self, which the board's thread must not keep alive
        return TorchKeyValueStore(store, lambda: bool(hvd.is_initialized()) and global_process_set.ranks is mark)


class _HorovodTransport(Transport):
    """Host values as operations of Horovod's. One of a kind is under way at a time, so that constant names will do."""

    def __init__(self, passthrough_errors: tuple[type[BaseException], ...]) -> None:
        self.passthrough_errors = passthrough_errors

    def connect(self, timeout_s: float) -> None:
        """Horovod's ranks are connected."""

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> "_Work":
        """Reduce a CPU tensor in place."""
        del timeout_s  # whoever waits looks at the clock
        return _Work(hvd.allreduce_async_(result, op=_REDUCES[op], name=_name_of("reduce", result)))

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> "_Work":
        """Fill `result` with every rank's `mine`."""
        del timeout_s

        def fill(output: torch.Tensor) -> None:
            for part, sent in zip(result, output.reshape(len(result), -1), strict=True):
                part.copy_(sent)

        return _Work(hvd.allgather_async(mine, name=_name_of("gather", mine)), fill)

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> "_Work":
        """Fill `result` with that of rank `src`."""
        del timeout_s
        return _Work(hvd.broadcast_async_(result, root_rank=src, name=_name_of(f"broadcast.{src}", result)))

    def maximum(self, values: list[int], timeout_s: float) -> "_Maximum":
        """Reduce twelve int64 with MAX."""
        del timeout_s
        result = torch.tensor(values)
        return _Maximum(hvd.allreduce_async_(result, op=hvd.Max, name="distckpt.maximum"), result)


class _Work:
    """An operation of Horovod's under way.

    Args:
        handle: Horovod's.
        finish: what is to be done with its output.
    """

    def __init__(self, handle: int, finish: Callable[[torch.Tensor], None] | None = None) -> None:
        self._handle = handle
        self._finish = finish
        self._is_over = False
        self._error: HorovodInternalError | None = None

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: it has not ended within `timeout`.
            HorovodInternalError: it failed.
        """
        begin_s = time.monotonic()
        limit_s = default_timeout_s() if timeout is None else timeout.total_seconds()
        while not self.is_completed():
            passed_s = time.monotonic() - begin_s
            if passed_s > limit_s:
                msg = f"an operation of Horovod's has not ended within {limit_s:g} s"
                raise RuntimeError(msg)
            time.sleep(_BRISK_PAUSE_S if passed_s < _BRISK_S else _PAUSE_S)
        if not self._is_over:
            self._is_over = True
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
        """Tell whether it has ended, well or not."""
        return self._is_over or bool(hvd.poll(self._handle))


class _Maximum(_Work):
    """A reduction under way."""

    def __init__(self, handle: int, result: torch.Tensor) -> None:
        super().__init__(handle)
        self._result = result

    def is_done(self) -> bool:
        """Return False: it has to be waited for."""
        return False

    @property
    def values(self) -> list[int]:
        """The result, once it is done."""
        values: list[int] = self._result.tolist()
        return values


def _name_of(kind: str, tensor: torch.Tensor) -> str:
    # By its size too: Horovod keeps what it has agreed on by name, and would have to agree anew on each other size.
    return f"distckpt.{kind}.{tensor.dtype}.{tuple(tensor.shape)}"
