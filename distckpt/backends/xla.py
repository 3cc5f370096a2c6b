"""Replicas of a torch_xla job. The only file that imports torch_xla, and only in a job that uses it.

Owns the backend over torch_xla's replicas, which are processes of their own or threads of one process.

Host values are exact: every operation is one all-reduce of int32 (SUM over rows of which each replica fills its own, or
MAX), which every device computes to the last bit, where a TPU's float64 is not. Two rules keep it safe:

1. **What the program left to be computed runs first, in a graph of its own.** Replicas meet in a collective only if
   they run the same program. What one of them has pending (a metric on rank 0 alone) would make it another.
2. **Replicas of one process meet at a gate before they enter, and enter at once.** A replica that enters alone cannot
   come back: on a CPU the runtime ends the process after ten seconds. At the gate it has a time limit, and is told who
   is missing. Between the gate and the collective nothing else is computed: ``torch_xla.sync()`` with nothing to do
   waits for what runs on the first device (torch_xla 2.9), where another replica may be waiting for this one.

The graphs have few shapes, so that they are compiled once: twelve numbers for a vote, and gathers of 4**k words.

Where all replicas are threads of one process they have a board, in that process. Replicas in several processes have
none: torch_xla offers no store, and the runtime's own waiting has no limit.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from distckpt.backends.base import Backend, KeyValueStore, TensorOp, default_timeout_s
from distckpt.backends.control_backend import FOLD, ControlGroupBackend
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt.backends.serial import SerialBackend
from distckpt.backends.transport import Transport

__all__ = ["XlaBackend", "current", "join", "launch", "leave"]

_XLAC: Any = torch_xla._XLAC  # noqa: SLF001 - what torch_xla's own functions stand on; some have no public name
_REDUCES = {"SUM": xm.REDUCE_SUM, "PRODUCT": xm.REDUCE_MUL, "MIN": xm.REDUCE_MIN, "MAX": xm.REDUCE_MAX}
# What every device reduces: a CPU neither bfloat16 nor by AND and OR (torch_xla 2.9).
_REDUCED_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.int64, torch.int32})
_FEWEST_WORDS = 16
_MOST_WORDS = 65536
_INT32 = 2**31
_TRACING = threading.Lock()


class _Life(threading.local):
    """This thread's job: its number in the process, and its backend once it is known."""

    def __init__(self) -> None:
        self.number = 0
        self.backend: Backend | None = None


_LIFE = _Life()  # of the thread: replicas may be threads of one process


def current() -> Backend:
    """Return the backend of this replica. Rank-local; issues no collectives."""
    backend = _LIFE.backend
    if backend is None:
        backend = _LIFE.backend = _LoneReplica() if xr.world_size() == 1 else XlaBackend(_LIFE.number)
    return backend


def join() -> None:
    """Join the job of replicas that this process or thread is one of; a world of one without a launcher."""
    torch_xla.device()  # from here on the runtime is live


def leave() -> None:
    """Leave the job, all replicas."""
    backend, _LIFE.backend = _LIFE.backend, None
    if isinstance(backend, XlaBackend):
        _LIFE.number += 1
        backend.end()


def launch(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int | None, start_method: str
) -> None:
    """Run ``fn(local_rank, *args, **kwargs)`` on the devices of this machine, by torch_xla.

    Args:
        fn: defined at the top level of a module.
        args: its arguments, after the local rank.
        kwargs: its keyword arguments.
        num_ranks: 1 for one device; None, or their number, for all.
        start_method: of the processes.

    Raises:
        ValueError: there are not so many devices; raised in the replicas.
    """
    replica = functools.partial(_run_replica, fn, tuple(args), dict(kwargs), num_ranks)
    torch_xla.launch(replica, start_method=start_method, debug_single_process=num_ranks == 1)


def _run_replica(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_ranks: int | None, rank: int
) -> None:
    del rank  # among all machines' replicas
    join()
    num_devices = int(xr.local_device_count())
    if num_ranks not in (None, 1, num_devices):
        msg = (
            f"torch_xla starts one replica or one for each of the {num_devices} devices here, but nproc_per_node is "
            f"{num_ranks}; limit the devices by its own variables (CPU_NUM_DEVICES, TPU_VISIBLE_CHIPS)"
        )
        raise ValueError(msg)
    try:
        fn(int(xr.local_ordinal()), *args, **kwargs)
    finally:
        current().close()
        leave()


