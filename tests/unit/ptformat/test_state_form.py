"""A state of a known form gets the pickle that it would get anew; any other state is not taken for one of that form."""

import contextlib
import copy
import math
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from distckpt import DiskSaver
from distckpt.ptformat import tensor_forms
from distckpt.ptformat.fast_pickle import TYPES, NotPlain, pickle_plain
from distckpt.ptformat.pickler import PickledState, pickle_state
from distckpt.ptformat.state_form import StateForms
from distckpt.ptformat.storage_facts import StorageFacts
from tests.unit.ptformat.test_fast_pickle import trees
from tests.unit.storages import bytes_of


@pytest.fixture(params=["exchange API", "attributes"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with DLPack's exchange API, if torch has it, and without."""
    if request.param == "attributes":
        monkeypatch.setattr(tensor_forms.TensorForms.__init__, "__defaults__", (None,))
    return str(request.param)


def as_anew(matched: PickledState, state: Any) -> bool:
    """Return True if `matched` is what a walk over the state makes; an error where it makes none."""
    plain = pickle_plain(state)
    assert matched.data == plain.data
    assert [one._cdata for one in matched.storages] == [one._cdata for one in plain.storages]
    assert tuple(matched.forms) == tuple(plain.tensors())
    facts = StorageFacts.of(plain.storages)
    assert matched.facts is not None
    assert list(matched.facts.sizes) == facts.sizes
    assert (matched.facts.devices, matched.facts.addresses) == (facts.devices, facts.addresses)
    return True


def forms_of(*states: Any) -> StateForms:
    forms = StateForms()
    for state in states:
        forms.keep(state, pickle_state(state))
    return forms


def matches(forms: StateForms, state: Any) -> bool:
    found = forms.match(state)
    return found is not None and as_anew(found, state)


def twin(tree: Any) -> Any:
    """Return a tree of the same form: other objects, other elements, the same keys, numbers and ties."""
    return copy.deepcopy(tree)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, other=trees)
def test_a_matched_state_has_the_pickle_that_a_walk_makes(tree: Any, other: Any) -> None:
    forms = forms_of(tree)
    is_container = isinstance(tree, dict | list | tuple)
    for one in (tree, twin(tree)):
        assert matches(forms, one) == is_container
    for state in (other, [tree], {"a": tree}, tree):
        found = forms.match(state)
        assert found is None or as_anew(found, state)


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of everything in a tree that can be replaced."""
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, item in pairs:
        yield tree, key
        yield from places_of(item)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, leaf=trees, data=st.data())
def test_a_state_with_another_leaf_is_as_anew_or_no_match(tree: Any, leaf: Any, data: st.DataObject) -> None:
    forms, changed = forms_of(tree), twin(tree)
    places = list(places_of(changed))
    if places:
        container, key = data.draw(st.sampled_from(places))
        container[key] = leaf
    found = forms.match(changed)
    assert found is None or as_anew(found, changed)


class Tracked(torch.Tensor):
    pass


class Name(str):
    __slots__ = ()


def state_of() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    tied = torch.ones(3, 3)
    metadata = OrderedDict([("", {"version": 1}), ("0", {"version": 1})])
    model: Any = OrderedDict(
        a=torch.ones(4, 6), b=torch.zeros(4, 6), tied=tied, again=tied[:], view=base[4:16], row=torch.ones(1, 6)
    )
    vars(model)["_metadata"] = metadata
    return {
        "model": model,
        "optimizer": {
            "state": {number: {"step": torch.tensor(3.0), "mean": torch.ones(number + 1)} for number in range(4)},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "nesterov": False, "foreach": None, "params": [0, 1]}],
        },
        "numbers": [1, 2.5, True, None, "text", 0.0, (1, (2, 3)), ()],
        "complex": torch.zeros(2, dtype=torch.complex64),
        "empty": torch.empty(0),
    }


def model_of(state: Any) -> Any:
    return state["model"]


def numbers_of(state: Any) -> list[Any]:
    return state["numbers"]  # type: ignore[no-any-return]


def put(state: Any, key: str, value: Any) -> None:
    state["model"][key] = value


def put_number(state: Any, at: int, value: Any) -> None:
    state["numbers"][at] = value


def resize(state: Any, num_bytes: int) -> None:
    state["model"]["a"].untyped_storage().resize_(num_bytes)


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "mine"  # type: ignore[attr-defined]  # any tensor takes attributes
    return tensor


def with_hook(tensor: torch.Tensor) -> torch.Tensor:
    tensor.requires_grad_().register_hook(lambda grad: grad)  # type: ignore[no-untyped-call]  # torch ships it so
    return tensor.requires_grad_(False)  # noqa: FBT003 - torch's way


def move_to_end(state: Any) -> None:
    state["model"].move_to_end("a")


def rename(state: Any) -> None:
    state["model"] = OrderedDict((f"{key}_" if key == "b" else key, item) for key, item in state["model"].items())


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    tensor.data = data


SAME_FORM: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda _: None,
    "another integer": lambda s: put_number(s, 0, 2),
    "a longer integer": lambda s: put_number(s, 0, 10**30),
    "zero": lambda s: put_number(s, 0, 0),
    "another float": lambda s: put_number(s, 1, -7.25),
    "nan": lambda s: put_number(s, 1, math.nan),
    "infinity": lambda s: put_number(s, 1, -math.inf),
    "minus zero": lambda s: put_number(s, 5, -0.0),
    "false": lambda s: put_number(s, 2, False),  # noqa: FBT003 - a value
    "other text": lambda s: put_number(s, 4, "söme \ud800"),
    "another learning rate": lambda s: s["optimizer"]["param_groups"][0].update(lr=1e-3),
    "other elements": lambda s: s["model"]["a"].fill_(7.0),
    "another tensor of the form": lambda s: put(s, "b", torch.full((4, 6), 5.0)),
    "other data": lambda s: set_data(s["model"]["a"], torch.full((4, 6), 6.0)),
    "a detached tensor": lambda s: put(s, "a", s["model"]["a"].detach()),
    "a view of all": lambda s: put(s, "a", s["model"]["a"].view(24).view(4, 6)),
    "another version": lambda s: vars(s["model"])["_metadata"][""].update(version=2),
    "nested numbers": lambda s: put_number(s, 6, (1, (2, 4))),
    "a key of equal text": lambda s: s.update({"num" + "bers"[:]: s.pop("numbers")}) or s.update(
        {key: s.pop(key) for key in ("complex", "empty")}
    ),
}  # fmt: skip
OTHER_FORM: dict[str, Callable[[Any], Any]] = {
    "true for 1": lambda s: put_number(s, 0, True),  # noqa: FBT003 - a value
    "1.0 for 1": lambda s: put_number(s, 0, 1.0),
    "1 for true": lambda s: put_number(s, 2, 1),
    "none for a number": lambda s: put_number(s, 0, None),
    "a number for none": lambda s: put_number(s, 3, 0),
    "text of a subclass": lambda s: put_number(s, 4, Name("text")),
    "an integer of 300 bytes": lambda s: put_number(s, 0, 1 << 2400),
    "a list for a tuple": lambda s: put_number(s, 6, [1, (2, 3)]),
    "a longer tuple": lambda s: put_number(s, 6, (1, (2, 3, 4))),
    "another number": lambda s: numbers_of(s).append(1),
    "a number less": lambda s: numbers_of(s).pop(),
    "another key": lambda s: put(s, "new", torch.ones(1)),
    "a key less": lambda s: model_of(s).pop("b"),
    "another name": rename,
    "another order": move_to_end,
    "a key of a subclass": lambda s: s.update({Name("numbers"): s.pop("numbers")}),
    "a key that is equal": lambda s: s["optimizer"]["state"].update(
        {True if key == 1 else key: s["optimizer"]["state"].pop(key) for key in (0, 1, 2, 3)}
    ),
    "a dict for an OrderedDict": lambda s: s.update(model=dict(s["model"])),
    "no metadata": lambda s: vars(s["model"]).clear(),
    "more metadata": lambda s: vars(s["model"])["_metadata"].update(new={"version": 1}),
    "metadata of another key": lambda s: vars(s["model"])["_metadata"][""].update(other=1),
    "another attribute": lambda s: vars(s["model"]).update(note=1),
    "an item moved between dicts": lambda s: s["optimizer"]["state"][1].update(
        extra=s["optimizer"]["state"][0].pop("mean")
    ),
    "a tensor for a number": lambda s: put_number(s, 0, torch.tensor(1)),
    "a number for a tensor": lambda s: put(s, "a", 1.0),
    "another shape": lambda s: put(s, "a", torch.ones(6, 4)),
    "other strides": lambda s: put(s, "a", torch.ones(6, 4).t()),
    "another dtype of the same size": lambda s: put(s, "a", torch.ones(4, 6, dtype=torch.int32)),
    "another dtype": lambda s: put(s, "a", torch.ones(4, 6).bfloat16()),
    "another offset": lambda s: put(s, "view", torch.arange(24, dtype=torch.float32)[5:17]),
    "another stride of a single row": lambda s: put(s, "row", torch.ones(6).as_strided((1, 6), (99, 1))),
    "a scalar of one dimension": lambda s: s["optimizer"]["state"][0].update(step=torch.ones(1)),
    "an opaque tensor": lambda s: put(s, "a", torch.ones(4, 6).to_mkldnn()),
    "an empty tensor of a storage with bytes": lambda s: s.update(empty=torch.ones(3)[3:]),
    "an empty tensor of another shape": lambda s: s.update(empty=torch.empty(0, 2)),
    "a smaller storage": lambda s: put(s, "view", torch.arange(16, dtype=torch.float32)[4:16]),
    "a storage that grew": lambda s: resize(s, 200),
    "other data of another size": lambda s: set_data(s["model"]["a"], torch.ones(5, 6)),
    "data of another dtype": lambda s: set_data(s["model"]["a"], torch.ones(4, 6, dtype=torch.int32)),
    "data with a larger storage": lambda s: set_data(s["model"]["a"], torch.ones(5, 6)[:4]),
    "data that is shared": lambda s: set_data(s["model"]["a"], s["model"]["b"]),
    "requires_grad": lambda s: s["model"]["a"].requires_grad_(),
    "a parameter": lambda s: put(s, "a", nn.Parameter(torch.ones(4, 6))),
    "a frozen parameter": lambda s: put(s, "a", nn.Parameter(torch.ones(4, 6), requires_grad=False)),
    "a subclass": lambda s: put(s, "a", torch.ones(4, 6).as_subclass(Tracked)),
    "an attribute of a tensor": lambda s: put(s, "a", with_attribute(torch.ones(4, 6))),
    "a hook of a tensor": lambda s: put(s, "a", with_hook(torch.ones(4, 6))),
    "another device": lambda s: put(s, "a", torch.ones(4, 6, device="meta")),
    "a sparse tensor": lambda s: put(s, "a", torch.ones(4, 6).to_sparse()),
    "a compressed tensor": lambda s: put(s, "a", torch.ones(4, 6).to_sparse_csr()),
    "a nested tensor": lambda s: put(s, "a", torch.nested.as_nested_tensor([torch.ones(6)] * 4)),
    "a quantized tensor": lambda s: put(s, "a", torch.quantize_per_tensor(torch.ones(4, 6), 1.0, 0, torch.qint8)),
    "a conjugate": lambda s: s.update(complex=torch.zeros(2, dtype=torch.complex64).conj()),
    "a negative view": lambda s: put(s, "a", torch.zeros(4, 6, dtype=torch.complex64).conj().imag),
    "a new tie": lambda s: put(s, "b", s["model"]["a"][:]),
    "a tensor twice": lambda s: put(s, "b", s["model"]["a"]),
    "a tied tensor twice": lambda s: put(s, "again", s["model"]["tied"]),
    "a tie that is gone": lambda s: put(s, "again", torch.ones(3, 3)),
    "another tie": lambda s: s["model"].update(b=s["model"]["a"][:], again=torch.ones(3, 3)),
    "storages of one address": lambda s: put(s, "b", torch.from_numpy(s["model"]["a"].numpy())),
    "a dict twice": lambda s: s["optimizer"]["state"].update({3: s["optimizer"]["state"][2]}),
    "a list that holds itself": lambda s: put_number(s, 4, numbers_of(s)),
    "another container": lambda s: put_number(s, 0, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME_FORM)
def test_a_state_of_the_same_form_matches(what: str) -> None:
    forms, state = forms_of(state_of()), state_of()
    SAME_FORM[what](state)
    assert matches(forms, state)
    assert matches(forms, state_of()), "and the first one again"


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse, nested and quantized tensors
@pytest.mark.parametrize("what", OTHER_FORM)
def test_a_state_of_another_form_does_not(what: str) -> None:
    forms, state = forms_of(state_of()), state_of()
    OTHER_FORM[what](state)
    assert forms.match(state) is None
    assert matches(forms, state_of()), "and no attempt changes the form"


def test_every_other_dtype_is_another_form() -> None:
    kinds = [one for one in vars(torch).values() if isinstance(one, torch.dtype)]
    assert set(TYPES) <= set(kinds)
    for kind in set(TYPES):
        forms = forms_of({"a": torch.zeros(16, dtype=torch.uint8).view(kind)})
        for other in set(kinds):
            try:
                tensor = torch.zeros(16, dtype=torch.uint8).view(other)
            except (RuntimeError, TypeError):  # no tensors of that type can be made so
                continue
            assert (forms.match({"a": tensor}) is not None) == (other is kind), (kind, other)


def test_an_empty_view_has_its_offset() -> None:
    forms = forms_of([torch.ones(6)[2:2], torch.ones(3)])
    assert matches(forms, [torch.zeros(6)[2:2], torch.zeros(3)])
    assert forms.match([torch.ones(6)[3:3], torch.ones(3)]) is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, as above
@pytest.mark.parametrize("seed", range(20))
def test_many_changes_one_after_another_are_each_as_anew(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    changes = [*SAME_FORM.values(), *OTHER_FORM.values()]
    forms, state = StateForms(), state_of()
    for _ in range(12):
        found = forms.match(state)
        if found is None:
            with contextlib.suppress(RuntimeError):  # storages of one address
                forms.keep(state, pickle_state(state))
        else:
            as_anew(found, state)
        try:
            changes[int(torch.randint(len(changes), (1,), generator=generator))](state)
        except (KeyError, TypeError, RuntimeError, AttributeError, IndexError):
            state = state_of()


@pytest.mark.parametrize("root", [OrderedDict, list, tuple, lambda _: torch.ones(1), lambda _: 1])
def test_a_root_of_another_type_does_not_match(root: Callable[[Any], Any]) -> None:
    assert forms_of(state_of()).match(root(state_of())) is None
    assert forms_of(root(state_of())).match(state_of()) is None


def test_several_forms_are_known_and_the_oldest_is_forgotten() -> None:
    states = [[torch.ones(number)] for number in range(1, 6)]
    forms = forms_of(*states[:4])
    assert matches(forms, states[0])
    forms.keep(states[4], pickle_state(states[4]))
    assert [matches(forms, state) for state in states] == [True, False, True, True, True]


def test_a_form_keeps_no_tensor_alive() -> None:
    state: Any = {"a": torch.ones(1000), "n": [1]}
    forms, tensor = forms_of(state), weakref.ref(state["a"])
    assert matches(forms, state)
    storage = weakref.ref(state["a"].untyped_storage())
    del state
    assert tensor() is None
    assert storage() is None


def test_a_copy_of_the_forms_is_empty() -> None:
    forms, state = forms_of([torch.ones(1)]), [torch.ones(1)]
    for copied in (copy.deepcopy(forms), pickle.loads(pickle.dumps(forms))):  # noqa: S301 - ours
        assert copied.match(state) is None
    assert matches(forms, state)


def test_threads_may_match_at_once() -> None:
    forms, errors = forms_of([torch.ones(3), 0]), list[BaseException]()

    def work(number: int) -> None:
        try:
            for step in range(200):
                state = [torch.ones(3), 1000 * number + step]
                assert matches(forms, state)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare what was loaded, to the bit: types, order, numbers, tensors with their strides and flags."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(map(repr, ours)) == list(map(repr, theirs))
        for one, other in zip(ours.values(), theirs.values(), strict=True):
            assert_same(one, other)
        assert_same(vars(ours) if hasattr(ours, "__dict__") else None, getattr(theirs, "__dict__", None))
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.layout) == (theirs.dtype, theirs.shape, theirs.layout)
        assert ours.requires_grad == theirs.requires_grad
        if ours.layout is torch.strided and not ours.is_quantized and not ours.is_nested and not ours.is_meta:
            assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset())
            assert bytes_of(ours.untyped_storage()) == bytes_of(theirs.untyped_storage())
    else:
        assert repr(ours) == repr(theirs)


def ties_of(tree: Any) -> list[int]:
    """Return for each tensor the number of its storage."""
    tensors = [item for container, key in places_of(tree) if isinstance(item := container[key], torch.Tensor)]
    strided = [one for one in tensors if one.layout is torch.strided]
    known: dict[int, int] = {}
    return [known.setdefault(one.untyped_storage()._cdata, len(known)) for one in strided]


LOADABLE = [
    *SAME_FORM,
    *(what for what in OTHER_FORM if what not in {
        "storages of one address", "a hook of a tensor", "a nested tensor", "a list that holds itself",
        "an opaque tensor",
    }),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse, nested and quantized tensors
@pytest.mark.parametrize("what", LOADABLE)
def test_the_file_of_a_changed_state_is_read_as_torchs(what: str, tmp_path: Path) -> None:
    saver, state = DiskSaver(tmp_path / "own", own_memory=True), state_of()
    saver(state, "a.pt")
    saver(state_of(), "a.pt")
    {**SAME_FORM, **OTHER_FORM}[what](state)
    saver(state, "b.pt")
    torch.save(state, tmp_path / "torch.pt")
    ours, theirs = (torch.load(path, weights_only=False) for path in (tmp_path / "own/b.pt", tmp_path / "torch.pt"))
    assert_same(ours, theirs)
    assert ties_of(ours) == ties_of(theirs)


def test_the_states_of_several_modules_are_plain() -> None:
    state = {name: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict() for name in "abc"}
    try:
        pickled = pickle_plain(state)
    except NotPlain:
        pytest.fail("the attributes of one state were taken for those of another")
    assert len(pickled.storages) == 21
    assert matches(forms_of(state), {name: copy.deepcopy(one) for name, one in state.items()})
