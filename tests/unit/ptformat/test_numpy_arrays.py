"""NumPy arrays, scalars and random states load again, and nothing of NumPy's is executed for it."""

import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distckpt import Checkpoint, DiskSaver, LoadError, UnsafeCheckpoint, resume
from distckpt.ptformat.reader import read_pt
from tests.support.equality import equal
from tests.unit.toys import Notebook, linear, run_epochs

pytestmark = pytest.mark.filterwarnings("ignore:.*load_objects will refuse it:UserWarning")

RECORD = np.dtype([("a", "<f4"), ("b", ">i2", (2, 3)), ("c", "U5"), ("d", [("x", "u1")])])
NUMBERS: Any = np.arange(6).reshape(2, 3)
ARRAYS: dict[str, Callable[[], Any]] = {
    **{
        code: partial(NUMBERS.astype, code)
        for code in ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16", ">f8", ">i4", "g")
    },
    "fortran": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "view": lambda: np.arange(20)[3:12:2],
    "no dimension": lambda: np.array(3.5),
    "empty": lambda: np.zeros((0, 4)),
    "text": lambda: np.array(["a", "bücher", ""]),
    "bytes": lambda: np.array([b"a", b"bcd"]),
    "void": lambda: np.array([b"abc"], dtype="V3"),
    "times": lambda: np.array(["2026-01-01", "NaT"], dtype="M8[ns]"),
    "days": lambda: np.array([1, 2], dtype="m8[25s]"),
    "record": lambda: np.zeros(3, RECORD),
    "aligned": lambda: np.ones(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "with titles": lambda: np.ones(2, np.dtype([(("title", "a"), "f8")])),
}
SCALARS: dict[str, Callable[[], Any]] = {
    **{
        kind.__name__: partial(kind, 3)
        for kind in (np.int8, np.uint64, np.float16, np.float32, np.float64, np.complex128)
    },
    "bool": lambda: np.bool_(True),  # noqa: FBT003 - its only argument
    "text": lambda: np.str_("é"),
    "no text": lambda: np.str_(""),
    "bytes": lambda: np.bytes_(b"ab"),
    "time": lambda: np.datetime64("2026-01-01", "s"),
    "record": lambda: np.ones(1, RECORD)[0],
}
STATES: dict[str, Callable[[], Any]] = {
    "random state": lambda: np.random.RandomState(7).get_state(),
    "bit generator": lambda: np.random.default_rng(7).bit_generator.state,
    "mersenne twister": lambda: np.random.Generator(np.random.MT19937(3)).bit_generator.state,
    "nested": lambda: {"a": [np.ones(2), (1, (np.zeros(3), "x"))], "o": OrderedDict(x=np.ones(1)), "c": Counter(a=1)},
    "beside tensors": lambda: {"t": torch.arange(3), "n": np.arange(3), "s": np.float32(1.5)},
    "a dtype": lambda: {"d": np.dtype("f4"), "r": RECORD},
}


def saved(path: Path, state: Any, how: str = "torch") -> Path:
    """Save a state, by NumPy 2's names or NumPy 1's."""
    if how == "distckpt":
        DiskSaver(path.parent)(state, path.name)
        return path
    torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
    if how == "NumPy 1":
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                assert not name.endswith("data.pkl") or b"numpy._core" in data
                new.writestr(name, data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path


@pytest.mark.parametrize("how", ["torch", "distckpt", "NumPy 1", "legacy"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_load_as_they_were(tmp_path: Path, kind: str, how: str) -> None:
    array = np.array(ARRAYS[kind](), order="K")
    found = read_pt(saved(tmp_path / "a.pt", {"a": array, "again": [array]}, how))
    assert equal({"a": array, "again": [array]}, found)
    assert found["a"].flags.writeable
    assert found["a"].flags.owndata


def byte_orders(dtype: np.dtype[Any]) -> list[Any]:
    """Return the byte orders of a dtype and of the dtypes in it."""
    inner = [dtype.base] if dtype.subdtype else [field[0] for field in (dtype.fields or {}).values()]
    return [dtype.byteorder, *map(byte_orders, inner)]


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_dtypes_keep_their_byte_orders(tmp_path: Path, kind: str) -> None:
    array = ARRAYS[kind]()
    found = read_pt(saved(tmp_path / "a.pt", {"array": array, "dtype": array.dtype}))
    assert byte_orders(found["array"].dtype) == byte_orders(array.dtype)
    assert byte_orders(found["dtype"]) == byte_orders(array.dtype)


def test_loaded_arrays_can_be_read_through_a_memoryview(tmp_path: Path) -> None:
    found = memoryview(read_pt(saved(tmp_path / "a.pt", np.arange(3.0))))
    assert (found.format, found.tolist()) == ("d", [0.0, 1.0, 2.0])


@pytest.mark.parametrize("how", ["torch", "distckpt", "NumPy 1"])
@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_load_as_they_were(tmp_path: Path, kind: str, how: str) -> None:
    state = {"x": SCALARS[kind](), 3: [SCALARS[kind]()]}
    assert equal(state, read_pt(saved(tmp_path / "a.pt", state, how)))


@pytest.mark.parametrize("how", ["torch", "distckpt"])
@pytest.mark.parametrize("kind", STATES)
def test_states_of_arrays_load_as_they_were(tmp_path: Path, kind: str, how: str) -> None:
    state = {"x": STATES[kind]()}
    assert equal(state, read_pt(saved(tmp_path / "a.pt", state, how)))


def test_an_array_that_stands_in_two_places_is_one(tmp_path: Path) -> None:
    array = np.ones(2)
    pair = (array, 1)
    state = read_pt(saved(tmp_path / "a.pt", {"a": array, "b": [array], "c": pair, "d": pair}))
    assert state["a"] is state["b"][0]
    assert state["a"] is state["c"][0]
    assert state["c"] is state["d"]


def test_a_list_that_holds_itself_and_an_array_is_read(tmp_path: Path) -> None:
    items: list[Any] = [np.ones(2)]
    items.append((items, items))
    found = read_pt(saved(tmp_path / "a.pt", {"x": items}))["x"]
    assert found[1][0] is found
    assert np.array_equal(found[0], np.ones(2))


def test_an_array_beside_what_torch_builds_from_values_is_read(tmp_path: Path) -> None:
    state = read_pt(saved(tmp_path / "a.pt", {"s": torch.eye(2).to_sparse(), "n": np.arange(3)}))
    assert torch.equal(state["s"].to_dense(), torch.eye(2))
    assert np.array_equal(state["n"], np.arange(3))


@pytest.mark.parametrize("load", ["load_objects", "resume", "reload_objects"])
def test_every_way_of_loading_takes_a_random_state(tmp_path: Path, load: str) -> None:
    state = np.random.RandomState(7).get_state()
    model = linear(1)
    handler = Checkpoint({"model": model, "rng": Notebook({"numpy": state})}, tmp_path)
    run_epochs(handler, 1)
    assert handler.last_checkpoint is not None
    fresh, book = linear(0), Notebook()
    objects = {"model": fresh, "rng": book}
    if load == "load_objects":
        Checkpoint.load_objects(objects, handler.last_checkpoint)
    elif load == "resume":
        resume(objects, tmp_path)
    else:
        handler.reload_objects(objects, global_step=1)
    assert equal(book.state, {"numpy": state})
    assert torch.equal(fresh.weight, model.weight)


def test_bytes_of_no_length_load(tmp_path: Path) -> None:
    assert read_pt(saved(tmp_path / "a.pt", {"x": b"", "y": [b"", b"a"]})) == {"x": b"", "y": [b"", b"a"]}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">i2", RECORD], ids=str)
def test_a_mapped_array_loads_as_a_plain_one(tmp_path: Path, kind: Any, order: Any) -> None:
    content = bytes(range(48, 96)) * np.dtype(kind).itemsize
    np.save(tmp_path / "a.npy", np.frombuffer(content, kind, count=6).reshape((2, 3), order=order))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_epochs(Checkpoint({"book": Notebook({"x": mapped}), "model": linear(1)}, tmp_path), 1)
    book = Notebook()
    Checkpoint.load_objects({"book": book}, tmp_path / "checkpoint_1.pt")
    found: Any = book.state["x"]
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape, found.tobytes()) == (mapped.dtype, mapped.shape, mapped.tobytes())
    assert found.flags.f_contiguous == mapped.flags.f_contiguous


def test_a_save_warns_of_objects_and_of_no_other_array(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path, require_empty=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saver({"n": np.ones(2), "s": np.float32(1), "e": np.zeros(0), "t": "O8", "r": RECORD}, "a.pt")
    for objects in (np.array([{}]), np.zeros(1, [("a", "O")]), np.dtype("O")):
        with pytest.warns(UserWarning, match="'n'"):
            saver({"n": objects, "s": np.float32(1)}, "a.pt")


# -- what is refused -----------------------------------------------------------------------------------


class Calls:
    """PickledState as a call, with a state if there is one."""

    def __init__(self, func: Any, *args: Any, state: Any = None) -> None:
        self.told = (func, args) if state is None else (func, args, state)

    def __reduce__(self) -> Any:
        return self.told


def reconstruct() -> Any:
    return np.zeros(1).__reduce__()[0]


def dtype(code: str, *state: Any) -> Any:
    return Calls(np.dtype, code, 0, 1, state=state or (3, "<", None, None, None, -1, -1, 0))


def array(shape: Any, of: Any, data: Any, *, kind: Any = np.ndarray) -> Any:
    return Calls(reconstruct(), kind, (0,), b"b", state=(1, shape, of, False, data))


F8 = np.dtype("f8")
CRAFTED: dict[str, Callable[[], Any]] = {
    "objects": lambda: np.array([{}, "x"], dtype=object),
    "an object": lambda: np.array({"x": 1}, dtype=object),
    "a field of objects": lambda: np.zeros(2, [("a", "f8"), ("b", "O")]),
    "items of objects": lambda: np.zeros(2, [("b", "O", (2,))]),
    "a dtype of objects": lambda: np.dtype("O"),
    "flags that say objects": lambda: array((1,), dtype("i8", 3, "<", None, None, None, 8, 8, 0x3F), [b"x"]),
    "objects by their bytes": lambda: array((1,), dtype("O8"), bytes(8)),
    "fields of objects, crafted": lambda: array(
        (1,), dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0), bytes(8)
    ),
    "items by another dtype": lambda: array((1,), dtype("V8", 3, "|", (F8, "O"), None, None, 8, 1, 0), bytes(8)),
    "another class": lambda: array((1,), F8, bytes(8), kind=OrderedDict),
    "a matrix": lambda: np.zeros((1, 1)).view(np.matrix),
    "masked": lambda: np.ma.ones(2),
    "huge": lambda: array((1 << 40, 1 << 40), F8, bytes(8)),
    "large, of nothing": lambda: array((1 << 62, 4, 0), F8, bytes(8)),
    "negative": lambda: array((-1,), F8, b""),
    "shape of floats": lambda: array((1.0,), F8, bytes(8)),
    "too few bytes": lambda: array((2,), F8, bytes(8)),
    "a list for bytes": lambda: array((1,), F8, [1.0]),
    "a dtype that is none": lambda: array((1,), "f8", bytes(8)),
    "a long name": lambda: array((1,), dtype("f8,O"), bytes(8)),
    "without a state": lambda: Calls(reconstruct(), np.ndarray, (0,), b"b"),
    "the class called": lambda: Calls(np.ndarray, (1 << 40,)),
    "a scalar of objects": lambda: Calls(np.float64(1).__reduce__()[0], np.dtype("O"), "x"),
    "a scalar too short": lambda: Calls(np.float64(1).__reduce__()[0], F8, b"1234"),
    "a function of NumPy's": lambda: Calls(np.load, "/dev/null"),
    "a key": lambda: {Calls(reconstruct(), np.ndarray, (0,), b"b"): 1},
    "in a tensor's attributes": lambda: with_attribute(np.ones(2)),
    "a dtype in a tensor's attributes": lambda: with_attribute([np.ones(2).dtype]),
}


def with_attribute(value: Any) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = value  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("kind", CRAFTED)
def test_what_is_no_plain_array_is_refused(tmp_path: Path, kind: str) -> None:
    before = set(torch.serialization.get_safe_globals())
    path, book = saved(tmp_path / "a.pt", {"x": CRAFTED[kind]()}), Notebook({"page": 1})
    with pytest.raises(LoadError):
        Checkpoint.load_objects({"x": book}, path)
    assert book.state == {"page": 1}
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("kind", ["objects", "an object", "a field of objects", "items of objects", "masked"])
def test_objects_are_refused_as_unsafe(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match="Nothing was executed"):
        read_pt(saved(tmp_path / "a.pt", {"x": CRAFTED[kind]()}))


def test_nothing_in_an_array_of_objects_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    items = np.empty(1, dtype=object)
    items[0] = Calls(os.mkdir, str(mark))
    with pytest.raises(UnsafeCheckpoint):
        read_pt(saved(tmp_path / "a.pt", {"x": items, "y": np.ones(2)}))
    assert not mark.exists()


def test_torchs_list_is_as_before_and_what_a_program_put_there_stays(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": np.ones(2)})
    with torch.serialization.safe_globals([Notebook]):
        before = set(torch.serialization.get_safe_globals())
        read_pt(path)
        assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_program_that_has_told_torch_of_numpy_gets_what_torch_gives(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": np.ones(2)})
    with torch.serialization.safe_globals([reconstruct(), np.ndarray, np.dtype, type(F8)]):
        before = set(map(id, torch.serialization.get_safe_globals()))
        assert np.array_equal(read_pt(path)["x"], np.ones(2))
        assert set(map(id, torch.serialization.get_safe_globals())) == before


def test_numpy_is_not_imported_for_a_file_without_arrays(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": torch.ones(2)}, "distckpt")
    program = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'numpy': raise ModuleNotFoundError(name, name='numpy')\n"
        "sys.meta_path.insert(0, No())\n"
        "from pathlib import Path\n"
        "from distckpt.ptformat.reader import read_pt\n"
        f"print(read_pt(Path({str(path)!r}))['x'].tolist(), 'numpy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[1.0, 1.0] False\n", done.stderr
