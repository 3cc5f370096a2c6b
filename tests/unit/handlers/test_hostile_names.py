"""Names that would leave the checkpoint directory: nothing outside it is created, changed or removed.

Each example has a tree of its own, many folders deep, so that a name which does escape lands inside the tree and
is seen. The tree is compared by inode, mode, size, times and content.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.handlers
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from torch import nn

from distckpt import Checkpoint, DiskSaver
from tests.support.selection import is_full

NUM_EXAMPLES = (20, 250)
"""In a quick run, and in a full one."""
MIN_HOSTILE = (8, 100)
# Deeper than any name climbs.
DEPTH = 12
ROOT = "<root>"
"""In a name: the absolute path of the example's tree."""

PARTS = [
    *("..", ".", "", "...", "a.pt", "kept.pt", "folder", "no-such-folder", "tmp"),
    *("outside", "secret.pt", "dangling.pt", "loop"),
    *(".distckpt-00000000-1-ab.tmp", ".distckpt-.tmp"),
    *("nul\0.pt", "\0", "\udc80.pt", "\ud800.pt", "ünï.pt", "e\u0301", "\u202e.pt", "a\nb.pt", " "),
    *("-rf", "~", "$HOME", "*", "{global_step}", "{", "%s", "\\..\\x.pt", "C:"),
    *("x" * 255, "x" * 256, "ü" * 200),
]
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=5).map("/".join),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(lambda parts: "/".join([ROOT, *parts])),
    st.tuples(st.integers(1, DEPTH // 2), st.sampled_from(PARTS)).map(lambda two: "../" * two[0] + two[1]),
    st.text(max_size=20),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """Folders and files around and in a checkpoint directory.

    Attributes:
        root: of all.
        directory: for the checkpoints.
    """

    root: Path
    directory: Path

    def seen_from_outside(self) -> dict[str, Any]:
        """Describe everything but what is in the directory, links in it included."""
        seen: dict[str, Any] = {}
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            if here == self.directory:
                folders.clear()
                files = [name for name in files if stat.S_ISLNK((here / name).lstat().st_mode)]  # noqa: PLW2901
                seen[folder] = (here.lstat().st_ino, here.lstat().st_mode)
            else:
                seen[folder] = _looks_of(here)
            seen |= {str(here / name): _looks_of(here / name) for name in files}
        return seen


def _looks_of(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
    target = path.readlink() if stat.S_ISLNK(found.st_mode) else None
    times = found.st_mtime_ns, found.st_ctime_ns
    return found.st_ino, found.st_mode, found.st_nlink, found.st_size, *times, content, target


@contextmanager
def tree() -> Iterator[Tree]:
    """Make a tree, and remove it."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        root = Path(name).resolve()
        directory = root.joinpath(*["d"] * DEPTH, "checkpoints")
        directory.mkdir(parents=True)
        for folder in [*directory.parents][: DEPTH + 1]:
            (folder / "secret.pt").write_text("secret")
            (folder / "a.pt").write_text("another's")
        outside = directory.parent / "outside"
        outside.mkdir()
        (outside / "a.pt").write_text("another's")
        (directory / "folder").mkdir()
        torch.save({"step": 0}, directory / "kept.pt")
        for link, target in {
            "outside": "../outside", "secret.pt": "../secret.pt", "dangling.pt": "../new.pt", "loop": "loop",
            "folder/outside": "../../outside", "folder/secret.pt": "../../secret.pt",
        }.items():  # fmt: skip
            (directory / link).symlink_to(target)
        yield Tree(root, directory)


# -- the doors through which a name comes in ---------------------------------------------------------


def _engine() -> Engine:
    return Engine(lambda _engine, _batch: None)


def _saver(directory: Path, **options: Any) -> DiskSaver:
    return DiskSaver(directory, require_empty=False, **options)


def _save_twice(handler: Checkpoint) -> None:
    """The second save evicts the first, by its name."""
    for step in (1, 2):
        engine = _engine()
        engine.state.iteration = step
        handler(engine)


def _pattern_of(name: str) -> str:
    return name.replace("{", "{{").replace("}", "}}")


def _checkpoint(directory: Path, key: str = "m", **options: Any) -> Checkpoint:
    return Checkpoint({key: nn.Linear(1, 1)}, _saver(directory), n_saved=1, **options)


def _evict(directory: Path, name: str) -> None:
    handler = _checkpoint(directory)
    handler.load_state_dict({"_saved": [(0, name)]})
    _save_twice(handler)


DOORS: dict[str, Callable[[Path, str], object]] = {
    "save": lambda where, name: _saver(where)({"a": 1}, name),
    "save in place": lambda where, name: _saver(where, atomic=False)({"a": 1}, name),
    "remove": lambda where, name: _saver(where).remove(name),
    "prefix": lambda where, name: _save_twice(_checkpoint(where, filename_prefix=name)),
    "pattern": lambda where, name: _save_twice(_checkpoint(where, filename_pattern=_pattern_of(name))),
    "pattern's part": lambda where, name: _save_twice(
        _checkpoint(where, filename_pattern=_pattern_of(name) + "{global_step}.{ext}")
    ),
    "key": lambda where, name: _save_twice(_checkpoint(where, key=name)),
    "score name": lambda where, name: _save_twice(
        _checkpoint(where, score_name=name, score_function=lambda engine: engine.state.iteration)
    ),
    "global step": lambda where, name: _save_twice(
        _checkpoint(where, global_step_transform=lambda *_: name, score_function=lambda engine: engine.state.iteration)
    ),
    "history": _evict,
}


def _is_fine(directory: Path, name: str) -> bool:
    """Say whether a save under this name has to work, by asking the file system rather than the code."""
    *folders, leaf = name.split("/")
    if "\0" in name or name.startswith("/") or ".." in folders or leaf in {"", ".", ".."}:
        return False
    try:
        too_long = any(len(os.fsencode(part)) > 255 for part in (*folders, leaf))
    except UnicodeEncodeError:
        return False
    if too_long or (leaf.startswith(".distckpt-") and leaf.endswith(".tmp")):
        return False
    folder = directory.joinpath(*folders)
    path = folder / leaf
    stays = folder.is_dir() and folder.resolve() == folder
    return stays and not path.is_symlink() and not path.is_dir()


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


# A history that names a folder, say: it cannot be removed, and a warning says so.
@pytest.mark.filterwarnings("ignore:Checkpoint. while removing older checkpoints")
def test_no_name_touches_anything_outside_the_directory(
    capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    num_examples, min_hostile = NUM_EXAMPLES[is_full(pytestconfig)], MIN_HOSTILE[is_full(pytestconfig)]
    hostile: set[str] = set()
    fine: set[str] = set()

    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(name=NAMES)
    @example(name="../a.pt")
    @example(name=f"{ROOT}/new.pt")
    @example(name="secret.pt")
    @example(name="outside/new.pt")
    @example(name="folder/new.pt")
    def no_door_lets_it_out(name: str) -> None:
        with tree() as place:
            given_name = name.replace(ROOT, str(place.root))
            is_fine = _is_fine(place.directory, given_name)
            (fine if is_fine else hostile).add(name)
            before = place.seen_from_outside()
            for door, go in DOORS.items():
                with suppress(OSError, ValueError):  # nothing else may be raised
                    go(place.directory, given_name)
                assert place.seen_from_outside() == before, f"{door!r} let {given_name!r} out"
            if is_fine:
                _saver(place.directory)({"a": 1}, given_name)
                path = place.directory / given_name
                assert torch.load(path, weights_only=True) == {"a": 1}
                _saver(place.directory).remove(given_name)
                assert not path.exists()
            else:
                with pytest.raises((OSError, ValueError)):
                    _saver(place.directory)({"a": 1}, given_name)

    no_door_lets_it_out()
    with capsys.disabled():
        print(f"\n{len(hostile)} hostile and {len(fine)} fine names through {len(DOORS)} doors")  # noqa: T201
    assert len(hostile) >= min_hostile
    assert fine


@pytest.mark.parametrize("name", ["../new.pt", "../a.pt", f"{ROOT}/new.pt", "outside/new.pt"])
def test_the_same_comparison_finds_out_a_saver_that_follows_such_names(name: str) -> None:
    with tree() as place:
        before = place.seen_from_outside()
        saver = ignite.handlers.DiskSaver(str(place.directory), require_empty=False)
        saver({"a": 1}, name.replace(ROOT, str(place.root)))
        assert place.seen_from_outside() != before


@pytest.mark.parametrize("name", ["../a.pt", "../secret.pt", "outside/a.pt"])
def test_the_same_comparison_finds_out_a_removal_outside(name: str) -> None:
    with tree() as place:
        before = place.seen_from_outside()
        ignite.handlers.DiskSaver(str(place.directory), require_empty=False).remove(name)
        assert place.seen_from_outside() != before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.pt", r"'\.\.' would leave the directory"),
        ("folder/../../a.pt", r"'\.\.' would leave the directory"),
        ("/a.pt", "it is absolute"),
        ("a\0.pt", "it holds a NUL"),
        ("\ud800.pt", "cannot be encoded"),
        ("", "it is empty"),
        ("folder/", "it names a directory"),
        (".distckpt-1-1-1.tmp", "reserved for temporary files"),
        ("secret.pt", "a symlink"),
        ("outside/a.pt", "a symlink"),
        ("folder/outside/a.pt", "a symlink"),
    ],
)
@pytest.mark.parametrize("door", ["save", "save in place", "remove", "pattern"])
def test_a_hostile_name_is_refused_with_the_reason(name: str, reason: str, door: str) -> None:
    with tree() as place, pytest.raises(ValueError, match=reason):
        DOORS[door](place.directory, name)


def test_a_hostile_prefix_is_refused_by_the_constructor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Argument filename_prefix should name a file inside"):
        _checkpoint(tmp_path, filename_prefix="../escaped")
