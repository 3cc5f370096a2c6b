"""Is every number in an output finite, and if not, which is the first that is not?

Owns what counts as a number in a nested output, and how it is looked at cheaply. Must not know who asks. Rank-local;
issues no collectives: of a DTensor each rank looks at its own shard.
"""

import cmath
import math
import numbers
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

__all__ = ["Offender", "all_finite", "first_offender", "nonfinite_flag"]

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)
# Two numbers in a byte, every code of which is a finite number; torch can hardly do anything with it.
_ALWAYS_FINITE = frozenset({getattr(torch, "float4_e2m1fn_x2", None)})
# So many tensors are judged together. For fewer the calls that fuse them cost more than a call for each: measured on
# the host; on an accelerator counted in kernels, since only the first wait there is a long one.
_MANY = 4
# Up to here copying a tensor of the host beside others costs less than a call of its own.
_SMALL_NUMEL = 4096
# Numbers that `first_offender` looks at in one go, which bounds the memory it needs beside the tensor.
_CHUNK_NUMEL = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Offender:
    """The first number of an output that is not finite.

    Attributes:
        path: Python that leads to it from `output`, such as ``output['logits'][2, 7]``.
        value: ``nan``, ``inf`` or ``-inf``. Of a complex number its first broken part, which `path` then names.
        num_broken: how many numbers of the tensor or array that holds it are not finite.
        num_values: how many numbers that tensor or array has.
        kind: what holds it, such as ``float32 (32, 10) on cuda:0``.
    """

    path: str
    value: str
    num_broken: int = 1
    num_values: int = 1
    kind: str

    def __str__(self) -> str:
        if self.num_values == 1:
            return f"{self.path} is {self.value} ({self.kind})"
        verb = "is" if self.num_broken == 1 else "are"
        share = f"{self.num_broken} of {self.num_values} values {verb} not finite"
        return f"{self.path} is {self.value} ({share}, {self.kind})"


def all_finite(output: Any) -> bool:
    """Tell whether `output` holds neither NaN nor infinity. A Python float is finite if float64 says so.

    Waits for the accelerator that a tensor is on; once, not for each, where there are many.

    Args:
        output: a number, a tensor of any dtype, shape and device, a NumPy array or scalar, text, None; or a mapping
            or sequence of them, nested at will. A meta tensor has no numbers.

    Raises:
        TypeError: it holds something else, before any number that is broken.

    Example:
        >>> all_finite([1.0, {"loss": torch.tensor([1.0, float("inf")])}, None])
        False
    """
    # In the order of what training loops return, since this runs in every iteration.
    if type(output) is float:
        return math.isfinite(output)
    if isinstance(output, torch.Tensor):
        return _tensor_is_finite(output)
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, Sequence) or isinstance(output, str | bytes):
        return _scalar_is_finite(output)
    tensors: list[torch.Tensor] = []
    try:
        return _gather(output, tensors) and _are_finite(tensors)
    except TypeError:
        # What stands before the thing that is no number counts, as if it had been looked at in order.
        if _are_finite(tensors):
            raise
        return False


def nonfinite_flag(output: Any) -> bool | torch.Tensor:
    """Tell whether `output` holds NaN or infinity, without waiting for an accelerator.

    An uncoalesced sparse tensor there is judged by its terms: to add them up would mean to wait.

    Args:
        output: as of `all_finite`.

    Returns:
        `not all_finite(output)` where that is known on the host; otherwise a tensor, bool (), on the accelerator (on
        one of them, if several), which that work is queued on.

    Raises:
        TypeError: it holds something else, before any number known on the host to be broken.

    Example:
        >>> nonfinite_flag({"loss": torch.tensor(float("nan"))})
        True
    """
    return _nonfinite_flag(output, _place_of)


def first_offender(output: Any) -> Offender | None:
    """Find the first number of `output` that is NaN or infinite, in the order in which it is nested.

    Slow, and it waits for accelerators: for use once `all_finite` has said no.

    Args:
        output: as of `all_finite`.

    Returns:
        None where all numbers are finite.

    Raises:
        TypeError: it holds something else, before any such number.

    Example:
        >>> print(first_offender({"loss": 0.5, "logits": torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])}))
        output['logits'][1, 0] is nan (1 of 4 values is not finite, float32 (2, 2) on cpu)
    """
    return _find(output, "output")


def _gather(items: Any, tensors: list[torch.Tensor]) -> bool:
    """Append the tensors of a nest to `tensors`; stop and return False at a number beside them that is not finite."""
    for item in items:
        if type(item) is float:
            if not math.isfinite(item):
                return False
        elif isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, Mapping):
            if not _gather(item.values(), tensors):
                return False
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            if not _gather(item, tensors):
                return False
        elif not _scalar_is_finite(item):
            return False
    return True


def _scalar_is_finite(value: Any) -> bool:
    if value is None or isinstance(value, str | bytes | numbers.Rational):  # an int or a Fraction of any size
        return True
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return bool(numpy.isfinite(value).all()) if value.dtype.kind in "fc" else True
    if isinstance(value, complex):
        return cmath.isfinite(value)
    if isinstance(value, Decimal):
        return value.is_finite()
    if isinstance(value, numbers.Number):
        return math.isfinite(value)  # type: ignore[arg-type]  # a real number of some other library
    msg = f"x must contain numbers, tensors, NumPy arrays, dicts or lists; found {type(value)}"
    raise TypeError(msg)


