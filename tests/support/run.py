"""Run a function on pooled ranks: the decorator `run_distributed` and the function `run_ranks`."""

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import pytest

from tests.support.dispatch import Call, Dispatch
from tests.support.fresh import fresh_ranks
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.locate import RANK_BODY, WORLD_SIZE
from tests.support.pool import pool_for
from tests.support.report import RankEnd, RankFailedError

P = ParamSpec("P")
T = TypeVar("T")


def run_distributed(
    world_size: int = 2,
    backend: str | None = "gloo",
    timeout_s: float = PROGRAM_LIMIT_S,
    *,
    env: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a pytest function so that it runs on every rank of a new process group.

    pytest evaluates fixtures and parameters once and sends them to every rank, so they must be picklable (`tmp_path`
    is). Ranks have torchrun's environment, an initialised torch.distributed, and the test's warning filters. `assert`,
    `pytest.raises`, `pytest.skip` and `pytest.importorskip` work. The test prints the ranks' output.

    Args:
        world_size: number of ranks.
        backend: backend of the default process group; None leaves torch.distributed uninitialised.
        timeout_s: limit for the whole body; a rank that exceeds it is reported with its stack.
        env: additional environment variables of the ranks.

    Example:
        @run_distributed(world_size=3)
        def test_every_rank_learns_the_largest_value(tmp_path: Path) -> None:
            ...
    """

    def decorate(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def on_ranks(*args: P.args, **kwargs: P.kwargs) -> None:
            __tracebackhide__ = True
            call = Call(
                function=function,
                args=args,
                kwargs=kwargs,
                backend=backend,
                environment=env or {},
                collective_timeout_s=2 * timeout_s,
            )
            _on_pool(call, world_size, timeout_s)

        setattr(on_ranks, RANK_BODY, function)
        setattr(on_ranks, WORLD_SIZE, world_size)
        return on_ranks

    return decorate


def run_ranks(
    function: Callable[..., T],
    world_size: int = 2,
    *args: object,
    backend: str | None = "gloo",
    timeout_s: float = PROGRAM_LIMIT_S,
    fresh: bool = False,
    env: Mapping[str, str] | None = None,
    collective_timeout_s: float | None = None,
) -> list[T]:
    """Call a module-level function on every rank; return the results in rank order.

    Args:
        function: runs on each rank, which imports it by name.
        world_size: number of ranks.
        *args: picklable arguments.
        backend: backend of the default process group; None leaves torch.distributed uninitialised.
        timeout_s: limit for the whole call.
        fresh: start new processes; `fresh_ranks` is the full interface to them.
        env: additional environment variables of the ranks.
        collective_timeout_s: timeout of the default process group. None: twice `timeout_s`, so that a hang is reported
            with stacks and not as a collective's error.

    Raises:
        RankFailedError: it failed on some rank; the message contains every failing rank's traceback.
    """
    __tracebackhide__ = True
    limit_s = collective_timeout_s if collective_timeout_s is not None else 2 * timeout_s
    if fresh:
        with fresh_ranks(function, world_size, *args, backend=backend, env=env, collective_timeout_s=limit_s) as ranks:
            return [end.value for end in ranks.finish(timeout_s=timeout_s)]
    call = Call(function=function, args=args, backend=backend, environment=env or {}, collective_timeout_s=limit_s)
    return [end.value for end in _on_pool(call, world_size, timeout_s)]


def _on_pool(call: Call, world_size: int, timeout_s: float) -> list[RankEnd]:
    __tracebackhide__ = True
    pool, dispatch = pool_for(world_size), None
    try:
        dispatch = Dispatch(call, pool.ranks(world_size))
        ends = dispatch.collect(timeout_s)
        kinds = {end.kind for end in ends}
        if any(end.failed for end in ends) or len(kinds) > 1:
            raise RankFailedError(call.name, ends, limit_s=timeout_s)  # noqa: TRY301 - handled as any other failure
        dispatch.release()
        leftovers = dispatch.wait_idle()
    except BaseException:
        pool.discard()
        raise
    finally:
        if dispatch is not None:
            dispatch.close()
    _print_output(ends)
    if leftovers:
        pool.discard()
        print("the next test gets new ranks, because this one left behind:", *leftovers, sep="\n  ")  # noqa: T201
    if kinds == {"skipped"}:
        pytest.skip(ends[0].reason)
    if kinds == {"xfailed"}:
        pytest.xfail(ends[0].reason)
    return ends


def _print_output(ends: list[RankEnd]) -> None:
    for end in ends:
        for line in end.output.splitlines():
            print(f"[rank {end.rank}] {line}")  # noqa: T201 - pytest captures it with the test
