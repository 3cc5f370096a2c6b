"""Checkpoints with policies: what is on the disk, after which save, in this run and in the next."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from distckpt import BestN, Checkpoint, DiskSaver, EveryHours, EveryNSteps, LastN, ModelCheckpoint, resume
from distckpt.handlers import build_manifest, common, save_intent
from distckpt.ptformat.records import parse_record, read_record
from tests.support.selection import quick
from tests.unit.directories import names_in
from tests.unit.ptformat.test_records import record_of
from tests.unit.toys import InMemory, idle_engine, linear

MIDNIGHT_S = 20_000 * 86_400.0
DOCS = Path(__file__).parents[3] / "docs"


class Clock:
    """A clock that shows a number of minutes after midnight."""

    def __init__(self) -> None:
        self.minutes = 0.0

    def time(self) -> float:
        """Return the time, some seconds after the minute."""
        return MIDNIGHT_S + 60 * self.minutes + 17.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that saves read."""
    made = Clock()
    monkeypatch.setattr(save_intent, "time", made)
    monkeypatch.setattr("distckpt.saving.api.time", made)
    return made


def peak_at_304(engine: Engine) -> float:
    """Return a score that is highest at iteration 304."""
    return -abs(engine.state.iteration - 304) / 1000


def train(
    where: Any, keep: Any, steps: int, clock: Clock | None = None, *, resumes: bool = True, **options: Any
) -> Checkpoint:
    """Train up to a step, save every 10 iterations, 12 minutes from one save to the next."""
    trainer = idle_engine()
    objects = {"model": linear(1), "trainer": trainer}
    saver = DiskSaver(where, require_empty=False) if isinstance(where, Path) else where
    handler = Checkpoint(objects, saver, **({} if keep is None else {"keep": keep}), **options)

    def save(engine: Engine) -> None:
        if clock is not None:
            clock.minutes = 12 * (engine.state.iteration // 10)
        handler(engine)

    handler.on_attach(trainer, (), {})
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), save)
    if resumes and isinstance(where, Path):
        resume(objects, handler, engine=trainer)
    trainer.run(range(10), max_epochs=steps // 10)
    return handler


def steps_in(names: Iterable[str]) -> list[int]:
    """Return the steps in the names of files, sorted."""
    return sorted(int(re.findall(r"_(\d+)(?:_|\.pt)", name)[0]) for name in names)


def scored() -> dict[str, Any]:
    """Return the arguments of a handler with a score, and with a step in the names."""
    return {"score_function": peak_at_304, "global_step_transform": lambda engine, _event: engine.state.iteration}


ROWS = re.findall(r"^\| `(\[.*\])` \| ([\d, ]+) \|$", (DOCS / "retention.md").read_text(), re.MULTILINE)


def test_the_docs_have_the_table() -> None:
    assert len(ROWS) == 9


@pytest.mark.parametrize(("keep", "steps"), ROWS)
def test_the_table_in_the_docs_is_true(keep: str, steps: str, clock: Clock) -> None:
    policies = eval(keep)  # noqa: S307 - this repository's page
    memory = InMemory()
    handler = train(memory, policies, 500, clock, **scored())
    assert steps_in(list(memory.files)) == [int(step) for step in steps.split(", ")]
    assert {name for _, name in handler.state_dict()["_saved"]} == set(memory.files)


@quick(3)
@pytest.mark.parametrize(("keep", "steps"), [row for row in ROWS if row[0] != "[BestN(2)]"])  # it resumes from the best
def test_a_run_that_is_resumed_keeps_what_the_table_says(keep: str, steps: str, clock: Clock, tmp_path: Path) -> None:
    policies = eval(keep)  # noqa: S307 - as above
    for end in (120, 130, 310, 420, 500):
        train(tmp_path, policies, end, clock, **scored())
    assert steps_in(names_in(tmp_path)) == [int(step) for step in steps.split(", ")]


def test_what_a_record_says(tmp_path: Path, clock: Clock) -> None:
    train(tmp_path, [LastN(1), EveryHours(1)], 20, clock)
    record = record_of(tmp_path / "checkpoint_20.pt")
    assert (record["keep"], record["step"]) == ([["LastN", 1], ["EveryHours", 1.0]], 20)
    assert record["time_s"] == MIDNIGHT_S + 24 * 60
    train(tmp_path, None, 30)
    record = record_of(tmp_path / "checkpoint_30.pt")
    assert record["step"] == 30
    assert not {"keep", "time_s"} & set(record)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ([LastN(5)], [LastN(2)], [90, 100]),
        ([LastN(5)], None, [100]),
        (None, [LastN(3)], [80, 90, 100]),
        ([EveryNSteps(20)], [EveryNSteps(40)], [40, 80, 100]),
        ([EveryNSteps(20)], [LastN(1)], [100]),
        ([LastN(8)], [LastN(1), EveryNSteps(30)], [30, 60, 90, 100]),
        ([LastN(8)], [LastN(1), EveryHours(1)], [10, 50, 100]),
    ],
)
def test_other_policies_apply_from_the_first_save_of_the_next_run(
    tmp_path: Path, clock: Clock, first: Any, second: Any, kept: list[int]
) -> None:
    train(tmp_path, first, 80, clock)
    train(tmp_path, second, 100, clock)
    assert steps_in(names_in(tmp_path)) == kept


