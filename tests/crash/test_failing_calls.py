"""Every system call of a save fails, once or for ever, on either rank of a real two-rank job.

It fails on the rank that saves, and where ranks share the writing on the others too. One job goes through all
failures. A save without one is watched first: what it calls is what can fail. Each failure then meets the second of
three saves with n_saved=1, in a directory in which a dead process has left a temporary file, so that clearing and
eviction are part of what fails.
"""

import contextlib
import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

import distckpt
from tests.crash.faults import Extent, faults_of
from tests.crash.injected import HandlerMaker, Roles, Seen, Trouble, expected_of, judge, observe
from tests.crash.loop_disk import mounted_tmpfs, unshare_mounts, why_no_mounts
from tests.crash.modes import MODES, disk_saver, is_sharded, is_shared
from tests.crash.savers import Subject
from tests.crash.shim import Called, How, Shim, build, why_no_compiler
from tests.crash.subject import name_of
from tests.crash.tally import place_of
from tests.support import fresh_ranks
from tests.support.limits import PROGRAM_LIMIT_S

pytestmark = pytest.mark.crash

WORLD_SIZE = 2
T = TypeVar("T")
Judged = tuple[Sequence[str], Sequence[str]]
"""Descriptions of the trials, and what was wrong in them."""


@pytest.fixture
def shim_library(tmp_path: Path) -> Path:
    reason = why_no_compiler()
    if reason is not None:
        pytest.skip(f"system calls cannot be made to fail: {reason}")
    return build(tmp_path)


# -- handlers, ours and broken ones ------------------------------------------------------------------


class _SwallowingSaver(distckpt.DiskSaver):
    """Ignores a failed save."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(OSError):
            super().__call__(*args, **kwargs)


class _DeafCheckpoint(distckpt.Checkpoint):
    """Ignores a failed save on the ranks that do not save."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(*([OSError] if dist.get_rank() != self.save_on_rank else [])):
            super().__call__(*args, **kwargs)


def _ours(counted: Subject, directory: Path, saving: int, *, mode: str) -> Any:
    return counted.handler(disk_saver(directory, mode, save_on_rank=saving), save_on_rank=saving)


def _swallowing(counted: Subject, directory: Path, saving: int) -> Any:
    return counted.handler(_SwallowingSaver(directory, save_on_rank=saving), save_on_rank=saving)


def _deaf(counted: Subject, directory: Path, saving: int) -> Any:
    return counted.handler(directory, kind=_DeafCheckpoint, save_on_rank=saving)


MAKERS: dict[str, HandlerMaker] = {
    "swallows": _swallowing,
    "deaf": _deaf,
    **{mode: partial(_ours, mode=mode) for mode in MODES},
}


# -- on the ranks ------------------------------------------------------------------------------------


def _all_roles(mode: str) -> Iterator[Roles]:
    """Yield each pair of a saving rank and a failing rank, which is one that writes."""
    for saving, failing in itertools.product(range(WORLD_SIZE), range(WORLD_SIZE)):
        if failing == saving or is_shared(mode):
            yield Roles(rank=dist.get_rank(), saving=saving, failing=failing, mode=mode)


def _calls_of_a_save(directory: Path, roles: Roles) -> list[Called]:
    """Collective. Watch a save without a failure; return the calls of the rank that is to fail, on all ranks."""
    shim = Shim()
    calm = Trouble(what="none", start=shim.watching, expected="saved", errno=errno.EIO)
    seen = observe(directory, roles, calm, MAKERS[roles.mode])
    calls: list[Any] = [shim.log()]
    dist.broadcast_object_list(calls, src=roles.failing)
    assert (seen.outcome, seen.removal_warnings) == ("saved", ())
    return list(calls[0])


