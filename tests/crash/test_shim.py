"""The shim that makes calls fail sees every system call of a save: what strace sees, it can fail."""

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.crash import strace
from tests.crash.injected import Seats, Seen, Trouble, observe
from tests.crash.savers import Subject
from tests.crash.shim import Called, Shim, build, why_no_compiler
from tests.support import run_ranks

pytestmark = pytest.mark.crash

LIMIT_S = 120.0
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
        seen = observe(Path(directory) / "checkpoints", Seats(rank=0, saving=0, failing=0), calm, _handler)
    return seen, shim.log()


def _in_the_shims_words(call: strace.Call) -> str:
    if call.name == "newfstatat":
        return "fstat" if "AT_EMPTY_PATH" in call.arguments else "stat"
    if call.name == "fcntl":
        return "fcntl" if "F_DUPFD" in call.arguments else "fcntl that cannot harm"
    return _SHIMS_NAME.get(call.name, call.name)


def test_the_shim_sees_every_call_that_strace_sees(tmp_path: Path, tell: Callable[[str], None]) -> None:
    reason = strace.why_no_strace() or why_no_compiler()
    if reason is not None:
        pytest.skip(reason)
    environment, trace = {"LD_PRELOAD": str(build(tmp_path))}, tmp_path / "trace"
    place = tmp_path / "place"
    place.mkdir()
    ((seen, log),) = run_ranks(
        _watch_a_save, 1, str(place), str(trace), backend=None, env=environment, fresh=True, timeout_s=LIMIT_S
    )
    assert seen.outcome == "saved"
    calls = strace.calls_in(trace, place, failed=True)
    (begin, end) = [
        index
        for index, call in enumerate(calls)
        if call.name == "newfstatat" and call.paths[-1] in {str(place / "begin"), str(place / "end")}
    ]
    # The shim watches the directory below, not the place itself.
    inside = [call for call in calls[begin + 1 : end] if call.paths[-1] != str(place)]
    straces = Counter(map(_in_the_shims_words, inside))
    shims = Counter(call.name for call in log)
    tell(f"failing calls: the shim sees {shims.total()} calls of a save, strace {straces.total()}")
    # The C library's own, inside the listing of a directory: opendir looks at its descriptor and closedir closes it;
    # getdents64 is what readdir fails by; rewinddir and F_GETFL, F_SETFD work on the descriptor alone.
    num_listings = shims.pop("opendir")
    assert num_listings == 2, "for what was saved before, as the first save of a run, and for what dead writers left"
    # One listing is by descriptor: it is rewound. One call asks for holes, and may fail: then there are none. The file
    # that is read for its record is asked for its length and set back.
    assert straces.pop("lseek") == 1 + 1 + 2
    assert straces.pop("fcntl that cannot harm") == 2
    # What only reads does not fail here: a record that cannot be read is none.
    assert straces.pop("pread64") > 0
    assert straces.pop("ioctl") > 0
    assert straces.pop("getdents64") > 0
    assert shims.pop("readdir") > 0
    shims += Counter({"fstat": num_listings, "close": num_listings, "openat": 1})  # the other listing is by path
    assert straces == shims
