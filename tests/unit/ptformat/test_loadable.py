"""What loading would refuse is told at each save, by object and key, and never costs the newest file that loads."""

import datetime as dt
import decimal
import enum
import pickle
import re
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpoint, DiskSaver, ModelCheckpoint, resume
from distckpt.errors import LoadError, UnsafeCheckpoint
from distckpt.ptformat.loadable import find_refused
from distckpt.ptformat.pickler import pickle_state
from distckpt.ptformat.reader import find_refused_names, is_loadable, read_pt
from distckpt.storage.local import LocalFile
from tests.unit.toys import Notebook, idle_engine, linear


class Mode(enum.Enum):
    """A class of the user's."""

    FAST = 1


class Tagged(torch.Tensor):
    """A tensor of the user's."""


class Allowed:
    """A class of the user's, which the program allows."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Mapped(dict[str, Any]):
    """A mapping of the user's."""


def quantized(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated them
        return torch.quantize_per_channel(torch.ones(2, 4), torch.ones(2), torch.zeros(2), 0, dtype)


REFUSED: dict[str, tuple[Any, str]] = {
    "object": (dt.timedelta(1), "datetime.timedelta"),
    "object with a function of its module": (decimal.Decimal(1), "decimal.Decimal"),
    "path": (Path("/a"), "pathlib.PosixPath"),
    "enum": (Mode.FAST, "Mode"),
    "class": (nn.Linear, "torch.nn.modules.linear.Linear"),
    "builtin class": (dict, "builtins.dict"),
    "function": (re.compile, "re.compile"),
    "mapping of another class": (defaultdict(list), "collections.defaultdict"),
    "mapping of the user's": (Mapped(a=1), "Mapped"),
    "frozenset": (frozenset({1}), "builtins.frozenset"),
    "tensor of the user's": (torch.ones(2).as_subclass(Tagged), "Tagged"),
    "module": (nn.Identity(), "torch.nn.modules.linear.Identity"),
    "integer of 300 bytes": (1 << 2400, "an integer of more than 255 bytes"),
    "bound method": ([].append, "builtins.getattr"),
}
TAKEN: dict[str, Any] = {
    "parameter": nn.Parameter(torch.ones(2)),
    "set": {1, 2},
    "bytes": [b"a", bytearray(b"b")],
    "complex": 1j,
    "size, dtype, device": (torch.Size([1]), torch.float16, torch.device("cpu"), torch.strided),
    "sparse": torch.eye(3).to_sparse(),
    "two elements a byte": quantized(torch.quint4x2),
    "quantized": quantized(torch.qint8),
    "meta": torch.ones(2, device="meta"),
    "tensor with attributes": torch.ones(2),
    "shared list": [[1]] * 2,
    "nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "integer of 200 bytes": 1 << 1600,
    "text that looks like a name": "cos\nsystem\n",
    "text that looks like an opcode": {"0h": "1j", "\x8b": {1}},
}
vars(TAKEN["tensor with attributes"])["note"] = 1


def with_attribute(value: Any) -> torch.Tensor:
    tensor = torch.ones(2)
    vars(tensor)["note"] = value
    return tensor


SAVERS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "checked": {"check_replicas": True},
    "torch's own writer": {"_disable_byteorder_record": True},
    "torch's older format": {"_use_new_zipfile_serialization": False},
}


def saved(saver: DiskSaver, *states: Any, n_saved: int = 1, beside: Any = None) -> tuple[list[str], Checkpoint]:
    """Save each state in turn, beside a model; return the warnings, and the handler."""
    book, engine = Notebook(), idle_engine()
    to_save = {"book": book} if beside is None else {"model": beside, "book": book}
    handler = Checkpoint(to_save, saver, n_saved=n_saved, global_step_transform=lambda *_: engine.state.iteration)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for state in states:
            book.state = state
            handler(engine)
            engine.state.iteration += 1
            handler.wait_until_finished()
    told = [str(one.message) for one in caught if "load_objects will refuse" in str(one.message)]
    return told, handler


@pytest.mark.parametrize("kind", REFUSED)
def test_what_weights_only_refuses_is_found_with_its_key_and_class(tmp_path: Path, kind: str) -> None:
    value, name = REFUSED[kind]
    state = {"fine": [torch.ones(1), {1}], "deep": OrderedDict(a=[0, (value,)])}
    (found,) = pickle_state(state).refused
    assert found.path == "deep.a.1.0"
    assert name in found.what
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpoint if "integer" not in kind else Exception):
        read_pt(tmp_path / "a.pt")
    assert not is_loadable(tmp_path / "a.pt")


def around_itself(num_more: int = 3) -> tuple[Any, ...]:
    inner: dict[str, Any] = {"fine": 1}
    outer = (inner, *range(num_more))
    inner["back"] = outer
    return outer


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(8)
    return tensor


def odd(**attributes: Any) -> torch.Tensor:
    tensor = torch.arange(11, dtype=torch.uint8)[:8].view(torch.float32)
    vars(tensor).update(attributes)
    return tensor


UNREADABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tuple in itself": (around_itself(), {}, "'book.a.1.x' (a tuple that contains itself)"),
    "short tuple in itself": (around_itself(0), {}, "'book.a.1.x' (a tuple that contains itself)"),
    "bytes": (b"abc", {"pickle_protocol": 3}, "'book.a.1.x' (bytes by pickle_protocol=3)"),
    "many bytes": (b"abc" * 99, {"pickle_protocol": 3}, "(bytes by pickle_protocol=3)"),
    "freed storage": (freed(), {}, "'book.a.1.x' (a tensor whose storage was freed)"),
    "freed storage of a parameter": (nn.Parameter(freed()), {}, "'book.a.1.x' (a tensor whose storage was freed)"),
    "odd storage with an attribute": (odd(note=1), {}, "'book.a.1.x' (a tensor whose storage does not consist of"),
    "odd storage, negated": (torch._neg_view(odd()), {}, "'book.a.1.x' (a tensor whose storage does not consist of"),
    "array of an allowed class": (Allowed([np.ones(2)]), {}, "'book.a.1.x.held.0' (a NumPy array or dtype"),
    "dtype of an allowed class": (Allowed(np.dtype("f4")), {}, "'book.a.1.x.held' (a NumPy array or dtype"),
    "attribute of a tensor": (with_attribute(np.ones(2)), {}, "'book.a.1.x.note' (a NumPy array or dtype"),
    "key": ({np.dtype("f4"): 1}, {}, "'book.a.1.x.float32' (a NumPy array or dtype"),
    "in a key": ({(1, np.dtype("f4")): 1}, {}, "(a NumPy array or dtype"),
    "set": ({np.dtype("f4")}, {}, "(a NumPy array or dtype"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_back_is_named_and_the_file_before_stays(tmp_path: Path, kind: str) -> None:
    value, options, named = UNREADABLE[kind]
    with torch.serialization.safe_globals([Allowed]):
        warned, handler = saved(DiskSaver(tmp_path, **options), {"a": [0, {"x": 1}]}, {"a": [0, {"x": value}]})
        assert len(warned) == 1
        assert named in warned[0]
        assert names(tmp_path) == ["book_0.pt", "book_1.pt"]
        assert not is_loadable(tmp_path / "book_1.pt")
        with pytest.raises(LoadError):
            handler.load_objects({"book": Notebook()}, tmp_path / "book_1.pt")


@pytest.mark.parametrize("kind", TAKEN)
def test_what_weights_only_takes_is_not_told_of(tmp_path: Path, kind: str) -> None:
    state = {"a": [TAKEN[kind], {1}]}
    assert pickle_state(state).refused == ()
    torch.save(state, tmp_path / "a.pt")
    assert is_loadable(tmp_path / "a.pt")
    read_pt(tmp_path / "a.pt")


def test_classes_that_the_program_has_allowed_are_not_told_of() -> None:
    with torch.serialization.safe_globals([defaultdict, list]):
        assert pickle_state({"a": defaultdict(list)}).refused == ()
    assert pickle_state({"a": defaultdict(list)}).refused


@pytest.mark.parametrize("options", SAVERS)
def test_each_save_warns_with_the_objects_and_the_inner_key(tmp_path: Path, options: str) -> None:
    good, bad = {"best": 1}, {"best": {"at": dt.timedelta(1)}}
    told, _ = saved(DiskSaver(tmp_path, **SAVERS[options]), good, bad, bad, good, beside=linear(0))
    assert len(told) == 2
    assert "'book.best.at' (datetime.timedelta)" in told[0]
    assert "checkpoint_1.pt" in told[0]
    assert "checkpoint_2.pt" in told[1]


def test_single_objects_bare_state_is_named_by_its_key(tmp_path: Path) -> None:
    told, _ = saved(DiskSaver(tmp_path), {"best": {"at": dt.timedelta(1)}})
    assert "'book.best.at' (datetime.timedelta)" in told[0]


def test_saver_that_is_called_directly_warns_each_time(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"'a\.0' \(datetime\.timedelta\)"):
            saver({"a": [dt.timedelta(1)]}, "a.pt")


def test_pickle_protocol_that_weights_only_does_not_know_is_told_of(tmp_path: Path) -> None:
    told, _ = saved(DiskSaver(tmp_path, pickle_protocol=4), {"a": 1}, {"a": 2})
    assert len(told) == 2
    assert "pickle_protocol=4" in told[1]
    assert saved(DiskSaver(tmp_path / "b", pickle_protocol=3), {"a": 1})[0] == []


@pytest.mark.parametrize("options", SAVERS)
def test_newest_file_that_loads_stays_until_a_newer_one_loads(tmp_path: Path, options: str) -> None:
    good, bad = {"best": 1}, {"best": dt.timedelta(1)}
    saver = DiskSaver(tmp_path, require_empty=False, **SAVERS[options])
    saved(saver, good, bad, bad, beside=linear(0))
    assert names(tmp_path) == ["checkpoint_0.pt", "checkpoint_2.pt"]
    book = Notebook()
    assert resume({"model": linear(0), "book": book}, tmp_path) == tmp_path / "checkpoint_0.pt"
    assert book.state == good


@pytest.mark.parametrize("options", SAVERS)
def test_file_that_stayed_is_removed_when_a_newer_one_loads(tmp_path: Path, options: str) -> None:
    good, bad = {"best": 1}, {"best": dt.timedelta(1)}
    saved(DiskSaver(tmp_path, **SAVERS[options]), good, bad, bad, good, beside=linear(0))
    assert names(tmp_path) == ["checkpoint_3.pt"]


def test_where_another_kept_file_loads_the_evicted_one_goes(tmp_path: Path) -> None:
    good, bad = {"best": 1}, {"best": dt.timedelta(1)}
    saved(DiskSaver(tmp_path), good, good, bad, n_saved=2)
    assert names(tmp_path) == ["book_1.pt", "book_2.pt"]


def test_where_nothing_ever_loaded_files_are_kept_and_removed_as_asked(tmp_path: Path) -> None:
    saved(DiskSaver(tmp_path), *[{"best": dt.timedelta(1)}] * 4, n_saved=2)
    assert names(tmp_path) == ["book_2.pt", "book_3.pt"]


def test_savers_that_are_shared_tell_of_each_handlers_state(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    engine = idle_engine()
    first = Checkpoint({"model": linear(0)}, saver, "best", global_step_transform=lambda *_: 0)
    second = Checkpoint({"a": Notebook({"x": dt.timedelta(1)})}, saver, "latest")
    first(engine)
    with pytest.warns(UserWarning, match=r"latest_a_0\.pt.*'a\.x' \(datetime\.timedelta\)"):
        second(engine)


def test_model_checkpoint_tells_of_it_too(tmp_path: Path) -> None:
    handler = ModelCheckpoint(tmp_path, "best")
    with pytest.warns(UserWarning, match=r"'book\.x' \(datetime\.timedelta\)"):
        handler(idle_engine(), {"book": Notebook({"x": dt.timedelta(1)})})


def test_warnings_that_are_errors_stop_the_save_before_anything_is_replaced(tmp_path: Path) -> None:
    book, engine = Notebook({"a": 1}), idle_engine()
    handler = Checkpoint({"book": book}, DiskSaver(tmp_path), filename_pattern="{name}.{ext}")
    handler(engine)
    book.state = {"a": dt.timedelta(1)}
    engine.state.iteration = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"book\.a"):
            handler(engine)
    assert read_pt(tmp_path / "book.pt") == {"a": 1}


def test_subclass_that_writes_by_another_function_is_told_of_as_well(tmp_path: Path) -> None:
    class Plain(DiskSaver):
        def _save_func(self, checkpoint: Any, path: Any, func: Callable[..., Any], rank: int = 0) -> None:
            del func
            super()._save_func(checkpoint, path, _save, rank)

    good, bad = {"best": 1}, {"best": dt.timedelta(1)}
    told, _ = saved(Plain(tmp_path), good, bad)
    assert "'book.best' (datetime.timedelta)" in told[0]
    assert names(tmp_path) == ["book_0.pt", "book_1.pt"]


def test_custom_save_handlers_get_the_state_as_it_is_and_nothing_is_said() -> None:
    seen: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoint({"a": Notebook({"x": Mode.FAST})}, lambda state, _name: seen.append(state))(idle_engine())
    assert seen == [{"x": Mode.FAST}]


def test_many_plain_objects_beside_one_that_is_refused_are_looked_at_once(tmp_path: Path) -> None:
    state = {"numbers": list(range(1000)), "bad": [dt.timedelta(number) for number in range(9)]}
    found = pickle_state(state).refused
    assert [one.path for one in found] == ["bad.0", "bad.1", "bad.2"]
    del tmp_path


def test_pickle_alone_decides_where_the_types_are_not_known() -> None:
    data = pickle.dumps({"a": 1}, protocol=2)
    assert find_refused({"a": 1}, data, kinds=[dt.timedelta], called=[], protocol=2) == ()


def test_file_of_another_kind_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"none")
    assert not is_loadable(tmp_path / "a.pt")
    assert not is_loadable(tmp_path / "missing.pt")
    torch.save({"a": 1}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert is_loadable(tmp_path / "b.pt")
    torch.save({"a": Mode.FAST}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    with LocalFile(tmp_path / "c.pt") as file:
        assert "Mode" in find_refused_names(file)[0]


def test_what_another_pickle_module_alone_can_pickle_is_named(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            return (eval, ("1",)) if getattr(obj, "__name__", "") == "<lambda>" else NotImplemented

    module = types.SimpleNamespace(__name__="another", Pickler=Pickler, dump=pickle.dump)
    told, _ = saved(DiskSaver(tmp_path, pickle_module=module), {"a": 1}, {"a": [0, lambda: None]}, beside=linear(0))
    assert "'book.a.1' (builtins.function)" in told[0]
    assert names(tmp_path) == ["checkpoint_0.pt", "checkpoint_1.pt"]


def _save(state: Any, file: Any) -> None:
    torch.save(state, file)


def names(folder: Path) -> list[str]:
    """Return what is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
