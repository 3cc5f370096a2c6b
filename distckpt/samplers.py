"""The order of a data set in which a run can go on anywhere, on any number of ranks.

The order of an epoch is a pure function of seed and epoch, and any place in it is computed on its own: a Feistel
network over the numbers of the data set, walked along its cycle until it is back among them (J. Black and P. Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Ranks take turns in the order, so that what all ranks have
trained is a prefix of it, and one number says how long the prefix is. Rank-local; issues no collectives.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler

from distckpt.backends.detect import current

__all__ = ["ResumableSampler", "batches_left", "find_resumable", "permuted"]

_KIND = "ResumableSampler"
_NUM_ROUNDS = 8
_MIN_BITS = 4
"""A network of fewer bits has too few keys to reach most permutations; walking along the cycle costs little there."""
_BLOCK = 8192
"""Indices computed at a time: some milliseconds' work."""
_FIRST_BLOCK = 256
"""The first block is small, so that the first batch is there at once."""


class ResumableSampler(DistributedSampler[int]):
    """Give each rank its share of a map-style data set, in an order that goes on anywhere, on any number of ranks.

    Use it as ``DataLoader(dataset, sampler=ResumableSampler(dataset))``, or inside torch's ``BatchSampler``. Each pass
    over the loader is the next epoch of the sampler, so ``set_epoch`` is not needed; it works as
    ``DistributedSampler``'s does.

    Rank r of W ranks takes the samples r, r + W, r + 2 * W, ... of the epoch's order. The state is the number of
    samples that all ranks have trained together. From there any number of ranks, with any batch size, deals out the
    rest of the epoch anew: each of its samples once. Going on draws and drops nothing, and no order of the whole data
    set is ever made.

    :func:`~distckpt.resume` goes on where the checkpoint's run was. It counts what was trained, not what workers have
    drawn ahead; the sampler need not be among the objects. Without an engine of ignite's, put the sampler into the
    checkpoint. Its state then counts what was drawn, which is more than what was trained if the loader has workers.

    Args:
        dataset_or_length: the data set, or its number of samples.
        num_replicas: the number of ranks; None for the job's.
        rank: this rank; None for the job's.
        shuffle: whether the order is random. Otherwise it is that of the data set.
        seed: which random orders; the same on all ranks. A loaded state brings its own.
        drop_last: where the ranks do not divide what is left of the epoch: True leaves out its very last samples, False
            repeats the epoch's first ones after them, so that all ranks have equally many.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is negative, or there is no such rank.

    Example:
        >>> two = [ResumableSampler(10, num_replicas=2, rank=rank) for rank in range(2)]
        >>> drawn = [iter(sampler) for sampler in two]
        >>> trained = [next(indices) for _ in range(2) for indices in drawn]
        >>> alone = ResumableSampler(10, num_replicas=1, rank=0)
        >>> alone.load_state_dict(two[0].state_dict())
        >>> sorted(trained + list(alone)) == list(range(10))
        True
    """

    def __init__(
        self,
        dataset_or_length: Sized | int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        dataset = range(dataset_or_length) if isinstance(dataset_or_length, int) else dataset_or_length
        if not isinstance(dataset, Sized):
            msg = f"Argument dataset_or_length should have a length, or be one, but given {type(dataset_or_length)}"
            raise TypeError(msg)
        backend = current()
        num_replicas = backend.world_size if num_replicas is None else num_replicas
        rank = backend.rank if rank is None else rank
        for name, value, least in (
            ("dataset_or_length", dataset_or_length if isinstance(dataset_or_length, int) else 0, 0),
            ("num_replicas", num_replicas, 1),
            ("rank", rank, 0),
            ("seed", seed, None),
        ):
            if not _is_int(value):
                msg = f"Argument {name} should be an integer, but given {type(value)}"
                raise TypeError(msg)
            if least is not None and value < least:
                msg = f"Argument {name} should be {least} or more, but given {value}"
                raise ValueError(msg)
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                msg = f"Argument {name} should be a bool, but given {type(flag)}"
                raise TypeError(msg)
        self._pending: _Place | None = None  # a pass that was begun by another run
        self._pass: _Place | None = None  # the one under way
        self._next_epoch = 0
        self._num_drawn = 0  # of the pass under way, by this rank
        self._count: Callable[[], int | None] | None = None
        super().__init__(
            dataset,  # type: ignore[arg-type]  # torch asks for a Dataset, and uses its length
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.length = len(dataset)

    def __iter__(self) -> Iterator[int]:
        """Begin a pass: of the next epoch, or where a loaded state says.

        The pass begins as its first index is drawn: a loader makes two iterators for its workers, and uses one.
        """
        place = self._begin()
        first = place.position + self.rank
        left, size = self._num_left(place), _FIRST_BLOCK
        key = f"{self.seed}:{place.epoch}"
        while left > 0:
            num = min(left, size)
            positions = torch.arange(first, first + num * self.num_replicas, self.num_replicas, device="cpu")
            positions %= self.length
            indices = permuted(positions, self.length, key) if self.shuffle else positions
            for index in indices.tolist():
                self._num_drawn += 1
                yield index
            first += num * self.num_replicas
            left, size = left - num, _BLOCK

    @property
    def epoch(self) -> int:
        """The epoch of the pass under way; before the first pass, that of the first one."""
        place = self._pending or self._pass
        return self._next_epoch if place is None else place.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass.

        A pass that goes on in the middle, by a loaded state, has its epoch already: then it is for the pass after.

        Args:
            epoch: any integer, the same on all ranks.
        """
        if self._pending is not None and self._pending.position:
            self._next_epoch = self._pending.epoch + 1 if epoch == self._pending.epoch else epoch
            return
        self._pending = None
        self._next_epoch = epoch

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data, the same for any number of ranks. Rank-local.

        Returns:
            ``epoch``, ``position`` (samples of it that all ranks have trained together), ``length``, ``seed``,
            ``shuffle`` and ``kind``: numbers, text and a bool.
        """
        if self._pending is not None:
            return self._state(self._pending)
        if self._pass is None:
            return self._state(_Place(self._next_epoch, 0))
        return self.distckpt_position(self._num_drawn if self._count is None else self._count())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next pass begin where a state says. Rank-local.

        Args:
            state_dict: what :meth:`state_dict` returned, on any rank of any number of ranks.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is of a data set of another length, of another order, or no state of a sampler.
        """
        if not isinstance(state_dict, Mapping):
            msg = f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            raise TypeError(msg)
        numbers = [state_dict.get(key) for key in ("epoch", "position", "length", "seed")]
        if state_dict.get("kind") != _KIND or not all(_is_int(number) for number in numbers):
            msg = f"Argument state_dict is no state of a {_KIND}: it has the keys {list(state_dict)}"
            raise ValueError(msg)
        place = _Place(state_dict["epoch"], state_dict["position"])
        if not 0 <= place.position <= state_dict["length"]:
            msg = f"Argument state_dict is no state of a {_KIND}: position {place.position} of {state_dict['length']}"
            raise ValueError(msg)
        if place.position and state_dict["length"] != self.length:
            msg = (
                f"rank {self.rank}: the state is of {state_dict['length']} samples, {place.position} of them trained, "
                f"and this data set has {self.length}: go on with the same data set, or begin the epoch anew by "
                f"leaving the sampler's state out"
            )
            raise ValueError(msg)
        if bool(state_dict.get("shuffle")) is not self.shuffle:
            msg = (
                f"rank {self.rank}: the state is of an order with shuffle={bool(state_dict.get('shuffle'))}, and this "
                f"sampler has shuffle={self.shuffle}: give it the same"
            )
            raise ValueError(msg)
        self.seed = state_dict["seed"]
        if place.position and not self._num_left(place):
            place = _Place(place.epoch + 1, 0)
        self._pending = place
        self._next_epoch = place.epoch + 1

    # -- for resume --------------------------------------------------------------------------------

    @property
    def distckpt_is_positioned(self) -> bool:
        """Whether a state was loaded, and no pass has begun since."""
        return self._pending is not None

    def distckpt_follow(self, count: Callable[[], int | None]) -> None:
        """Let the state count what was trained.

        Args:
            count: returns what :meth:`distckpt_position` is given.
        """
        self._count = count

    def distckpt_position(self, num_trained: int | None) -> dict[str, Any]:
        """Return the state after this rank, as each other one, has trained so many samples of the iterator under way.

        Args:
            num_trained: by this rank; what was trained before the iterator was made does not count. None if the loader
                has no batch left in the pass, though some samples may be.
        """
        place = self._pending or self._pass or _Place(self._next_epoch, 0)
        if num_trained is None:
            return self._state(place if place is self._pending else _Place(self._next_epoch, 0))
        rest = _Place(place.epoch, min(place.position + num_trained * self.num_replicas, self.length))
        is_over = num_trained > 0 and not self._num_left(rest)
        return self._state(_Place(self._next_epoch, 0) if is_over else rest)

    @property
    def distckpt_num_left(self) -> int:
        """The number of samples that the next pass has for each rank."""
        return self._num_left(self._pending or _Place(0, 0))

    def _begin(self) -> "_Place":
        if self._pending is None:
            place = _Place(self._next_epoch, 0)
            self._next_epoch += 1
        else:
            place, self._pending = self._pending, None
        self._pass, self._num_drawn = place, 0
        return place

    def _num_left(self, place: "_Place") -> int:
        """Return how many samples each rank has from a place to the end of its epoch."""
        left = self.length - place.position
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def _state(self, place: "_Place") -> dict[str, Any]:
        return {
            "kind": _KIND,
            "epoch": place.epoch,
            "position": place.position,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the data: so many samples of an epoch are behind it, over all ranks."""

    epoch: int
    position: int


def find_resumable(loader: Any) -> ResumableSampler | None:
    """Return the sampler of ours whose indices a loader makes into batches in the order drawn; None if there is none.

    One inside a sampler or batch sampler of another kind does not count: it may draw ahead, or twice.
    """
    outer = getattr(loader, "batch_sampler", None)
    inner = getattr(loader, "sampler", None) if outer is None else outer
    if type(inner) is BatchSampler:
        inner = inner.sampler
    return inner if isinstance(inner, ResumableSampler) else None


def batches_left(loader: Any) -> int | None:
    """Return how many batches the next iterator over a loader gives on each rank; None without a sampler of ours."""
    sampler = find_resumable(loader)
    if sampler is None:
        return None
    left, outer = sampler.distckpt_num_left, loader.batch_sampler
    if outer is None:
        return left
    size = int(outer.batch_size)
    return left // size if outer.drop_last else -(-left // size)


def permuted(positions: torch.Tensor, length: int, key: str) -> torch.Tensor:
    """Return what stands at positions of a random order of the numbers below a length.

    Args:
        positions: int64 (n,), each in [0, length).
        length: below 2 ** 62.
        key: which order.

    Returns:
        int64 (n,). Over all positions each number below `length` comes once.

    Example:
        >>> permuted(torch.arange(8), 8, "a").sort().values.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    num_bits = max((length - 1).bit_length(), _MIN_BITS)
    low_bits = num_bits // 2
    digest = hashlib.blake2b(key.encode(), digest_size=4 * _NUM_ROUNDS).digest()
    keys = struct.unpack(f"<{_NUM_ROUNDS}I", digest)
    values = _encrypted(positions, low_bits, num_bits - low_bits, keys)
    (outside,) = torch.nonzero(values >= length, as_tuple=True)
    while len(outside):
        walked = _encrypted(values[outside], low_bits, num_bits - low_bits, keys)
        values[outside] = walked
        outside = outside[walked >= length]
    return values


def _encrypted(values: torch.Tensor, low_bits: int, high_bits: int, keys: tuple[int, ...]) -> torch.Tensor:
    """Return the network's image of numbers of ``low_bits + high_bits`` bits: a permutation of all of them."""
    widths = (high_bits, low_bits)
    high, low = values >> low_bits, values & ((1 << low_bits) - 1)
    for number, key in enumerate(keys):
        high, low = low, (high ^ _hashed(low, key)) & ((1 << widths[number % 2]) - 1)
    return (high << low_bits) | low  # after an even number of rounds the halves are back in their places


def _hashed(values: torch.Tensor, key: int) -> torch.Tensor:
    """Return 32 random bits for each number of at most 32 bits, and a key of 32."""
    mixed = values ^ key
    for _ in range(2):  # T. Mueller's integer hash, stackoverflow.com/a/12996028; no product reaches 2 ** 63
        mixed = (((mixed >> 16) ^ mixed) * 0x45D9F3B) & 0xFFFFFFFF
    return (mixed >> 16) ^ mixed


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
