"""A resumed run continues at the first batch that was not trained, for all events of the save and kinds of data."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import DeterministicEngine, Engine, Events
from ignite.utils import manual_seed
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distckpt import Checkpoint, DiskSaver, Loop, RngState, resume

ENDLESS = 10**6


class KilledError(Exception):
    """What ends a run in its middle."""


class Model:
    """A model whose state is the list of its batches, each with a random number."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(one) for one in self.seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = [tuple(one) for one in state["seen"]]


class Anew:
    """Data without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


class Stream(IterableDataset[int]):
    """The same as a data set."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


DATA: dict[str, Callable[[], Any]] = {
    "a range": lambda: range(7),
    "no length": Anew,
    "in sequence": lambda: DataLoader(TensorDataset(torch.arange(7)), batch_size=2),
    "shuffled": lambda: DataLoader(TensorDataset(torch.arange(7)), batch_size=2, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), batch_size=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that is killed in one of its iterations."""

    data: str
    event: Any
    terminates_epoch_at: int = 0
    in_step: bool = False
    run: tuple[tuple[str, int], ...] = (("max_epochs", 3),)

    def go(self, folder: Path | None, die_at: int = ENDLESS) -> list[tuple[Any, ...]]:
        torch.manual_seed(7)
        model = Model()

        def step(engine: Engine, batch: Any) -> None:
            if self.in_step and engine.state.iteration == die_at:
                raise KilledError
            indices = batch[0] if isinstance(batch, list) else batch
            drawn = torch.rand(1).item()
            model.seen.append((engine.state.epoch, engine.state.iteration, torch.as_tensor(indices).tolist(), drawn))

        trainer = Engine(step)
        objects = {"model": model, "trainer": trainer, "rng": RngState(trainer)}
        if self.terminates_epoch_at:
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED(once=self.terminates_epoch_at),
                lambda: trainer.terminate_epoch(skip_epoch_completed=False),
            )

        @trainer.on(Events.ITERATION_COMPLETED(event_filter=lambda _, number: not self.in_step and number == die_at))
        def kill() -> None:
            raise KilledError

        if folder is not None:
            saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=3)
            trainer.add_event_handler(self.event, saver)
            resume(objects, saver)
        with contextlib.suppress(KilledError):
            trainer.run(DATA[self.data](), **dict(self.run))
        return model.seen


EVENTS = {
    "iteration started": Events.ITERATION_STARTED(every=2),
    "iteration completed": Events.ITERATION_COMPLETED(every=2),
    "batch wanted": Events.GET_BATCH_STARTED,
    "batch drawn": Events.GET_BATCH_COMPLETED,
    "epoch started": Events.EPOCH_STARTED,
    "epoch completed": Events.EPOCH_COMPLETED,
    "exception": Events.EXCEPTION_RAISED,
    "pass over": Events.DATALOADER_STOP_ITERATION,
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("data", DATA)
def test_each_batch_is_trained_once_whatever_the_event_of_the_save(tmp_path: Path, data: str, event: str) -> None:
    program = Program(data=data, event=EVENTS[event], in_step=True)
    alone = program.go(None)
    for die_at in (4, 6, 7, 9):
        folder = tmp_path / str(die_at)
        program.go(folder, die_at)
        assert program.go(folder) == alone


@pytest.mark.parametrize("run", [{"max_epochs": 3}, {"max_iters": 11}, {"max_epochs": 4, "epoch_length": 3}], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_a_terminated_epoch_does_not_continue(tmp_path: Path, data: str, run: dict[str, int]) -> None:
    if data == "no length" and "max_iters" in run:
        run = {"max_epochs": 2}  # ignite itself ends such a run early
    for number, event in enumerate((Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.EPOCH_STARTED)):
        program = Program(data=data, event=event, terminates_epoch_at=2, run=tuple(run.items()))
        alone = program.go(None)
        for die_at in (2, 3, 5, 6):
            folder = tmp_path / f"{number}_{die_at}"
            program.go(folder, die_at)
            assert program.go(folder) == alone


def test_a_run_killed_again_and_again_trains_each_batch_once(tmp_path: Path) -> None:
    program = Program(data="shuffled", event=Events.ITERATION_STARTED, in_step=True)
    alone = program.go(None)
    for die_at in (2, 3, 3, 5, 8, 9):
        program.go(tmp_path, die_at)
    assert program.go(tmp_path) == alone
    assert program.go(tmp_path) == alone  # it had ended


# -- data that know their position -----------------------------------------------------------------------------------


class StatefulData:
    """Data with a state, such as torchdata's StatefulDataLoader."""

    def __init__(self, num: int = 10) -> None:
        self.at = 0
        self.num = num

    def __iter__(self) -> Iterator[int]:
        while self.at < self.num:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class StatefulDataWithLength(StatefulData):
    """The same with a length."""

    def __len__(self) -> int:
        return self.num


class StatefulStream(StatefulData, IterableDataset[int]):
    """The same as a data set."""


class Holder:
    """An object of the program's that saves its loader's state under a name of its own."""

    def __init__(self, loader: StatefulData) -> None:
        self.loader = loader

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["position"])