class XlaBackend(ControlGroupBackend):
    """One replica of several.

    Args:
        life: the number of the job in this process.
    """

    name = "xla"
    can_reduce_lazily = True

    def __init__(self, life: int) -> None:
        super().__init__(int(xr.global_ordinal()), int(xr.world_size()))
        self._local_rank, self._node = int(xr.local_ordinal()), int(xr.host_index())
        self._device = torch_xla.device()
        self._has_ended = threading.Event()
        self._place = _Place.of_job(life, int(xr.addressable_device_count()))

    @property
    def local_rank(self) -> int:
        """The ordinal among this machine's replicas."""
        return self._local_rank

    @property
    def node(self) -> int:
        """The number of this machine."""
        return self._node

    def device(self) -> torch.device:
        """Return this replica's XLA device."""
        device: torch.device = self._device
        return device

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Collective. Reduce by XLA where the tensor lies on its device, else through the host group."""
        if tensor.device.type != "xla":
            return self._control_group.reduce(tensor, op, what="all_reduce", timeout_s=default_timeout_s())
        if op not in _REDUCES or tensor.dtype not in _REDUCED_DTYPES:
            return functools.reduce(FOLD[op], self.gather_tensor(tensor))
        found: list[torch.Tensor] = []

        def exchange() -> None:
            found.append(_traced(_REDUCES[op], tensor.detach()))
            torch_xla.sync()

        self._control_group.carry(
            lambda transport: transport.begin(exchange), what="all_reduce", timeout_s=default_timeout_s()
        )
        return found[0]

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Collective. Gather as bytes, through the host group."""
        parts = self._control_group.gather(tensor.detach().cpu(), what="all_gather", timeout_s=default_timeout_s())
        return [part.to(tensor.device) for part in parts]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Collective. Broadcast as bytes, through the host group."""
        sent = self._control_group.broadcast(
            tensor.detach().cpu(), src, what="broadcast", timeout_s=default_timeout_s()
        )
        return sent.to(tensor.device)

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        """All replicas. Compute what is pending, once, and bring the tensors to the host where they are wanted."""
        return _materialise(tree, to_host=to_host)

    def generators(self) -> Mapping[str, Any]:
        """Return XLA's random number generator of this replica's device."""
        return {"xla": _Generator(self._device)}

    def _make_transport(self) -> "_XlaTransport":
        return _XlaTransport(self._rank, self._world_size, self._device, self._place.gate)

    def _make_store(self, what: object, timeout_s: float) -> KeyValueStore | None:
        del what, timeout_s  # it is in this process
        if self._place.num_replicas < self._world_size:
            return None
        has_ended = self._has_ended  # not through self, which the board's thread must not keep alive
        return TorchKeyValueStore(self._place.store, lambda: not has_ended.is_set())

    def end(self) -> None:
        """Leave this process's other replicas. Rank-local; nothing may be asked of the backend after."""
        self._has_ended.set()
        self._place.leave()


class _LoneReplica(SerialBackend):
    """A world of one whose device is XLA's."""

    name = "xla"

    def device(self) -> torch.device:
        """Return the XLA device."""
        device: torch.device = torch_xla.device()
        return device

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        """Compute what is pending, once, and bring the tensors to the host."""
        return _materialise(tree, to_host=to_host)

    def generators(self) -> Mapping[str, Any]:
        """Return XLA's random number generator."""
        return {"xla": _Generator(self.device())}


# -- how values travel ---------------------------------------------------------------------------------


