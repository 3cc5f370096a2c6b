"""When Checkpoint saves, in which order, and what it says of it. One process."""

import errno
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from distckpt import BaseSaveHandler, Checkpoint, CheckpointEvents, DiskSaver, global_step_from_engine
from distckpt.storage.local import LocalStorage
from tests.unit.toys import InMemory, idle_engine, linear, run_epochs

NAN = float("nan")


def _by_epoch(scores: list[float]) -> Callable[[Engine], float]:
    return lambda engine: scores[engine.state.epoch - 1]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([NAN, 0.1, 0.2], ["model_0.2000.pt"]),
        ([0.1, NAN, 0.2], ["model_0.2000.pt"]),
        ([0.2, 0.1, NAN], ["model_0.2000.pt"]),
        ([NAN, NAN, NAN], []),
    ],
)
@pytest.mark.parametrize("n_saved", [1, None])
def test_a_nan_score_saves_nothing_and_blocks_nothing(
    scores: list[float], kept: list[str], n_saved: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    saver = InMemory()
    handler = Checkpoint({"model": nn.Identity()}, saver, score_function=_by_epoch(scores), n_saved=n_saved)
    run_epochs(handler, len(scores))
    assert caplog.text.count("is not saved: the score is NaN. ") == sum(map(math.isnan, scores))
    assert "model_nan.pt" not in saver.files
    if n_saved == 1:
        assert list(saver.files) == kept
    assert handler.last_checkpoint == (kept[0] if kept else None)


def test_a_nan_that_an_older_release_recorded_gives_way() -> None:
    saver = InMemory()
    saver.files["model_nan.pt"] = {}
    handler = Checkpoint({"model": nn.Identity()}, saver, score_function=lambda _engine: -5.0)
    handler.load_state_dict({"_saved": [(NAN, "model_nan.pt")]})
    run_epochs(handler, 1)
    assert list(saver.files) == ["model_-5.0000.pt"]


def test_two_checkpoints_on_one_event_see_the_same_event() -> None:
    trainer, evaluator = idle_engine(), idle_engine()
    names = []
    for prefix in ("first", "second"):
        saver = InMemory()
        names.append(saver.files)
        handler = Checkpoint(
            {"model": nn.Identity()},
            saver,
            prefix,
            global_step_transform=global_step_from_engine(trainer),
            n_saved=None,
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    del evaluator
    trainer.run([0, 1, 2], max_epochs=2)
    assert [list(files) for files in names] == [
        ["first_model_3.pt", "first_model_6.pt"],
        ["second_model_3.pt", "second_model_6.pt"],
    ]


def test_a_listener_may_be_there_before_the_first_save() -> None:
    trainer = idle_engine()
    fired: list[int] = []

    @trainer.on(Checkpoint.SAVED_CHECKPOINT)
    def saved(engine: Engine) -> None:
        fired.append(engine.state.iteration)

    handler = Checkpoint({"model": nn.Identity()}, InMemory())
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    trainer.run([0] * 5)
    assert fired == [2, 4]
    assert Checkpoint.SAVED_CHECKPOINT is CheckpointEvents.SAVED_CHECKPOINT


def test_a_listener_may_listen_to_several_events_at_once() -> None:
    trainer = idle_engine()
    fired: list[int] = []
    trainer.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT | Events.COMPLETED, lambda: fired.append(trainer.state.iteration)
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, Checkpoint({"model": nn.Identity()}, InMemory()))
    trainer.run([0] * 2)
    assert fired == [1, 2, 2]


def test_other_unknown_events_are_still_refused() -> None:
    with pytest.raises(ValueError, match="is not a valid event for this Engine"):
        idle_engine().add_event_handler("nothing of the kind", lambda: None)


def test_the_event_fires_after_the_file_is_there_and_the_old_one_gone(tmp_path: Path) -> None:
    trainer = idle_engine()
    seen: list[Any] = []
    handler = Checkpoint({"model": nn.Identity()}, tmp_path)

    @trainer.on(Checkpoint.SAVED_CHECKPOINT)
    def look() -> None:
        assert isinstance(handler.last_checkpoint, Path)
        seen.append((os.listdir(tmp_path), handler.last_checkpoint.name))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run([0] * 2)
    assert seen == [(["model_1.pt"], "model_1.pt"), (["model_2.pt"], "model_2.pt")]


def test_nothing_fires_when_nothing_was_saved() -> None:
    trainer = idle_engine()
    fired: list[int] = []
    trainer.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda: fired.append(trainer.state.epoch))
    handler = Checkpoint({"model": nn.Identity()}, InMemory(), score_function=_by_epoch([2, 1, 3]))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run([0], max_epochs=3)
    assert fired == [1, 3]


