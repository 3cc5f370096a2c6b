"""Who has to keep the contract of `Backend`, and how a clause of it is run by each.

An implementation is a name, a number of ranks and a way to start them. A new one (Horovod, XLA) is an entry in
`EVERY`; no clause changes. Where the parts of one are missing, `not_run` says so and its id does not appear.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Protocol

import pytest
import torch
import torch.distributed as dist

from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from tests.support import run_ranks
from tests.support.locate import RANK_BODY, load_function, reference_to
from tests.support.messages import FunctionRef
from tests.support.runtime import OWN, RUNTIME

P = ParamSpec("P")
Clause = Callable[..., None]

REGISTERED = "ours"
"""A torch.distributed backend that no build has; the tests register it, as a vendor's plug-in would."""


class Launch(Protocol):
    """A way to run a clause on every rank of a job and to wait for its end."""

    def __call__(self, clause: Clause, arguments: Mapping[str, object], timeout_s: float) -> None:
        """Run ``clause(backend, **arguments)`` on each rank; raise if it fails on any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One backend in a job of one size."""

    name: str
    world_size: int
    launch: Launch


def in_this_process(clause: Clause, arguments: Mapping[str, object], timeout_s: float) -> None:
    """Run a clause in a world of one: here, where there is no process group."""
    del timeout_s  # nothing is ever waited for
    clause(current(), **arguments)


def on_ranks(runtime: str, world_size: int) -> Launch:
    """Return how to run a clause on ranks of torch.distributed."""

    def launch(clause: Clause, arguments: Mapping[str, object], timeout_s: float) -> None:
        __tracebackhide__ = True
        run_ranks(
            _on_rank,
            world_size,
            reference_to(clause),
            dict(arguments),
            backend=runtime,
            timeout_s=timeout_s,
        )

    return launch


def _on_rank(clause: FunctionRef, arguments: Mapping[str, object]) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(current().local_rank % torch.cuda.device_count())
    load_function(clause)(current(), **arguments)


def _make_group(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> Any:  # torch types it apart
    return dist.ProcessGroupGloo(store, rank, world_size, timeout)


# A rank imports this module before it joins the job, as programs import a vendor's plug-in.
if REGISTERED not in dist.Backend.backend_list:
    dist.Backend.register_backend(REGISTERED, _make_group, devices="cpu")


def job_store() -> dist.Store:
    """From a rank: return this call's own corner of the launcher's store, to join a job by hand."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"contracts/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _torch_job(runtime: str, world_size: int) -> Implementation:
    launch = on_ranks(runtime, world_size)
    return Implementation(name=f"{runtime}-{world_size}", world_size=world_size, launch=launch)


def _nccl_jobs() -> Sequence[Implementation]:
    """Return NCCL jobs of one rank, and of two where there are two GPUs: NCCL refuses ranks that share one."""
    num_gpus = torch.cuda.device_count() if dist.is_nccl_available() and torch.cuda.is_available() else 0
    return [_torch_job("nccl", size) for size in (1, 2) if size <= num_gpus]


def _own_job(world_size: int) -> Implementation:
    """Return a job of the runtime that this pytest process tests."""
    return Implementation(name=f"{RUNTIME}-{world_size}", world_size=world_size, launch=on_ranks(OWN, world_size))


def _of_this_runtime() -> Sequence[Implementation]:
    if RUNTIME == "horovod":  # of three on two cores one may starve in hvd.init(), where no test can help it
        return (_own_job(2),)
    if RUNTIME == "xla":
        return (_own_job(2), _own_job(3))
    serial = Implementation(name="serial", world_size=1, launch=in_this_process)
    return (serial, _own_job(2), _own_job(3), _torch_job(REGISTERED, 2), *_nccl_jobs())


EVERY: Sequence[Implementation] = _of_this_runtime()
SEVERAL_RANKS: Sequence[Implementation] = tuple(one for one in EVERY if one.world_size > 1)


def not_run() -> Sequence[str]:
    """Return a line for each implementation that does not run, with the reason."""
    if RUNTIME != "gloo":
        return ()
    sizes = [job.world_size for job in _nccl_jobs()]
    if not sizes:
        return ("nccl: not run, no GPU",)
    return () if max(sizes) > 1 else ("nccl-2: not run, NCCL refuses two ranks that share the only GPU",)


def clause(
    on: Sequence[Implementation] = EVERY, *, timeout_s: float = 30.0
) -> Callable[[Callable[Concatenate[Backend, P], None]], Callable[..., None]]:
    """Make a clause of the contract a pytest test of every implementation.

    The function is run on each rank, with that rank's backend first; further parameters are pytest's, as usual.

    Args:
        on: the implementations that it is asked of.
        timeout_s: limit for the whole body.

    Example:
        @clause()
        def test_rank_is_in_the_world(backend: Backend) -> None:
            assert 0 <= backend.rank < backend.world_size
    """

    def decorate(function: Callable[Concatenate[Backend, P], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(*, implementation: Implementation, **arguments: Any) -> None:
            __tracebackhide__ = True
            implementation.launch(function, arguments, timeout_s)

        signature = inspect.signature(function)
        _, *others = signature.parameters.values()
        mine = inspect.Parameter("implementation", inspect.Parameter.KEYWORD_ONLY)
        others = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others]
        del test.__wrapped__  # pytest would look through to the body's parameters
        setattr(test, "__signature__", signature.replace(parameters=[mine, *others]))  # noqa: B010
        setattr(test, RANK_BODY, function)
        marked: Callable[..., None] = pytest.mark.parametrize("implementation", on, ids=[one.name for one in on])(test)
        return marked

    return decorate
