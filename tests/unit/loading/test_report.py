"""A load that is not strict reports the keys that it passed over; a mismatch is one error that lists all keys."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.handlers import Checkpoint as Ignites
from torch import nn

from distckpt import Checkpoint, DiskSaver, LoadError, LoadReport, StateMismatchError, resume
from distckpt.loading.report import join_mismatches
from tests.support.equality import equal
from tests.unit.loading.test_dry_run_modules import Hooked
from tests.unit.toys import Notebook, linear, run_epochs, snapshot

load = Checkpoint.load_objects
SURPLUS = {"weight": torch.ones(2, 2), "more": torch.ones(1)}


@pytest.fixture(params=["mapping", "file"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return what makes a checkpoint of a state: the mapping itself, or a file."""

    def make(state: Any) -> Any:
        if request.param == "mapping":
            return state
        DiskSaver(tmp_path, require_empty=False)(state, "a.pt")
        return tmp_path / "a.pt"

    return make


def sgd(num_groups: int = 1) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.ones(1)]} for _ in range(num_groups)], lr=0.1)


def test_a_load_that_fits_has_nothing_to_report(given: Any) -> None:
    report = load({"m": linear(0)}, given({"m": linear(1).state_dict()}))
    assert report == LoadReport()
    assert not report


def test_what_is_passed_over_is_reported_under_its_objects_name(given: Any) -> None:
    objects: dict[str, Any] = {"m": linear(0), "deep": [{"x": nn.Sequential(linear(1), linear(2))}]}
    state = {"m": SURPLUS, "deep": [{"x": {"0.weight": torch.ones(2, 2), "2.bias": torch.ones(2)}}]}
    report = load(objects, given(state), strict=False)
    assert report
    assert report == LoadReport(
        missing=("m.bias", "deep[0].x.0.bias", "deep[0].x.1.weight", "deep[0].x.1.bias"),
        unexpected=("m.more", "deep[0].x.2.bias"),
    )
    assert torch.equal(objects["m"].weight, torch.ones(2, 2))


def test_modules_that_load_in_their_own_way_report_too(given: Any) -> None:
    report = load({"h": Hooked(), "m": linear(0)}, given({"h": SURPLUS, "m": SURPLUS}), strict=False)
    assert set(report.missing) == {"h.bias", "m.bias"}
    assert set(report.unexpected) == {"h.more", "m.more"}


@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_are_refused_strict_or_not_as_torch_does(given: Any, *, strict: bool) -> None:
    model = linear(0)
    before = snapshot({"m": model})
    state = {"weight": torch.ones(3, 2), "more": torch.ones(1)}
    with pytest.raises(RuntimeError) as torchs:
        linear(0).load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError) as caught:
        load({"m": model}, given({"m": state}), strict=strict)
    assert str(caught.value) == str(torchs.value)
    assert isinstance(caught.value, StateMismatchError)
    keys = (caught.value.missing, caught.value.unexpected, caught.value.mismatched)
    assert keys == (("m.bias",), ("m.more",), ("m.weight",))
    assert equal(snapshot({"m": model}), before)


def test_what_is_no_tensor_is_a_mismatch(given: Any) -> None:
    with pytest.raises(StateMismatchError, match=r"expected torch\.Tensor") as caught:
        load({"m": linear(0)}, given({"m": {**linear(1).state_dict(), "bias": 3}}))
    assert caught.value.mismatched == ("m.bias",)


ALL_WRONG = {
    "a": {"weight": torch.ones(3, 3), "bias": torch.ones(2)},
    "b": {"weight": torch.ones(2, 2)},
    "c": SURPLUS,
    "o": sgd(2).state_dict(),
}


def test_one_error_lists_what_is_wrong_with_all_objects(given: Any) -> None:
    objects = {"a": linear(0), "b": linear(1), "c": linear(2), "d": linear(3), "o": sgd(), "n": Notebook({"page": 1})}
    before = snapshot(objects)
    with pytest.raises(StateMismatchError) as caught:
        load(objects, given({**ALL_WRONG, "n": {"page": 2}}))
    error = caught.value
    assert str(error).startswith("Key 'd' from x is not found in y")
    assert error.missing == ("d", "b.bias", "c.bias")
    assert error.unexpected == ("c.more",)
    assert error.mismatched == ("a.weight", "o.param_groups")
    for text in ("size mismatch for weight", 'Missing key(s) in state_dict: "bias"', "different number of parameter"):
        assert text in str(error)
    assert isinstance(error, ValueError)
    assert isinstance(error, RuntimeError)
    assert isinstance(error, LoadError)
    assert equal(snapshot(objects), before)


@pytest.mark.parametrize(
    ("state", "kind", "others"),
    [
        ({"a": {}, "c": {}}, RuntimeError, ValueError),
        ({"a": linear(1).state_dict()}, ValueError, RuntimeError),
        ({"c": linear(1).state_dict()}, ValueError, RuntimeError),
    ],
)
def test_of_one_kind_of_fault_the_error_is_of_its_type_alone(
    given: Any, state: Any, kind: type[Exception], others: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        load({"a": linear(0), "c": linear(0)}, given(state))
    assert not isinstance(caught.value, others)


def test_a_single_fault_has_the_words_of_the_reference(given: Any) -> None:
    state = {"a": linear(1).state_dict()}
    with pytest.raises(ValueError, match="Key 'c' from x is not found in y") as theirs:
        Ignites.load_objects({"a": linear(0), "c": linear(0)}, state)
    with pytest.raises(ValueError, match="Key 'c' from x is not found in y") as ours:
        load({"a": linear(0), "c": linear(0)}, given(state))
    assert str(ours.value) == str(theirs.value)


def test_the_error_of_several_survives_a_journey() -> None:
    with pytest.raises(StateMismatchError) as caught:
        load({"a": linear(0), "d": linear(3)}, ALL_WRONG)
    for twin in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):  # noqa: S301 - our own bytes
        assert (type(twin), str(twin)) == (type(caught.value), str(caught.value))
        assert (twin.missing, twin.mismatched) == (("d",), ("a.weight",))


def test_one_misfit_stays_what_it_is() -> None:
    error = StateMismatchError("no")
    assert join_mismatches([("a", error)]) is error


def test_reload_objects_reports_too(tmp_path: Path) -> None:
    handler = Checkpoint({"m": linear(0)}, tmp_path)
    run_epochs(handler, 1)
    larger = nn.Sequential()
    assert handler.reload_objects({"m": larger}, {"strict": False}, global_step=1) == LoadReport(
        unexpected=("m.weight", "m.bias")
    )
    content = bytearray((tmp_path / "m_1.pt").read_bytes())
    content[192] ^= 1
    (tmp_path / "m_1.pt").write_bytes(content)
    with pytest.raises(LoadError, match="checksum"):
        handler.reload_objects({"m": linear(0)}, global_step=1)
    assert not handler.reload_objects({"m": linear(0)}, verify=False, global_step=1)


def test_resume_says_what_it_has_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DiskSaver(tmp_path)({"m": SURPLUS}, "a.pt")
    with caplog.at_level(logging.WARNING, logger="distckpt"):
        assert resume({"m": linear(0)}, tmp_path, strict=False) == tmp_path / "a.pt"
    *messages, last = [record.getMessage() for record in caplog.records]
    assert last.startswith("resume: continuing from ")
    assert messages == [
        f"resume: {tmp_path / 'a.pt'} lacks m.bias",
        f"resume: {tmp_path / 'a.pt'} has unused keys: m.more",
    ]
