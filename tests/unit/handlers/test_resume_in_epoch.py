"""Resume in the middle of an epoch: the rest of it is trained."""

import copy
import itertools
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distckpt import Checkpoint, DiskSaver, RngState, resume
from tests.unit.handlers.test_resume import engine_state


class Program:
    """A program that draws from all random number generators and records its batches."""

    def __init__(self, data: Callable[[], Any], *, notes_passes: bool = True, **run: Any) -> None:
        random.seed(1)
        torch.manual_seed(1)
        self.seen: list[Any] = []
        self.trainer = Engine(self._step)
        self.rng = RngState(self.trainer if notes_passes else None)
        self.to_save: dict[str, Any] = {"trainer": self.trainer, "rng": self.rng}
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: self.seen.append(("epoch", random.random())))
        self.data, self.kwargs = data, run

    def _step(self, _engine: Engine, batch: Any) -> None:
        shown = batch[0].tolist() if isinstance(batch, list) else batch
        self.seen.append((self.trainer.state.iteration, shown, torch.rand(1).item(), random.random()))

    def run(self) -> list[Any]:
        self.trainer.run(self.data(), **self.kwargs)
        return self.seen


def shuffled() -> Any:
    """Return ten batches, in an order that an iterator draws from torch's generator at its start."""
    return DataLoader(TensorDataset(torch.arange(20)), batch_size=2, shuffle=True)


def in_order() -> Any:
    """Ten batches, as they are."""
    return DataLoader(TensorDataset(torch.arange(20)), batch_size=2)


def drawn() -> Iterator[float]:
    """Yield random batches without end, the same for each new iterator."""
    own = random.Random(7)
    return (own.random() for _ in itertools.count())


class Stream(IterableDataset[Any]):
    """Ten samples of which nobody knows the number beforehand, each with noise of torch's generator."""

    def __iter__(self) -> Iterator[Any]:
        """Begin anew."""
        return (torch.tensor([value]) + torch.rand(1) for value in range(10))


def streamed() -> Any:
    """Ten batches of unknown number."""
    return DataLoader(Stream(), batch_size=None)


def interrupted(make: Callable[[], Program], steps: Iterable[int], *, last: int, **kwargs: Any) -> list[Any]:
    """Run a program that is stopped after some iterations, each time resumed in a new one; return what they saw."""
    seen: list[Any] = []
    state: dict[str, Any] = {}
    for step in [*steps, last]:
        program = make()
        if state:
            random.seed(99)
            torch.manual_seed(99)
            resume_from(program, state, **kwargs)
            torch.rand(3)  # whatever a program draws before it runs
        state = {}
        program.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), partial(save_and_stop, program, state))
        seen += program.run()
    return seen


def save_and_stop(program: Program, saved: dict[str, Any]) -> None:
    """Copy the states of what a program saves, and end its run."""
    saved.update(copy.deepcopy({name: obj.state_dict() for name, obj in program.to_save.items()}))
    program.trainer.terminate()


def resume_from(program: Program, state: dict[str, Any], **kwargs: Any) -> None:
    """Resume a program from a state that is put into a file for it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "a.pt")
        assert resume(program.to_save, folder, engine=program.trainer, **kwargs) is not None


def iterations(seen: list[Any]) -> list[Any]:
    """Leave out what the epochs' beginnings drew."""
    return [one for one in seen if one[0] != "epoch"]


@pytest.mark.parametrize("steps", [[3], [13], [19], [13, 14, 18], [10], [20, 23]], ids=str)
@pytest.mark.parametrize(
    ("data", "run"),
    [
        (shuffled, {"max_epochs": 3}),
        (in_order, {"max_epochs": 3}),
        (streamed, {"max_epochs": 3, "epoch_length": 10}),
        (lambda: None, {"max_epochs": 3, "epoch_length": 10}),
        (shuffled, {"max_iters": 30, "epoch_length": 10}),
    ],
    ids=["shuffled", "in order", "streamed", "no data", "max_iters"],
)
def test_an_interrupted_run_trains_what_an_uninterrupted_run_trains(
    data: Callable[[], Any], run: dict[str, Any], steps: list[int]
) -> None:
    alone = Program(data, **run).run()
    seen = interrupted(lambda: Program(data, **run), steps, last=30)
    assert iterations(seen) == iterations(alone)


