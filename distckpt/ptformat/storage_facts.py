"""What a save needs to know of a state's storages, read once for each."""

import operator
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

_T = TypeVar("_T")
CHUNK: Final = 512
"""Number of items that stay in the processor's cache while one attribute after another is read."""
IDENTITY: Final = operator.attrgetter("_cdata")
"""Returns torch's identity of a storage."""
_DEVICE: Final = operator.attrgetter("device")


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """Facts of some storages, in their order.

    Attributes:
        sizes: in bytes.
        devices: types of the devices.
        addresses: of the bytes, an ``array("Q")``; None unless all storages are in host memory.
    """

    sizes: Sequence[int]
    devices: frozenset[str]
    addresses: "array[int] | None"

    @classmethod
    def of(cls, storages: Sequence[torch.UntypedStorage]) -> "StorageFacts":
        """Read the facts of storages.

        Example:
            >>> StorageFacts.of([torch.ones(2).untyped_storage()]).sizes
            [8]
        """
        sizes, devices = list[int](), set[torch.device]()
        for part in chunks(storages):
            sizes += map(torch.UntypedStorage.nbytes, part)
            devices.update(map(_DEVICE, part))
        types = frozenset(device.type for device in devices)
        addresses = array("Q", map(torch.UntypedStorage.data_ptr, storages)) if types <= {"cpu"} else None
        return cls(sizes, types, addresses)


def chunks(items: Sequence[_T]) -> Iterator[list[_T]]:
    """Yield parts of :data:`CHUNK` items."""
    for begin in range(0, len(items), CHUNK):
        yield list(items[begin : begin + CHUNK])