def _fail_each_call(root: str, whose: str, extent: Extent, only: str | None = None) -> Judged:
    """Collective. Make every call of a save fail, on each rank that writes."""
    tried, wrong = [], []
    shim = Shim()
    for roles in _all_roles(whose if whose in MODES else MODES[0]):
        place = Path(root).resolve() / f"rank{roles.saving}-{roles.failing}"
        calls = _calls_of_a_save(place / "calm", roles)
        assert calls, f"rank {roles.failing} of {WORLD_SIZE} has no part in a save that is {roles.mode}"
        for number, fault in enumerate(faults_of(calls, extent)):
            if only not in (None, fault.call):
                continue
            trouble = Trouble(
                what=str(fault),
                start=partial(shim.watching, fault=fault),
                expected=expected_of(fault, calls),
                errno=fault.errno,
                may_stay=fault.call == "rename" and fault.how is How.DONE_BUT_REPORTED_AS_FAILED,
                may_harm_nothing=fault.how is How.TORN,
            )
            wrong += _observe_and_judge(place / f"case{number}", roles, trouble, whose)
            tried.append(f"{fault} -> {trouble.expected}")
    return tried, wrong


def _fail_calls_of_broken_savers(root: str, controls: Sequence[tuple[str, str]]) -> Judged:
    tried, wrong = [], []
    for whose, only in controls:
        found = _fail_each_call(f"{root}/{whose}-{only}", whose, "quick", only)
        tried += [f"{whose} {one}" for one in found[0]]
        wrong += [f"{whose} {one}" for one in found[1]]
    return tried, wrong


def _observe_and_judge(directory: Path, roles: Roles, trouble: Trouble, whose: str) -> list[str]:
    seen: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(seen, observe(directory, roles, trouble, MAKERS[whose]))
    found: list[Seen] = seen
    return judge(directory, roles, trouble, found)


# -- faults of the machine, without the shim --------------------------------------------------


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
    os.truncate(filler, filler.stat().st_size - 400_000)  # room for a part of the file: a short write comes first
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


def _roles_where_one_rank_fails(mode: str) -> Iterator[Roles]:
    return (roles for roles in _all_roles(mode) if roles.failing == roles.saving)


def _real_troubles(root: str) -> Judged:
    tried, wrong = [], []
    for mode, trouble in itertools.product(MODES, REAL_TROUBLES):
        for roles in _roles_where_one_rank_fails(mode):
            directory = Path(root).resolve() / f"rank{roles.saving}" / "checkpoints"
            wrong += _observe_and_judge(directory, roles, trouble, mode)
            tried.append(f"{trouble.what}, {mode}")
    return tried, wrong


def _full_disks(root: str) -> Judged:
    unshare_mounts()
    tried, wrong = [], []
    # Ranks that share the writing share the disk too.
    for roles in (roles for mode in MODES if not is_shared(mode) for roles in _roles_where_one_rank_fails(mode)):
        # Each rank has its own mounts: only the saving rank sees this disk, as on two nodes.
        place = Path(root).resolve() / f"rank{roles.saving}"
        place.mkdir(exist_ok=True)
        with mounted_tmpfs(place, "3m") if roles.rank == roles.saving else contextlib.nullcontext():
            wrong += _observe_and_judge(place / "checkpoints", roles, FULL_DISK, roles.mode)
        tried.append(f"{FULL_DISK.what}, {roles.mode}")
    return tried, wrong


# -- tests -------------------------------------------------------------------------------------------


def _on_ranks(function: Callable[..., T], *args: object, limit_s: float = PROGRAM_LIMIT_S, **kwargs: Any) -> T:
    with fresh_ranks(function, WORLD_SIZE, *args, **kwargs) as ranks:
        ends = ranks.finish(timeout_s=limit_s)
    judged: T = ends[0].value
    assert ends[1].value == judged, "the ranks judge alike"
    return judged


