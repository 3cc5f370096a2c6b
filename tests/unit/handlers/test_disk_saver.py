"""DiskSaver and ModelCheckpoint: their directories, arguments and errors. One process."""

import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import checkpoint as ignites

from distckpt import DiskSaver, ModelCheckpoint
from tests.unit.toys import idle_engine, linear


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
@pytest.mark.parametrize("atomic", [True, False])
def test_files_get_the_permissions_that_the_umask_gives(
    tmp_path: Path,
    umask: Callable[[int], int],
    mask: int,
    atomic: bool,  # noqa: FBT001
) -> None:
    umask(mask)
    DiskSaver(tmp_path, atomic=atomic)({}, "a.pt")
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o666 & ~mask


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saver = DiskSaver("~/runs/one")
    assert saver.dirname == tmp_path / "runs/one"
    assert saver.dirname.is_dir()


class _PathLike:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", [str, Path, _PathLike])
@pytest.mark.parametrize("library", [ignites, None])
def test_any_path_is_a_directory_name(tmp_path: Path, kind: Callable[[Path], Any], library: Any) -> None:
    saver = (library.DiskSaver if library else DiskSaver)(kind(tmp_path))
    assert saver.dirname == tmp_path


@pytest.mark.parametrize("atomic", [True, False])
def test_what_was_saved_is_loaded_by_plain_torch(tmp_path: Path, atomic: bool) -> None:  # noqa: FBT001
    saver = DiskSaver(tmp_path, atomic=atomic)
    saver({"model": {"weight": torch.arange(5.0)}}, "a.pt", {"priority": 1})
    assert torch.equal(
        torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["model"]["weight"], torch.arange(5.0)
    )
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("make", [DiskSaver, ModelCheckpoint])
def test_a_directory_with_checkpoints_is_refused(tmp_path: Path, make: Callable[..., Any]) -> None:
    (tmp_path / "old.pt").touch()
    words = f"Files ['old.pt'] with extension '.pt' are already present in the directory {tmp_path}. If you want"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        make(tmp_path)
    make(tmp_path, require_empty=False)


def test_other_files_are_no_reason_to_refuse(tmp_path: Path) -> None:
    for name in ("notes.txt", "a.pth", "pt", "a.pt.bak"):
        (tmp_path / name).touch()
    DiskSaver(tmp_path)


@pytest.mark.parametrize("make", [DiskSaver, ModelCheckpoint])
def test_a_missing_directory_is_refused_when_it_may_not_be_made(tmp_path: Path, make: Callable[..., Any]) -> None:
    missing = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="^" + re.escape(f"Directory path '{missing}' is not found")):
        make(missing, create_dir=False)
    make(missing)
    assert missing.is_dir()


def test_a_file_in_place_of_the_directory_is_refused_as_ignite_does(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        ignites.DiskSaver(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        DiskSaver(tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"dirname": 12}, TypeError, "dirname should be"),
        ({"dirname": None}, TypeError, "dirname should be"),
        ({"save_on_rank": "0"}, TypeError, "save_on_rank should be a non-negative integer"),
        ({"save_on_rank": True}, TypeError, "save_on_rank should be a non-negative integer"),
        ({"save_on_rank": -1}, ValueError, "save_on_rank should be a non-negative integer"),
    ],
)
def test_a_wrong_argument_is_refused(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        DiskSaver(**{"dirname": tmp_path, **arguments})


@pytest.mark.parametrize("make", [DiskSaver, ModelCheckpoint])
def test_an_unknown_keyword_is_a_type_error_at_the_first_save(tmp_path: Path, make: Callable[..., Any]) -> None:
    handler = make(tmp_path, unknown_keyword=1)  # not yet: ignite's constructor takes it too
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'unknown_keyword'"):
        handler({}, "a.pt") if make is DiskSaver else handler(idle_engine(), {"model": linear(0)})
    assert os.listdir(tmp_path) == []


def test_keywords_go_to_torch_save(tmp_path: Path) -> None:
    DiskSaver(tmp_path, pickle_protocol=3)({"a": 1}, "three.pt")
    with zipfile.ZipFile(tmp_path / "three.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        data = archive.read(name)
    (protocol,) = [argument for code, argument, _ in pickletools.genops(data) if code.name == "PROTO"]
    assert protocol == 3  # torch's default is 2
    DiskSaver(tmp_path, require_empty=False, _use_new_zipfile_serialization=False)({"a": torch.ones(2)}, "old.pt")
    assert not zipfile.is_zipfile(tmp_path / "old.pt")
    assert torch.equal(torch.load(tmp_path / "old.pt", weights_only=True)["a"], torch.ones(2))


def test_removing_a_missing_file_is_an_error_when_a_user_asks(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    saver({}, "a.pt")
    saver.remove("a.pt")
    with pytest.raises(FileNotFoundError):
        saver.remove("a.pt")


def test_model_checkpoint_without_objects_is_a_runtime_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^No objects to checkpoint found\."):
        ModelCheckpoint(tmp_path)(idle_engine(), {})


def test_model_checkpoint_checks_its_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"should have `state_dict` method"):
        ModelCheckpoint(tmp_path)(idle_engine(), {"name": 42})


def test_model_checkpoint_refuses_a_place_that_is_taken_by_itself(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path, include_self=True)
    with pytest.raises(ValueError, match="Cannot have key 'checkpointer' if `include_self` is True"):
        handler(idle_engine(), {"checkpointer": linear(0), "model": linear(1)})


def test_model_checkpoint_hands_its_arguments_on(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path, "p", atomic=False, save_on_rank=0, n_saved=None, pickle_protocol=3)
    assert isinstance(handler.save_handler, DiskSaver)
    assert handler.save_handler.kwargs == {"pickle_protocol": 3}
    assert (handler.save_handler.dirname, handler.save_handler._atomic) == (tmp_path, False)
    assert (handler.filename_prefix, handler.n_saved, handler.last_checkpoint) == ("p", None, None)


def test_model_checkpoint_is_called_with_engine_and_objects(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path, "p", n_saved=2)
    engine = idle_engine()
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler, {"model": linear(0)})
    engine.run([0], max_epochs=3)
    assert sorted(os.listdir(tmp_path)) == ["p_model_2.pt", "p_model_3.pt"]
    assert handler.last_checkpoint == tmp_path / "p_model_3.pt"


def test_model_checkpoint_needs_its_disk_saver(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path)
    handler(idle_engine(), {"model": linear(0)})
    handler.save_handler = lambda _checkpoint, _filename: None
    with pytest.raises(RuntimeError, match=r"^Internal error, save_handler should be DiskSaver, but has"):
        _ = handler.last_checkpoint


def test_a_prefix_that_leaves_the_directory_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="filename_prefix"):
        ModelCheckpoint(tmp_path / "inner", "../outer")


def test_a_vanished_directory_is_told_with_its_path_and_step(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    engine = idle_engine()
    engine.state.iteration = 7
    with pytest.raises(FileNotFoundError, match=r"rank 0, step 7: .*gone.*ENOENT"):
        handler(engine, {"model": linear(0)})
    assert handler.last_checkpoint is None
