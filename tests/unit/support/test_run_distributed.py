"""`run_distributed` and `run_ranks`: results, failures, hangs and replaced processes."""

import importlib.util
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distckpt import Loop
from tests.support import (
    RankFailedError,
    run_distributed,
    run_ranks,
)
from tests.support.pool import pool_for
from tests.support.report import RankEnd


@run_distributed(world_size=2)
def test_ranks_form_a_process_group(tmp_path: Path) -> None:
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    assert total.item() == 3
    (tmp_path / f"rank{dist.get_rank()}").touch()
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]


@pytest.mark.parametrize("number", [1, 2])
@run_distributed(world_size=3)
def test_parameters_reach_every_rank(number: int) -> None:
    numbers: list[int | None] = [None] * 3
    dist.all_gather_object(numbers, number)
    assert numbers == [number] * 3


@run_distributed(world_size=2)
def test_environment_is_torchruns() -> None:
    rank = str(dist.get_rank())
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (rank, rank)
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert dist.is_torchelastic_launched()


@run_distributed(world_size=1, backend=None)
def test_without_a_backend_nothing_is_initialised() -> None:
    assert not dist.is_initialized()


def _rank_squared() -> int:
    return dist.get_rank() ** 2


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(_rank_squared, 4) == [0, 1, 4, 9]


def _pid() -> int:
    return os.getpid()


def test_processes_are_reused_between_calls() -> None:
    assert run_ranks(_pid, 2) == run_ranks(_pid, 2)


def _fails_on_rank_1(value: int) -> None:
    if dist.get_rank() == 1:
        assert value == 7
    dist.barrier()


def test_a_failing_rank_is_reported_with_its_line_and_the_pool_is_rebuilt() -> None:
    before = run_ranks(_pid, 2)
    with pytest.raises(RankFailedError, match=r"rank 1 .*AssertionError") as caught:
        run_ranks(_fails_on_rank_1, 2, 6)
    assert "rank 1 (the first to fail) raised" in str(caught.value)
    assert "assert value == 7" in str(caught.value)
    assert "assert 6 == 7" in str(caught.value), "assertions are not rewritten on the ranks"
    assert [end.kind for end in caught.value.ends] == ["raised", "raised"]
    assert set(before).isdisjoint(run_ranks(_pid, 2))


def test_the_first_to_fail_is_the_first_on_the_clock_and_not_the_first_whose_message_arrived() -> None:
    early = RankEnd(rank=1, kind="raised", reason="the cause")
    late = RankEnd(rank=0, kind="raised", reason="its effect")
    text = str(RankFailedError("a program", [late, early], limit_s=1.0))
    assert "--- rank 1 (the first to fail) raised: the cause" in text
    assert text.index("the cause") < text.index("its effect")


def _hangs_on_rank_0() -> None:
    if dist.get_rank() == 0:
        threading.Event().wait()


def test_a_hanging_rank_is_reported_with_its_stack() -> None:
    before = run_ranks(_pid, 2)
    with pytest.raises(RankFailedError, match="rank 0 hung") as caught:
        run_ranks(_hangs_on_rank_0, 2, timeout_s=1.0)
    assert "in _hangs_on_rank_0" in str(caught.value)
    assert set(before).isdisjoint(run_ranks(_pid, 2))


def _waits_for_rank_1_that_left() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_a_rank_left_alone_in_a_collective_is_reported_with_its_stack() -> None:
    with pytest.raises(RankFailedError, match="rank 0 hung") as caught:
        run_ranks(_waits_for_rank_1_that_left, 2, timeout_s=1.0)
    assert "in barrier" in str(caught.value)
    assert "in _waits_for_rank_1_that_left" in str(caught.value)


def _dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_dies_is_reported_with_its_signal() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 .*died: killed by signal 9"):
        run_ranks(_dies_on_rank_1, 2)


def _prints_and_fails() -> None:
    print("what the rank printed")  # noqa: T201
    raise ValueError("two\nlines")