class _XlaTransport(Transport):
    """Host values by all-reduces of int32."""

    def __init__(self, rank: int, world_size: int, device: torch.device, gate: "_Gate") -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._gate = gate
        self._num_works = 0

    def connect(self, timeout_s: float) -> None:
        """The runtime has connected the replicas."""

    def reduce(self, result: torch.Tensor, op: TensorOp, timeout_s: float) -> "_Work":
        """Reduce a CPU tensor of any dtype in place: every replica gathers all, and folds them in the ranks' order."""
        del timeout_s  # whoever waits looks at the clock
        mine = _bytes_of(result)

        def exchange() -> None:
            parts = [_tensor_of(data, result) for data in self._gather(mine)]
            result.copy_(functools.reduce(FOLD[op], parts))

        return self.begin(exchange)

    def gather(self, result: Sequence[torch.Tensor], mine: torch.Tensor, timeout_s: float) -> "_Work":
        """Fill `result` with every rank's `mine`."""
        del timeout_s

        def exchange() -> None:
            for part, sent in zip(result, self._gather(mine), strict=True):
                part.copy_(sent)

        return self.begin(exchange)

    def broadcast(self, result: torch.Tensor, src: int, timeout_s: float) -> "_Work":
        """Fill `result` with that of rank `src`."""
        del timeout_s

        def exchange() -> None:
            words = _words_of(result if self._rank == src else torch.zeros_like(result))
            sent = torch.cat([self._all_reduce(xm.REDUCE_SUM, part) for part in _parts_of(words)])
            result.copy_(sent.view(torch.uint8)[: result.numel()])

        return self.begin(exchange)

    def maximum(self, values: Sequence[int | torch.Tensor], timeout_s: float) -> "_Maximum":
        """Reduce twelve numbers with MAX; those not known yet are bool () or integers () on this replica's device."""
        del timeout_s
        known = [0 if isinstance(value, torch.Tensor) else value for value in values]
        if any(not -_INT32 <= value < _INT32 for value in known):
            msg = f"numbers that XLA reduces have to fit into int32, but given {known}"
            raise OverflowError(msg)
        mine = torch.tensor(known, dtype=torch.int32).to(self._device)
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                number = value.detach().reshape(1).to(torch.int32)
                mine = mine + torch.nn.functional.pad(number, (place, len(known) - 1 - place))
        # What is pending runs now, and with it the numbers that come from it, in one graph; nothing waits for it.
        torch_xla.sync()
        work = _Maximum(self._gate, self._next(), self._rank)
        work.exchange = lambda: work.take(self._all_reduce(xm.REDUCE_MAX, mine))
        return work

    def withdraw(self, work: Any) -> bool:
        """Let this replica not have come, unless all have."""
        withdrawn: bool = work.withdraw()
        return withdrawn

    def begin(self, exchange: Callable[[], None]) -> "_Work":
        """Let `exchange`, which is collective, take place when all replicas have come."""
        return _Work(self._gate, self._next(), self._rank, exchange)

    def _next(self) -> int:
        self._num_works += 1
        return self._num_works

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's bytes, uint8 (n,)."""
        gathered = []
        for part in _parts_of(_words_of(mine)):
            rows = torch.zeros(self._world_size, part.numel(), dtype=torch.int32)
            rows[self._rank] = part
            gathered.append(self._all_reduce(xm.REDUCE_SUM, rows))
        rows = torch.cat(gathered, dim=1)
        return [row.contiguous().view(torch.uint8)[: mine.numel()] for row in rows]

    def _all_reduce(self, op: str, values: torch.Tensor) -> torch.Tensor:
        """Reduce int32 and bring the result to the host: the one collective that all others are made of."""
        result = _traced(op, values.to(self._device))
        torch_xla.sync()
        on_host: torch.Tensor = result.cpu()
        return on_host


def _traced(op: str, values: torch.Tensor) -> torch.Tensor:
    """Return what a reduction over the replicas will be.

    One replica at a time: torch_xla keeps something of all devices there, and replicas of one process that trace their
    reductions at the same moment crash now and then (torch_xla 2.9).
    """
    with _TRACING:
        result: torch.Tensor = xm.all_reduce(op, values)
    return result


class _Work:
    """An operation under way: it takes place when all replicas of this process have come to it.

    Args:
        gate: where they meet.
        number: of the operation.
        rank: this replica.
        exchange: the operation itself, collective.
    """

    def __init__(self, gate: "_Gate", number: int, rank: int, exchange: Callable[[], None] = lambda: None) -> None:
        self.exchange = exchange
        self._gate = gate
        self._number = number
        self._rank = rank
        self._has_come = self._is_over = False

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for the others, then take part.

        Raises:
            RuntimeError: not all have come within `timeout`; or the runtime's.
        """
        if self._is_over:
            return
        if not self._has_come:
            self._has_come = True
            torch_xla.sync()  # the module's first rule
            self._gate.come(self._number, self._rank)
        limit_s = default_timeout_s() if timeout is None else timeout.total_seconds()
        if not self._gate.wait(self._number, limit_s):
            msg = f"not all replicas of this process have come within {limit_s:g} s"
            raise RuntimeError(msg)
        self._is_over = True
        self.exchange()

    def is_completed(self) -> bool:
        """Tell whether it has ended, well or not."""
        return self._is_over

    def withdraw(self) -> bool:
        """Let this replica not have come, unless all have."""
        return not self._is_over and self._gate.withdraw(self._number, self._rank)


class _Maximum(_Work):
    """A reduction under way."""

    values: ClassVar[list[int]] = []

    def is_done(self) -> bool:
        """Return False: it has to be waited for."""
        return False

    def take(self, result: torch.Tensor) -> None:
        """Keep the result."""
        self.values: list[int] = result.tolist()  # type: ignore[misc]  # until then there is none


class _Gate:
    """Where replicas that are threads of one process meet before they enter a collective."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._came: dict[int, set[int]] = {}
        self._all_came = threading.Condition()
        self._last = 0

    def come(self, number: int, rank: int) -> None:
        """Tell that a replica has come to an operation."""
        with self._all_came:
            came = self._came.setdefault(number, set())
            came.add(rank)
            if len(came) == self._num_replicas:
                del self._came[number]
                self._last = max(self._last, number)
                self._all_came.notify_all()

    def wait(self, number: int, limit_s: float) -> bool:
        """Wait until all have come; tell whether they have."""
        with self._all_came:
            return self._all_came.wait_for(lambda: self._last >= number, limit_s)

    def withdraw(self, number: int, rank: int) -> bool:
        """Let a replica not have come; False where all have by now."""
        with self._all_came:
            if self._last >= number:
                return False
            self._came.get(number, set()).discard(rank)
            return True


