"""Resuming on several ranks: all of them take the same checkpoint, or hear the same error."""

import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from distckpt import (
    Checkpoint,
    CollectiveTimeout,
    DiskSaver,
    LoadError,
    RemoteRankError,
    StateMismatchError,
    resume,
)
from distckpt.ptformat.reader import OpenCheckpoint
from tests.distributed.programs import all_equal, gather, idle_engine, kinds, logged, model_of, raised
from tests.support import job, run_distributed, run_ranks
from tests.support.selection import process_ranks_only

WORLDS = pytest.mark.parametrize("world_size", [2, 3])


def put(folder: Path, step: int, **more: Any) -> Path:
    """Write a checkpoint of a model all of whose weights are `step`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"checkpoint_{step}.pt"
    trainer = {"epoch_length": 4, "iteration": step, "max_epochs": 100}
    torch.save({"model": model_of(float(step)).state_dict(), "trainer": trainer, **more}, path)
    return path


def cut(path: Path) -> None:
    """Take the second half off a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit of the model's bias: it would load as another number."""
    content = bytearray(path.read_bytes())
    bias = torch.load(path, weights_only=True)["model"]["bias"]
    with zipfile.ZipFile(path) as archive:
        records = [one for one in archive.infolist() if archive.read(one) == bias.numpy().tobytes()]
    header = records[-1].header_offset
    at = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
    content[at + 2] ^= 0x10
    path.write_bytes(content)


def resumed(source: Any) -> dict[str, Any]:
    """Resume, and return the results on this rank."""
    model, trainer = model_of(0.0), idle_engine()
    with logged("distckpt") as messages:
        path: Path | None = None

        def go() -> None:
            nonlocal path
            path = resume({"model": model, "trainer": trainer}, source, engine=trainer, timeout_s=20.0)

        error = raised(go)
    return {
        "path": path,
        "weight": model.bias.item(),
        "iteration": trainer.state.iteration,
        "skipped": [one for one in messages if one.endswith("It is passed over.")],
        "logged": [
            one.split(" in ")[0] for one in messages if not one.endswith("It is passed over.")
        ],  # seconds differ
        "error": None if error is None else str(error),
        "kinds": kinds(error),
    }


def resumed_from(folder: Path, *, per_rank: bool = False) -> dict[str, Any]:
    """Resume from a directory, or from one of each rank's own, given relative to its working directory."""
    if per_rank:
        os.chdir(folder / f"rank{job.rank()}")
        return resumed(Path("checkpoints"))
    return resumed(folder)


def own_folders(folder: Path, world_size: int) -> list[Path]:
    """Give each rank a file system of its own, as it were: the same path, other files."""
    folders = [folder / f"rank{rank}" / "checkpoints" for rank in range(world_size)]
    for one in folders:
        one.mkdir(parents=True)
    return folders


def on_own_folders(folder: Path) -> dict[str, Any]:
    return resumed_from(folder, per_rank=True)


@WORLDS
def test_all_ranks_take_the_newest(tmp_path: Path, world_size: int) -> None:
    for step in (4, 12, 8):
        put(tmp_path, step)
    ends = run_ranks(resumed_from, world_size, tmp_path)
    assert all_equal(ends)
    assert ends[0]["path"] == tmp_path / "checkpoint_12.pt"
    assert (ends[0]["weight"], ends[0]["iteration"], ends[0]["skipped"]) == (12.0, 12, [])
    assert ends[0]["logged"] == [
        f"resume: continuing from {tmp_path / 'checkpoint_12.pt'} of iteration 12, epoch 3: loaded model, trainer"
    ]


@WORLDS
def test_without_a_checkpoint_all_ranks_start_afresh(tmp_path: Path, world_size: int) -> None:
    ends = run_ranks(resumed_from, world_size, tmp_path / "sub")
    assert all_equal(ends)
    assert (ends[0]["path"], ends[0]["error"], ends[0]["skipped"]) == (None, None, [])
    assert ends[0]["logged"] == ["resume: nothing to resume from"]


