"""Every system call of a save fails once, on the saving rank of a real two-rank job.

One job goes through all failures. A save without one is watched first: what it calls is what can fail. Each
failure then meets the second of three saves with n_saved=1, in a directory in which a dead process has left a
temporary file, so that clearing and eviction are part of what fails.
"""

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import distckpt
from tests.crash.injected import Seen, Trouble, expected_of, judge, observe
from tests.crash.loop_disk import OWN_MOUNTS, mounted_tmpfs, why_no_mounts
from tests.crash.shim import Called, Fault, How, Shim, build, why_no_compiler
from tests.crash.subject import Counted
from tests.support import fresh_ranks

pytestmark = pytest.mark.crash

WORLD_SIZE = 2
LIMIT_S = 170.0
Judged = tuple[Sequence[str], Sequence[str]]
"""What was tried, and what was wrong."""


@pytest.fixture
def shim_library(tmp_path: Path) -> Path:
    reason = why_no_compiler()
    if reason is not None:
        pytest.skip(f"system calls cannot be made to fail: {reason}")
    return build(tmp_path)


# -- handlers, ours and broken ones ------------------------------------------------------------------


class _SwallowingSaver(distckpt.DiskSaver):
    """Takes a failed save for done."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(OSError):
            super().__call__(*args, **kwargs)


class _DeafCheckpoint(distckpt.Checkpoint):
    """Believes on ranks that do not save that all is well."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(*([OSError] if dist.get_rank() != self.save_on_rank else [])):
            super().__call__(*args, **kwargs)


def _ours(counted: Counted, directory: Path, saving: int) -> Any:
    return counted.handler(directory, save_on_rank=saving)


def _swallowing(counted: Counted, directory: Path, saving: int) -> Any:
    return counted.handler(_SwallowingSaver(directory, save_on_rank=saving), save_on_rank=saving)


def _deaf(counted: Counted, directory: Path, saving: int) -> Any:
    return counted.handler(directory, kind=_DeafCheckpoint, save_on_rank=saving)


MAKERS = {"ours": _ours, "swallows": _swallowing, "deaf": _deaf}


# -- on the ranks ------------------------------------------------------------------------------------


def _calls_of_a_save(directory: Path, saving: int) -> list[Called]:
    """Collective. Watch a save without any failure and tell all ranks what it calls."""
    shim = Shim()
    calm = Trouble(what="none", start=shim.watching, expected="saved", errno=errno.EIO)
    seen = observe(directory, dist.get_rank(), saving, calm, _ours)
    calls: list[Any] = [shim.log()]
    dist.broadcast_object_list(calls, src=saving)
    assert (seen.outcome, seen.told) == ("saved", ())
    return list(calls[0])


def _faults(calls: Sequence[Called]) -> Iterator[Fault]:
    """Yield each call's failures."""
    names = [call.name for call in calls]
    for name in sorted(set(names)):
        for nth in range(1, names.count(name) + 1):
            yield Fault(call=name, nth=nth)
            yield Fault(call=name, nth=nth, errno=errno.ENOSPC)
            if name == "write":
                for how in (How.SHORT, How.ZERO, How.TORN):
                    yield Fault(call=name, nth=nth, how=how)
                if nth < names.count(name):
                    yield Fault(call=name, nth=nth, how=How.SHORT_THEN_REFUSED, errno=errno.ENOSPC)
            if name in {"write", "fsync", "rename", "unlink"}:
                yield Fault(call=name, nth=nth, how=How.DONE_BUT_REPORTED_AS_FAILED)
            if name == "fsync":
                yield Fault(call=name, nth=nth, errno=errno.EINVAL)  # no harm on a directory
    for nth in range(1, len(names) + 1):
        yield Fault(call="*", nth=nth, for_ever=True)


def _fail_each_call(root: str, whose: str, only: str | None = None) -> Judged:
    """Collective. Make every call of a save fail, with each rank as the saving one."""
    tried, wrong = [], []
    shim, rank = Shim(), dist.get_rank()
    for saving in range(WORLD_SIZE):
        place = Path(root).resolve() / f"rank{saving}"
        calls = _calls_of_a_save(place / "calm", saving)
        for number, fault in enumerate(_faults(calls)):
            if only not in (None, fault.call):
                continue
            trouble = Trouble(
                what=str(fault),
                start=partial(shim.watching, fault=fault),
                expected=expected_of(fault, calls),
                errno=fault.errno,
                may_stay=fault.call == "rename" and fault.how is How.DONE_BUT_REPORTED_AS_FAILED,
            )
            wrong += _observe_and_judge(place / f"case{number}", rank, saving, trouble, whose)
            tried.append(f"{fault} -> {trouble.expected}")
    return tried, wrong


def _fail_calls_of_broken_savers(root: str, controls: Sequence[tuple[str, str]]) -> Judged:
    tried, wrong = [], []
    for whose, only in controls:
        found = _fail_each_call(f"{root}/{whose}-{only}", whose, only)
        tried += [f"{whose} {one}" for one in found[0]]
        wrong += [f"{whose} {one}" for one in found[1]]
    return tried, wrong


def _observe_and_judge(directory: Path, rank: int, saving: int, trouble: Trouble, whose: str) -> list[str]:
    seen: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(seen, observe(directory, rank, saving, trouble, MAKERS[whose]))
    found: list[Seen] = seen
    return judge(directory, saving, trouble, found)