def knowing_loader() -> tuple[Any, Any]:
    data = StatefulDataWithLength()
    return data, data


def knowing_loader_without_length() -> tuple[Any, Any]:
    data = StatefulData()
    return data, data


def knowing_sampler() -> tuple[Any, Any]:
    sampler = StatefulDataWithLength()
    return DataLoader(TensorDataset(torch.arange(10)), batch_size=1, sampler=sampler), sampler


def knowing_dataset() -> tuple[Any, Any]:
    dataset = StatefulStream()
    return DataLoader(dataset, batch_size=1), dataset


def held_loader() -> tuple[Any, Any]:
    data = StatefulDataWithLength()
    return data, Holder(data)


def plain_data() -> tuple[Any, Any]:
    return range(10), Model()


@pytest.mark.parametrize(
    "make",
    [knowing_loader, knowing_loader_without_length, knowing_sampler, knowing_dataset, held_loader, plain_data],
    ids=lambda make: make.__name__,
)
def test_nothing_is_skipped_twice(tmp_path: Path, make: Any) -> None:
    def go(stop_at: int = 0) -> list[int]:
        seen: list[int] = []
        data, its = make()
        trainer = Engine(lambda _engine, batch: seen.append(int(batch[0] if isinstance(batch, list) else batch)))
        objects = {"trainer": trainer, "data": its}
        saver = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        if stop_at:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), trainer.terminate)
        resume(objects, saver)
        trainer.run(data, max_epochs=2)
        return seen

    once = list(range(10))
    assert go(4) == [0, 1, 2, 3]
    assert go(13) == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert go() == once[3:]


def test_a_map_style_data_set_among_the_objects_is_fast_forwarded(tmp_path: Path) -> None:
    class Scaled(Model):
        def __getitem__(self, index: int) -> int:
            return index

        def __len__(self) -> int:
            return 6

    def go(stop_at: int = 0) -> list[int]:
        seen: list[int] = []
        trainer, data = Engine(lambda _engine, batch: seen.append(batch.item())), Scaled()
        objects = {"trainer": trainer, "data": data}
        saver = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        if stop_at:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), trainer.terminate)
        resume(objects, saver)
        loader: Any = DataLoader(data, batch_size=1)  # type: ignore[arg-type]  # torch asks for a Dataset, and uses its methods
        trainer.run(loader, max_epochs=1)
        return seen

    assert (go(2), go()) == ([0, 1], [2, 3, 4, 5])


def test_a_batch_that_a_stateful_loader_has_yielded_untrained_is_warned_of(tmp_path: Path) -> None:
    def make(stop_at: int = 0) -> tuple[Engine, Any]:
        trainer, data = Engine(lambda _engine, _batch: None), StatefulDataWithLength()
        objects = {"trainer": trainer, "data": data}
        saver = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_STARTED(once=3), saver)
        if stop_at:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=stop_at), trainer.terminate)
        resume(objects, saver)
        return trainer, data

    trainer, data = make(3)
    trainer.run(data, max_epochs=1)
    trainer, data = make()
    with pytest.warns(UserWarning, match="after batch 3 was drawn and before it was trained"):
        trainer.run(data, max_epochs=1)


@pytest.mark.parametrize("has_rng", [False, True])
@pytest.mark.parametrize("stop_at", [2, 6, 8])
def test_a_deterministic_engine_finds_its_position_itself(tmp_path: Path, stop_at: int, *, has_rng: bool) -> None:
    def go(stop_at: int = 0, folder: Path | None = None) -> list[Any]:
        manual_seed(1)
        seen: list[Any] = []
        trainer = DeterministicEngine(lambda _engine, batch: seen.append((batch.tolist(), torch.rand(1).item())))
        objects: dict[str, Any] = {"model": Model(), "trainer": trainer}
        objects |= {"rng": RngState(trainer)} if has_rng else {}
        if folder is not None:
            saver = Checkpoint(objects, DiskSaver(folder, require_empty=False))
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at or ENDLESS), saver)
            if stop_at:
                trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), trainer.terminate)
            resume(objects, saver)
        numbers: Any = torch.arange(12.0)
        trainer.run(DataLoader(numbers, batch_size=2, shuffle=True), max_epochs=2)
        return seen

    alone = go()
    assert go(stop_at, tmp_path) + go(folder=tmp_path) == alone