def test_the_event_name_is_put_back_when_a_listener_fails() -> None:
    trainer = idle_engine()
    trainer.last_event_name = Events.EPOCH_COMPLETED

    @trainer.on(Checkpoint.SAVED_CHECKPOINT)
    def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        Checkpoint({"model": nn.Identity()}, InMemory())(trainer)
    assert trainer.last_event_name is Events.EPOCH_COMPLETED


def test_the_old_checkpoint_is_removed_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noted(DiskSaver):
        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            super().__call__(checkpoint, filename, metadata)
            calls.append(f"save {filename}")

        def remove(self, filename: str) -> None:
            super().remove(filename)
            calls.append(f"remove {filename}")

    run_epochs(Checkpoint({"model": nn.Identity()}, Noted(tmp_path), n_saved=1), 3)
    assert calls == [
        "save model_1.pt",
        "save model_2.pt",
        "remove model_1.pt",
        "save model_3.pt",
        "remove model_2.pt",
    ]


@pytest.mark.parametrize("n_saved", [1, 2, None])
def test_a_custom_handler_removes_a_file_whose_name_is_used_again(n_saved: int | None) -> None:
    saver = InMemory()
    handler = Checkpoint({"model": nn.Identity()}, saver, filename_pattern="last.{ext}", n_saved=n_saved)
    run_epochs(handler, 3)
    assert saver.calls == ["save last.pt", *["remove last.pt", "save last.pt"] * 2]
    assert handler.state_dict() == {"_saved": [(3, "last.pt")]}


def test_a_file_that_could_not_be_removed_before_its_name_is_used_again_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Stubborn(InMemory):
        def remove(self, filename: str) -> None:
            self.calls.append(f"remove {filename}")
            raise PermissionError("denied")

    saver = Stubborn()
    options: dict[str, Any] = {"filename_pattern": "{global_step}.{ext}", "n_saved": None}
    handler = Checkpoint(
        {"model": nn.Identity()}, saver, global_step_transform=lambda e, _: min(2, e.state.epoch), **options
    )
    handler.greater_or_equal = True
    run_epochs(handler, 3)
    assert "2.pt could not be removed: PermissionError: denied" in caplog.text
    handler.global_step_transform = lambda e, _: e.state.epoch + 10
    run_epochs(handler, 1)
    assert saver.calls == ["save 1.pt", "save 2.pt", "remove 2.pt", "save 2.pt", "save 11.pt"]
    assert handler.state_dict() == {"_saved": [(1, "1.pt"), (2, "2.pt"), (11, "11.pt")]}


def test_a_part_that_a_failed_save_left_is_removed_before_its_name_is_used_again(tmp_path: Path) -> None:
    is_full = False

    class New(BaseSaveHandler):
        def __call__(
            self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None
        ) -> None:
            del checkpoint, metadata
            with (tmp_path / filename).open("xb") as file:
                file.write(b"part")
                if is_full:
                    raise OSError(errno.ENOSPC, "No space left on device")
                file.write(b", all")

        def remove(self, filename: str) -> None:
            (tmp_path / filename).unlink()

    handler = Checkpoint({"model": nn.Identity()}, New(), filename_pattern="last.{ext}")
    run_epochs(handler, 1)
    engine = idle_engine()
    engine.state.iteration, is_full = 5, True
    with pytest.raises(OSError, match="No space"):
        handler(engine)
    assert handler.state_dict() == {"_saved": []}
    is_full = False
    handler(engine)
    assert (tmp_path / "last.pt").read_bytes() == b"part, all"
    assert handler.state_dict() == {"_saved": [(5, "last.pt")]}


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_saver_keeps_a_file_of_the_same_name_until_the_new_one_replaces_it(
    tmp_path: Path,
    background: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saver = DiskSaver(tmp_path, background=background)
    handler = Checkpoint({"model": nn.Linear(1, 1)}, saver, filename_pattern="last.{ext}", n_saved=2)
    run_epochs(handler, 1)
    handler.wait_until_finished()
    before = (tmp_path / "last.pt").read_bytes()

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "create", fail)
        with pytest.raises(OSError, match="No space left"):
            run_epochs(handler, 2)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("failing", ["capture", "write"])
