"""Metrics of ignite's among the objects to save: no rank waits in their gathering for one that failed elsewhere."""

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.metrics import Accuracy, Average, Loss, Metric, MetricGroup, RunningAverage
from torch import nn

from distckpt import Checkpoint, DiskSaver, RemoteRankError, RngState
from tests.distributed.failures import Stateful, failing_object
from tests.distributed.idist import fresh_idist
from tests.distributed.programs import fire, gather, raised
from tests.support import job, run_distributed
from tests.support.selection import torch_only

pytestmark = torch_only

SOON_S = 10.0
SAVERS: dict[str, dict[str, Any]] = {
    "foreground": {},
    "background": {"background": True},
    "shared": {"share_write": "node"},
}


@contextmanager
def idist_of_the_job() -> Iterator[None]:
    """Let ignite's metrics find the job."""
    with fresh_idist():
        assert idist.get_world_size() == job.world_size(), "collective the first time"
        yield


def accuracy() -> Metric:
    """Return a metric that has seen one example, rightly told on rank 1 alone."""
    metric = Accuracy()
    metric.update((torch.tensor([[0.1, 0.9]]), torch.tensor([min(job.rank(), 1)])))
    return metric


class More(Accuracy):
    """A metric whose state has a part of its own, beside the gathered one."""

    failure: Exception | None = None

    def state_dict(self) -> "OrderedDict[str, Any]":
        """Return ignite's state and one more key."""
        if self.failure is not None:
            raise self.failure
        state = super().state_dict()
        state["more"] = 7
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        """Take over ignite's part."""
        super().load_state_dict(OrderedDict((key, state_dict[key]) for key in state_dict if key != "more"))


class Broken(Accuracy):
    """A metric whose part of the state cannot be had on some rank."""

    failure: Exception | None = None

    def _state_dict_per_rank(self) -> "OrderedDict[str, Any]":
        if self.failure is not None:
            raise self.failure
        return super()._state_dict_per_rank()


class Alone(Accuracy):
    """A metric whose own ``state_dict`` gathers nothing, and whose attributes ignite could not gather."""

    def _state_dict_per_rank(self) -> "OrderedDict[str, Any]":
        raise AssertionError("nobody asks for it")

    def state_dict(self) -> "OrderedDict[str, Any]":
        """Return this rank's state."""
        return OrderedDict(rank=job.rank())


def tree_of(bad: object, metric: object, place: str) -> dict[str, Any]:
    """Return objects to save, the metric behind or before the one that fails, or nested."""
    trees: dict[str, dict[str, Any]] = {
        "before": {"bad": bad, "metric": metric},
        "behind": {"metric": metric, "bad": bad},
        "nested": {"bad": bad, "parts": {"metrics": [metric, Average()]}},
        "with others that are spread": {"rng": RngState(), "metric": metric, "bad": bad, "other": RngState()},
    }
    return trees[place]


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("place", ["before", "behind", "nested", "with others that are spread"])
@run_distributed(world_size=2)
def test_an_error_of_another_object_on_one_rank_is_raised_on_all_at_once(
    tmp_path: Path, saver: str, culprit: int, place: str
) -> None:
    with idist_of_the_job():
        bad = Stateful()
        bad.failure = ValueError("boom") if job.rank() == culprit else None
        begin_s = time.monotonic()
        handler = Checkpoint(tree_of(bad, accuracy(), place), DiskSaver(tmp_path, **SAVERS[saver]))
        error = raised(lambda: fire(handler))
        assert time.monotonic() - begin_s < SOON_S
        assert isinstance(error, RemoteRankError)
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"boom (ValueError on rank {culprit}, ")
        assert [failure.rank for failure in error.failures] == [culprit]
        bad.failure = None
        fire(handler)
        job.barrier()
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", [More, Broken])
@pytest.mark.parametrize("saver", ["foreground", "background"])
@pytest.mark.parametrize("culprit", [0, 1])
@run_distributed(world_size=2)
def test_a_metric_whose_own_state_fails_on_one_rank_is_an_error_on_all(
    tmp_path: Path, kind: type[Any], saver: str, culprit: int
) -> None:
    with idist_of_the_job():
        metric = kind()
        if job.rank() == culprit:
            metric.failure = KeyError("no examples")
        begin_s = time.monotonic()
        to_save = {"before": accuracy(), "metric": metric, "behind": accuracy()}
        error = raised(lambda: fire(Checkpoint(to_save, DiskSaver(tmp_path, **SAVERS[saver]))))
        assert time.monotonic() - begin_s < SOON_S
        assert isinstance(error, RemoteRankError)
        assert isinstance(error, KeyError)
        assert [failure.rank for failure in error.failures] == [culprit], "not of both: the phase within is named"
        assert gather(str(error)) == [str(error)] * 2
        assert (isinstance(error.__cause__, KeyError)) is (job.rank() == culprit)


@pytest.mark.parametrize("saver", SAVERS)
@run_distributed(world_size=2)
def test_metrics_are_saved_as_ignite_gathers_them(tmp_path: Path, saver: str) -> None:
    with idist_of_the_job():
        group = MetricGroup({"accuracy": accuracy(), "average": Average()})
        metrics: dict[str, Any] = {
            "accuracy": accuracy(),
            "running": RunningAverage(output_transform=lambda output: output),
            "group": group,
            "sum": accuracy() + accuracy(),
            "loss": Loss(nn.functional.nll_loss),
            "more": More(),
        }
        metrics["running"].update(1.0 + job.rank())
        handler = Checkpoint({"metrics": metrics, "list": [accuracy()]}, DiskSaver(tmp_path, **SAVERS[saver]))
        fire(handler)
        job.barrier()
        saved = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)
        for name, metric in metrics.items():
            expected = metric.state_dict()
            assert repr(saved["metrics"][name]) == repr(expected), name
            assert type(saved["metrics"][name]) is type(expected)
        loaded: Any = accuracy()
        loaded.reset()
        loaded.load_state_dict(saved["list"][0])
        assert int(loaded._num_correct) == job.rank(), "each rank has its own part"


@run_distributed(world_size=2)
def test_a_metric_that_gathers_nothing_of_its_own_accord_is_left_alone(tmp_path: Path) -> None:
    with idist_of_the_job():
        fire(Checkpoint({"alone": Alone(), "other": Stateful()}, tmp_path, save_on_rank=1))
        job.barrier()
        assert torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)["alone"] == {"rank": 1}


@run_distributed(world_size=2)
def test_a_state_that_was_gathered_for_a_save_that_failed_is_not_handed_out_later(tmp_path: Path) -> None:
    with idist_of_the_job():
        metric, bad = accuracy(), Stateful()
        with failing_object(bad, ValueError("boom")):
            assert raised(lambda: fire(Checkpoint({"metric": metric, "bad": bad}, tmp_path))) is not None
        metric.update((torch.tensor([[0.1, 0.9]]), torch.tensor([1])))
        (states,) = metric.state_dict().values()
        assert [state["_num_examples"] for state in states] == [2, 2]


def test_a_metric_in_a_world_of_one_is_saved_as_it_is(tmp_path: Path) -> None:
    with fresh_idist():
        metric = Accuracy()
        metric.update((torch.tensor([[0.1, 0.9]]), torch.tensor([1])))
        fire(Checkpoint({"metric": metric}, tmp_path))
        saved = torch.load(tmp_path / "metric_1.pt", weights_only=True)
        assert repr(saved) == repr(metric.state_dict())
