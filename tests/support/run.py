"""What tests use: a decorator and a function that run a body on pooled ranks."""

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import pytest

from tests.support.dispatch import Call, Dispatch
from tests.support.fresh import fresh_ranks
from tests.support.locate import RANK_BODY, WORLD_SIZE
from tests.support.pool import pool_for
from tests.support.report import RankEnd, RankFailedError

P = ParamSpec("P")
T = TypeVar("T")


def run_distributed(
    world_size: int = 2,
    backend: str | None = "gloo",
    timeout_s: float = 90.0,
    *,
    env: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a plain pytest function run on every rank of a fresh process group.

    Fixtures and parameters are evaluated once, by pytest, and sent to every rank: they have to be
    picklable (`tmp_path` is). The ranks have the environment that torchrun gives, torch.distributed is
    initialised, and warnings are filtered as in the test's process. `assert`, `pytest.raises`,
    `pytest.skip` and `pytest.importorskip` work; what a rank prints is printed by the test.

    Args:
        world_size: number of ranks.
        backend: of the default process group; None leaves it uninitialised.
        timeout_s: limit for the whole body; a rank that takes longer is reported with its stack.
        env: more environment variables for the ranks.

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
    timeout_s: float = 90.0,
    fresh: bool = False,
    env: Mapping[str, str] | None = None,
    collective_timeout_s: float | None = None,
) -> list[T]:
    """Call a module-level function on every rank and return what each returned, in rank order.

    Args:
        function: runs on each rank; found there by its name.
        world_size: number of ranks.
        *args: picklable arguments.
        backend: of the default process group; None leaves it uninitialised.
        timeout_s: limit for the whole call.
        fresh: use new processes instead of the pool's. `fresh_ranks` does more.
        env: more environment variables for the ranks.
        collective_timeout_s: timeout of the default process group. By default longer than `timeout_s`,
            so that a hang is reported with stacks rather than as a collective's error.

    Raises:
        RankFailedError: it failed on some rank; the message holds every failing rank's traceback.
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
            raise RankFailedError(call.name, ends, limit_s=timeout_s)  # noqa: TRY301 - as any other here
        dispatch.release()
        leftovers = dispatch.wait_idle()
    except BaseException:
        pool.discard()
        raise
    finally:
        if dispatch is not None:
            dispatch.end()
    _print_output(ends)
    if leftovers:
        pool.discard()
        print("new ranks for the next test, since this one left behind:", *leftovers, sep="\n  ")  # noqa: T201
    if kinds == {"skipped"}:
        pytest.skip(ends[0].reason)
    if kinds == {"xfailed"}:
        pytest.xfail(ends[0].reason)
    return ends


def _print_output(ends: list[RankEnd]) -> None:
    for end in ends:
        for line in end.output.splitlines():
            print(f"[rank {end.rank}] {line}")  # noqa: T201 - pytest captures it with the test
