"""The number of collectives that a save takes: reductions of headers, and gathers where answers differ.

They are counted on a rank's own backend. Each way of saving saves three times, evicts the second time on, and the third
save counts: the ranks are connected by then, and know who sees the directory.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver as IgniteDiskSaver
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distckpt
from distckpt import BaseSaveHandler, Checkpoint, DiskSaver
from distckpt.backends.detect import current
from tests.distributed.programs import all_equal, gather, idle_engine, model_of, raised, warned
from tests.support import job, run_distributed
from tests.support.selection import torch_only

pytestmark = torch_only


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Collect the names of the collectives that this rank enters."""
    entered: list[str] = []
    backend = current()

    def count(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            entered.append(name)
            return call(*args, **kwargs)

        return enter

    names = {"start_max": "reduce", "reduce_host": "reduce", "gather_host": "gather"}
    names |= {name: name for name in ("reduce_tensor", "gather_tensor", "broadcast_tensor")} | {
        "exchange_host": "exchange"
    }
    with pytest.MonkeyPatch.context() as patch:
        for method, name in names.items():
            patch.setattr(backend, method, count(name, getattr(backend, method)))
        yield entered


class KeyedSaver(BaseSaveHandler):
    """Keeps checkpoints in a dict on the first rank."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        del metadata
        if job.rank() == 0:
            self.files[filename] = checkpoint

    def remove(self, filename: str) -> None:
        if job.rank() == 0:
            del self.files[filename]


def handler_saves(saver: Any, *, scores_differ: bool, model: Any = None) -> list[list[str]]:
    """Save at the end of each of three epochs; return the collectives of each save."""
    model = model_of(1.0) if model is None else model

    def score(engine: Engine) -> float:
        return engine.state.epoch + (job.rank() / 10 if scores_differ else 0.0)

    handler = Checkpoint({"model": model}, saver, n_saved=1, score_function=score)
    trainer = idle_engine()
    saves: list[list[str]] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def save(engine: Engine) -> None:
        with counted_collectives() as entered:
            handler(engine)
            handler.wait_until_finished()
        saves.append(entered)

    with warned():  # of the scores that differ
        trainer.run([0], max_epochs=3)
    return saves


def function_saves(folder: Path, save: Callable[..., Any]) -> list[list[str]]:
    """Save three times to one path; return the collectives of each save."""
    saves = []
    for step in range(3):
        with counted_collectives() as entered:
            save({"model": model_of(float(step))}, folder / "model.pt", step=step)
        saves.append(entered)
    return saves


def is_alike_on_ranks(entered: list[str]) -> bool:
    return all_equal(gather(entered))


def counts(entered: list[str]) -> tuple[int, int]:
    assert set(entered) <= {"reduce", "gather"}
    return entered.count("reduce"), entered.count("gather")


SAVERS: dict[str, tuple[Callable[[Path], Any], tuple[int, int]]] = {
    # Reductions: decide, stage, save.
    "a DiskSaver": (DiskSaver, (3, 0)),
    # And the ranks meet before they wait for a disk.
    "in the background": (lambda folder: DiskSaver(folder, background=True), (4, 0)),
    # Decide, stage (the file's token is gathered), write (the checksums are), commit.
    "shared by a node": (lambda folder: DiskSaver(folder, share_write="node"), (4, 2)),
    "shared by the world": (lambda folder: DiskSaver(folder, share_write="world"), (4, 2)),
    "shared with compared replicas": (
        lambda folder: DiskSaver(folder, share_write="node", check_replicas=True),
        (5, 2),
    ),
    # Decide, capture, remove, save; ignite's DiskSaver removes afterwards.
    "a custom save handler": (lambda _: KeyedSaver(), (4, 0)),
    "ignite's DiskSaver": (lambda folder: IgniteDiskSaver(str(folder), require_empty=False), (4, 0)),
}


@pytest.mark.parametrize("scores_differ", [False, True], ids=["facts alike", "facts that differ"])
@pytest.mark.parametrize("kind", SAVERS)
@run_distributed(world_size=2)
def test_a_save_by_a_handler_takes_so_many_collectives(tmp_path: Path, kind: str, *, scores_differ: bool) -> None:
    make, (reductions, gathers) = SAVERS[kind]
    *_, last = handler_saves(make(tmp_path), scores_differ=scores_differ)
    assert counts(last) == (reductions, gathers + scores_differ), last
    assert len(last) <= 4 or kind != "a DiskSaver"
    assert is_alike_on_ranks(last)


@pytest.mark.only_on("gloo", why="device meshes over Gloo")
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@run_distributed(world_size=2)
def test_a_save_of_sharded_tensors_takes_so_many_collectives(tmp_path: Path, dim: int, *, background: bool) -> None:
    model = nn.Linear(40, 40)
    mesh = init_device_mesh("cpu", (2,))
    for name, parameter in list(model.named_parameters()):
        shard = distribute_tensor(parameter.detach(), mesh, [Shard(min(dim, parameter.dim() - 1))], src_data_rank=None)
        model.register_parameter(name, nn.Parameter(shard))
    *_, last = handler_saves(DiskSaver(tmp_path, background=background), scores_differ=False, model=model)
    # Decide, stage (the file's token is gathered), find the rows, write (the checksums are gathered), commit.
    # Columns are redistributed: before it the ranks meet once more.
    assert last.count("exchange") == 1
    rest = [name for name in last if name != "exchange"]
    assert counts(rest) in ([(4 + dim, 2), (5 + dim, 2)] if background else [(5 + dim, 2)]), last
    assert is_alike_on_ranks(last)


@run_distributed(world_size=2)
def test_a_save_shared_in_the_background_takes_so_many_collectives(tmp_path: Path) -> None:
    # The coordinator commits at once if the store tells it of the other writer, else after one more reduction.
    *_, last = handler_saves(DiskSaver(tmp_path, share_write="node", background=True), scores_differ=False)
    assert counts(last) in [(3, 2), (4, 2)], last
    assert is_alike_on_ranks(last)


@run_distributed(world_size=2)
def test_a_vote_on_each_iteration_adds_two_reductions_to_a_save(tmp_path: Path) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path), score_function=lambda engine: rising[engine])
    trainer, saves = idle_engine(), dict[int, list[str]]()
    rising: dict[Engine, float] = {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def save(engine: Engine) -> None:
        rising[engine] = engine.state.iteration // 2
        with counted_collectives() as entered:
            handler(engine)
        saves[engine.state.iteration] = entered

    trainer.run([0] * 5)
    # Only the vote, where no rank has a better score; else the ranks compare what they report, and save.
    assert {iteration: counts(saves[iteration]) for iteration in (3, 4, 5)} == {3: (1, 0), 4: (5, 0), 5: (1, 0)}, saves
    assert is_alike_on_ranks(saves[4])


@pytest.mark.parametrize("saving", [0, 1])
@run_distributed(world_size=2)
def test_histories_that_differ_are_told_once_and_the_coordinators_counts(tmp_path: Path, saving: int) -> None:
    handler = Checkpoint({"model": model_of(1.0)}, DiskSaver(tmp_path, save_on_rank=saving), n_saved=None)
    trainer = idle_engine()
    saves: list[list[str]] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def save(engine: Engine) -> None:
        if engine.state.epoch == 2:
            handler.load_state_dict({"_saved": [(0, f"of_rank_{job.rank()}.pt")]})
        with counted_collectives() as entered:
            handler(engine)
        saves.append(entered)

    trainer.run([0], max_epochs=3)
    assert [counts(entered) for entered in saves[1:]] == [(4, 2), (3, 0)], saves
    theirs = (0, f"of_rank_{saving}.pt")
    assert gather(handler.state_dict()["_saved"]) == [[theirs, (2, "model_2.pt"), (3, "model_3.pt")]] * 2


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    # Check the arguments, stage, save.
    "save": (distckpt.save, (3, 0)),
    "async_save": (lambda *args, **kwargs: distckpt.async_save(*args, **kwargs).result(), (3, 0)),
    # Two more reductions find the writers by a probe file, whose token is gathered.
    "a shared save": (lambda *args, **kwargs: distckpt.save(*args, share_write="node", **kwargs), (6, 3)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@run_distributed(world_size=2)
def test_a_save_without_an_engine_takes_so_many_collectives(tmp_path: Path, kind: str) -> None:
    save, expected = FUNCTIONS[kind]
    *_, last = function_saves(tmp_path, save)
    assert counts(last) == expected, last
    assert is_alike_on_ranks(last)


@run_distributed(world_size=2)
def test_a_state_that_fails_on_one_rank_takes_one_gather_to_tell(tmp_path: Path) -> None:
    class Failing:
        def state_dict(self) -> dict[str, torch.Tensor]:
            if job.rank() == 1:
                raise ValueError("broken")
            return {"weight": torch.ones(1)}

    handler = Checkpoint({"model": Failing()}, DiskSaver(tmp_path))
    trainer = idle_engine()
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    with counted_collectives() as entered:
        error = raised(lambda: trainer.run([0]))
    assert "rank 1" in str(error)
    assert "broken" in str(error)
    assert counts(entered) == (2, 2), entered  # the ranks' proposals for the run's id are gathered first
    assert gather(handler.last_checkpoint) == [None, None]