def _fail_calls_in_each_mode(root: str, extents: dict[str, Extent]) -> dict[str, Judged]:
    return {mode: _fail_each_call(str(place_of(root, mode)), mode, extent) for mode, extent in extents.items()}


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
def test_every_call_of_a_save_fails_and_all_ranks_raise_the_same(
    tmp_path: Path,
    shim_library: Path,
    *,
    sharded: bool,
    is_whole: bool,
    limit_s: float,
    report: Callable[[str], None],
) -> None:
    modes = [mode for mode in MODES if is_sharded(mode) == sharded]
    extents: dict[str, Extent] = dict.fromkeys(modes, "whole" if is_whole else "sample")
    of_modes = _on_ranks(
        _fail_calls_in_each_mode, str(tmp_path), extents, env={"LD_PRELOAD": str(shim_library)}, limit_s=limit_s
    )
    for mode, (tried, wrong) in of_modes.items():
        outcomes = [one.rpartition(" -> ")[2] for one in tried]
        counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("failed", "not durable", "saved"))
        report(f"failing calls, {mode}: {len(tried)} failures on two ranks ({counts}), {len(wrong)} with a wrong end")
    wrong = [f"{mode}: {one}" for mode, of_mode in of_modes.items() for one in of_mode[1]]
    assert not wrong, "\n".join(wrong)
    if sharded:
        return
    tried = of_modes[MODES[0]][0]
    assert {"openat", "write", "fsync", "rename", "unlink", "close", "fstat", "stat", "flock", "readdir"} <= {
        one.split(" ")[0] for one in tried
    }


def test_the_same_failures_find_out_savers_that_keep_an_error_to_themselves(
    tmp_path: Path, shim_library: Path, report: Callable[[str], None]
) -> None:
    controls = {
        ("swallows", "write"): "lost: step 2 was acknowledged",
        ("swallows", "fsync"): "expected failed, saw saved",
        ("deaf", "rename"): "the ranks saw different things",
    }
    environment = {"LD_PRELOAD": str(shim_library)}
    tried, wrong = _on_ranks(_fail_calls_of_broken_savers, str(tmp_path), list(controls), env=environment)
    report(f"failing calls, negative controls: {len(wrong)} findings in {len(tried)} failures of broken savers")
    for (whose, call), finding in controls.items():
        found = [one for one in wrong if one.startswith(f"{whose} {call}") and finding in one]
        assert found, f"a saver that {whose} was not found out when {call} failed"


@pytest.mark.parametrize(("faults", "whole"), [(("record data/3 has 1 of its 9 bytes",), (2,)), ((), (1,))])
def test_a_torn_write_is_forgiven_only_where_every_byte_is_right(
    tmp_path: Path, faults: tuple[str, ...], whole: tuple[int, ...]
) -> None:
    torn = Trouble(what="torn", start=contextlib.nullcontext, expected="failed", errno=errno.EIO, may_harm_nothing=True)
    roles = Roles(rank=0, saving=0, failing=0)
    right = Seen(
        outcome="saved",
        message="",
        kinds=(),
        removal_warnings=(),
        last=name_of(2),
        third="saved",
        whole=(2,),
        steps=(3,),
    )
    assert judge(tmp_path, roles, torn, [right, right]) == []
    assert judge(tmp_path, roles, replace(torn, may_harm_nothing=False), [right, right])
    wrong = judge(tmp_path, roles, torn, [replace(right, faults=faults, whole=whole), right])
    assert any("expected failed, saw saved" in one for one in wrong)


def test_real_limits_and_vanished_directories_are_the_same_error_on_every_rank(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    tried, wrong = _on_ranks(_real_troubles, str(tmp_path))
    report(f"real failures on two ranks: {len(tried)} ({'; '.join(sorted(set(tried)))}), {len(wrong)} with a wrong end")
    assert not wrong, "\n".join(wrong)


def test_a_full_disk_is_the_same_error_on_every_rank(tmp_path: Path, report: Callable[[str], None]) -> None:
    reason = why_no_mounts(tmp_path, kind="tmpfs")
    if reason is not None:
        pytest.skip(f"this machine does not allow to mount a small tmpfs: {reason}")
    tried, wrong = _on_ranks(_full_disks, str(tmp_path))
    report(f"full disk on two ranks: {len(tried)} ({'; '.join(sorted(set(tried)))}), {len(wrong)} with a wrong end")
    assert not wrong, "\n".join(wrong)
