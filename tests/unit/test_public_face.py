"""What the package shows: names that are its own, types, and loggers that say nothing by themselves."""

import logging
import subprocess
import sys
from pathlib import Path

import ignite.handlers
import pytest
from ignite.handlers import checkpoint as ignites

import distckpt
from distckpt import EarlyStopping, TerminateOnNan, TimeLimit
from tests.support.limits import PROGRAM_LIMIT_S
from tests.unit.toys import idle_engine

NAMES = [
    "BaseSaveHandler",
    "Checkpoint",
    "CheckpointEvents",
    "DiskSaver",
    "EarlyStopping",
    "ModelCheckpoint",
    "TerminateOnNan",
    "TimeLimit",
    "Timer",
    "global_step_from_engine",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_contracts_names_are_our_own(name: str) -> None:
    ours = getattr(distckpt, name)
    assert name in distckpt.__all__
    assert getattr(distckpt.handlers, name) is ours
    assert name in distckpt.handlers.__all__
    assert ours.__module__.startswith("distckpt.")
    assert ours is not getattr(ignite.handlers, name, None)
    assert ours is not getattr(ignites, name, None)


def test_every_public_name_is_there_and_sorted() -> None:
    assert sorted(distckpt.__all__) == list(distckpt.__all__)
    assert all(hasattr(distckpt, name) for name in distckpt.__all__)


def test_types_are_shipped() -> None:
    assert (Path(distckpt.__file__).parent / "py.typed").exists()


def test_the_packages_logger_has_no_handlers() -> None:
    assert logging.getLogger("distckpt").handlers == []  # not even one that does nothing: Python's last resort counts


@pytest.mark.parametrize(
    "make",
    [
        TerminateOnNan,
        TimeLimit,
        lambda: EarlyStopping(1, lambda _engine: 0.0, idle_engine()),
    ],
)
def test_handlers_log_below_the_package_and_add_no_handlers(make: type[TerminateOnNan]) -> None:
    before = list(logging.getLogger().handlers)
    handler = make()
    assert handler.logger.name.startswith("distckpt.")
    assert handler.logger.handlers == []
    assert handler.logger.propagate
    assert list(logging.getLogger().handlers) == before


def run_fresh(program: str) -> str:
    """Return what a program prints in a process of its own."""
    root = Path(distckpt.__file__).parents[1]
    return subprocess.check_output(
        [sys.executable, "-c", program], cwd=root, text=True, timeout=PROGRAM_LIMIT_S
    ).strip()


def test_importing_configures_nothing_and_pulls_in_no_other_runtime() -> None:
    program = (
        "import logging, sys, warnings; before = list(warnings.filters); import distckpt; "
        "print([name for name in ('horovod', 'torch_xla') if name in sys.modules], logging.getLogger().handlers)"
    )
    assert run_fresh(program) == "[] []"


def test_importing_the_package_alone_does_not_import_ignite() -> None:
    program = (
        "import sys, distckpt; distckpt.get_rank(); distckpt.LoadReport; distckpt.ResumableSampler; dir(distckpt); "
        "print([name for name in sys.modules if name.startswith(('ignite', 'distckpt.handlers'))])"
    )
    assert run_fresh(program) == "[]"


def test_importing_the_package_and_reading_records_does_not_import_torch() -> None:
    program = (
        "import sys, distckpt, distckpt.ptformat.records; distckpt.CorruptCheckpointError; distckpt.errors.LoadError; "
        "dir(distckpt); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert run_fresh(program) == "[]"


def test_every_module_is_an_attribute_of_the_package() -> None:
    program = "import distckpt; print(distckpt.backends.__name__, distckpt.policy.__name__, distckpt.samplers.__name__)"
    assert run_fresh(program) == "distckpt.backends distckpt.policy distckpt.samplers"


@pytest.mark.parametrize("name", ["Checkpoint", "handlers"])
def test_the_first_use_of_a_handler_installs_the_hooks_into_ignite(name: str) -> None:
    program = (
        "from ignite.engine import Engine; before = Engine.run; import distckpt; same = Engine.run; "
        f"distckpt.{name}; print(same is before, Engine.run is before, Engine.run.__wrapped__ is before)"
    )
    assert run_fresh(program) == "True False True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'distckpt' has no attribute 'Chekpoint'"):
        distckpt.Chekpoint  # type: ignore[attr-defined]  # noqa: B018
    assert set(distckpt.__all__) <= set(dir(distckpt))
