"""RngState in one process: the numbers drawn after a load are those drawn after the save."""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # it is loaded when it is first asked for
import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpoint, RngState
from distckpt.handlers import rng_generators
from distckpt.saving.capture import capture, consolidate
from tests.support.equality import equal
from tests.unit.toys import Refuses, idle_engine, run_epochs


def draw() -> list[Any]:
    """Draw from every generator, in ways that keep something for the next time too."""
    return [
        random.random(),
        random.gauss(0.0, 1.0),
        np.random.standard_normal(),  # noqa: NPY002 - the global generator is the point
        np.random.randint(1000),  # noqa: NPY002 - as above
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


def test_what_is_drawn_after_a_load_is_what_was_drawn_after_the_save() -> None:
    draw()
    state = RngState().state_dict()
    drawn = draw()
    assert draw() != drawn
    RngState().load_state_dict(state)
    assert draw() == drawn


def test_a_state_is_a_copy() -> None:
    state = RngState().state_dict()
    before = copy.deepcopy(state)
    draw()
    assert equal(state, before)
    assert not equal(RngState().state_dict(), before)


def test_a_checkpoint_holds_nothing_that_loading_would_have_to_execute(tmp_path: Path) -> None:
    source = RngState(idle_engine(), generators={"data": torch.Generator()})
    run_epochs(Checkpoint({"rng": source, "other": RngState()}, tmp_path), 1)
    drawn = draw()
    saved = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert saved["rng"]["world_size"] == 1
    assert list(saved["rng"]["ranks"]) == [0]
    Checkpoint.load_objects({"rng": RngState(generators={"data": torch.Generator()})}, tmp_path / "checkpoint_1.pt")
    assert draw() == drawn


def test_generators_of_the_programs_own_are_saved_by_name() -> None:
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    source = RngState(generators={"one": one, "other": other})
    state = source.state_dict()
    drawn = [torch.rand(2, generator=one).tolist(), torch.rand(2, generator=other).tolist()]
    source.load_state_dict(state)
    assert [torch.rand(2, generator=one).tolist(), torch.rand(2, generator=other).tolist()] == drawn


def test_a_generator_that_is_not_there_is_named_in_a_warning() -> None:
    state = RngState(generators={"data": torch.Generator()}).state_dict()
    drawn = draw()
    with pytest.warns(UserWarning, match="there is no generator 'data' here"):
        RngState().load_state_dict(state)
    assert draw() == drawn, "the others are set"


def test_another_kind_of_numpys_generator_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    state = RngState().state_dict()
    monkeypatch.setattr(np.random, "get_state", lambda **_: {"bit_generator": "PCG64"})
    assert "numpy" not in rng_generators.capture()
    with pytest.warns(UserWarning, match="NumPy's global generator is missing, or not of the kind MT19937"):
        RngState().load_state_dict(state)


def test_numpy_is_not_imported_to_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    assert "numpy" not in rng_generators.capture()


def job_of(num_ranks: int, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a state of a job of several ranks, from states of single ones."""
    return {"world_size": num_ranks, "ranks": {rank: one["ranks"][0] for rank, one in enumerate(states)}}


def test_in_a_smaller_job_a_rank_keeps_its_own_and_a_warning_says_so() -> None:
    source = RngState()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        states.append(source.state_dict())
    RngState().load_state_dict(states[0])
    drawn = draw()
    with pytest.warns(UserWarning, match="rank 0, 1 of a job of 2 ranks, and this job has 1: each rank gets its own"):
        RngState().load_state_dict(job_of(2, states))
    assert draw() == drawn


class Rank:
    """A world in which this process is another rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def generators(self) -> dict[str, Any]:
        """Return the runtime's own: none."""
        return {}


def test_a_rank_that_is_new_gets_numbers_of_its_own_each_time_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Any] = {"alike": torch.Generator(), "python": random.Random(1), "numpy": np.random.default_rng(1)}

    def draw_all() -> list[Any]:
        return [
            *draw(),
            torch.rand(1, generator=own["alike"]).item(),
            own["python"].random(),
            own["numpy"].random(),
        ]

    source = RngState(generators=own)
    states, drawn = [], []
    for seed in (1, 2):
        own["alike"].manual_seed(0)
        own["python"].seed(seed)
        own["numpy"].bit_generator.state = np.random.PCG64(seed).state
        np.random.seed(seed)  # noqa: NPY002 - the global generator is the point
        torch.manual_seed(seed)
        random.seed(seed)
        states.append(source.state_dict())
        drawn.append(draw_all())
    for rank in (2, 3, 3):
        monkeypatch.setattr("distckpt.handlers.rng_state.current", lambda rank=rank: Rank(rank, 4))
        with pytest.warns(UserWarning, match=r"ranks \[2, 3\] get states derived from all of these"):
            source.load_state_dict(job_of(2, states))
        drawn.append(draw_all())
    assert drawn[3] == drawn[4]
    for numbers in zip(*drawn[:4], strict=True):
        num_different = len({repr(one) for one in numbers})
        assert num_different == (1 if numbers[0] == drawn[0][6] else 4)


def test_a_missing_state_of_this_rank_is_a_warning() -> None:
    mine = RngState().state_dict()["ranks"][0]
    with pytest.warns(UserWarning, match="of rank 1, and none of rank 0: not set"):
        RngState().load_state_dict({"world_size": 1, "ranks": {1: mine}})


@pytest.mark.parametrize("given", [None, [1], "text", 3], ids=repr)
def test_a_state_that_is_no_mapping_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match="Argument state_dict should be a dictionary, but given"):
        RngState().load_state_dict(given)