def test_a_failed_save_leaves_the_old_checkpoint_and_history(tmp_path: Path, failing: str) -> None:
    class Bad(nn.Module):
        broken = False

        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            if self.broken and failing == "capture":
                raise LookupError
            return {"weight": (lambda: None) if self.broken else torch.ones(1)}  # a lambda cannot be pickled

    model = Bad()
    handler = Checkpoint({"model": model}, tmp_path)
    engine = run_epochs(handler, 1)
    history = handler.state_dict()
    model.broken = True
    engine.state.iteration = 2
    kind: type[Exception] = LookupError if failing == "capture" else Exception
    with pytest.raises(kind):
        handler(engine)
    assert os.listdir(tmp_path) == ["model_1.pt"]
    assert handler.state_dict() == history
    assert torch.load(tmp_path / "model_1.pt", weights_only=True)["weight"] == 1
    model.broken = False
    handler(engine)
    assert os.listdir(tmp_path) == ["model_2.pt"]


def test_no_side_files_stand_in_the_directory(tmp_path: Path) -> None:
    run_epochs(Checkpoint({"model": linear(0)}, tmp_path, n_saved=2), 4)
    assert sorted(os.listdir(tmp_path)) == ["model_3.pt", "model_4.pt"]


def test_a_file_deleted_by_hand_is_warned_of_and_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = Checkpoint({"model": nn.Identity()}, tmp_path)
    engine = run_epochs(handler, 1)
    (tmp_path / "model_1.pt").unlink()
    engine.state.iteration = 2
    handler(engine)
    assert "model_1.pt was already gone" in caplog.text
    assert os.listdir(tmp_path) == ["model_2.pt"]


def test_a_name_that_cannot_be_encoded_does_not_keep_the_log_from_being_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Checkpoint({"m": nn.Linear(1, 1)}, tmp_path, n_saved=1)
    handler.load_state_dict({"_saved": [(0, "caf\udce9.pt")]})
    run_epochs(handler, 1)
    (record,) = [one for one in caplog.records if "already gone" in one.getMessage()]
    assert "caf\\udce9.pt" in record.getMessage().encode("utf-8").decode("utf-8")


def test_a_file_that_cannot_be_removed_is_tried_again_with_the_next_save(caplog: pytest.LogCaptureFixture) -> None:
    class Sticky(InMemory):
        stuck = True

        def remove(self, filename: str) -> None:
            if self.stuck:
                raise PermissionError(13, "Permission denied", filename)
            super().remove(filename)

    saver = Sticky()
    handler = Checkpoint({"model": nn.Identity()}, saver)
    engine = run_epochs(handler, 1)
    engine.state.iteration = 2
    handler(engine)
    assert re.search("model_1.pt could not be removed.*tries again", caplog.text)
    saver.stuck = False
    engine.state.iteration = 3
    handler(engine)
    assert list(saver.files) == ["model_3.pt"]


@pytest.mark.parametrize(("saver", "kind"), [("disk", Path), ("memory", str)])
def test_last_checkpoint_is_a_path_on_disk_and_a_name_elsewhere(tmp_path: Path, saver: str, kind: type) -> None:
    handler = Checkpoint({"model": nn.Identity()}, DiskSaver(tmp_path) if saver == "disk" else InMemory())
    assert handler.last_checkpoint is None
    run_epochs(handler, 2)
    assert isinstance(handler.last_checkpoint, kind)
    assert str(handler.last_checkpoint).endswith("model_2.pt")


def test_last_checkpoint_is_the_best_with_a_score() -> None:
    handler = Checkpoint({"model": nn.Identity()}, InMemory(), score_function=_by_epoch([0.1, 0.9, 0.5]), n_saved=2)
    run_epochs(handler, 3)
    assert handler.last_checkpoint == "model_0.9000.pt"


def test_an_iteration_of_a_second_run_has_not_been_saved_by_the_first() -> None:
    handler, seen = Checkpoint({"model": nn.Identity()}, InMemory(), n_saved=None), list[bool]()
    trainer = Engine(lambda _engine, _batch: None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(handler.has_saved_at(trainer)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    for _ in range(2):
        trainer.run([0])
        assert handler.has_saved_at(trainer)
    assert seen == [False, False]