def test_steps_and_times_of_older_files_come_from_the_rest_of_their_manifests(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_record = build_manifest._make_record

    def make_older_record(*arguments: Any) -> Any:
        record = make_record(*arguments)
        assert record is not None
        return {key: value for key, value in record.items() if key not in ("keep", "step", "time_s")}

    with monkeypatch.context() as patch:
        patch.setattr(build_manifest, "_make_record", make_older_record)
        for folder, options in (("steps", {}), ("scores", scored())):
            train(tmp_path / folder, None, 80, clock, n_saved=None, **options)
    for folder, options in (("steps", {}), ("scores", scored())):
        train(tmp_path / folder, [EveryNSteps(30), EveryHours(1)], 100, clock, **options)
        assert steps_in(names_in(tmp_path / folder)) == [10, 30, 50, 60, 90, 100]


def test_a_history_that_a_program_loads_is_judged_by_the_files_records(tmp_path: Path) -> None:
    first = train(tmp_path, None, 80, n_saved=None, **scored())
    trainer = idle_engine()
    second = Checkpoint(
        {"model": linear(1)}, DiskSaver(tmp_path, require_empty=False), keep=[EveryNSteps(30)], **scored()
    )
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    second.keep = [LastN(2), EveryNSteps(40)]  # as n_saved, it may be assigned
    trainer.state.iteration = 90
    # The files are another handler's (model and trainer): it keeps a history of them, and removes none.
    second(trainer)
    assert steps_in(name for _, name in second.state_dict()["_saved"]) == [40, 80, 90]
    assert steps_in(names_in(tmp_path)) == [10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_files_without_known_steps_are_kept() -> None:
    memory = InMemory()
    handler = Checkpoint({"model": linear(1)}, memory, keep=[EveryNSteps(100)], **scored())
    memory.files = {"model_5_0.5.pt": 0, "model_6_0.6.pt": 0}
    handler.load_state_dict({"_saved": [(0.5, "model_5_0.5.pt"), (0.6, "model_6_0.6.pt")]})
    trainer = idle_engine()
    for trainer.state.iteration in (10, 20):
        handler(trainer)
    assert steps_in(list(memory.files)) == [5, 6, 20]
    handler.keep = [LastN(2)]
    trainer.state.iteration = 30
    handler(trainer)
    assert steps_in(list(memory.files)) == [20, 30]


def test_each_of_several_handlers_removes_its_own_files_alone(tmp_path: Path) -> None:
    trainer = idle_engine()
    objects = {"model": linear(1), "trainer": trainer}
    saver = DiskSaver(tmp_path, require_empty=False)
    many = Checkpoint(objects, saver, "many", keep=[LastN(1), EveryNSteps(40)])
    few = ModelCheckpoint(tmp_path, "few", require_empty=False, keep=[LastN(2), BestN(1)], score_function=peak_at_304)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), many)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), few, {"model": objects["model"]})
    trainer.run(range(10), max_epochs=10)
    names = names_in(tmp_path)
    assert [name for name in names if name.startswith("many")] == [
        f"many_checkpoint_{step}.pt" for step in (100, 40, 80)
    ]
    assert [name for name in names if name.startswith("few")] == ["few_model_-0.2040.pt", "few_model_-0.2140.pt"]