# -- what the machine itself can do, without the shim ------------------------------------------------


@contextlib.contextmanager
def _file_size_limit(_directory: Path) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_001, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _vanished(directory: Path) -> Iterator[None]:
    elsewhere = directory.with_name("elsewhere")
    directory.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(directory)


@contextlib.contextmanager
def _a_file_instead(directory: Path) -> Iterator[None]:
    with _vanished(directory):
        directory.touch()
        try:
            yield
        finally:
            directory.unlink()


@contextlib.contextmanager
def _full_disk(directory: Path) -> Iterator[None]:
    filler = directory.with_name("filler")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - 400_000)  # room for a part of it: a short write comes first
    try:
        yield
    finally:
        filler.unlink()


REAL_TROUBLES = [
    Trouble(what="file size limit", start=_file_size_limit, expected="failed", errno=errno.EFBIG),
    Trouble(what="directory vanished", start=_vanished, expected="failed", errno=errno.ENOENT),
    Trouble(what="a file instead of the directory", start=_a_file_instead, expected="failed", errno=errno.ENOTDIR),
]
FULL_DISK = Trouble(what="full disk", start=_full_disk, expected="failed", errno=errno.ENOSPC)


def _real_troubles(root: str) -> Judged:
    tried, wrong = [], []
    for saving in range(WORLD_SIZE):
        for trouble in REAL_TROUBLES:
            directory = Path(root).resolve() / f"rank{saving}" / "checkpoints"
            wrong += _observe_and_judge(directory, dist.get_rank(), saving, trouble, "ours")
            tried.append(trouble.what)
    return tried, wrong


def _full_disks(root: str) -> Judged:
    tried, wrong = [], []
    for saving in range(WORLD_SIZE):
        # Each rank has mounts of its own: as on two nodes, only the saving one sees this disk.
        place = Path(root).resolve() / f"rank{saving}"
        place.mkdir(exist_ok=True)
        with mounted_tmpfs(place, "3m") if dist.get_rank() == saving else contextlib.nullcontext():
            wrong += _observe_and_judge(place / "checkpoints", dist.get_rank(), saving, FULL_DISK, "ours")
        tried.append(FULL_DISK.what)
    return tried, wrong


# -- tests -------------------------------------------------------------------------------------------


def _on_ranks(function: Callable[..., Judged], *args: object, **kwargs: Any) -> Judged:
    with fresh_ranks(function, WORLD_SIZE, *args, **kwargs) as ranks:
        ends = ranks.finish(timeout_s=LIMIT_S)
    tried: Judged = ends[0].value
    assert ends[1].value == tried, "the ranks judge alike"
    return tried


def test_every_call_of_a_save_fails_once_and_all_ranks_hear_the_same(
    tmp_path: Path, shim_library: Path, tell: Callable[[str], None]
) -> None:
    tried, wrong = _on_ranks(_fail_each_call, str(tmp_path), "ours", env={"LD_PRELOAD": str(shim_library)})
    outcomes = [one.rpartition(" -> ")[2] for one in tried]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("failed", "not durable", "saved"))
    tell(f"failing calls: {len(tried)} failures on two ranks ({counts}), {len(wrong)} with a wrong end")
    assert not wrong, "\n".join(wrong)
    assert {"openat", "write", "fsync", "rename", "unlink", "close", "fstat", "stat", "flock", "readdir"} <= {
        one.split(" ")[0] for one in tried
    }


def test_the_same_failures_find_out_savers_that_keep_an_error_to_themselves(
    tmp_path: Path, shim_library: Path, tell: Callable[[str], None]
) -> None:
    controls = {
        ("swallows", "write"): "lost: step 2 was acknowledged",
        ("swallows", "fsync"): "expected failed, saw saved",
        ("deaf", "rename"): "the ranks saw different things",
    }
    environment = {"LD_PRELOAD": str(shim_library)}
    tried, wrong = _on_ranks(_fail_calls_of_broken_savers, str(tmp_path), list(controls), env=environment)
    tell(f"failing calls, negative controls: {len(wrong)} findings in {len(tried)} failures of broken savers")
    for (whose, call), finding in controls.items():
        found = [one for one in wrong if one.startswith(f"{whose} {call}") and finding in one]
        assert found, f"a saver that {whose} was not found out when {call} failed"


def test_real_limits_and_vanished_directories_are_the_same_error_on_every_rank(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    tried, wrong = _on_ranks(_real_troubles, str(tmp_path))
    tell(f"real failures on two ranks: {len(tried)} ({', '.join(sorted(set(tried)))}), {len(wrong)} with a wrong end")
    assert not wrong, "\n".join(wrong)


def test_a_full_disk_is_the_same_error_on_every_rank(tmp_path: Path, tell: Callable[[str], None]) -> None:
    reason = why_no_mounts(tmp_path, kind="tmpfs")
    if reason is not None:
        pytest.skip(f"this machine does not allow to mount a small tmpfs: {reason}")
    tried, wrong = _on_ranks(_full_disks, str(tmp_path), prefix=lambda _: OWN_MOUNTS)
    tell(f"full disk on two ranks: {len(tried)} saves, {len(wrong)} with a wrong end")
    assert not wrong, "\n".join(wrong)
