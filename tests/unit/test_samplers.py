"""ResumableSampler: each sample of an epoch once, on any number of ranks, wherever the epoch was interrupted."""

import copy
import itertools
import json
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

from distckpt import Checkpoint, ResumableSampler
from distckpt.samplers import batches_left, find_resumable, permute

ORDER_OF_TEN = [6, 2, 9, 5, 7, 1, 3, 0, 8, 4]
"""Of seed 0 and epoch 0. A changed order would break the resume of every run under way."""


def ranks_of(world_size: int, length: int, **kwargs: Any) -> list[ResumableSampler]:
    """Return the samplers of all ranks of a job."""
    return [ResumableSampler(length, num_replicas=world_size, rank=rank, **kwargs) for rank in range(world_size)]


def turns(samplers: list[ResumableSampler]) -> Iterator[int]:
    """Yield a pass's samples, the ranks taking turns."""
    return itertools.chain.from_iterable(zip(*samplers, strict=True))


# -- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 4097, 100_003])
def test_an_order_has_each_number_once(length: int) -> None:
    for key in ("0:0", "0:1", "7:0"):
        assert torch.equal(permute(torch.arange(length), length, key).sort().values, torch.arange(length))


def test_any_position_of_an_order_is_computed_alone() -> None:
    whole = permute(torch.arange(5000), 5000, "a")
    places = torch.randint(5000, (300,))
    assert torch.equal(permute(places, 5000, "a"), whole[places])


def test_an_order_stays_what_it_was_when_it_was_released() -> None:
    assert permute(torch.arange(10), 10, "0:0").tolist() == ORDER_OF_TEN
    assert list(ResumableSampler(10, num_replicas=1, rank=0)) == ORDER_OF_TEN


@pytest.mark.parametrize(("length", "num_orders"), [(3, 6), (4, 24)])
def test_all_orders_of_a_few_samples_come_about_equally_often(length: int, num_orders: int) -> None:
    num, expected = 30 * num_orders, 30
    seen = Counter(tuple(permute(torch.arange(length), length, f"0:{epoch}").tolist()) for epoch in range(num))
    assert len(seen) == num_orders
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < num_orders + 5 * (2 * num_orders) ** 0.5