@WORLDS
def test_a_truncated_newest_checkpoint_is_skipped_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    put(tmp_path, 4)
    cut(put(tmp_path, 8))
    ends = run_ranks(resumed_from, world_size, tmp_path)
    assert all_equal(ends)
    assert ends[0]["path"] == tmp_path / "checkpoint_4.pt"
    (message,) = ends[0]["skipped"]
    assert message.startswith(f"resume: {tmp_path / 'checkpoint_8.pt'} cannot be loaded: on every rank: ")
    assert "truncated" in message


@pytest.mark.parametrize("writer", ["torch", "distckpt"])
def test_a_checkpoint_with_a_flipped_bit_is_skipped_on_all_ranks(tmp_path: Path, writer: str) -> None:
    put(tmp_path, 4)
    newest = put(tmp_path, 8)
    if writer == "distckpt":
        DiskSaver(tmp_path, require_empty=False)(torch.load(newest, weights_only=True), newest.name)
    flip(newest)
    ends = run_ranks(resumed_from, 2, tmp_path)
    assert all_equal(ends)
    assert (ends[0]["path"], ends[0]["weight"]) == (tmp_path / "checkpoint_4.pt", 4.0)
    (message,) = ends[0]["skipped"]
    assert message.startswith(f"resume: {newest} cannot be loaded: on every rank: ")
    assert "has checksum" in message


@process_ranks_only
@WORLDS
def test_a_checkpoint_that_is_damaged_on_one_rank_is_skipped_on_all(tmp_path: Path, world_size: int) -> None:
    folders = own_folders(tmp_path, world_size)
    for one in folders:
        put(one, 4)
        put(one, 8)
    for one in folders:
        shutil.copyfile(folders[0] / "checkpoint_4.pt", one / "checkpoint_4.pt") if one != folders[0] else None
    cut(folders[1] / "checkpoint_8.pt")
    ends = run_ranks(on_own_folders, world_size, tmp_path)
    assert all_equal(ends)
    assert ends[0]["path"] == Path("checkpoints/checkpoint_4.pt")
    (message,) = ends[0]["skipped"]
    assert "checkpoint_8.pt cannot be loaded: on rank 1: " in message


@process_ranks_only
@WORLDS
def test_different_files_of_the_same_name_are_skipped_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    folders = own_folders(tmp_path, world_size)
    old = put(tmp_path, 4)
    for rank, one in enumerate(folders):
        shutil.copyfile(old, one / old.name)
        put(one, 8, note=1 if rank == world_size - 1 else 0)
    ends = run_ranks(on_own_folders, world_size, tmp_path)
    assert all_equal(ends)
    assert ends[0]["path"] == Path("checkpoints/checkpoint_4.pt")
    (message,) = ends[0]["skipped"]
    assert f"is not the same file on all ranks: rank {world_size - 1} has another than rank 0" in message


@process_ranks_only
@WORLDS
def test_a_rank_that_does_not_see_the_file_is_named_on_all(tmp_path: Path, world_size: int) -> None:
    folders = own_folders(tmp_path, world_size)
    put(folders[0], 8)
    ends = run_ranks(on_own_folders, world_size, tmp_path)
    assert all_equal(ends)
    others = ", ".join(str(rank) for rank in range(1, world_size))
    assert LoadError.__name__ in ends[0]["kinds"]
    assert ends[0]["error"].startswith(
        f"checkpoints/checkpoint_8.pt exists for rank 0, which lists the checkpoints, but not for rank {others}."
    )
    assert ends[0]["weight"] == 0.0


