"""What resume() returns: a path, and what is known of the run."""

import copy
import pickle
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver, resume
from distckpt.handlers.resume import Resumed
from tests.unit.toys import Notebook

PATH = Path("folder") / "checkpoint_6.pt"


def test_it_is_used_as_the_path_that_programs_had() -> None:
    found = Resumed(PATH, iteration=6)
    assert isinstance(found, Path)
    assert (found, PATH) == (PATH, found)
    assert hash(found) == hash(PATH)
    assert {found, PATH} == {PATH}
    assert (found.name, str(found), f"{found}") == (PATH.name, str(PATH), str(PATH))
    assert found.parent / "x" == Path("folder/x")
    paths: list[Path] = [found, Path("a")]
    assert sorted(paths) == [Path("a"), PATH]


def test_a_path_made_of_it_is_a_plain_one() -> None:
    found = Resumed(PATH, iteration=6)
    made = (found.path, found.parent, found / "x", found.with_suffix(".txt"), found.with_name("a"))
    assert {type(one) for one in made} == {type(Path())}
    for one in (found.absolute(), found.resolve()):
        assert one.name == PATH.name
        assert getattr(one, "iteration", None) is None


def test_a_copy_knows_the_same() -> None:
    found = Resumed(PATH, iteration=6, epoch=2, skipped=(("b.pt", "it is truncated"),))
    for one in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):  # noqa: S301 - the test's own
        assert (one, one.iteration, one.epoch, one.skipped) == (PATH, 6, 2, found.skipped)


def test_it_tells_where_the_run_goes_on_and_what_was_skipped(tmp_path: Path) -> None:
    trainer, objects = Engine(lambda _engine, _batch: None), {"note": Notebook("a")}
    saver = Checkpoint({**objects, "trainer": trainer}, DiskSaver(tmp_path), n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), saver)
    trainer.run(range(4), max_epochs=2)
    newest = tmp_path / "checkpoint_6.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = Engine(lambda _engine, _batch: None)
    found = resume({**objects, "trainer": again}, tmp_path)
    assert found is not None
    assert (found, found.iteration, found.epoch, found.has_ended) == (tmp_path / "checkpoint_3.pt", 3, 0, False)
    ((name, reason),) = found.skipped
    assert (name, "truncated" in reason, found.world_size) == (newest.name, True, 1)
    assert found.run_id
    assert torch.load(found, weights_only=True)["trainer"]["iteration"] == 3


def test_of_a_file_without_an_engine_nothing_is_known(tmp_path: Path) -> None:
    torch.save({"note": Notebook("a").state_dict()}, tmp_path / "a.pt")
    found = resume({"note": Notebook("b")}, tmp_path)
    assert found is not None
    assert (found.iteration, found.epoch, found.has_ended, found.run_id, found.world_size) == (
        None,
        None,
        False,
        None,
        None,
    )
