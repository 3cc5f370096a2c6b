"""The order of the system calls of a save, seen by strace.

Two saves with n_saved=1 into a directory that did not exist, so that the second one evicts. What is asserted is
the whole of what happens to the directory: nothing else may change anything in it.
"""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distckpt.policy.naming import is_temp
from tests.crash import strace
from tests.crash.subject import Counted, idle_engine, name_of, steps_in, whole_step
from tests.support import run_ranks

pytestmark = pytest.mark.crash

# 3 MiB: several writes.
NUM_FLOATS = 800_000
OLD, NEW = name_of(1), name_of(2)


def _save(name: str) -> list[str]:
    return ["create TEMP", "open for writing TEMP", "write TEMP", "sync TEMP", f"rename TEMP {name}", "sync DIR"]


WHOLE_RUN = ["mkdir DIR", "sync PARENT", *_save(OLD), *_save(NEW), f"unlink {OLD}"]


@pytest.fixture
def _strace_works() -> None:
    reason = strace.why_no_strace()
    if reason is not None:
        pytest.skip(reason)


def _save_twice(places: Sequence[tuple[str, int, str]], traces: Sequence[str]) -> None:
    """Save twice into each place, under strace. A place is a directory, the rank that saves, and whose handler."""
    with strace.traced(Path(traces[int(os.environ["RANK"])])):
        _save_into(places)


def _save_into(places: Sequence[tuple[str, int, str]]) -> None:
    for directory, save_on_rank, whose in places:
        counted = Counted(NUM_FLOATS)
        handler: Any
        if whose == "ignite":
            handler = counted.ignite_handler(Path(directory))
        else:
            handler = counted.handler(directory, save_on_rank=save_on_rank)
        for step in (1, 2):
            counted.step = step
            handler(idle_engine())


def _trace(tmp_path: Path, world_size: int, places: Sequence[tuple[Path, int, str]]) -> list[list[list[str]]]:
    """Return what each rank did to each place, in `WHOLE_RUN`'s words."""
    traces = [tmp_path / f"trace{rank}" for rank in range(world_size)]
    for directory, _, _ in places:
        directory.parent.mkdir()
    run_ranks(
        _save_twice, world_size, [(str(directory), rank, whose) for directory, rank, whose in places],
        [str(trace) for trace in traces], backend="gloo" if world_size > 1 else None, fresh=True,
    )  # fmt: skip
    for directory, _, _ in places:
        assert steps_in(directory) == [2]
        assert whole_step(directory / NEW) == 2
    return [
        [_in_words(strace.changes(strace.calls_in(trace, place.parent)), place) for place, _, _ in places]
        for trace in traces
    ]


_VERBS = {
    "fsync": "sync", "fdatasync": "sync", "rename": "rename", "renameat": "rename", "renameat2": "rename",
    "unlink": "unlink", "unlinkat": "unlink", "mkdir": "mkdir", "mkdirat": "mkdir", "write": "write",
    "pwrite64": "write", "writev": "write",
}  # fmt: skip


def _in_words(calls: Sequence[strace.Call], directory: Path) -> list[str]:
    words = []
    for call in calls:
        verb = _VERBS.get(call.name, call.name)
        if call.name == "openat":
            private = "O_EXCL" in call.arguments and "O_NOFOLLOW" in call.arguments
            verb = "create" if private else "open for writing"
        # A descriptor in front of a name is the directory to which the name is relative.
        named = [path for path in call.paths if path.startswith(f"{directory}/")]
        objects = {"rename": named, "sync": call.paths[-1:], "mkdir": call.paths[-1:]}.get(verb, named[:1])
        words.append(" ".join([verb, *(_called(path, directory) for path in objects)]))
    # Consecutive writes count as one.
    return words[:1] + [new for old, new in pairwise(words) if (old, new) != ("write TEMP", "write TEMP")]


def _called(path: str, directory: Path) -> str:
    name = Path(path).name
    if is_temp(name) or name.startswith("tmp"):  # ignite's
        return "TEMP"
    return {str(directory): "DIR", str(directory.parent): "PARENT"}.get(path, name)


@pytest.mark.usefixtures("_strace_works")
def test_a_save_writes_syncs_renames_syncs_the_directory_and_only_then_removes(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    place, control = tmp_path / "ours" / "checkpoints", tmp_path / "ignites" / "checkpoints"
    ((ours, ignites),) = _trace(tmp_path, 1, [(place, 0, "distckpt"), (control, 0, "ignite")])
    assert ours == WHOLE_RUN
    report(f"order of calls: 1 rank, {len(ours)} steps in order")
    # The negative control: the same harness finds another order where there is one.
    report(f"order of calls, negative control: ignite's is {', '.join(ignites)}")
    assert ignites.count("write TEMP") == 2
    assert not any(word.startswith("sync") for word in ignites), "ignite syncs nothing"
    assert ignites.index(f"unlink {OLD}") < ignites.index(f"rename TEMP {NEW}"), "it removes first"


@pytest.mark.usefixtures("_strace_works")
def test_the_saving_rank_of_two_does_the_same_and_the_other_one_nothing(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    places = [(tmp_path / f"rank{rank}" / "checkpoints", rank, "distckpt") for rank in range(2)]
    words = _trace(tmp_path, 2, places)
    for saving in range(2):
        assert words[saving][saving] == WHOLE_RUN
        assert words[1 - saving][saving] == []
    report(f"order of calls: 2 ranks, each the saving one once, {len(WHOLE_RUN)} steps in order")


def test_a_trace_with_interleaved_threads_is_put_together(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(
        '7 write(4</d/.t>, ""..., 9 <unfinished ...>\n'
        '8 unlinkat(3</d>, "a.pt", 0) = -1 ENOENT (No such file or directory)\n'
        '8 renameat(3</d>, "x", 3</d>, "y") = 0\n'
        "7 <... write resumed>) = 9\n"
        '7 openat(AT_FDCWD</e>, "/d/z", O_WRONLY|O_CREAT, 0666) = 5</d/z>\n'
        "7 fsync(3</dd>) = 0\n"
    )
    calls = strace.changes(strace.calls_in(trace, Path("/d")))
    assert [(call.name, call.paths) for call in calls] == [
        ("renameat", ("/d", "/d/x", "/d", "/d/y")),
        ("write", ("/d/.t",)),
        ("openat", ("/e", "/d/z")),
    ]