@WORLDS
def test_without_a_whole_checkpoint_all_ranks_raise_the_reasons(tmp_path: Path, world_size: int) -> None:
    for step in (4, 8):
        cut(put(tmp_path, step))
    torch.save({"model": {}}, tmp_path / "other.pt")
    ends = run_ranks(resumed_from, world_size, tmp_path)
    assert all_equal(ends)
    assert LoadError.__name__ in ends[0]["kinds"]
    assert len(ends[0]["skipped"]) == 3
    for name in ("checkpoint_4.pt", "checkpoint_8.pt", "other.pt cannot be loaded: on every rank: it lacks"):
        assert name in ends[0]["error"]


@WORLDS
def test_a_checkpoint_that_lacks_an_object_is_skipped_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    put(tmp_path, 4)
    torch.save({"trainer": {"epoch_length": 4, "iteration": 8, "max_epochs": 9}}, tmp_path / "checkpoint_8.pt")
    ends = run_ranks(resumed_from, world_size, tmp_path)
    assert all_equal(ends)
    assert ends[0]["path"] == tmp_path / "checkpoint_4.pt"
    assert "checkpoint_8.pt cannot be loaded: on every rank: it lacks" in ends[0]["skipped"][0]


@WORLDS
def test_damage_in_any_ranks_range_is_found_on_all(tmp_path: Path, world_size: int) -> None:
    put(tmp_path, 4)
    state = {**torch.load(tmp_path / "checkpoint_4.pt", weights_only=True), "large": torch.zeros(200_000)}
    DiskSaver(tmp_path, require_empty=False)(state, "checkpoint_8.pt")
    newest = tmp_path / "checkpoint_8.pt"
    content = bytearray(newest.read_bytes())
    for part in range(4):
        damaged = bytearray(content)
        damaged[20_000 + part * 200_000] ^= 1
        newest.write_bytes(damaged)
        ends = run_ranks(resumed_from, world_size, tmp_path)
        assert all_equal(ends)
        assert ends[0]["path"] == tmp_path / "checkpoint_4.pt"
        assert "on every rank: " in ends[0]["skipped"][0]
        assert "has checksum" in ends[0]["skipped"][0]


def read_by_all(folder: Path, resumes: bool) -> tuple[int, int]:  # noqa: FBT001 - it travels by position
    """Load with a cold cache; return how many bytes this rank has verified, and how many it had read from storage."""
    checked: list[int] = []
    read = 0
    real = OpenCheckpoint.check

    def watched(self: OpenCheckpoint, ranges: Any, source: Any = None) -> Any:
        checked.extend(end - begin for begin, end in ranges)
        return real(self, ranges, source)

    model = torch.nn.Linear(1024, 2048)
    OpenCheckpoint.check = watched  # type: ignore[method-assign]
    try:
        for _ in range(2):  # what the first one imports is read from storage too
            torch.nn.init.zeros_(model.weight)
            checked.clear()
            job.barrier()
            if job.rank() == 0:
                with (folder / "a.pt").open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            job.barrier()
            before = bytes_read()
            if resumes:
                resume({"model": model}, folder)
            else:
                Checkpoint.load_objects({"model": model}, folder / "a.pt")
            read = bytes_read() - before
            assert model.weight.mean().item() == 3.0
    finally:
        OpenCheckpoint.check = real  # type: ignore[method-assign]
    return sum(checked), read