def test_what_a_removal_has_left_is_removed_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, [LastN(4)], 60)
    removed = list[str]()

    def fail_after_one(_self: DiskSaver, name: str) -> None:
        if removed:
            raise KeyboardInterrupt  # as if the process was killed here
        removed.append(name)
        (tmp_path / name).unlink()

    with monkeypatch.context() as patch:
        patch.setattr("distckpt.storage.local.LocalStorage.remove", fail_after_one)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, [EveryNSteps(60)], 70)
    assert steps_in(names_in(tmp_path)) == [40, 50, 60, 70]
    train(tmp_path, [EveryNSteps(60), LastN(3)], 80)
    assert steps_in(names_in(tmp_path)) == [60, 70, 80], "40 and 50 were given up before the other policies"


def test_a_nan_is_not_saved_and_the_best_alone_need_no_newest(tmp_path: Path) -> None:
    scores = iter([0.5, math.nan, 0.4, 0.6])
    handler = Checkpoint({"model": linear(1)}, tmp_path, score_function=lambda _: next(scores), keep=[BestN(1)])
    trainer = idle_engine()
    found = []
    for trainer.state.iteration in range(1, 5):
        handler(trainer)
        found.append(names_in(tmp_path))
    assert found == [["model_0.5000.pt"]] * 3 + [["model_0.6000.pt"]]


def test_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distckpt.handlers.save_log")
    train(tmp_path, [LastN(1), BestN(2), EveryNSteps(20)], 30, **scored())
    lines = [line.partition("durable after ")[2][9:] for line in caplog.messages if ": saved " in line]
    assert lines == [
        "kept as newest, best",
        "kept as newest, best, step 20",
        (
            "kept as newest, best; evicted checkpoint_10_-0.2940.pt (score -0.294): "
            "not kept by LastN(1), BestN(2), EveryNSteps(20)"
        ),
    ]


def test_common_handlers_pass_policies_on(tmp_path: Path) -> None:
    best = common.save_best_model_by_val_score(
        str(tmp_path), idle_engine(), linear(1), "acc", keep=[BestN(2), EveryNSteps(5)]
    )
    assert list(best.keep or ()) == [BestN(2), EveryNSteps(5)]
    trainer = idle_engine()
    common.setup_common_training_handlers(
        trainer,
        to_save={"trainer": trainer},
        save_every_iters=1,
        output_path=str(tmp_path),
        with_pbars=False,
        keep=[EveryNSteps(2)],
    )
    trainer.run([0], max_epochs=5)
    assert names_in(tmp_path) == ["training_trainer_2.pt", "training_trainer_4.pt", "training_trainer_5.pt"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": [BestN(2)]}, ValueError, "BestN in argument keep needs a score: give score_function or score_name"),
        ({"keep": []}, ValueError, "is empty"),
        ({"keep": LastN(1)}, TypeError, "Argument keep should be a list of LastN"),
        ({"keep": [LastN(1)], "n_saved": 3}, ValueError, "Give n_saved or keep, but given n_saved=3 and keep=.LastN.1"),
        ({"keep": [LastN(1)], "n_saved": None}, ValueError, "Give n_saved or keep"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda folder, **given: Checkpoint({"model": linear(1)}, folder, **given),
        ModelCheckpoint,
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, make: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path, **arguments)


def test_a_record_of_a_newer_release_with_other_policies_is_read(tmp_path: Path) -> None:
    train(tmp_path, [LastN(1)], 10)
    found = record_of(tmp_path / "checkpoint_10.pt")
    assert (known := parse_record(found)) is not None
    assert known.keep == (LastN(1),)
    newer = parse_record({**found, "keep": [["OnSundays", 1]], "step": None, "time_s": "later"})
    assert newer is not None
    assert (newer.keep, newer.step, newer.time_s) == (None, None, None)
    assert newer.kept == known.kept
    read = read_record(tmp_path / "checkpoint_10.pt")
    assert read is not None
    assert read.time_s is not None, "from the manifest"
    assert torch.load(tmp_path / "checkpoint_10.pt", weights_only=True)