def _tensor_is_finite(tensor: torch.Tensor) -> bool:
    if _is_plain(tensor):
        return _strided_is_finite(tensor)
    return all(map(_strided_is_finite, _parts(tensor, waits=True)))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether torch's reductions take the tensor as it is."""
    return (
        tensor.dtype in _PLAIN_DTYPES
        and type(tensor) in _PLAIN_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


def _strided_is_finite(tensor: torch.Tensor) -> bool:
    # One kernel in the usual case: a finite sum has only finite terms. It may overflow, so ask again before saying no.
    total = tensor if tensor.numel() == 1 else (tensor.detach() if tensor.requires_grad else tensor).sum()
    if cmath.isfinite(total.item()):
        return True
    tensor = _as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return math.isfinite(tensor.amax().item()) and math.isfinite(tensor.amin().item())  # NaN comes through in both


def _are_finite(tensors: list[torch.Tensor]) -> bool:
    """Judge tensors together: the small ones of the host by one sum, those of an accelerator while waiting once."""
    if len(tensors) < _MANY:
        return all(map(_tensor_is_finite, tensors))
    small: list[torch.Tensor] = []
    elsewhere: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        is_plain = _is_plain(tensor)
        if is_plain and not tensor.is_cpu:
            elsewhere.setdefault(tensor.device, []).append(tensor)
        elif is_plain and 1 < tensor.numel() <= _SMALL_NUMEL:
            small.append(tensor)
        elif not (_strided_is_finite(tensor) if is_plain else _tensor_is_finite(tensor)):
            return False
    if len(small) > 1:
        with torch.no_grad():
            small = [torch.cat([tensor if tensor.dim() == 1 else tensor.ravel() for tensor in small])]
    if small and not _strided_is_finite(small[0]):
        return False
    # All accelerators get their work before the first of them is waited for.
    flags = [_flag(group) for group in elsewhere.values()]
    return not any(flag is not None and flag.item() for flag in flags)


def _place_of(tensor: torch.Tensor) -> Hashable | None:
    """Return the accelerator that the tensor is on; None for the host and for a tensor with no numbers at all."""
    return None if tensor.is_cpu or tensor.is_meta else tensor.device


def _nonfinite_flag(output: Any, place_of: Callable[[torch.Tensor], Hashable | None]) -> bool | torch.Tensor:
    """Work as `nonfinite_flag`, for accelerators as `place_of` tells them apart."""
    if type(output) is float:
        return not math.isfinite(output)
    if isinstance(output, torch.Tensor) and place_of(output) is None:
        return not _tensor_is_finite(output)
    tensors: list[torch.Tensor] = []
    try:
        if not _gather((output,), tensors):
            return True
    except TypeError:
        if _are_finite([tensor for tensor in tensors if place_of(tensor) is None]):
            raise
        return True
    by_place: dict[Hashable | None, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_place.setdefault(place_of(tensor), []).append(tensor)
    if not _are_finite(by_place.pop(None, [])):
        return True
    flags = [flag for group in by_place.values() if (flag := _flag(group)) is not None]
    if len(flags) > 1:
        flags = [torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags]).any()]
    return flags[0] if flags else False