def bytes_read() -> int:
    """Return how many bytes this process has had read from storage."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@process_ranks_only
@WORLDS
@pytest.mark.parametrize("resumes", [True, False])
def test_ranks_of_one_machine_have_each_byte_read_from_storage_once(
    tmp_path: Path, world_size: int, *, resumes: bool
) -> None:
    model = torch.nn.Linear(1024, 2048)
    torch.nn.init.constant_(model.weight, 3.0)
    DiskSaver(tmp_path)({"model": model.state_dict()}, "a.pt")
    size = (tmp_path / "a.pt").stat().st_size
    ends = run_ranks(read_by_all, world_size, tmp_path, resumes)
    verified = [num_bytes for num_bytes, _ in ends]
    assert sum(verified) == (size if resumes else size * world_size)
    assert max(verified) - min(verified) <= (8192 if resumes else 0)
    total = sum(num_bytes for _, num_bytes in ends)
    assert total <= 1.01 * size + 65536, "a file system without storage counts nothing"


@run_distributed(world_size=2)
def test_a_misfit_on_one_rank_changes_no_object_on_any(tmp_path: Path) -> None:
    if job.rank() == 0:
        put(tmp_path, 4)
    job.barrier()
    model, book = (model_of(0.0) if job.rank() == 0 else torch.nn.Linear(7, 7)), idle_engine()
    before = model.bias.detach().clone()
    with pytest.raises(RemoteRankError, match="size mismatch") as caught:
        resume({"model": model, "trainer": book}, tmp_path)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, StateMismatchError)
    assert torch.equal(model.bias, before)
    assert book.state.iteration == 0


class RefusesOn:
    """An object that takes no state on one rank."""

    def __init__(self, rank: int) -> None:
        self.refuses = job.rank() == rank
        self.state: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing worth keeping."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Refuse, or take it over."""
        if self.refuses:
            msg = "it refuses"
            raise RuntimeError(msg)
        self.state = state


@run_distributed(world_size=2)
def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    if job.rank() == 0:
        put(tmp_path, 4, other={})
    job.barrier()
    model = model_of(0.0)
    with pytest.raises(
        RemoteRankError, match=r"it refuses \(RuntimeError on rank 1, while: resume, loading checkpoint_4.pt"
    ):
        resume({"model": model, "other": RefusesOn(1)}, tmp_path)
    assert model.bias.item() == 0.0, "all or none, on all ranks"


@run_distributed(world_size=2)
def test_a_wrong_argument_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    source: Any = tmp_path if job.rank() == 0 else 3
    error = raised(lambda: resume({"model": model_of(0.0)}, source))
    assert {"RemoteRankError", "TypeError"} <= set(kinds(error))
    error = raised(lambda: resume({"model": model_of(0.0)}, DiskSaver(tmp_path, save_on_rank=job.rank())))
    assert kinds(error)[0] == "ValueError"
    assert "save_on_rank should be one rank of this job (0 to 1), but is, by rank: [0, 1]" in str(error)


@run_distributed(world_size=2)
def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    if job.rank() == 0:
        with pytest.raises(CollectiveTimeout) as caught:
            resume({"model": model_of(0.0)}, tmp_path, timeout_s=0.5)
        assert caught.value.missing == (1,)


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_directory_of_the_saving_rank_is_searched(tmp_path: Path, saving: int) -> None:
    mine = tmp_path / f"rank{job.rank()}"
    put(mine, 4 if job.rank() == saving else 8)
    job.barrier()
    model = model_of(0.0)
    saver = DiskSaver(mine, save_on_rank=saving, require_empty=False)
    assert resume({"model": model}, saver) == tmp_path / f"rank{saving}" / "checkpoint_4.pt"
    assert model.bias.item() == 4.0


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_history_continues_on_all_ranks(tmp_path: Path, saving: int, *, include_self: bool) -> None:
    for num_epochs in (3, 5):
        trainer = idle_engine()
        objects = {"model": model_of(1.0), "trainer": trainer}
        handler = Checkpoint(
            objects,
            DiskSaver(tmp_path, save_on_rank=saving, require_empty=False),
            n_saved=2,
            include_self=include_self,
        )
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        found = resume(objects, handler, engine=trainer)
        if num_epochs == 5:
            assert found == tmp_path / "checkpoint_12.pt"
            history = [[8, "checkpoint_8.pt"], [12, "checkpoint_12.pt"]]
            assert gather([list(entry) for entry in handler.state_dict()["_saved"]]) == [history] * 2
        trainer.run(range(4), max_epochs=num_epochs)
        job.barrier()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_16.pt", "checkpoint_20.pt"]