class _Place:
    """What the replicas of one job that are threads of this process have in common, and nothing else.

    Attributes:
        num_replicas: how many they are.
        gate: where they meet.
        store: for their board.
    """

    _every: ClassVar[dict[int, "_Place"]] = {}
    _lock = threading.Lock()

    def __init__(self, life: int, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self.gate = _Gate(num_replicas)
        self.store = dist.HashStore()
        self._life = life
        self._num_left = 0

    @classmethod
    def of_job(cls, life: int, num_replicas: int) -> "_Place":
        """Return the place of the job of this number: every replica counts the jobs that it was part of."""
        with cls._lock:
            return cls._every.setdefault(life, cls(life, num_replicas))

    def leave(self) -> None:
        """Tell that a replica leaves."""
        with self._lock:
            self._num_left += 1
            if self._num_left == self.num_replicas:
                self._every.pop(self._life, None)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8).clone()


def _tensor_of(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return data.clone().view(like.dtype).reshape(like.shape)


def _words_of(data: torch.Tensor) -> torch.Tensor:
    """Return bytes as int32, with zeros behind them: of 16 * 4**k words, or of multiples of the most words."""
    num_words = -(-data.numel() // 4)
    size = _FEWEST_WORDS
    while size < min(num_words, _MOST_WORDS):
        size *= 4
    if num_words > _MOST_WORDS:
        size = -(-num_words // _MOST_WORDS) * _MOST_WORDS
    padded = torch.zeros(4 * size, dtype=torch.uint8)
    padded[: data.numel()] = data
    return padded.view(torch.int32)


def _parts_of(words: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(words, _MOST_WORDS)


# -- what is saved -------------------------------------------------------------------------------------


def _materialise(tree: Any, *, to_host: bool) -> Any:
    """Compute what is pending, once, and bring the XLA tensors of a state to the host where they are wanted.

    Tensors that are one on the device, such as tied weights, are one on the host.
    """
    torch_xla.sync()
    if not to_host:
        xm.wait_device_ops()
        return tree
    found: dict[int, torch.Tensor] = {}
    _visit(tree, found)
    here = dict(zip(found, _XLAC._xla_get_cpu_tensors(list(found.values())), strict=True))  # noqa: SLF001 - as above
    return _replaced(tree, here)


def _id_of(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.device.type != "xla":
        return None
    number: int = _XLAC._xla_get_tensor_id(value)  # noqa: SLF001 - as above
    return number


def _visit(value: Any, found: dict[int, torch.Tensor]) -> None:
    number = _id_of(value)
    if number is not None:
        found.setdefault(number, value.detach())
    elif isinstance(value, Mapping):
        for item in value.values():
            _visit(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _visit(item, found)


def _replaced(value: Any, here: Mapping[int, torch.Tensor]) -> Any:
    """Return `value` with tensors of the host; containers without any are the same objects as before."""
    number = _id_of(value)
    if number is not None:
        on_host = here[number]
        return torch.nn.Parameter(on_host, value.requires_grad) if isinstance(value, torch.nn.Parameter) else on_host
    if isinstance(value, Mapping):
        new = {key: _replaced(item, here) for key, item in value.items()}
        if all(new[key] is value[key] for key in new):
            return value
        return _like(value, new)
    if isinstance(value, list | tuple):
        items = [_replaced(item, here) for item in value]
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
    """XLA's random number generator, with the face of a torch.Generator."""

    def __init__(self, device: torch.device) -> None:
        self._device = str(device)

    def get_state(self) -> torch.Tensor:
        """Return its state, a number of 64 bits: uint8 (8,), the lowest byte first."""
        data = int(xm.get_rng_state(self._device)).to_bytes(8, "little")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()

    def set_state(self, state: torch.Tensor) -> None:
        """Set it."""
        xm.set_rng_state(int.from_bytes(bytes(state.tolist()), "little"), self._device)
