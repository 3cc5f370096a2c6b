"""The forms of a plain state's tensors: all that its pickle depends on, and which of them share a storage."""

from array import array
from collections.abc import Sequence
from typing import Any, Final

import torch

from distckpt._compare import has_layouts, have_layouts, have_values, layout_of
from distckpt.ptformat.fast_pickle import PlainWalk
from distckpt.ptformat.storage_facts import CHUNK, IDENTITY, StorageFacts, chunks

_API: Final = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10
_CPU: Final = torch.device("cpu")
_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_ROCM = 1, 2, 10


class Differs(Exception):  # noqa: N818 - a reason, always caught
    """The state has another form, or none that can be compared."""


class TensorForms:
    """The forms of a state's tensors. Keeps no tensor alive.

    Args:
        walk: the walk over the state.
        api: DLPack's exchange API, if torch has it.
    """

    def __init__(self, walk: PlainWalk, api: object = _API) -> None:
        distinct = {id(form): form for form in walk.tensor_forms}
        self._is_on_host = all(device is None for _, _, device, *_ in distinct.values())
        is_complex = any(dtype.is_complex for dtype, *_ in distinct.values())
        # Whatever PlainWalk and is_plain read of a tensor. Those of another layout, and nested ones, raise errors.
        # DLPack has one code for several dtypes (uint7, uint8).
        self._attributes: tuple[str, ...] = ("dtype", "requires_grad", "_backward_hooks", "__dict__")
        self._methods: tuple[str, ...] = ("is_neg", "is_conj") if is_complex else ("is_neg",)
        self._api = api
        self._layouts: list[bytes] | None = None
        if has_layouts(api):
            layouts = {
                key: layout_of(offset * dtype.itemsize, *_code_of(dtype), _dlpack_device(device), shape, stride)
                for key, (dtype, _, device, offset, shape, stride, _) in distinct.items()
            }
            self._layouts = [layouts[id(form)] for form in walk.tensor_forms]
        else:
            self._attributes += ("shape", "is_cpu" if self._is_on_host else "device")
            self._methods += ("stride", "storage_offset")
        names = (*self._attributes, *self._methods)
        rows = {key: _row_of(form, names) for key, form in distinct.items()}
        self._rows = [rows[id(form)] for form in walk.tensor_forms]
        self._sizes = [num_bytes for _, num_bytes, *_ in walk.tensor_forms]
        self._without_elements = {number: form.offset for number, form in enumerate(walk.forms) if 0 in form.shape}
        self._distinct = array("Q")  # addresses of which no two are equal, and none is 0
        self._numbers = walk.numbers
        firsts = dict(zip(reversed(walk.numbers), range(len(walk.numbers) - 1, -1, -1), strict=True))
        self._firsts = [firsts[number] for number in range(len(firsts))]
        devices = (device for _, _, device, *_ in distinct.values())
        self._devices = frozenset("cpu" if device is None else device.type for device in devices)

    def read(self, tensors: list[torch.Tensor]) -> tuple[tuple[torch.UntypedStorage, ...], StorageFacts]:
        """Compare tensors, and return their storages, each once.

        Raises:
            Differs: their forms, or which of them share storages, are different.
        """
        storages, addresses = list[torch.UntypedStorage](), array("Q")
        for number, (part, sizes) in enumerate(zip(chunks(tensors), chunks(self._sizes), strict=True)):
            begin, end = CHUNK * number, CHUNK * number + len(part)
            places = array("Q", bytes(8 * len(part)))
            try:
                is_equal = self._layouts is None or have_layouts(self._api, part, self._layouts[begin:end], places)
                is_equal = is_equal and have_values(part, self._rows[begin:end], self._attributes, self._methods)
                found = list(map(torch.Tensor.untyped_storage, part))
                addresses.extend(map(torch.UntypedStorage.data_ptr, found))
            except Exception as error:  # nested tensors have no shape, sparse ones and others no storage
                raise Differs from error
            if not is_equal or list(map(torch.UntypedStorage.nbytes, found)) != sizes:
                raise Differs
            if self._layouts is not None:  # the addresses tell the offsets
                for index in self._without_elements.keys() & range(begin, end):
                    places[index - begin] = addresses[index]
                if places != addresses[begin:]:
                    raise Differs
            storages += found
        for index, offset in self._without_elements.items():
            if tensors[index].storage_offset() != offset:
                raise Differs
        return self._each_once(tensors, storages, addresses)

    def _each_once(
        self, tensors: Sequence[torch.Tensor], storages: Sequence[torch.UntypedStorage], addresses: "array[int]"
    ) -> tuple[tuple[torch.UntypedStorage, ...], StorageFacts]:
        sizes = self._sizes
        if not self._are_distinct(addresses):
            identities = list(map(IDENTITY, storages))
            numbers = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
            is_once = len(set(map(id, tensors))) == len(tensors)
            if not is_once or list(map(numbers.__getitem__, identities)) != self._numbers:
                raise Differs
            storages, sizes = [storages[index] for index in self._firsts], [sizes[index] for index in self._firsts]
            addresses = array("Q", [addresses[index] for index in self._firsts])
            # Storages at one address may be of different types, which PlainWalk refuses.
            if len(set(addresses)) != len(addresses) - max(addresses.count(0) - 1, 0):
                raise Differs
        return tuple(storages), StorageFacts(sizes, self._devices, addresses if self._is_on_host else None)

    def _are_distinct(self, addresses: "array[int]") -> bool:
        """Return True if each tensor should have a storage of its own, and the addresses show that it has."""
        if len(self._firsts) != len(self._numbers):
            return False
        if addresses != self._distinct:
            distinct = set(addresses)
            if len(distinct) != len(addresses) or 0 in distinct:
                return False
            self._distinct = addresses
        return True


def _row_of(form: tuple[Any, ...], names: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of a tensor's attributes."""
    dtype, _, device, offset, shape, stride, requires_grad = form
    values = {
        "dtype": dtype, "shape": shape, "stride": stride, "storage_offset": offset, "requires_grad": requires_grad,
        "is_cpu": True, "device": device or _CPU,
        "is_neg": False, "is_conj": False, "_backward_hooks": None, "__dict__": {},
    }  # fmt: skip
    return tuple(values[name] for name in names)


def _code_of(dtype: torch.dtype) -> tuple[int, int]:
    """Return DLPack's code and number of bits of a dtype in :data:`~distckpt.ptformat.fast_pickle.TYPES`."""
    codes = {torch.uint8: 1, torch.bfloat16: 4, torch.bool: 6}
    return codes.get(dtype, 2 if dtype.is_floating_point else 5 if dtype.is_complex else 0), 8 * dtype.itemsize


def _dlpack_device(device: torch.device | None) -> tuple[int, int]:
    if device is None:
        return _DLPACK_CPU, 0
    return _DLPACK_CUDA if torch.version.hip is None else _DLPACK_ROCM, device.index or 0
