"""What a program written for ignite 0.4.x may pass by name, and what became of it."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint
from distckpt.handlers.compat import accept_older_order
from tests.unit.toys import InMemory, idle_engine, linear


@pytest.mark.parametrize(
    ("older", "words"),
    [
        ({"archived": True}, "archived is deprecated"),
        ({"archived": False}, "archived is deprecated"),
        ({"save_interval": 1}, "Argument save_interval is deprecated and should be None"),
        ({"save_as_state_dict": True}, "Argument save_as_state_dict is deprecated and should be True"),
    ],
)
def test_older_arguments_are_taken_and_warned_of(tmp_path: Path, older: dict[str, Any], words: str) -> None:
    with pytest.warns(DeprecationWarning, match=words) as caught:
        handler = ModelCheckpoint(tmp_path, "p", **older)
    assert caught[0].filename == __file__
    handler(idle_engine(), {"model": linear(0)})
    assert [path.name for path in tmp_path.iterdir()] == ["p_model_0.pt"]


@pytest.mark.parametrize(
    ("older", "words"),
    [
        ({"save_interval": 5}, "Argument save_interval is deprecated and should be None.*ITERATION_STARTED"),
        ({"save_interval": 0}, "Argument save_interval is deprecated"),
        ({"save_as_state_dict": False}, "Argument save_as_state_dict is deprecated and should be True"),
    ],
)
def test_older_arguments_that_cannot_be_honoured_are_refused(tmp_path: Path, older: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        ModelCheckpoint(tmp_path / "new", "p", **older)
    assert not (tmp_path / "new").exists()  # refused before anything was made


def test_no_interval_is_no_older_form(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelCheckpoint(tmp_path, "p", save_interval=None)


TWICE: list[tuple[Any, list[Any], dict[str, Any]]] = [
    (Checkpoint, [{"m": nn.Identity()}, InMemory(), "", None, None, 1, None, False, None], {"archived": True}),
    (ModelCheckpoint, ["no such folder", "p", 1], {"save_interval": 1}),
    (ModelCheckpoint, ["no such folder", "p", None, None, None, 2], {"n_saved": 3}),
]


@pytest.mark.parametrize(("kind", "given", "again"), TWICE)
def test_an_argument_given_twice_is_a_type_error(kind: Any, given: list[Any], again: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(TypeError, match="got multiple values for argument"):
            kind(*given, **again)
    assert not Path("no such folder").exists()


def test_too_many_arguments_are_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        ModelCheckpoint(tmp_path, *["p"] * 20)  # type: ignore[arg-type]  # that is what is tested


def test_the_signature_shown_is_todays() -> None:
    assert list(inspect.signature(ModelCheckpoint).parameters)[:4] == [
        "dirname",
        "filename_prefix",
        "score_function",
        "score_name",
    ]


def test_a_subclass_may_pass_on_what_it_is_given() -> None:
    class Mine(Checkpoint):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    saver = InMemory()
    Mine({"model": nn.Identity()}, saver, "mine", n_saved=None)(idle_engine())
    assert list(saver.files) == ["mine_model_0.pt"]


def test_orders_are_told_apart_by_what_was_given() -> None:
    class Thing:
        @accept_older_order(("one", "old", "two"), lambda given: isinstance(given.get("two"), bool))
        def __init__(self, one: int, two: int = 0, old: bool | None = None) -> None:  # noqa: FBT001
            self.values = (one, two, old)

    assert Thing(1, 2).values == (1, 2, None)
    with pytest.warns(DeprecationWarning, match="today's order is one, two, old"):
        assert Thing(1, True, 2).values == (1, 2, True)  # type: ignore[arg-type]  # noqa: FBT003 - the older order


@pytest.mark.parametrize("rank", [1, 7])
def test_a_rank_that_the_job_does_not_have_is_refused_at_the_first_event(tmp_path: Path, rank: int) -> None:
    # ignite saves nothing then, and says nothing.
    handlers = [
        Checkpoint({"model": linear(0)}, tmp_path, save_on_rank=rank),
        Checkpoint({"model": linear(0)}, DiskSaver(tmp_path, save_on_rank=rank)),
        Checkpoint({"model": linear(0)}, InMemory(), save_on_rank=rank),
    ]
    for handler in handlers:
        with pytest.raises(ValueError, match=f"save_on_rank should be a rank of this job.*given {rank}"):
            handler(idle_engine())