@pytest.mark.parametrize("steps", [[3], [7], [13, 14, 19], [10], [25]], ids=str)
@pytest.mark.parametrize("length", [4, 15], ids=["shorter", "longer"])
@pytest.mark.parametrize("data", [shuffled, streamed, drawn])
def test_passes_over_the_data_need_not_be_epochs(data: Callable[[], Any], length: int, steps: list[int]) -> None:
    run: dict[str, Any] = {"max_epochs": 60 // length, "epoch_length": length}
    alone = Program(data, **run).run()
    seen = interrupted(lambda: Program(data, **run), steps, last=60 // length * length)
    assert iterations(seen) == iterations(alone)


@pytest.mark.parametrize("steps", [[3], [13, 17], [10]], ids=str)
def test_data_in_a_known_order_need_no_rng_state(steps: list[int]) -> None:
    def make() -> Program:
        return Program(in_order, notes_passes=False, max_epochs=3)

    assert iterations(interrupted(make, steps, last=30)) == iterations(make().run())


def test_what_the_beginning_of_an_epoch_draws_is_drawn_as_it_was() -> None:
    alone = Program(shuffled, max_epochs=3).run()
    assert interrupted(lambda: Program(shuffled, max_epochs=3), [10, 20], last=30) == alone


def test_an_unknown_order_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the sample order of the interrupted epoch is not known"):
        interrupted(lambda: Program(shuffled, notes_passes=False, max_epochs=3), [13], last=30)
    interrupted(lambda: Program(shuffled, notes_passes=False, max_epochs=3), [10], last=30)
    interrupted(lambda: Program(shuffled, max_epochs=3), [13], last=30)


def test_no_batch_of_data_that_continue_by_themselves_is_skipped() -> None:
    later = iter(range(13, 100))
    program = Program(lambda: later, notes_passes=False, max_epochs=3)
    state = {"trainer": engine_state(13, epoch_length=10), "rng": program.rng.state_dict()}
    resume_from(program, state, skip_batches=False)
    program.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=15), program.trainer.terminate)
    assert [one[:2] for one in iterations(program.run())] == [(14, 13), (15, 14)]


def test_data_that_end_too_soon_are_warned_of() -> None:
    program = Program(lambda: iter(range(2)), max_epochs=1)
    resume_from(program, {"trainer": engine_state(3), "rng": program.rng.state_dict()})
    program.trainer.add_event_handler(Events.ITERATION_STARTED, program.trainer.terminate)
    with pytest.warns(
        UserWarning, match="3 batches of this pass over the data were trained before, but the data ended"
    ):
        program.run()


def test_nothing_is_left_on_the_engine_after_the_first_batch() -> None:
    program = Program(shuffled, max_epochs=3)
    events = (Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_STARTED)

    def count() -> list[int]:
        return [len(program.trainer._event_handlers[event]) for event in events]

    before = count()
    for _ in range(2):  # the second takes the place of the first
        resume_from(program, {"trainer": engine_state(13, epoch_length=10), "rng": program.rng.state_dict()})
        assert count() == [number + 1 for number in before]
    with pytest.warns(UserWarning, match="the sample order of the interrupted epoch is not known"):
        program.run()
    assert count() == before
    assert iterations(program.seen)[0][0] == 14


def test_a_run_that_starts_elsewhere_is_not_changed() -> None:
    program = Program(in_order, max_epochs=1)
    resume_from(program, {"trainer": engine_state(13, epoch_length=10), "rng": program.rng.state_dict()})
    program.trainer.load_state_dict(engine_state(0, epoch_length=10))
    assert [one[:2] for one in iterations(program.run())][:2] == [(1, [0, 1]), (2, [2, 3])]


def test_a_stopped_engine_continues_in_the_same_process() -> None:
    alone = Program(shuffled, max_epochs=3).run()
    program = Program(shuffled, max_epochs=3)
    saved: dict[str, Any] = {}

    program.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=13), partial(save_and_stop, program, saved))
    program.run()
    resume_from(program, saved)
    assert iterations(program.run()) == iterations(alone)


def test_tensors_of_an_engine_outside_of_to_load_are_read(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Engine]:
        model, trainer = nn.Linear(2, 2), Engine(lambda _engine, _batch: None)
        trainer.state_dict_user_keys.extend(["alpha", "deep"])
        trainer.state.alpha, trainer.state.deep = torch.zeros(4), {"a": [torch.zeros(3)]}  # type: ignore[attr-defined]  # the user's
        return model, trainer

    model, trainer = build()
    trainer.state.alpha, trainer.state.deep = torch.arange(4.0), {"a": [torch.arange(3.0)]}  # type: ignore[attr-defined]
    saver = Checkpoint({"model": model, "trainer": trainer}, DiskSaver(tmp_path, require_empty=False))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run([0], max_epochs=2)
    fresh, engine = build()
    resume({"model": fresh}, tmp_path, engine=engine)
    assert torch.equal(engine.state.alpha, torch.arange(4.0))  # type: ignore[attr-defined]
    assert torch.equal(engine.state.deep["a"][0], torch.arange(3.0))  # type: ignore[attr-defined]
    assert torch.equal(fresh.state_dict()["weight"], model.state_dict()["weight"])
    assert engine.state.iteration == 2


@pytest.mark.parametrize("is_live_compiled", [True, False])
def test_a_compiled_models_checkpoint_resumes(tmp_path: Path, *, is_live_compiled: bool) -> None:
    model: Any = torch.compile(nn.Linear(2, 2))
    torch.save({"model": model.state_dict(), "trainer": engine_state(3)}, tmp_path / "a.pt")
    fresh: Any = torch.compile(nn.Linear(2, 2)) if is_live_compiled else nn.Linear(2, 2)
    assert resume({"model": fresh}, tmp_path) == tmp_path / "a.pt"
    assert torch.equal(fresh.weight, model.weight)
