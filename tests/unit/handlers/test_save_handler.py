"""Save handlers of a program's own: how they are called, and what becomes of their errors. One process."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import ignite.handlers.checkpoint as ignites
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from distckpt import BaseSaveHandler, Checkpoint, DiskSaver, ModelCheckpoint
from tests.unit.toys import InMemory, Notebook, idle_engine, linear, run_epochs


def _two(checkpoint: Any, filename: str) -> None:
    _CALLS.append((checkpoint, filename))


def _three(checkpoint: Any, filename: str, metadata: Any) -> None:
    _CALLS.append((checkpoint, filename, metadata))


_CALLS: list[tuple[Any, ...]] = []


class _Method:
    def two(self, checkpoint: Any, filename: str) -> None:
        _two(checkpoint, filename)

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        _three(checkpoint, filename, metadata)


@pytest.mark.parametrize(
    ("handler", "num_arguments"),
    [
        (_two, 2),
        (_three, 3),
        (_Method(), 3),
        (_Method().two, 2),
        (functools.partial(_Method.two, _Method()), 2),
        (lambda *args: _CALLS.append(args), 3),
        (lambda checkpoint, filename, **rest: _CALLS.append((checkpoint, filename, *rest)), 2),
        (lambda checkpoint, filename, *, metadata=1: _CALLS.append((checkpoint, filename)), 2),  # noqa: ARG005
    ],
)
def test_callables_get_as_many_arguments_as_they_take(handler: Callable[..., None], num_arguments: int) -> None:
    _CALLS.clear()
    run_epochs(Checkpoint({"model": nn.Identity()}, handler), 1)
    assert [len(call) for call in _CALLS] == [num_arguments]


class _Proxy:
    """Forwards what it does not know, as handles of remote objects do."""

    def __call__(self, *given: Any) -> None:
        _CALLS.append(given)

    def __getattr__(self, name: str) -> Any:
        return MagicMock(name=name)


@pytest.mark.parametrize("make", [MagicMock, _Proxy])
def test_a_handler_that_has_every_attribute_is_called_and_nothing_else(make: Callable[[], Any]) -> None:
    handler = make()
    _CALLS.clear()
    run_epochs(Checkpoint({"model": linear(0), "other": linear(1)}, handler, n_saved=1), 2)
    calls = _CALLS if make is _Proxy else [call.args for call in handler.call_args_list]
    assert [filename for _, filename, *_ in calls] == ["checkpoint_1.pt", "checkpoint_2.pt"]
    assert [list(checkpoint) for checkpoint, *_ in calls] == 2 * [["model", "other"]]


def test_a_type_error_inside_a_handler_does_not_run_it_twice() -> None:
    num_calls = 0

    def handler(_checkpoint: Any, _filename: str, _metadata: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        raise TypeError("its own")

    with pytest.raises(TypeError, match=r"^its own$"):
        Checkpoint({"model": nn.Identity()}, handler)(idle_engine())
    assert num_calls == 1


@pytest.mark.parametrize(
    "error", [LookupError("own words"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_in_a_world_of_one_errors_come_as_they_were_raised(error: BaseException) -> None:
    def handler(_checkpoint: Any, _filename: str) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Checkpoint({"model": nn.Identity()}, handler)(idle_engine())
    assert caught.value is error


class _OwnError(RuntimeError):
    """What the save handlers below raise."""


class _Prefixed(DiskSaver):
    """Maps each name to a file of its own, and fails where a test wants it."""

    fails = False

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        if self.fails:
            raise _OwnError
        super().__call__(checkpoint, f"run7_{filename}", metadata)

    def remove(self, filename: str) -> None:
        super().remove(f"run7_{filename}")


def test_a_subclass_whose_write_fails_has_lost_nothing(tmp_path: Path) -> None:
    saver = _Prefixed(tmp_path)
    handler = Checkpoint({"model": nn.Identity()}, saver)
    engine = run_epochs(handler, 1)
    history = handler.state_dict()
    saver.fails, engine.state.iteration = True, 2
    with pytest.raises(_OwnError):
        handler(engine)
    assert (os.listdir(tmp_path), handler.state_dict()) == (["run7_model_1.pt"], history)
    saver.fails = False
    handler(engine)
    assert os.listdir(tmp_path) == ["run7_model_2.pt"]


def test_where_a_handler_removed_first_and_its_write_fails_the_history_says_what_stands() -> None:
    class Fragile(InMemory):
        fails = False

        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            if self.fails:
                raise _OwnError
            super().__call__(checkpoint, filename, metadata)

    saver = Fragile()
    handler = Checkpoint({"model": nn.Identity()}, saver, n_saved=2)
    engine = run_epochs(handler, 2)
    saver.fails, engine.state.iteration = True, 3
    with pytest.raises(_OwnError):
        handler(engine)
    assert list(saver.files) == ["model_2.pt"]
    assert handler.state_dict() == {"_saved": [(2, "model_2.pt")]}
    saver.fails, engine.state.iteration = False, 4
    handler(engine)
    assert list(saver.files) == ["model_2.pt", "model_4.pt"]
    assert handler.state_dict() == {"_saved": [(2, "model_2.pt"), (4, "model_4.pt")]}


def test_what_could_not_be_removed_before_a_failed_write_is_still_in_the_history() -> None:
    class Stuck(InMemory):
        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            if self.files:
                raise _OwnError
            super().__call__(checkpoint, filename, metadata)

        def remove(self, filename: str) -> None:
            raise PermissionError(13, "Permission denied", filename)

    saver = Stuck()
    handler = Checkpoint({"model": nn.Identity()}, saver)
    engine = run_epochs(handler, 1)
    engine.state.iteration = 2
    with pytest.raises(_OwnError):
        handler(engine)
    assert handler.state_dict() == {"_saved": [(1, "model_1.pt")]}
    assert handler._history.orphans == ()


def test_a_state_that_cannot_be_captured_is_found_out_before_anything_is_removed() -> None:
    class Broken(Notebook):
        fails = False

        def state_dict(self) -> Any:
            if self.fails:
                raise _OwnError
            return super().state_dict()

    saver, broken = InMemory(), Broken()
    handler = Checkpoint({"notes": broken}, saver)
    engine = run_epochs(handler, 1)
    broken.fails, engine.state.iteration = True, 2
    with pytest.raises(_OwnError):
        handler(engine)
    assert list(saver.files) == ["notes_1.pt"]


@pytest.mark.parametrize("options", [{"background": True}, {"share_write": "node"}, {"check_replicas": True}, {}])
def test_a_subclass_that_overrides_only_remove_cannot_take_what_was_just_written(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    class ClearsAll(DiskSaver):
        def remove(self, filename: str) -> None:
            del filename
            for path in self.dirname.glob("*.pt"):
                path.unlink()

    handler = Checkpoint({"model": linear(0)}, ClearsAll(tmp_path, **options))
    run_epochs(handler, 4)
    assert os.listdir(tmp_path) == ["model_4.pt"]
    assert handler.last_checkpoint == tmp_path / "model_4.pt"


def test_remove_that_is_replaced_on_the_instance_is_called_in_the_background_too(tmp_path: Path) -> None:
    removed: list[str] = []
    saver = DiskSaver(tmp_path, background=True)
    saver.remove = removed.append  # type: ignore[method-assign, assignment]
    run_epochs(Checkpoint({"model": linear(0)}, saver), 3)
    assert removed == ["model_1.pt", "model_2.pt"]


@pytest.mark.parametrize("options", [{}, {"background": True}, {"share_write": "node"}, {"atomic": False}])
def test_an_overridden_save_func_is_called_with_the_path_and_what_writes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Uploads(DiskSaver):
        def _save_func(self, checkpoint: Any, path: Any, func: Any, rank: int = 0) -> None:
            super()._save_func(checkpoint, path, func, rank)
            calls.append((path, func, path.exists()))

    handler = Checkpoint({"model": linear(0)}, Uploads(tmp_path, **options), n_saved=2)
    run_epochs(handler, 2)
    assert calls == [(tmp_path / f"model_{step}.pt", torch.save, True) for step in (1, 2)]
    Checkpoint.load_objects({"model": linear(1)}, tmp_path / "model_2.pt")


def test_a_save_func_that_writes_by_itself_as_ignites_does(tmp_path: Path) -> None:
    class Own(DiskSaver):
        def _save_func(self, checkpoint: Any, path: Any, func: Any) -> None:  # type: ignore[override]
            with path.with_suffix(".new").open("wb") as file:
                func(checkpoint, file, **self.kwargs)
            path.with_suffix(".new").rename(path)

    run_epochs(Checkpoint({"model": linear(0)}, Own(tmp_path)), 2)
    assert os.listdir(tmp_path) == ["model_2.pt"]


def _reversed_text(checkpoint: Any, file: Any) -> None:
    if isinstance(file, os.PathLike):
        Path(file).write_bytes(repr(checkpoint)[::-1].encode())
    else:
        file.write(repr(checkpoint)[::-1].encode())
        file.seek(0)
        assert file.read()


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_save_func_writes_by_another_function_and_to_another_place(
    tmp_path: Path,
    atomic: bool,  # noqa: FBT001
    as_text: bool,  # noqa: FBT001
) -> None:
    class Elsewhere(DiskSaver):
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
            del metadata
            path = tmp_path / "other" / filename
            self._save_func(checkpoint, str(path) if as_text else path, _reversed_text)

    (tmp_path / "other").mkdir()
    Elsewhere(tmp_path / "own", atomic=atomic)({"a": 1}, "a.txt")
    assert (tmp_path / "other" / "a.txt").read_text() == "}1 :'a'{"
    assert os.listdir(tmp_path / "other") == ["a.txt"]


def test_an_error_of_another_function_leaves_the_older_file(tmp_path: Path) -> None:
    def fail(_checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise _OwnError

    saver = DiskSaver(tmp_path)
    saver({"a": 1}, "a.pt")
    with pytest.raises(_OwnError):
        saver._save_func({"a": 2}, tmp_path / "a.pt", fail)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": 1}


def test_an_overridden_check_of_the_directory_decides(tmp_path: Path) -> None:
    class Lenient(DiskSaver):
        @staticmethod
        def _check_and_setup(dirname: Path, create_dir: bool, require_empty: bool) -> None:  # noqa: FBT001 - ignite's
            del require_empty
            DiskSaver._check_and_setup(dirname, create_dir, require_empty=False)

    (tmp_path / "a.pt").touch()
    with pytest.raises(ValueError, match="are already present"):
        DiskSaver(tmp_path)
    Lenient(tmp_path)


@pytest.mark.parametrize("base", [Checkpoint, ModelCheckpoint])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("_setup_checkpoint", "state_dict"),
        ("_check_objects", "state_dict"),
        ("_get_filename_pattern", "filename_pattern"),
        ("_check_lt_n_saved", "n_saved"),
        ("_compare_fn", "greater_or_equal"),
    ],
)
def test_a_subclass_that_overrides_what_is_never_called_is_refused(base: type, name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=rf"^Mine overrides `{name}`, which ignite calls and .* does not.*{advice}"):
        type("Mine", (base,), {"__qualname__": "Mine", name: lambda *_: None})


@pytest.mark.parametrize("on_class", [False, True])
def test_what_is_never_called_is_refused_on_an_object_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on_class: bool
) -> None:
    handler = Checkpoint({"model": linear(0)}, tmp_path)
    monkeypatch.setattr(Checkpoint if on_class else handler, "_setup_checkpoint", dict, raising=False)
    with pytest.raises(TypeError, match=r"^Checkpoint overrides `_setup_checkpoint`, which ignite calls.*state_dict"):
        run_epochs(handler, 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["_save_native", "_save_xla"])
def test_an_older_releases_hooks_of_a_disk_saver_are_refused_in_a_mixin_too(name: str) -> None:
    mixin = type("Mixin", (), {name: lambda *_: None})
    with pytest.raises(TypeError, match=r"Override `_save_func\(checkpoint, path, func\)` instead"):
        type("Mine", (mixin, DiskSaver), {})


def test_save_handlers_count_as_ignites_and_the_other_way_round(tmp_path: Path) -> None:
    ours, theirs = DiskSaver(tmp_path), ignites.DiskSaver(tmp_path)
    assert isinstance(InMemory(), ignites.BaseSaveHandler)
    assert isinstance(ours, ignites.BaseSaveHandler)
    assert isinstance(ours, ignites.DiskSaver)
    assert isinstance(theirs, BaseSaveHandler)
    assert not isinstance(theirs, DiskSaver), "it is another class, and has other methods"
    assert not isinstance(InMemory(), ignites.DiskSaver)
    assert not isinstance(run_epochs, BaseSaveHandler)
    assert not isinstance(ours, type(InMemory()))


def test_a_disk_saver_of_ignites_names_directory_and_rank(tmp_path: Path) -> None:
    saver = ignites.DiskSaver(tmp_path)
    handler = Checkpoint({"model": linear(0)}, saver, n_saved=2)
    engine = run_epochs(handler, 3)
    assert sorted(os.listdir(tmp_path)) == ["model_2.pt", "model_3.pt"]
    assert handler.last_checkpoint == tmp_path / "model_3.pt"
    handler.reload_objects({"model": linear(1)}, name="model", global_step=2)
    named = ModelCheckpoint(tmp_path / "other")
    named.save_handler = saver
    named(engine, {"model": linear(0)})
    assert named.last_checkpoint == tmp_path / "model_3.pt"
    saver.save_on_rank = 1
    with pytest.raises(ValueError, match="save_on_rank should be a rank of this job"):
        handler(Engine(lambda _engine, _batch: None))