# -- other batches than before -----------------------------------------------------------------------------------------


def train_in_batches_of(
    size: int, folder: Path, *, kill_at: int = 0, num: int = 40, shuffle: bool = False, has_rng: bool = True, **run: int
) -> dict[int, list[int]]:
    torch.manual_seed(3)
    epochs: dict[int, list[int]] = {}

    def step(engine: Engine, batch: Any) -> None:
        epochs.setdefault(engine.state.epoch, []).extend(batch[0].tolist())

    trainer = Engine(step)
    objects: dict[str, Any] = {"model": Model(), "trainer": trainer} | ({"rng": RngState(trainer)} if has_rng else {})
    saver = Checkpoint(objects, DiskSaver(folder, require_empty=False))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill_at or ENDLESS), saver)
    if kill_at:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill_at), trainer.terminate)
    resume(objects, saver)
    trainer.run(DataLoader(TensorDataset(torch.arange(num)), size, shuffle=shuffle), **(run or {"max_epochs": 3}))
    return epochs


@pytest.mark.parametrize("size", [2, 5, 8, 40])
def test_between_two_epochs_whole_epochs_follow(tmp_path: Path, size: int) -> None:
    train_in_batches_of(4, tmp_path, kill_at=10)
    epochs = train_in_batches_of(size, tmp_path)
    assert epochs == {2: list(range(40)), 3: list(range(40))}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_in_an_epoch_the_samples_are_counted(tmp_path: Path, size: int, *, shuffle: bool) -> None:
    begun = train_in_batches_of(4, tmp_path, kill_at=13, shuffle=shuffle)
    epochs = train_in_batches_of(size, tmp_path, shuffle=shuffle)
    assert sorted(epochs) == [2, 3]
    assert sorted(begun[2] + epochs[2]) == list(range(40))
    assert sorted(epochs[3]) == list(range(40))


@pytest.mark.parametrize("kind", ["no whole number of batches", "another order", "another number of samples"])
def test_an_unknown_position_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    shuffle = kind != "no whole number of batches"
    has_rng = kind != "another order"
    train_in_batches_of(4, tmp_path, kill_at=13, shuffle=shuffle, has_rng=has_rng)
    size, num = (8, 40) if not shuffle else (4, 44) if has_rng else (2, 40)
    with pytest.raises(ValueError, match=r"(?s)3 of 10 batches of 4 \(12 samples\).*distckpt.ResumableSampler"):
        train_in_batches_of(size, tmp_path, num=num, shuffle=shuffle, has_rng=has_rng)


def test_epochs_of_a_given_length_keep_it(tmp_path: Path) -> None:
    train_in_batches_of(4, tmp_path, kill_at=6, max_epochs=4, epoch_length=3)
    epochs = train_in_batches_of(2, tmp_path, max_epochs=4, epoch_length=3)
    assert epochs == {3: list(range(24, 30)), 4: list(range(30, 36))}


def test_a_number_of_iterations_is_kept_with_other_batches(tmp_path: Path) -> None:
    train_in_batches_of(4, tmp_path, kill_at=10, max_iters=15)
    epochs = train_in_batches_of(2, tmp_path, max_iters=15)
    assert epochs == {2: list(range(10))}


