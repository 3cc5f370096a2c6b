"""Checkpoint's own state: history, reset, include_self, reload_objects."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from distckpt import Checkpoint, DiskSaver
from tests.support.equality import equal
from tests.unit.toys import InMemory, Notebook, idle_engine, linear, run_epochs


def _checkpoint(**options: Any) -> Checkpoint:
    return Checkpoint({"model": nn.Identity()}, InMemory(), **options)


def test_state_is_the_list_of_priorities_and_names() -> None:
    handler = _checkpoint(n_saved=2)
    run_epochs(handler, 3)
    state = handler.state_dict()
    assert type(state) is OrderedDict
    assert state == {"_saved": [(2, "model_2.pt"), (3, "model_3.pt")]}
    assert all(type(entry) is tuple for entry in state["_saved"])


@pytest.mark.parametrize("key", ["_saved", "saved"])
@pytest.mark.parametrize(
    "entry",
    [
        *((0.5, "a.pt"), [0.5, "a.pt"], Checkpoint.Item(0.5, "a.pt")),
        *((np.float64(0.5), "a.pt"), (np.array(0.5), "a.pt"), (torch.tensor(0.5), "a.pt")),  # steps of ignite's handler
    ],
)
def test_states_of_both_releases_are_loaded(key: str, entry: Any) -> None:
    handler = _checkpoint()
    handler.load_state_dict({key: [entry]})
    assert handler.state_dict() == {"_saved": [(0.5, "a.pt")]}
    assert handler._saved == [Checkpoint.Item(0.5, "a.pt")]
    assert type(handler._saved[0].priority) is float
    assert handler.last_checkpoint == "a.pt"


def test_a_program_may_change_the_list_of_kept_checkpoints() -> None:
    handler = _checkpoint(n_saved=2)
    run_epochs(handler, 3)
    removed = handler._saved.pop()
    assert removed == Checkpoint.Item(3, "model_3.pt")
    assert handler.last_checkpoint == "model_2.pt"
    run_epochs(handler, 3)
    assert handler.state_dict() == {"_saved": [(2, "model_2.pt"), (3, "model_3.pt")]}


def test_a_program_may_assign_the_list_of_kept_checkpoints() -> None:
    handler = _checkpoint(n_saved=2)
    run_epochs(handler, 3)
    handler._saved = []
    assert handler.last_checkpoint is None
    handler._saved = [Checkpoint.Item(1, "model_1.pt")]
    assert handler.state_dict() == {"_saved": [(1, "model_1.pt")]}


@pytest.mark.parametrize("wrong", [[], None, "text", 12])
def test_a_state_that_is_no_mapping_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^Argument state_dict should be a dictionary, but given"):
        _checkpoint().load_state_dict(wrong)


def test_a_state_without_the_key_is_a_value_error() -> None:
    handler = _checkpoint()
    run_epochs(handler, 1)
    with pytest.raises(ValueError, match=r"^Required state attribute '_saved' is absent in provided state_dict"):
        handler.load_state_dict({"other": []})
    assert handler.last_checkpoint == "model_1.pt"


def test_history_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path), n_saved=2)
    run_epochs(first, 2)
    second = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path, require_empty=False), n_saved=2)
    second.load_state_dict(first.state_dict())
    engine = idle_engine()
    engine.state.iteration = 3
    second(engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_2.pt", "model_3.pt"]


def test_a_resume_that_keeps_fewer_removes_the_rest(tmp_path: Path) -> None:
    first = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path), n_saved=3)
    run_epochs(first, 3)
    second = Checkpoint({"model": linear(0)}, DiskSaver(tmp_path, require_empty=False), n_saved=1)
    second.load_state_dict(first.state_dict())
    engine = idle_engine()
    engine.state.iteration = 4
    second(engine)
    assert [path.name for path in tmp_path.iterdir()] == ["model_4.pt"]


def test_reset_forgets_the_history_and_leaves_the_files() -> None:
    saver = InMemory()
    handler = Checkpoint({"model": nn.Identity()}, saver)
    run_epochs(handler, 2)
    handler.reset()
    assert handler.last_checkpoint is None
    run_epochs(handler, 1)
    assert list(saver.files) == ["model_2.pt", "model_1.pt"]


@pytest.mark.parametrize("names", [["model"], ["model", "other"]])
def test_a_checkpoint_that_includes_itself_is_read_back(tmp_path: Path, names: list[str]) -> None:
    objects = {name: linear(seed) for seed, name in enumerate(names)}
    handler = Checkpoint(objects, tmp_path, include_self=True, n_saved=2)
    run_epochs(handler, 2)
    assert isinstance(handler.last_checkpoint, Path)
    content = torch.load(handler.last_checkpoint, weights_only=True)
    assert list(content) == [*names, "checkpointer"]
    # The file tells of itself: what it holds is what is true once it is committed.
    assert content["checkpointer"] == handler.state_dict()

    fresh = {name: linear(9) for name in names}
    other = Checkpoint(fresh, InMemory(), include_self=True)
    Checkpoint.load_objects({**fresh, "checkpointer": other}, handler.last_checkpoint)
    assert other.state_dict() == handler.state_dict()
    for name in names:
        assert equal(fresh[name].state_dict(), objects[name].state_dict())


def test_what_a_subclass_adds_to_its_state_is_saved_and_read_back(tmp_path: Path) -> None:
    class Best(Checkpoint):
        best = 0.25

        def state_dict(self) -> Any:
            return {**super().state_dict(), "best": self.best}

        def load_state_dict(self, state_dict: Any) -> None:
            self.best = state_dict["best"]
            super().load_state_dict(state_dict)

    handler = Best({"model": linear(0)}, tmp_path, include_self=True, n_saved=2)
    handler.best = 0.75
    run_epochs(handler, 2)
    assert isinstance(handler.last_checkpoint, Path)
    content = torch.load(handler.last_checkpoint, weights_only=True)
    assert content["checkpointer"] == handler.state_dict()
    other = Best({"model": linear(1)}, InMemory(), include_self=True)
    Checkpoint.load_objects({"checkpointer": other}, handler.last_checkpoint)
    assert other.state_dict() == handler.state_dict()


def test_a_single_object_is_read_back_without_its_checkpointer(tmp_path: Path) -> None:
    model, fresh = linear(1), linear(2)
    handler = Checkpoint({"model": model}, tmp_path, include_self=True)
    run_epochs(handler, 1)
    assert handler.last_checkpoint is not None
    Checkpoint.load_objects({"model": fresh}, handler.last_checkpoint)
    assert equal(fresh.state_dict(), model.state_dict())


def test_without_include_self_one_object_is_its_bare_state(tmp_path: Path) -> None:
    model = linear(1)
    run_epochs(Checkpoint({"model": model}, tmp_path), 1)
    assert equal(torch.load(tmp_path / "model_1.pt", weights_only=True), model.state_dict())


NUMPY_STATES = [
    {"best": np.float32(0.5), "step": np.int64(3), "flag": np.bool_(1)},
    {"nested": {"deep": [np.float64(0.25), (np.uint8(1), "text")]}},
    OrderedDict(a=np.float16(0.5)),
    {np.int64(3): "as a key"},
]


@pytest.mark.parametrize("state", NUMPY_STATES)
def test_numpy_scalars_in_a_state_leave_the_file_loadable(tmp_path: Path, state: Any) -> None:
    handler = Checkpoint({"book": Notebook(state), "model": linear(0)}, tmp_path)
    run_epochs(handler, 1)
    content = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
    assert content["book"] == state
    fresh = Notebook()
    assert handler.last_checkpoint is not None
    Checkpoint.load_objects({"book": fresh}, handler.last_checkpoint)
    assert fresh.state == state


def test_a_live_state_is_not_changed_by_saving_it() -> None:
    state = {"best": np.float32(0.5), "plain": [1, 2]}
    run_epochs(Checkpoint({"book": Notebook(state), "model": linear(0)}, InMemory()), 1)
    assert type(state["best"]) is np.float32


def _numpy_score() -> dict[str, Any]:
    return {"score_function": lambda _engine: np.float32(0.5)}


def test_numpy_scores_are_pythons_in_history_and_file(tmp_path: Path) -> None:
    objects = {"model": linear(0), "other": linear(1)}
    handler = Checkpoint(objects, tmp_path, include_self=True, **_numpy_score())
    run_epochs(handler, 1)
    content = torch.load(tmp_path / "checkpoint_0.5000.pt", weights_only=True)
    assert content["checkpointer"] == {"_saved": [(0.5, "checkpoint_0.5000.pt")]}


RELOADED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"global_step": 3}),
    ({"filename_prefix": "best"}, {"global_step": 3}),
    ({"score_function": lambda engine: engine.state.epoch / 8}, {"score": "0.3750"}),
    ({"score_function": lambda engine: engine.state.epoch}, {"score": 3}),
    (
        {"score_name": "acc", "score_function": lambda engine: engine.state.epoch / 8},
        {"score": "0.3750"},
    ),
    (
        {
            "score_function": lambda engine: engine.state.epoch,
            "global_step_transform": lambda engine, _: engine.state.epoch,
        },
        {"score": 3, "global_step": 3},
    ),
    ({"filename_pattern": "{name}-at-{global_step}.{ext}"}, {"global_step": 3}),
    ({}, {"global_step": 3, "name": "model"}),
]


@pytest.mark.parametrize(("options", "components"), RELOADED)
def test_a_file_is_found_again_by_the_parts_of_its_name(
    tmp_path: Path, options: dict[str, Any], components: dict[str, Any]
) -> None:
    model = linear(1)
    handler = Checkpoint({"model": model}, tmp_path, n_saved=None, **options)
    run_epochs(handler, 3)
    fresh = linear(2)
    handler.reload_objects({"model": fresh}, **components)
    assert equal(fresh.state_dict(), model.state_dict())


def test_load_kwargs_go_to_modules(tmp_path: Path) -> None:
    handler = Checkpoint({"model": linear(1)}, tmp_path)
    run_epochs(handler, 1)
    larger = nn.Sequential(linear(2))
    with pytest.raises(RuntimeError, match="Missing key"):
        handler.reload_objects({"model": larger}, global_step=1)
    handler.reload_objects({"model": larger}, {"strict": False}, global_step=1)


def test_reloading_without_a_disk_is_an_attribute_error() -> None:
    handler = _checkpoint()
    run_epochs(handler, 1)
    with pytest.raises(AttributeError, match=r"^Checkpoint's `save_handler` should be of type `DiskSaver`, given"):
        handler.reload_objects({"model": nn.Identity()}, global_step=1)


def test_the_files_of_thousands_of_saves_are_not_remembered(tmp_path: Path) -> None:
    trainer = idle_engine()
    handler = Checkpoint({"model": linear(1)}, DiskSaver(tmp_path), n_saved=2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run(range(40))
    remembered = set(handler._history.saved_in)
    assert {"model_39.pt", "model_40.pt"} <= remembered
    assert len(remembered) <= 10