@pytest.mark.parametrize("length", [50, 1000, 65_536, 1_000_003])
def test_an_order_mixes_as_a_random_one_does(length: int) -> None:
    places = torch.arange(length, dtype=torch.float64)
    for epoch in range(5):
        order = permute(torch.arange(length), length, f"3:{epoch}").double()
        other = permute(torch.arange(length), length, f"3:{epoch + 1}").double()
        for pair in ((order, places), (order[1:], order[:-1]), (order, other)):
            correlation = torch.corrcoef(torch.stack(pair))[0, 1].item()
            assert abs(correlation) * length**0.5 < 5.0
        tenths = torch.histc(order[: length // 2], bins=10, min=0, max=length)
        expected = length / 20
        assert ((tenths - expected) ** 2 / expected).sum().item() < 40.0


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = ResumableSampler(100, num_replicas=1, rank=0)
    orders = {tuple(sampler) for _ in range(10)}
    orders |= {tuple(ResumableSampler(100, num_replicas=1, rank=0, seed=seed)) for seed in range(1, 10)}
    assert len(orders) == 19


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    assert list(ResumableSampler(7, num_replicas=2, rank=1, shuffle=False)) == [1, 3, 5, 0]


# -- the ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5, 12, 100])
def test_ranks_take_the_samples_of_one_order_in_turn(world_size: int, length: int) -> None:
    order = list(ResumableSampler(length, num_replicas=1, rank=0))
    ours = ranks_of(world_size, length)
    dealt = list(turns(ours))
    assert dealt[:length] == order
    assert dealt[length:] == (order * world_size)[: len(dealt) - length], "padded with the first ones"
    assert len(dealt) == world_size * len(ours[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_drop_last_leaves_out_the_last_samples(world_size: int) -> None:
    order = list(ResumableSampler(20, num_replicas=1, rank=0))
    ours = ranks_of(world_size, 20, drop_last=True)
    dealt = list(turns(ours))
    assert dealt == order[: 20 // world_size * world_size]
    assert len(dealt) == world_size * len(ours[0])


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_on_changing_numbers_of_ranks_has_each_sample_once(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 200, (), generator=draw))
    state = ResumableSampler(length, num_replicas=1, rank=0, seed=seed).state_dict()
    trained: list[int] = []
    while state["epoch"] == 0:
        world_size, steps = (int(torch.randint(1, 6, (), generator=draw)) for _ in range(2))
        ours = ranks_of(world_size, length)
        for sampler in ours:
            sampler.load_state_dict(state)
        trained += itertools.islice(turns(ours), steps * world_size)
        states = [sampler.state_dict() for sampler in ours]
        assert states == [states[0]] * world_size, "the state is the same on all ranks"
        state = json.loads(json.dumps(states[0]))
    order = list(ResumableSampler(length, num_replicas=1, rank=0, seed=seed))
    assert trained[:length] == order
    assert len(trained) - length < 5, "padding comes at the very end alone"


# -- its state -----------------------------------------------------------------------------------


def test_an_end_is_the_beginning_of_the_next_epoch() -> None:
    sampler = ResumableSampler(5, num_replicas=2, rank=1)
    num = len(list(sampler))
    assert num == 3
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)


def after_thirty() -> ResumableSampler:
    """Return a sampler from which 30 of its rank's samples are drawn."""
    sampler = ResumableSampler(100, num_replicas=2, rank=0)
    list(itertools.islice(sampler, 30))
    return sampler


def test_trained_samples_count_if_they_are_known() -> None:
    sampler = after_thirty()
    sampler.distckpt_set_engine(lambda: sampler.distckpt_position(8), lambda: False)
    assert sampler.state_dict()["position"] == 16
    sampler.distckpt_set_engine(lambda: sampler.distckpt_position(None), lambda: True)
    sampler.distckpt_set_engine(lambda: sampler.distckpt_position(8), lambda: True)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)


def test_a_copy_belongs_to_no_engine() -> None:
    sampler = after_thirty()
    sampler.distckpt_set_engine(lambda: sampler.distckpt_position(8), lambda: True)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):  # noqa: S301 - made in the same line
        assert twin.state_dict()["position"] == 60
    assert sampler.state_dict()["position"] == 16


def test_a_state_is_loaded_twice_and_nothing_is_skipped_twice() -> None:
    sampler = ResumableSampler(10, num_replicas=1, rank=0)
    state = sampler.state_dict() | {"position": 4}
    sampler.load_state_dict(state)
    sampler.load_state_dict(sampler.state_dict())
    assert sampler.distckpt_is_positioned
    assert list(sampler) == ORDER_OF_TEN[4:]
    assert not sampler.distckpt_is_positioned
    assert sorted(sampler) == list(range(10)), "the next epoch is a whole one"


def test_a_checkpoint_brings_it_back_with_its_seed(tmp_path: Path) -> None:
    source = ResumableSampler(10, num_replicas=1, rank=0, seed=5)
    begun = list(itertools.islice(source, 6))
    torch.save({"sampler": source.state_dict(), "other": {}}, tmp_path / "a.pt")
    target = ResumableSampler(10, num_replicas=2, rank=0, seed=9)
    other = ResumableSampler(10, num_replicas=2, rank=1, seed=9)
    for sampler in (target, other):
        Checkpoint.load_objects({"sampler": sampler}, torch.load(tmp_path / "a.pt", weights_only=True))
    assert sorted([*begun, *target, *other]) == list(range(10))
    assert target.epoch == 0


def test_set_epoch_keeps_the_position_of_a_continued_pass() -> None:
    for epoch in (4, 9):
        sampler = ResumableSampler(10, num_replicas=1, rank=0)
        sampler.load_state_dict(sampler.state_dict() | {"epoch": 4, "position": 3, "next_epoch": 5})
        sampler.set_epoch(epoch)
        assert sampler.epoch == 4
        assert len(list(sampler)) == 7
        sampler.set_epoch(9)
        again = ResumableSampler(10, num_replicas=1, rank=0)
        again.epoch = 9
        assert list(sampler) == list(again)


def test_set_epoch_applies_to_a_pass_that_starts() -> None:
    sampler = ResumableSampler(10, num_replicas=1, rank=0)
    orders = []
    for epoch in (3, 3, 4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sampler.epoch == epoch
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 11}, "the state is of 11 samples, 3 of them trained, and this data set has 10"),
        ({"shuffle": False}, "the state is of an order with shuffle=False"),
        ({"kind": "another"}, "no state of a ResumableSampler"),
        ({"epoch": "1"}, "no state of a ResumableSampler"),
        ({"position": -1}, "position -1 of 10"),
        ({"position": 11}, "position 11 of 10"),
    ],
)
def test_a_state_of_another_order_is_refused_and_nothing_changes(change: dict[str, Any], message: str) -> None:
    sampler = ResumableSampler(10, num_replicas=1, rank=0)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(before | {"position": 3} | change)
    assert sampler.state_dict() == before
    assert not sampler.distckpt_is_positioned


def test_a_data_set_may_grow_between_two_epochs() -> None:
    sampler = ResumableSampler(12, num_replicas=1, rank=0)
    sampler.load_state_dict(ResumableSampler(10, num_replicas=1, rank=0).state_dict() | {"epoch": 2})
    assert sorted(sampler) == list(range(12))


