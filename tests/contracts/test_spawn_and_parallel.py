"""Starting ranks from a script: `spawn` and `Parallel`, on real processes."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

import distckpt
from tests.support import run_distributed
from tests.support.runtime import RUNTIME
from tests.support.selection import only_on, torch_only

spawning = only_on("gloo", "horovod", why="replicas on a CPU need the launch script's turns to compile")
ERRORS: dict[str, type[Exception]] = {"gloo": ProcessRaisedException, "horovod": RuntimeError}


def leave_note(local_rank: int, folder: Path, word: str, *, number: int = 0) -> None:
    """Write down who this rank is and what it was given."""
    note = {
        "local_rank": [local_rank, distckpt.get_local_rank()],
        "rank": distckpt.get_rank(),
        "world_size": distckpt.get_world_size(),
        "backend": distckpt.backend(),
        "sum": distckpt.all_reduce(1),
        "given": [word, number],
    }
    (folder / f"{distckpt.get_rank()}.json").write_text(json.dumps(note), encoding="utf-8")


def notes_in(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def expected_note(rank: int, world_size: int, word: str, number: int) -> dict[str, object]:
    backend = RUNTIME if world_size > 1 else None
    given = [word, number]
    ranks = {"local_rank": [rank, rank], "rank": rank, "world_size": world_size}
    return {**ranks, "backend": backend, "sum": world_size, "given": given}


def fail_on_rank_1(local_rank: int) -> None:
    """Raise on one rank."""
    if local_rank == 1:
        raise KeyError("from rank 1")


@spawning
def test_spawned_ranks_form_a_job(tmp_path: Path) -> None:
    options: dict[str, Any] = {"timeout": 30} if RUNTIME == "gloo" else {}
    distckpt.spawn(RUNTIME, leave_note, (tmp_path, "ß"), {"number": 3}, nproc_per_node=2, **options)
    assert notes_in(tmp_path) == [expected_note(rank, 2, "ß", 3) for rank in range(2)]
    assert not dist.is_initialized(), "the script itself stays outside"


@spawning
def test_a_rank_that_raises_ends_the_script_with_its_error() -> None:
    with (
        pytest.raises(ERRORS[RUNTIME], match="from rank 1" if RUNTIME == "gloo" else "non-zero"),
        distckpt.Parallel(RUNTIME, nproc_per_node=2) as parallel,
    ):
        parallel.run(fail_on_rank_1)


@spawning
def test_parallel_starts_the_ranks_that_it_is_asked_for(tmp_path: Path) -> None:
    with distckpt.Parallel(RUNTIME, nproc_per_node=2) as parallel:
        parallel.run(leave_note, tmp_path, "word", number=7)
    assert notes_in(tmp_path) == [expected_note(rank, 2, "word", 7) for rank in range(2)]


@torch_only
@run_distributed(world_size=2, backend=None)
def test_parallel_joins_the_ranks_that_a_launcher_started(tmp_path: Path, launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    rank = int(os.environ["RANK"])
    with distckpt.Parallel(backend="gloo") as parallel:
        parallel.run(leave_note, tmp_path, "word", number=7)
        assert notes_in(tmp_path)[:1] == [expected_note(0, 2, "word", 7)] or rank == 1
        distckpt.barrier()
    assert notes_in(tmp_path) == [expected_note(rank, 2, "word", 7) for rank in range(2)]
    assert not dist.is_initialized()


@torch_only
@run_distributed(world_size=2, backend=None)
def test_no_rank_goes_on_before_all_have_joined(
    tmp_path: Path, launcher_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    has_joined, join = tmp_path / "has joined", dist.init_process_group

    def join_late(*args: Any, **options: Any) -> None:
        join(*args, **options)
        time.sleep(0.5)
        has_joined.touch()

    if os.environ["RANK"] == "0":
        monkeypatch.setattr(dist, "init_process_group", join_late)
    distckpt.initialize("gloo")
    try:
        assert has_joined.exists(), "an error of this rank would break the connections of the other, and be hidden"
    finally:
        distckpt.finalize()


@torch_only
@run_distributed(world_size=1, backend=None)
def test_parallel_leaves_the_job_when_the_program_raises(launcher_port: int) -> None:
    os.environ["MASTER_PORT"] = str(launcher_port)
    with pytest.raises(ZeroDivisionError), distckpt.Parallel(backend="gloo") as parallel:
        parallel.run(lambda _local_rank: 1 // 0)
    assert not dist.is_initialized()


def test_parallel_without_a_backend_is_a_world_of_one(tmp_path: Path) -> None:
    with distckpt.Parallel() as parallel:
        parallel.run(leave_note, tmp_path, "word")
    assert notes_in(tmp_path) == [expected_note(0, 1, "word", 0)]


@run_distributed(world_size=2)
def test_parallel_without_a_backend_runs_in_the_live_job(tmp_path: Path) -> None:
    with distckpt.Parallel() as parallel:
        parallel.run(leave_note, tmp_path, "word")
    distckpt.barrier()
    assert notes_in(tmp_path) == [expected_note(rank, 2, "word", 0) for rank in range(2)]
    assert distckpt.get_world_size() == 2, "who did not make the job does not end it"
    assert dist.is_initialized() or RUNTIME != "gloo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "smoke"}, "smoke"),
        ({"nproc_per_node": 2}, "^If backend is None, argument 'nproc_per_node' should be also None, but given 2"),
        ({"node_rank": 0}, "^If backend is None, argument 'node_rank' should be also None, but given 0"),
        ({"backend": "gloo", "nproc_per_node": 0}, "^Argument nproc_per_node should positive, but given 0"),
        ({"backend": "gloo", "nproc_per_node": 1, "nnodes": 0}, "^Argument nnodes should positive, but given 0"),
        (
            {"backend": "gloo", "nproc_per_node": 1, "nnodes": 2},
            "^If number of nodes larger than one, arguments node_rank should be given",
        ),
        (
            {"backend": "gloo", "nproc_per_node": 1, "nnodes": 2, "node_rank": 2},
            "^Argument node_rank should be between 0 and 1, but given 2",
        ),
        (
            {"backend": "gloo", "nproc_per_node": 1, "nnodes": 2, "node_rank": 1},
            "^If number of nodes larger than one, arguments master_addr and master_port or init_method",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distckpt.Parallel(**arguments)  # type: ignore[arg-type]  # wrong on purpose