def spoilt(spoil: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Return a state of which something is wrong."""
    state = RngState().state_dict()
    spoil(state["ranks"][0])
    return state


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"ranks": {}},
        {"world_size": 1, "ranks": 3},
        {"world_size": 1, "ranks": {0: 7}},
        {"world_size": 1, "ranks": {0: {"pass": None}}},
        spoilt(lambda mine: mine["now"].pop("torch")),
        spoilt(lambda mine: mine["now"].update(torch=torch.zeros(3))),
        spoilt(lambda mine: mine["now"].update(python=None)),
        spoilt(lambda mine: mine["now"]["python"].update(words=torch.zeros(7, dtype=torch.uint8))),
        spoilt(lambda mine: mine["now"]["numpy"].update(words=torch.zeros(4, dtype=torch.uint8))),
    ],
    ids=range(10),
)
def test_a_state_of_something_else_is_refused_and_nothing_is_set(state: dict[str, Any]) -> None:
    before = RngState().state_dict()
    with pytest.raises(ValueError, match=r"world_size|random number generators"):
        RngState().load_state_dict(state)
    assert equal(RngState().state_dict(), before)


def test_nothing_is_set_when_another_object_refuses_its_state() -> None:
    source, other = RngState(), Refuses()
    state = {"rng": source.state_dict(), "other": {}}
    draw()
    before = RngState().state_dict()
    with pytest.raises(RuntimeError, match="it refuses"):
        Checkpoint.load_objects({"rng": source, "other": other}, state)
    assert equal(RngState().state_dict(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainer": 3}, "Argument trainer should be an instance of Engine or None"),
        ({"generators": {"a": 3}}, "Argument generators should map names to torch.Generators"),
        ({"generators": {1: torch.Generator()}}, "Argument generators should map names to torch.Generators"),
        ({"timeout_s": "3"}, "Argument timeout_s"),
    ],
)
def test_wrong_arguments_are_type_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RngState(**arguments)


def test_what_was_gathered_for_a_save_is_saved_and_never_handed_out_later() -> None:
    source = RngState()
    gathered = consolidate({"rng": source}, save_on_rank=0)
    before = RngState().state_dict()
    draw()
    assert equal(capture({"rng": source}, rank=0, save_on_rank=0, gathered=gathered)["rng"], before)
    assert not equal(source.state_dict(), before)


class Foreign:
    """An object of another library with a method of a known name."""

    def consolidate_state_dict(self, to: int) -> None:
        """Be called by nobody."""
        raise AssertionError(to)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


class Gathered(Foreign):
    """An object whose class has the method that gathers its state."""

    to: int | None = None

    def distckpt_consolidate(self, to: int) -> None:
        """Remember for whom."""
        self.to = to


def test_only_objects_with_the_method_are_gathered() -> None:
    gathered_object = Gathered()
    consolidate({"foreign": Foreign(), "nested": [{"gathered_object": gathered_object}]}, save_on_rank=3)
    assert gathered_object.to == 3


def test_the_start_of_each_pass_over_the_data_is_recorded() -> None:
    trainer = idle_engine()
    rng_state = RngState(trainer)
    began = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: began.append(rng_state.pass_began_at))
    trainer.run(DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True), max_epochs=2, epoch_length=4)
    assert began == [0, 0, 0, 3, 3, 3, 6, 6], "three batches are a pass, whatever an epoch is"


def test_a_restored_pass_has_the_same_order() -> None:
    trainer = idle_engine()
    rng_state = RngState(trainer)
    seen: list[list[int]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch[0].tolist()))
    data = DataLoader(TensorDataset(torch.arange(20)), batch_size=5, shuffle=True)
    trainer.run(data, max_epochs=2)
    draw()
    rng_state.load_state_dict(rng_state.state_dict())
    rng_state.begin_pass(0, is_order_drawn=True)
    assert [batch[0].tolist() for batch in data] == seen[4:]


@pytest.mark.parametrize("is_initialized", [True, False])
def test_cuda_is_read_only_if_it_is_in_use(monkeypatch: pytest.MonkeyPatch, *, is_initialized: bool) -> None:
    state = torch.arange(16, dtype=torch.uint8)
    put: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    captured = rng_generators.capture()
    assert ("cuda" in captured) is is_initialized
    assert rng_generators.restore(captured) == []
    assert put == ([state] if is_initialized else [])


def test_a_state_of_a_cuda_device_is_not_set_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rng_generators.restore({**rng_generators.capture(), "cuda": torch.zeros(16, dtype=torch.uint8)}) == [
        "there is no CUDA device here"
    ]


class Jumpy:
    """A sampler of a program's own, with generators of its own."""

    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(1)
        self.nested = [{"python": random.Random(2)}]
        self.numpy = np.random.default_rng(3)
        self.older = np.random.RandomState(4)
        self.secret = random.SystemRandom()

    def __iter__(self) -> Iterator[int]:
        """Draw from each."""
        yield int(torch.randint(10, (), generator=self.torch))
        yield self.nested[0]["python"].randrange(10)
        yield int(self.numpy.integers(10))
        yield int(self.older.standard_normal() * 3) % 10

    def __len__(self) -> int:
        """Return how many these are."""
        return 4


def test_generators_of_the_data_are_saved_without_being_named() -> None:
    trainer = idle_engine()
    sampler = Jumpy()
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(10)), sampler=sampler, batch_size=4)
    rng_state = RngState(trainer)
    trainer.run(loader)
    state = rng_state.state_dict()
    orders = [list(sampler) for _ in range(3)]
    draw()
    rng_state.load_state_dict(state)
    rng_state.restore_loaded()
    assert [list(sampler) for _ in range(3)] == orders
    assert rng_state.missing_generators(loader) == []
    found = set(state["ranks"][0]["now"]["generators"])
    way = "state.dataloader.sampler"
    assert found == {f"{way}.torch", f"{way}.nested.0.python", f"{way}.numpy", f"{way}.older"}


def test_a_checkpoint_with_generators_of_all_kinds_loads_without_executing_code(tmp_path: Path) -> None:
    trainer = idle_engine()
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(10)), sampler=Jumpy(), batch_size=4)
    trainer.state.dataloader = loader
    torch.save(RngState(trainer).state_dict(), tmp_path / "rng.pt")
    assert torch.load(tmp_path / "rng.pt", weights_only=True)["world_size"] == 1