@pytest.mark.parametrize("given", [None, [1], "text"], ids=repr)
def test_a_state_that_is_no_mapping_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match="Argument state_dict should be a dictionary, but given"):
        ResumableSampler(3).load_state_dict(given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset_or_length": iter([1])}, TypeError, "should have a length, or be one"),
        ({"dataset_or_length": -1}, ValueError, "dataset_or_length should be 0 or more"),
        ({"num_replicas": 0}, ValueError, "num_replicas should be 1 or more"),
        ({"num_replicas": "2"}, TypeError, "Argument num_replicas should be an integer"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "Invalid rank 2"),
        ({"rank": -1}, ValueError, "rank should be 0 or more"),
        ({"seed": 1.5}, TypeError, "Argument seed should be an integer"),
        ({"seed": True}, TypeError, "Argument seed should be an integer"),
        ({"shuffle": 1}, TypeError, "Argument shuffle should be a bool"),
        ({"drop_last": None}, TypeError, "Argument drop_last should be a bool"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResumableSampler(**({"dataset_or_length": 10} | arguments))


# -- in a loader ---------------------------------------------------------------------------------


def batches_of(loader: DataLoader[Any]) -> list[list[int]]:
    """Return the samples of a pass over a loader."""
    return [batch[0].tolist() for batch in loader]


LOADERS: dict[str, Any] = {
    "no workers": {},
    "workers": {"num_workers": 2},
    "persistent workers": {"num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("is_batched", [True, False], ids=["batches", "samples"])
def test_a_loader_makes_one_epoch_of_each_pass(kind: str, *, is_batched: bool) -> None:
    data = TensorDataset(torch.arange(11))
    sampler = ResumableSampler(data, num_replicas=1, rank=0)
    size = 3 if is_batched else None
    loader: DataLoader[Any] = DataLoader(data, batch_size=size, sampler=sampler, **LOADERS[kind])
    orders = [list(sampler) for sampler in [ResumableSampler(11, num_replicas=1, rank=0)] for _ in range(3)]
    for order in orders:
        passed = [sample for batch in loader for sample in batch[0].reshape(-1).tolist()]
        assert passed == order


def test_the_rest_of_a_pass_is_counted_in_batches() -> None:
    data = TensorDataset(torch.arange(20))
    for position, size, drop_last, expected in ((0, 3, False, 7), (8, 5, False, 3), (8, 5, True, 2), (18, 5, True, 0)):
        sampler = ResumableSampler(data, num_replicas=1, rank=0)
        sampler.load_state_dict(sampler.state_dict() | {"position": position})
        for loader in (
            DataLoader(data, batch_size=size, sampler=sampler, drop_last=drop_last),
            DataLoader(data, batch_sampler=BatchSampler(sampler, size, drop_last)),
        ):
            assert batches_left(loader) == expected
        assert len(batches_of(loader)) == expected
    assert batches_left(DataLoader(data, batch_size=None, sampler=ResumableSampler(data, num_replicas=2, rank=0))) == 10


class TwoByTwo(BatchSampler):
    """A batch sampler that draws ahead of what it gives."""


def test_only_a_sampler_whose_order_the_loader_keeps_is_found() -> None:
    data = TensorDataset(torch.arange(20))
    sampler = ResumableSampler(data)
    assert find_resumable(DataLoader(data, sampler=sampler)) is sampler
    assert find_resumable(DataLoader(data, batch_size=None, sampler=sampler)) is sampler
    assert find_resumable(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))) is sampler
    others: list[Any] = [
        DataLoader(data),
        DataLoader(data, sampler=RandomSampler(sampler)),
        DataLoader(data, sampler=DistributedSampler(data, num_replicas=1, rank=0)),
        DataLoader(data, batch_sampler=TwoByTwo(sampler, 2, drop_last=False)),
        [1, 2],
        None,
    ]
    assert [find_resumable(loader) for loader in others] == [None] * len(others)
    assert batches_left(others[0]) is None


def test_the_middle_of_a_huge_epoch_is_there_at_once() -> None:
    sampler = ResumableSampler(32_000_000_000, num_replicas=4, rank=2)
    sampler.load_state_dict(sampler.state_dict() | {"position": 16_000_000_000})
    begin_s = time.process_time()
    first = next(iter(sampler))
    assert time.process_time() - begin_s < 1.0
    assert 0 <= first < 32_000_000_000


def test_a_default_device_of_the_programs_does_not_matter() -> None:
    torch.set_default_device("meta")
    try:
        assert list(ResumableSampler(10, num_replicas=1, rank=0)) == ORDER_OF_TEN
    finally:
        torch.set_default_device(None)