def _fails_in_a_thread() -> None:
    thread = threading.Thread(target=_prints_and_fails)
    thread.start()
    thread.join()


def test_an_exception_in_a_ranks_thread_fails_the_test_and_its_output_is_shown() -> None:
    with pytest.raises(RankFailedError, match="uncaught exception in thread") as caught:
        run_ranks(_fails_in_a_thread, 1)
    assert "what the rank printed" in str(caught.value)


LEFT: list[Loop] = []


def _leaves_a_run() -> None:
    LEFT.append(Loop(max_epochs=1, epoch_length=1).__enter__())


def test_a_run_that_a_rank_leaves_under_way_fails_the_test() -> None:
    with pytest.raises(RankFailedError, match=r"left a run of .*Loop.* under way"):
        run_ranks(_leaves_a_run, 1)


def _prints() -> None:
    print("a line")  # noqa: T201


def test_output_of_ranks_is_printed_by_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(_prints, 2)
    assert capsys.readouterr().out == "[rank 0] a line\n[rank 1] a line\n"


def _leaves_traces() -> None:
    os.environ["LEFT_BY_A_TEST"] = "1"
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    dist.new_group([0])


@run_distributed(world_size=2)
def _sees_no_traces() -> None:
    assert "LEFT_BY_A_TEST" not in os.environ
    assert Path.cwd() != Path("/")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert torch.get_default_dtype() is torch.float32
    assert dist.get_world_size() == 2
    with pytest.raises(UserWarning, match="an error again"):
        warnings.warn("an error again", stacklevel=1)


def test_state_does_not_leak_between_tests() -> None:
    before = run_ranks(_pid, 2)
    run_ranks(_leaves_traces, 2)
    _sees_no_traces()
    assert run_ranks(_pid, 2) == before


def _leaves_a_thread() -> None:
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()


def test_ranks_with_a_forgotten_thread_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    before = run_ranks(_pid, 1)
    run_ranks(_leaves_a_thread, 1)
    assert "rank 0: thread forgotten" in capsys.readouterr().out
    assert run_ranks(_pid, 1) != before


@pytest.mark.filterwarnings("ignore:harmless:UserWarning")
@run_distributed(world_size=1)
def test_warning_filters_of_the_test_hold_on_ranks() -> None:
    warnings.warn("harmless", stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("anything else", stacklevel=1)


def _skips() -> None:
    pytest.skip("not here")


def test_skipping_on_every_rank_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(_skips, 2)


def _skips_on_rank_0() -> None:
    if dist.get_rank() == 0:
        pytest.skip("only here")


def test_skipping_on_some_ranks_only_is_a_failure() -> None:
    with pytest.raises(RankFailedError, match="rank 0 skipped: only here"):
        run_ranks(_skips_on_rank_0, 2)


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"argument 0 of .*_fails_on_rank_1 cannot be sent"):
        run_ranks(_fails_on_rank_1, 1, threading.Lock())
    with pytest.raises(TypeError, match="not a lambda"):
        run_ranks(lambda: None, 1)


def test_functions_of_modules_that_cannot_be_imported_by_name_are_found_by_file(tmp_path: Path) -> None:
    path = tmp_path / "a script.py"
    path.write_text("import torch.distributed as dist\n\ndef world_size():\n    return dist.get_world_size()\n")
    spec = importlib.util.spec_from_file_location("a_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert run_ranks(module.world_size, 2) == [2, 2]


def _initialises_by_environment() -> int:
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total.item())


def test_ranks_can_initialise_as_under_torchrun() -> None:
    assert run_ranks(_initialises_by_environment, 2, backend=None) == [2, 2]


def test_a_warm_pool_costs_little() -> None:
    run_ranks(_pid, 2)
    times = []
    for _ in range(10):
        begin = time.monotonic()
        run_ranks(_pid, 2)
        times.append(time.monotonic() - begin)
    assert min(times) < 0.5, "a test on warm ranks should cost some 40 ms"


def test_pool_names_its_processes() -> None:
    assert set(run_ranks(_pid, 2)) <= set(pool_for(2).pids())