def _flag(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Return whether any of them is broken, bool () on the device that all are on; None if they hold no numbers.

    Not by a sum, which may overflow, nor by `isfinite`, which writes several tensors of the size of its argument.
    """
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for part in [part for tensor in tensors for part in _parts(tensor, waits=False)]:
        by_dtype.setdefault(part.dtype, []).append(part)
    norms: list[torch.Tensor] = []
    for group in by_dtype.values():
        if len(group) == 1 or group[0].device.type == "xla":  # which fuses what it is given itself
            norms += [torch.linalg.vector_norm(part, math.inf) for part in group]
        else:
            norms += torch._foreach_norm(group, math.inf)  # noqa: SLF001 - what torch's clip_grad_norm_ stands on
    if len(norms) > 1:
        return torch.stack(norms).lt(math.inf).all().logical_not()
    return norms[0].lt(math.inf).logical_not() if norms else None  # NaN is not less either


def _parts(tensor: torch.Tensor, *, waits: bool) -> list[torch.Tensor]:
    """Return what can be reduced: strided tensors of real numbers, with no graph, none of them empty.

    Args:
        tensor: of any kind.
        waits: whether the accelerator may be waited for.
    """
    if not _can_break(tensor):
        return []
    tensor = _local(tensor)
    if tensor.is_nested:
        if waits or tensor.layout is torch.strided:  # then its sizes are on the host
            return [part for row in tensor.unbind() for part in _parts(row, waits=waits)]
        tensor = _rows_of_jagged(tensor)
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values() if waits or tensor.is_coalesced() else tensor._values()  # noqa: SLF001
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.dtype.itemsize == 1:  # float8 can neither be summed nor compared
        tensor = tensor.float()
    if tensor.is_complex():  # a large complex number has an infinite norm, and complex32 can hardly be looked at
        tensor = _as_real(tensor)
    return [tensor] if tensor.numel() > 0 else []


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with no graph; of a DTensor this rank's shard, as reductions of it are collectives."""
    to_local = None if type(tensor) in _PLAIN_TYPES else getattr(tensor, "to_local", None)
    tensor = tensor if to_local is None else to_local()
    return tensor.detach() if tensor.requires_grad else tensor


def _can_break(tensor: torch.Tensor) -> bool:
    is_inexact = tensor.is_floating_point() or tensor.is_complex()  # not integers, bools, quantised integers
    return is_inexact and not tensor.is_meta and tensor.dtype not in _ALWAYS_FINITE


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _rows_of_jagged(tensor: torch.Tensor) -> torch.Tensor:
    """Return a jagged tensor's buffer with zeros where no row lies, though only the device knows where they lie."""
    nested: Any = tensor  # torch has no public type for it
    buffer, starts, lengths = nested.values(), nested.offsets()[:-1], nested.lengths()
    buffer = buffer.float() if buffer.dtype.itemsize == 1 else buffer
    ends = nested.offsets()[1:] if lengths is None else starts + lengths
    dim = nested._ragged_idx - 1  # noqa: SLF001 - rows lie along it in the buffer; there is no other name for it
    marks = torch.zeros(buffer.shape[dim] + 1, dtype=torch.int64, device=buffer.device)
    one = torch.ones_like(starts, dtype=torch.int64)
    in_a_row = marks.index_add(0, starts, one).index_add(0, ends, -one).cumsum(0)[:-1] > 0
    shape = [-1 if axis == dim else 1 for axis in range(buffer.dim())]
    zeros: torch.Tensor = buffer.masked_fill(~in_a_row.view(shape), 0)
    return zeros


def _find(value: Any, path: str) -> Offender | None:
    if isinstance(value, torch.Tensor):
        return _find_in_tensor(value, path)
    if isinstance(value, Mapping):
        places = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        places = ((f"{path}.{name}", item) for name, item in zip(value._fields, value, strict=True))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        places = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif _scalar_is_finite(value):
        return None
    elif hasattr(value, "dtype"):
        return _find_in_array(value, path)
    else:
        return _offender(path, (), value, kind=type(value).__name__)
    return next((found for at, item in places if (found := _find(item, at)) is not None), None)


def _find_in_tensor(tensor: torch.Tensor, path: str) -> Offender | None:
    local = _local(tensor)
    if hasattr(tensor, "to_local"):
        path += ".to_local()"
    if not _can_break(local):
        return None
    if local.is_nested:
        rows = enumerate(local.unbind())
        return next((found for i, row in rows if (found := _find_in_tensor(row, f"{path}[{i}]")) is not None), None)
    if local.layout is torch.sparse_coo:
        return _find_in_tensor(local.coalesce().values(), f"{path}.coalesce().values()")
    if local.layout is not torch.strided:
        return _find_in_tensor(local.values(), f"{path}.values()")
    num_broken, position, value = 0, 0, math.nan
    for number, part in enumerate(torch.split(local.reshape(-1), _CHUNK_NUMEL)):
        # Neither float8 nor complex32 can be looked at as it is.
        chunk = part.float() if part.dtype.itemsize == 1 else part
        chunk = chunk.to(torch.complex64) if chunk.dtype is torch.complex32 else chunk
        is_broken = chunk.isfinite().logical_not()
        num_in_chunk = int(is_broken.sum())
        if num_in_chunk and not num_broken:
            first = int(is_broken.to(torch.uint8).argmax())  # of equal ones the first
            position, value = number * _CHUNK_NUMEL + first, chunk[first].item()
        num_broken += num_in_chunk
    if not num_broken:
        return None
    kind = f"{str(local.dtype).removeprefix('torch.')} {tuple(local.shape)} on {local.device}"
    index = _index_of(position, local.shape)
    return _offender(path, index, value, num_broken=num_broken, num_values=local.numel(), kind=kind)


def _find_in_array(array: Any, path: str) -> Offender:
    is_broken = ~sys.modules["numpy"].isfinite(array)
    index = _index_of(int(is_broken.argmax()), array.shape)
    kind = f"NumPy {array.dtype} {array.shape}"
    return _offender(path, index, array[index], num_broken=int(is_broken.sum()), num_values=array.size, kind=kind)


def _offender(path: str, index: tuple[int, ...], value: Any, **known: Any) -> Offender:
    if index:
        path += f"[{', '.join(map(str, index))}]"
    if isinstance(value, Decimal):
        value = math.nan if value.is_nan() else float(value)  # a signalling NaN would raise
    elif isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
        path, value = (f"{path}.imag", value.imag) if math.isfinite(value.real) else (f"{path}.real", value.real)
    text = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return Offender(path=path, value=text, **known)


def _index_of(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of the number at a position in row-major order."""
    return tuple(map(int, torch.unravel_index(torch.tensor(position), tuple(shape))))
