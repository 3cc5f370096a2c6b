"""ignite 0.5.5's own handler tests pass with distckpt's handlers, except where a difference is intended."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.parity.ignite_sdist import Outcome, replace_clock, rewrite_imports, run_pytest, unpack
from tests.support.selection import full_only

FILES = (
    "tests/ignite/handlers/test_checkpoint.py",
    "tests/ignite/handlers/test_early_stopping.py",
    "tests/ignite/handlers/test_handlers.py",
    "tests/ignite/handlers/test_terminate_on_nan.py",
    "tests/ignite/handlers/test_time_limit.py",
    "tests/ignite/handlers/test_timing.py",
    "tests/ignite/engine/test_engine_state_dict.py",
)
# They measure a sleep to a tenth of a second.
FILES_WITH_CLOCK = ("tests/ignite/handlers/test_time_limit.py", "tests/ignite/handlers/test_timing.py")
# Tests that need a GPU, Horovod, XLA or several nodes, which this machine may not have.
SELECTION = "not (hvd or nccl or xla or multinode)"

_INTERNALS = "It looks at ignite's private {}; the contract fixes public names, arguments and messages."
DELIBERATE = {
    "test_checkpoint.py::test_checkpoint_include_self_state_dict[to_save0-obj0-model]": (
        'Contract, Checkpoint: "include_self with one object writes a mapping with checkpointer that load_objects '
        'reads back (today it cannot)"; the test expects the unreadable form.'
    ),
    "test_checkpoint.py::test_checkpoint__setup_checkpoint[to_save0]": _INTERNALS.format("_setup_checkpoint"),
    "test_checkpoint.py::test_checkpoint__setup_checkpoint[to_save1]": _INTERNALS.format("_setup_checkpoint"),
    "test_checkpoint.py::test_checkpoint__setup_checkpoint[to_save2]": _INTERNALS.format("_setup_checkpoint"),
    "test_checkpoint.py::test_disk_saver_atomic": (
        "It wants a broken file under the final name where atomic=False and the state cannot be pickled; here that is "
        "found out before any file is touched, and what was there stands."
    ),
    "test_checkpoint.py::test_distrib_gloo_cpu_or_gpu": (
        "It asks for save_on_rank=1 in a world of one, where ignite saves nothing in silence; by the contract's fault "
        "table saving is one decision of all ranks, so a coordinator that does not exist is refused. With two ranks "
        "the test passes, below."
    ),
}

# Parts of tests that are replaced in the copy, so that the rest of the test runs: (text, replacement): reason.
PREFIX_OF_WRONG_TYPE = {
    ("_test(to_save, to_save, filename_pattern=", "_test(to_save, filename_pattern="): (
        "It passes to_save as filename_prefix, under a pattern that does not use it; a wrong type is refused at "
        "construction."
    )
}
ONLY_ON_RANK_0 = {
    (
        (
            "    _test_save_model_optimizer_lr_scheduler_with_state_dict"
            '(device, rank_zero_dirname / "2", just_on_zero_rank=True)\n'
        ),
        "",
    ): 'Contract, fault table: "a handler built on rank 0 only": the first event says which ranks have it.'
}


def _copy_that_imports_distckpt(folder: Path, adaptations: Iterable[tuple[str, str]]) -> Path:
    root = unpack(folder)
    for file in FILES:
        before = (root / file).read_text()
        after = rewrite_imports(before)
        assert "from distckpt import" in after, file
        (root / file).write_text(after)
    for file in FILES_WITH_CLOCK:
        replace_clock(root, file)
    file_of_checkpoints = root / FILES[0]
    for text, replacement in adaptations:
        source = file_of_checkpoints.read_text()
        assert source.count(text) == 1, text
        file_of_checkpoints.write_text(source.replace(text, replacement))
    return root


def _check(outcome: Outcome, deliberate: dict[str, str], num_tests: int) -> None:
    assert sorted(outcome.failed) == sorted(deliberate), outcome.output
    assert not outcome.skipped, outcome.skipped
    # A suite that is not collected would not fail.
    assert len(outcome.passed) == num_tests - len(deliberate), outcome.output


@pytest.mark.slow
def test_ignites_tests_pass_in_a_world_of_one(tmp_path: Path) -> None:
    root = _copy_that_imports_distckpt(tmp_path, PREFIX_OF_WRONG_TYPE)
    _check(run_pytest(root, FILES, ("-n0", "-k", SELECTION), {}), DELIBERATE, num_tests=152)


@full_only
@pytest.mark.slow
def test_ignites_distributed_tests_pass_with_two_ranks(tmp_path: Path) -> None:
    root = _copy_that_imports_distckpt(tmp_path, ONLY_ON_RANK_0)
    # As ignite runs them: every worker of xdist is a rank, and each runs all tests.
    each = ("--dist=each", "--tx", "2*popen", "-m", "distributed", "-k", SELECTION)
    environment = {"WORLD_SIZE": "2", "DISTCKPT_TIMEOUT_S": "20"}
    _check(run_pytest(root, FILES[:2], each, environment), {}, num_tests=4)


@pytest.mark.parametrize(
    ("line", "rewritten"),
    [
        ("from ignite.handlers import Timer", "from distckpt import Timer"),
        ("from ignite.handlers import ProgressBar", "from ignite.handlers import ProgressBar"),
        (
            "    from ignite.handlers import ProgressBar, TimeLimit",
            "    from distckpt import TimeLimit\n    from ignite.handlers import ProgressBar",
        ),
        ("from ignite.handlers.checkpoint import BaseSaveHandler", "from distckpt import BaseSaveHandler"),
        ("from ignite.engine import Engine", "from ignite.engine import Engine"),
    ],
)
def test_imports_are_rewritten_name_by_name(line: str, rewritten: str) -> None:
    assert rewrite_imports(line) == rewritten
