"""The shim that makes calls fail sees every system call of a save: what strace sees, it can fail."""

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.crash import strace
from tests.crash.injected import Roles, Seen, Trouble, observe
from tests.crash.savers import Subject
from tests.crash.shim import Called, Shim, build, why_no_compiler
from tests.support import run_ranks

pytestmark = pytest.mark.crash

_SHIMS_NAME = {
    "openat": "openat", "write": "write", "pwrite64": "write", "fsync": "fsync", "renameat": "rename",
    "unlinkat": "unlink", "flock": "flock", "close": "close",
}  # fmt: skip


def _handler(counted: Subject, directory: Path, _saving: int) -> Any:
    return counted.handler(directory)


def _watch_a_save(directory: str, trace: str) -> tuple[Seen, Sequence[Called]]:
    shim, begin, end = Shim(), Path(directory, "begin"), Path(directory, "end")
    begin.touch()
    end.touch()

    @contextmanager
    def between_marks(watched: Path) -> Iterator[None]:
        with shim.watching(watched):
            begin.stat()
            yield
            end.stat()

    calm = Trouble(what="none", start=between_marks, expected="saved", errno=errno.EIO)
    with strace.traced(Path(trace)):
        seen = observe(Path(directory) / "checkpoints", Roles(rank=0, saving=0, failing=0), calm, _handler)
    return seen, shim.log()


def _in_the_shims_words(call: strace.Call) -> str:
    if call.name == "newfstatat":
        return "fstat" if "AT_EMPTY_PATH" in call.arguments else "stat"
    if call.name == "fcntl":
        return "fcntl" if "F_DUPFD" in call.arguments else "fcntl that cannot harm"
    return _SHIMS_NAME.get(call.name, call.name)


def test_the_shim_sees_every_call_that_strace_sees(tmp_path: Path, report: Callable[[str], None]) -> None:
    reason = strace.why_no_strace() or why_no_compiler()
    if reason is not None:
        pytest.skip(reason)
    environment, trace = {"LD_PRELOAD": str(build(tmp_path))}, tmp_path / "trace"
    place = tmp_path / "place"
    place.mkdir()
    ((seen, log),) = run_ranks(_watch_a_save, 1, str(place), str(trace), backend=None, env=environment, fresh=True)
    assert seen.outcome == "saved"
    calls = strace.calls_in(trace, place, failed=True)
    (begin, end) = [
        index
        for index, call in enumerate(calls)
        if call.name == "newfstatat" and call.paths[-1] in {str(place / "begin"), str(place / "end")}
    ]
    # The shim watches the directory below `place`, not `place` itself.
    inside = [call for call in calls[begin + 1 : end] if call.paths[-1] != str(place)]
    straces = Counter(map(_in_the_shims_words, inside))
    shims = Counter(call.name for call in log)
    report(f"failing calls: the shim sees {shims.total()} calls of a save, strace {straces.total()}")
    # Calls inside the C library's listing of a directory: fstat in opendir, close in closedir, getdents64 in readdir.
    # rewinddir, F_GETFL and F_SETFD change the descriptor only.
    num_listings = shims.pop("opendir")
    assert num_listings == 2, "for what was saved before, as the first save of a run, and for what dead writers left"
    # The listing by descriptor is rewound. One call asks for holes, and may fail. Two find the length of the file whose
    # record is read.
    assert straces.pop("lseek") == 1 + 1 + 2
    assert straces.pop("fcntl that cannot harm") == 2
    # The shim does not fail reads: a record that cannot be read counts as none.
    assert straces.pop("pread64") > 0
    assert straces.pop("ioctl") > 0
    assert straces.pop("getdents64") > 0
    assert shims.pop("readdir") > 0
    shims += Counter({"fstat": num_listings, "close": num_listings, "openat": 1})  # the other listing is by path
    assert straces == shims
