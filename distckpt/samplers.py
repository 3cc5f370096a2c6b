"""A sampler whose epochs can be continued at any sample, on any number of ranks.

An epoch's order is a pure function of seed and epoch, and each of its positions is computed on its own. The function is
a Feistel network over the data set's indices, applied again while its result is no index (J. Black and P. Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Ranks take the order's samples in turn. So the samples that all
ranks have trained are a prefix of the order, and its length is the state. Rank-local; issues no collectives.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler

from distckpt.backends.detect import current

__all__ = ["ResumableSampler"]

_KIND = "ResumableSampler"
_NUM_ROUNDS = 8
_MIN_BITS = 4
"""A network of fewer bits has too few keys to reach most permutations. Repeated application costs little there."""
_BLOCK = 8192
"""Indices computed at a time."""
_FIRST_BLOCK = 256
"""A small first block, so that the first batch does not wait."""


class ResumableSampler(DistributedSampler[int]):
    """Split a map-style data set among the ranks, in an order that can be continued anywhere on any number of ranks.

    Use it as ``DataLoader(dataset, sampler=ResumableSampler(dataset))``, or inside torch's ``BatchSampler``. Each pass
    over the loader is the sampler's next epoch, so ``set_epoch`` is not needed; it works as ``DistributedSampler``'s.

    Rank r of W ranks takes the samples r, r + W, r + 2 * W, ... of the epoch's order. The state is the number of
    samples that all ranks have trained together. Any number of ranks, with any batch size, continues from there: each
    remaining sample of the epoch comes once. No batch is drawn and dropped, and no list of all indices is made.

    :func:`~distckpt.resume` continues where the checkpoint's run was. It counts trained samples, not those that workers
    have drawn already; the sampler need not be among the objects. An evaluator may use the same loader: its passes are
    epochs of the sampler too. Without an ignite engine, save the sampler's state with the other objects. It then counts
    drawn samples, which may be more than trained ones if the loader has workers, of the iterator that began last.

    Args:
        dataset_or_length: the data set, or its number of samples.
        num_replicas: number of ranks; None for the job's.
        rank: this rank; None for the job's.
        shuffle: True for a random order, False for the data set's.
        seed: selects the random orders; the same on all ranks. A loaded state replaces it.
        drop_last: if the samples left in the epoch are not a multiple of the ranks, True leaves out the last ones.
            False repeats the epoch's first samples, so that all ranks have equally many.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is negative, or `rank` does not exist.

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
        for name, value, minimum in (
            ("dataset_or_length", dataset_or_length if isinstance(dataset_or_length, int) else 0, 0),
            ("num_replicas", num_replicas, 1),
            ("rank", rank, 0),
            ("seed", seed, None),
        ):
            if not _is_int(value):
                raise TypeError(f"Argument {name} should be an integer, but given {type(value)}")
            if minimum is not None and value < minimum:
                raise ValueError(f"Argument {name} should be {minimum} or more, but given {value}")
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"Argument {name} should be a bool, but given {type(flag)}")
        self._loaded: _Position | None = None  # where the next pass starts, if a state was loaded
        self.distckpt_is_reserved = False  # the loaded state is for a later pass than the next one
        self._start: _Position | None = None  # where the pass under way started
        self._next_epoch = 0
        self._num_drawn = 0  # of the pass under way, by this rank
        self._engine_position: Callable[[], dict[str, Any]] | None = None
        self._is_engine_iterating: Callable[[], bool] = bool
        super().__init__(
            dataset,  # type: ignore[arg-type]  # torch asks for a Dataset, and uses its length
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.length = len(dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the engine: a copy counts the samples that are drawn from itself."""
        return {**vars(self), "_engine_position": None, "_is_engine_iterating": bool}

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the next epoch, or of the rest of a loaded one.

        The epoch counts from the first index on: a loader makes two iterators for its workers, and uses one.
        """
        start = self._begin_pass()
        first = start.num_samples + self.rank
        left, size = self._num_left(start), _FIRST_BLOCK
        key = f"{self.seed}:{start.epoch}"
        while left > 0:
            num = min(left, size)
            positions = torch.arange(first, first + num * self.num_replicas, self.num_replicas, device="cpu")
            positions %= self.length
            indices = permute(positions, self.length, key) if self.shuffle else positions
            for index in indices.tolist():
                self._num_drawn += 1
                yield index
            first += num * self.num_replicas
            left, size = left - num, _BLOCK

    @property
    def epoch(self) -> int:
        """Return the epoch of the pass under way; before the first pass, the first epoch."""
        position = self._loaded or self._start
        return self._next_epoch if position is None else position.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass. If that pass continues a loaded epoch, set the one after it.

        Args:
            epoch: any integer, the same on all ranks.
        """
        if self._loaded is not None and self._loaded.num_samples:
            if epoch != self._loaded.epoch:
                self._next_epoch = epoch
            return
        self._loaded = None
        self._next_epoch = epoch

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, the same on all ranks. Rank-local.

        Returns:
            ``epoch``, ``position`` (the number of its samples that all ranks have trained together), ``next_epoch``
            (of the following pass), ``length``, ``seed``, ``shuffle`` and ``kind``: numbers, text and a bool.
        """
        if self._loaded is None and self._start is None:
            return self._state_at_next()
        if self._loaded is not None:
            return self._state_at(self._loaded)
        return self.distckpt_position(self._num_drawn) if self._engine_position is None else self._engine_position()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next pass start at a saved position. Rank-local.

        Args:
            state_dict: as :meth:`state_dict` returned it, on any rank of any number of ranks.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: it belongs to a data set of another length or to another order, or is no sampler's state.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Argument state_dict should be a dictionary, but given {type(state_dict)}")
        numbers = [state_dict.get(key) for key in ("epoch", "position", "length", "seed")]
        if state_dict.get("kind") != _KIND or not all(_is_int(number) for number in numbers):
            raise ValueError(f"Argument state_dict is no state of a {_KIND}: it has the keys {list(state_dict)}")
        position = _Position(state_dict["epoch"], state_dict["position"])
        if not 0 <= position.num_samples <= state_dict["length"]:
            where = f"position {position.num_samples} of {state_dict['length']}"
            raise ValueError(f"Argument state_dict is no state of a {_KIND}: {where}")
        if position.num_samples and state_dict["length"] != self.length:
            raise ValueError(
                f"rank {self.rank}: the state is of {state_dict['length']} samples, {position.num_samples} of them "
                f"trained, and this data set has {self.length}. Continue with the same data set, or restart the epoch "
                f"by leaving the sampler's state out"
            )
        if bool(state_dict.get("shuffle")) is not self.shuffle:
            raise ValueError(
                f"rank {self.rank}: the state is of an order with shuffle={bool(state_dict.get('shuffle'))}, and this "
                f"sampler has shuffle={self.shuffle}: give it the same"
            )
        following: Any = state_dict.get("next_epoch")
        self.seed = state_dict["seed"]
        self._loaded, self._next_epoch = position, following if _is_int(following) else position.epoch + 1
        if position.num_samples and not self._num_left(position):
            self._loaded, self._next_epoch = _Position(self._next_epoch), self._next_epoch + 1

    # -- for resume --------------------------------------------------------------------------------

    @property
    def distckpt_is_positioned(self) -> bool:
        """Return True if a state was loaded, and no pass has started since."""
        return self._loaded is not None

    @property
    def distckpt_num_left(self) -> int:
        """Return the number of samples that the next pass has for each rank."""
        return self._num_left(self._loaded or _Position(0))

    def distckpt_end_pass(self) -> None:
        """Let the next pass be the epoch that follows the loaded one: no batch is left in that."""
        self._loaded, self._next_epoch = _Position(self._next_epoch), self._next_epoch + 1
        self.distckpt_is_reserved = False

    @property
    def distckpt_start(self) -> Any:
        """Return where the pass that began last started, for :meth:`distckpt_position`; None before the first one."""
        return self._start

    def distckpt_set_engine(self, position: Callable[[], dict[str, Any]], is_iterating: Callable[[], bool]) -> None:
        """Let :meth:`state_dict` return an engine's position, which counts trained samples.

        An engine that iterates keeps its place, such as a trainer beside an evaluator on the same loader.

        Args:
            position: returns the result of :meth:`distckpt_position`.
            is_iterating: returns True if the engine has an iterator over its data.
        """
        if not self._is_engine_iterating():
            self._engine_position, self._is_engine_iterating = position, is_iterating

    def distckpt_position(self, num_trained: int | None, start: Any = None) -> dict[str, Any]:
        """Return the state after each rank has trained a number of samples of an iterator.

        Args:
            num_trained: the number; None if the loader has no batch left in the pass, even if some samples are left.
            start: :attr:`distckpt_start` of the iterator; None for the iterator that began last.
        """
        start = self._loaded or start or self._start
        if start is None or (num_trained is None and start is not self._loaded):
            return self._state_at_next()
        trained = min(start.num_samples + (num_trained or 0) * self.num_replicas, self.length)
        position = _Position(start.epoch, trained)
        return self._state_at_next() if num_trained and not self._num_left(position) else self._state_at(position)

    def _begin_pass(self) -> "_Position":
        if self._loaded is None or self.distckpt_is_reserved:
            self._start = _Position(self._next_epoch)
            self._next_epoch += 1
        else:
            self._start, self._loaded = self._loaded, None
        self._num_drawn = 0
        return self._start

    def _num_left(self, position: "_Position") -> int:
        """Return the number of samples that each rank has from a position to the end of its epoch."""
        left = self.length - position.num_samples
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def _state_at_next(self) -> dict[str, Any]:
        return self._state_at(_Position(self._next_epoch), self._next_epoch + 1)

    def _state_at(self, position: "_Position", next_epoch: int | None = None) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "epoch": position.epoch,
            "position": position.num_samples,
            "next_epoch": self._next_epoch if next_epoch is None else next_epoch,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


@dataclass(frozen=True, slots=True)
class _Position:
    """A position in the data: an epoch, and the number of its samples before the position, on all ranks together."""

    epoch: int
    num_samples: int = 0


def find_resumable(loader: Any) -> ResumableSampler | None:
    """Return the ResumableSampler whose indices a loader batches in the order drawn; None if there is none.

    One inside another kind of sampler does not count: that sampler may draw ahead, or twice.
    """
    outer = getattr(loader, "batch_sampler", None)
    inner = getattr(loader, "sampler", None) if outer is None else outer
    if type(inner) is BatchSampler:
        inner = inner.sampler
    return inner if isinstance(inner, ResumableSampler) else None


def batches_left(loader: Any) -> int | None:
    """Return the number of batches of a loader's next iterator on each rank; None without a ResumableSampler."""
    sampler = find_resumable(loader)
    if sampler is None:
        return None
    left, outer = sampler.distckpt_num_left, loader.batch_sampler
    if outer is None:
        return left
    size = int(outer.batch_size)
    return left // size if outer.drop_last else -(-left // size)


def permute(positions: torch.Tensor, length: int, key: str) -> torch.Tensor:
    """Return the numbers at some positions of a random permutation, which `key` selects, of all numbers below `length`.

    `positions` and the result are int64 (n,); `length` is below 2 ** 62.
    """
    num_bits = max((length - 1).bit_length(), _MIN_BITS)
    low_bits = num_bits // 2
    digest = hashlib.blake2b(key.encode(), digest_size=4 * _NUM_ROUNDS).digest()
    keys = struct.unpack(f"<{_NUM_ROUNDS}I", digest)
    values = _encrypt(positions, low_bits, num_bits - low_bits, keys)
    (outside,) = torch.nonzero(values >= length, as_tuple=True)
    while len(outside):
        again = _encrypt(values[outside], low_bits, num_bits - low_bits, keys)
        values[outside] = again
        outside = outside[again >= length]
    return values


def _encrypt(values: torch.Tensor, low_bits: int, high_bits: int, keys: tuple[int, ...]) -> torch.Tensor:
    """Permute the numbers of ``low_bits + high_bits`` bits by a Feistel network."""
    widths = (high_bits, low_bits)
    high, low = values >> low_bits, values & ((1 << low_bits) - 1)
    for number, key in enumerate(keys):
        high, low = low, (high ^ _hash(low, key)) & ((1 << widths[number % 2]) - 1)
    return (high << low_bits) | low  # after an even number of rounds the halves have their first widths again


def _hash(values: torch.Tensor, key: int) -> torch.Tensor:
    """Return 32 pseudo-random bits for each number of at most 32 bits."""
    mixed = values ^ key
    for _ in range(2):  # T. Mueller's integer hash, stackoverflow.com/a/12996028; no product reaches 2 ** 63
        mixed = (((mixed >> 16) ^ mixed) * 0x45D9F3B) & 0xFFFFFFFF
    return (mixed >> 16) ^ mixed


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