# -- complete runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{"max_epochs": 3}, {"max_iters": 15}, {"max_epochs": 3, "epoch_length": 5}], ids=str)
def test_a_complete_run_trains_no_more(tmp_path: Path, first: dict[str, int]) -> None:
    def go(*runs: dict[str, int]) -> tuple[Any, list[list[int]], list[str]]:
        seen: list[int] = []
        fired: list[str] = []
        trainer = Engine(lambda engine, _batch: seen.append(engine.state.iteration))
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
            trainer.add_event_handler(event, lambda: fired.append(str(trainer.last_event_name)))
        saver = Checkpoint({"trainer": trainer, "model": Model()}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        found = resume(saver.to_save, saver, engine=trainer)
        trained = []
        for run in runs:
            seen.clear()
            assert trainer.run(range(5), **run) is trainer.state
            trained.append(list(seen))
        return found, trained, fired

    assert go(first)[1] == [list(range(1, 16))]
    found, trained, fired = go(first)
    assert (trained, found.has_ended, found.iteration, found.epoch) == ([[]], True, 15, 3)
    assert fired == ["Events.STARTED", "Events.EPOCH_COMPLETED", "Events.COMPLETED"]  # which followed the save
    key = next(iter(first))
    further = first | {key: first[key] * 2}
    assert go(further)[1] == [list(range(16, 31))]
    assert go(first)[1:] == ([[]], [])  # a nearer end than it had come to
    assert go(further, further)[1] == [[], list(range(1, 31))]  # the second run is ignite's own


def test_a_run_that_ended_within_an_epoch_keeps_its_epoch(tmp_path: Path) -> None:
    ends = []
    for _ in range(2):
        trainer = Engine(lambda _engine, _batch: None)
        saver = Checkpoint({"trainer": trainer, "model": Model()}, DiskSaver(tmp_path, require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        resume(saver.to_save, saver, engine=trainer)
        state = trainer.run(range(5), max_iters=7)
        ends.append((state.iteration, state.epoch))
    assert ends == [(7, 2), (7, 2)]


def fire_epochs(folder: Path | None, *, on_loop: bool, ends_epoch: str = "", die_at: int = ENDLESS) -> list[Any]:
    """Train for three epochs; return what followed each epoch's batches, with random numbers.

    Where an epoch is terminated, without them: ignite makes a new iterator then, which draws.
    """
    torch.manual_seed(7)
    model = Model()

    def draw() -> float:
        return 0.0 if ends_epoch else torch.rand(1).item()

    def step(engine: Engine, _batch: Any) -> None:
        if engine.state.iteration == die_at:
            raise KilledError

    data = DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True)
    trainer = Loop(data, max_epochs=3) if on_loop else Engine(step)
    objects = {"model": model, "trainer": trainer, "rng": RngState(trainer)}

    def end_epoch() -> None:
        model.seen.append((trainer.state.epoch, trainer.state.iteration, draw()))

    if ends_epoch:
        skips = {"skip_epoch_completed": True} if ends_epoch == "skip" else {}
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: trainer.terminate_epoch(**skips))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, end_epoch)
    if folder is not None:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=2)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saver)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: model.seen.append(("end",)))
        resume(objects, saver)
    with contextlib.suppress(KilledError):
        if isinstance(trainer, Loop):
            with trainer:
                for _ in trainer.epochs():
                    for batch in trainer.batches():
                        step(trainer, batch)
                    model.seen.append((trainer.state.epoch, "body", draw()))
        else:
            trainer.run(data, max_epochs=3)
    return [one for one in model.seen if one != ("end",)]


@pytest.mark.parametrize(
    ("ends_epoch", "on_loop"), [("", False), ("", True), ("terminate", False), ("terminate", True), ("skip", False)]
)
def test_an_epoch_saved_after_its_last_batch_is_ended(tmp_path: Path, ends_epoch: str, *, on_loop: bool) -> None:
    program = {"on_loop": on_loop, "ends_epoch": ends_epoch}
    alone = fire_epochs(None, **program)  # type: ignore[arg-type]
    assert len(alone) == (3 - (ends_epoch == "skip")) + (3 if on_loop else 0)
    for die_at in (5, 7, 9):
        folder = tmp_path / str(die_at)
        fire_epochs(folder, die_at=die_at, **program)  # type: ignore[arg-type]
        assert fire_epochs(folder, **program) == alone  # type: ignore[arg-type]
        assert fire_epochs(folder, **program) == alone  # type: ignore[arg-type]  # the run's last file is of its last batch


@pytest.mark.parametrize("skips", [False, True])
def test_an_epoch_saved_while_it_is_terminated_is_ended(tmp_path: Path, *, skips: bool) -> None:
    def go(folder: Path, *, is_killed: bool) -> list[Any]:
        model = Model()

        def step(engine: Engine, batch: int) -> None:
            model.seen.append((engine.state.epoch, batch))
            if engine.state.iteration == 2:
                engine.terminate_epoch(skip_epoch_completed=skips)

        trainer = Engine(step)
        objects = {"trainer": trainer, "model": model}
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False))
        trainer.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, saver)
        resume(objects, saver)

        @trainer.on(Events.EPOCH_STARTED if skips else Events.EPOCH_COMPLETED)
        def kill() -> None:
            if is_killed and trainer.state.iteration == 2:
                raise KilledError

        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: model.seen.append((trainer.state.epoch, "end")))
        with contextlib.suppress(KilledError):
            trainer.run(range(4), max_epochs=2)
        return model.seen

    alone = go(tmp_path / "alone", is_killed=False)
    assert alone.count((1, "end")) == (not skips)
    go(tmp_path / "two", is_killed=True)
    assert go(tmp_path / "two", is_killed=False) == alone
