"""Check a nested output for NaN and infinity, and describe the first such number.

Rank-local; issues no collectives: of a DTensor each rank checks its own shard.
"""

import cmath
import math
import numbers
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)
# Two finite numbers in a byte; torch supports hardly any operation on it.
_ALWAYS_FINITE = frozenset({getattr(torch, "float4_e2m1fn_x2", None)})
# From this many tensors on, fused calls cost less than one call per tensor. On an accelerator only the first wait is
# long.
_MIN_FUSED = 4
# Up to this size, concatenating a host tensor with others costs less than a call for it alone.
_SMALL_NUMEL = 4096
# Numbers that `describe_nonfinite` checks at a time, which bounds its memory.
_CHUNK_NUMEL = 2**22


class PendingFlag:
    """A bool copied from an accelerator to the host without a synchronisation.

    Args:
        flag: bool (), on any device.

    Example:
        >>> flag = PendingFlag(torch.tensor(True))
        >>> flag.is_ready() and flag.value()
        True
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            # Pinned: a copy into pageable memory waits for the device.
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch ships it without types
            self._event.record(torch.cuda.current_stream(flag.device))
        else:
            self._host = flag

    def is_ready(self) -> bool:
        """Return True if the value has arrived on the host. Does not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]  # as above

    def value(self) -> bool:
        """Return the value. Only after it is ready."""
        return bool(self._host)

    def as_tensor(self) -> torch.Tensor:
        """Return the value on its own device, bool (). Does not wait."""
        return self._flag


def all_finite(output: Any) -> bool:
    """Return True if `output` holds neither NaN nor infinity. A Python float is checked as a float64.

    Waits for the tensors' accelerator; once, if there are many tensors.

    Args:
        output: a number, a tensor of any dtype, shape and device, a NumPy array or scalar, text or None; or a nested
            mapping or sequence of these. A meta tensor has no numbers.

    Raises:
        TypeError: `output` holds another type, before any number that is not finite.

    Example:
        >>> all_finite([1.0, {"loss": torch.tensor([1.0, float("inf")])}, None])
        False
    """
    # The most common types first: this runs in every iteration.
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
        # The tensors before the unknown type count, as if checked in order.
        if _are_finite(tensors):
            raise
        return False


def nonfinite_flag(output: Any) -> bool | torch.Tensor:
    """Return whether `output` holds NaN or infinity, without waiting for an accelerator.

    An uncoalesced sparse tensor on an accelerator is judged by its terms, since adding them up would wait.

    Args:
        output: as for `all_finite`.

    Returns:
        ``not all_finite(output)`` if it is known on the host; otherwise a tensor, bool (), on one of the accelerators.

    Raises:
        TypeError: `output` holds another type, before any number known on the host to be NaN or infinite.

    Example:
        >>> nonfinite_flag({"loss": torch.tensor(float("nan"))})
        True
    """
    return _nonfinite_flag(output, _accelerator_of)


def describe_nonfinite(output: Any) -> str | None:
    """Describe the first number of `output`, in nested order, that is NaN or infinite; None if all are finite.

    The text begins with the number's Python expression. Slow, and waits for accelerators: use it after `all_finite`.

    Args:
        output: as for `all_finite`.

    Raises:
        TypeError: `output` holds another type, before any such number.

    Example:
        >>> describe_nonfinite({"loss": 0.5, "logits": torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])})
        "output['logits'][1, 0] is nan (1 of 4 values is not finite, float32 (2, 2) on cpu)"
    """
    return _find(output, "output")


def _gather(items: Any, tensors: list[torch.Tensor]) -> bool:
    """Append the nested tensors to `tensors`; stop and return False at another number that is not finite."""
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
        return math.isfinite(value)  # type: ignore[arg-type]  # a real number of another library
    raise TypeError(f"x must contain numbers, tensors, NumPy arrays, dicts or lists; found {type(value)}")


def _tensor_is_finite(tensor: torch.Tensor) -> bool:
    if _is_plain(tensor):
        return _strided_is_finite(tensor)
    return all(map(_strided_is_finite, _reducible(tensor, may_wait=True)))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return True if torch's reductions accept the tensor as it is."""
    return (
        tensor.dtype in _PLAIN_DTYPES
        and type(tensor) in _PLAIN_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


def _strided_is_finite(tensor: torch.Tensor) -> bool:
    # Usually one kernel: a finite sum has finite terms only. A sum may overflow, so check again before returning False.
    total = tensor if tensor.numel() == 1 else (tensor.detach() if tensor.requires_grad else tensor).sum()
    if cmath.isfinite(total.item()):
        return True
    tensor = _as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return math.isfinite(tensor.amax().item()) and math.isfinite(tensor.amin().item())  # NaN propagates in both


def _are_finite(tensors: list[torch.Tensor]) -> bool:
    """Check tensors together: small host tensors by one sum, those of an accelerator with one wait."""
    if len(tensors) < _MIN_FUSED:
        return all(map(_tensor_is_finite, tensors))
    small: list[torch.Tensor] = []
    on_devices: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        is_plain = _is_plain(tensor)
        if is_plain and not tensor.is_cpu:
            on_devices.setdefault(tensor.device, []).append(tensor)
        elif is_plain and 1 < tensor.numel() <= _SMALL_NUMEL:
            small.append(tensor)
        elif not (_strided_is_finite(tensor) if is_plain else _tensor_is_finite(tensor)):
            return False
    if len(small) > 1:
        with torch.no_grad():
            small = [torch.cat([tensor if tensor.dim() == 1 else tensor.ravel() for tensor in small])]
    if small and not _strided_is_finite(small[0]):
        return False
    # Queue the work on all accelerators before waiting for the first.
    flags = [_flag(group) for group in on_devices.values()]
    return not any(flag is not None and flag.item() for flag in flags)


def _accelerator_of(tensor: torch.Tensor) -> Hashable | None:
    """Return the tensor's accelerator; None for the host and for meta tensors."""
    return None if tensor.is_cpu or tensor.is_meta else tensor.device


def _nonfinite_flag(output: Any, accelerator_of: Callable[[torch.Tensor], Hashable | None]) -> bool | torch.Tensor:
    if type(output) is float:
        return not math.isfinite(output)
    if isinstance(output, torch.Tensor) and accelerator_of(output) is None:
        return not _tensor_is_finite(output)
    tensors: list[torch.Tensor] = []
    try:
        if not _gather((output,), tensors):
            return True
    except TypeError:
        if _are_finite([tensor for tensor in tensors if accelerator_of(tensor) is None]):
            raise
        return True
    by_device: dict[Hashable | None, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(accelerator_of(tensor), []).append(tensor)
    if not _are_finite(by_device.pop(None, [])):
        return True
    flags = [flag for group in by_device.values() if (flag := _flag(group)) is not None]
    if len(flags) > 1:
        flags = [torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags]).any()]
    return flags[0] if flags else False


def _flag(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Return whether any tensor holds NaN or infinity, bool () on the tensors' device; None if they hold no numbers.

    Uses the infinity norm: a sum may overflow, and `isfinite` writes several tensors of its argument's size.
    """
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for part in (part for tensor in tensors for part in _reducible(tensor, may_wait=False)):
        by_dtype.setdefault(part.dtype, []).append(part)
    norms: list[torch.Tensor] = []
    for group in by_dtype.values():
        if len(group) == 1 or group[0].device.type == "xla":  # XLA fuses these itself
            norms += [torch.linalg.vector_norm(part, math.inf) for part in group]
        else:
            norms += torch._foreach_norm(group, math.inf)  # noqa: SLF001 - clip_grad_norm_ uses it
    if len(norms) > 1:
        return torch.stack(norms).lt(math.inf).all().logical_not()
    return norms[0].lt(math.inf).logical_not() if norms else None  # NaN is not less


def _reducible(tensor: torch.Tensor, *, may_wait: bool) -> list[torch.Tensor]:
    """Return the tensor's numbers as strided tensors of real dtypes, without graph, none of them empty."""
    if not _can_be_nonfinite(tensor):
        return []
    tensor = _local(tensor)
    if tensor.is_nested:
        if may_wait or tensor.layout is torch.strided:  # its sizes are on the host
            return [part for row in tensor.unbind() for part in _reducible(row, may_wait=may_wait)]
        tensor = _rows_of_jagged(tensor)
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values() if may_wait or tensor.is_coalesced() else tensor._values()  # noqa: SLF001
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.dtype.itemsize == 1:  # float8 can neither be summed nor compared
        tensor = tensor.float()
    if tensor.is_complex():  # a large complex number has an infinite norm, and complex32 has few operations
        tensor = _as_real(tensor)
    return [tensor] if tensor.numel() > 0 else []


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without graph; of a DTensor this rank's shard, since its reductions are collectives."""
    to_local = None if type(tensor) in _PLAIN_TYPES else getattr(tensor, "to_local", None)
    tensor = tensor if to_local is None else to_local()
    return tensor.detach() if tensor.requires_grad else tensor


def _can_be_nonfinite(tensor: torch.Tensor) -> bool:
    is_inexact = tensor.is_floating_point() or tensor.is_complex()  # not integers, bools, quantised integers
    return is_inexact and not tensor.is_meta and tensor.dtype not in _ALWAYS_FINITE


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _rows_of_jagged(tensor: torch.Tensor) -> torch.Tensor:
    """Return a jagged tensor's buffer with zeros outside of its rows; only the device knows where the rows are."""
    nested: Any = tensor  # torch has no public type for it
    buffer, starts, lengths = nested.values(), nested.offsets()[:-1], nested.lengths()
    buffer = buffer.float() if buffer.dtype.itemsize == 1 else buffer
    ends = nested.offsets()[1:] if lengths is None else starts + lengths
    dim = nested._ragged_idx - 1  # noqa: SLF001 - the rows' dimension; no public name
    marks = torch.zeros(buffer.shape[dim] + 1, dtype=torch.int64, device=buffer.device)
    one = torch.ones_like(starts, dtype=torch.int64)
    in_a_row = marks.index_add(0, starts, one).index_add(0, ends, -one).cumsum(0)[:-1] > 0
    shape = [-1 if axis == dim else 1 for axis in range(buffer.dim())]
    zeros: torch.Tensor = buffer.masked_fill(~in_a_row.view(shape), 0)
    return zeros


def _find(value: Any, path: str) -> str | None:
    if isinstance(value, torch.Tensor):
        return _find_in_tensor(value, path)
    if isinstance(value, Mapping):
        items = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = ((f"{path}.{name}", item) for name, item in zip(value._fields, value, strict=True))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif _scalar_is_finite(value):
        return None
    elif hasattr(value, "dtype"):
        return _find_in_array(value, path)
    else:
        return _describe(path, (), value, type(value).__name__)
    return next((found for item_path, item in items if (found := _find(item, item_path)) is not None), None)


def _find_in_tensor(tensor: torch.Tensor, path: str) -> str | None:
    local = _local(tensor)
    if hasattr(tensor, "to_local"):
        path += ".to_local()"
    if not _can_be_nonfinite(local):
        return None
    if local.is_nested:
        rows = enumerate(local.unbind())
        return next((found for i, row in rows if (found := _find_in_tensor(row, f"{path}[{i}]")) is not None), None)
    if local.layout is torch.sparse_coo:
        return _find_in_tensor(local.coalesce().values(), f"{path}.coalesce().values()")
    if local.layout is not torch.strided:
        return _find_in_tensor(local.values(), f"{path}.values()")
    num_nonfinite, position, value = 0, 0, math.nan
    for number, part in enumerate(torch.split(local.reshape(-1), _CHUNK_NUMEL)):
        # float8 and complex32 have no isfinite.
        chunk = part.float() if part.dtype.itemsize == 1 else part
        chunk = chunk.to(torch.complex64) if chunk.dtype is torch.complex32 else chunk
        is_nonfinite = chunk.isfinite().logical_not()
        num_in_chunk = int(is_nonfinite.sum())
        if num_in_chunk and not num_nonfinite:
            first = int(is_nonfinite.to(torch.uint8).argmax())  # argmax returns the first
            position, value = number * _CHUNK_NUMEL + first, chunk[first].item()
        num_nonfinite += num_in_chunk
    if not num_nonfinite:
        return None
    kind = f"{str(local.dtype).removeprefix('torch.')} {tuple(local.shape)} on {local.device}"
    index = _index_of(position, local.shape)
    return _describe(path, index, value, kind, num_nonfinite, local.numel())


def _find_in_array(array: Any, path: str) -> str:
    is_nonfinite = ~sys.modules["numpy"].isfinite(array)
    index = _index_of(int(is_nonfinite.argmax()), array.shape)
    kind = f"NumPy {array.dtype} {array.shape}"
    return _describe(path, index, array[index], kind, int(is_nonfinite.sum()), array.size)


def _describe(
    path: str, index: tuple[int, ...], value: Any, kind: str, num_nonfinite: int = 1, num_values: int = 1
) -> str:
    if index:
        path += f"[{', '.join(map(str, index))}]"
    if isinstance(value, Decimal):
        value = math.nan if value.is_nan() else float(value)  # a signalling NaN would raise
    elif isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
        path, value = (f"{path}.imag", value.imag) if math.isfinite(value.real) else (f"{path}.real", value.real)
    text = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    verb = "is" if num_nonfinite == 1 else "are"
    count = "" if num_values == 1 else f"{num_nonfinite} of {num_values} values {verb} not finite, "
    return f"{path} is {text} ({count}{kind})"


def _index_of(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of the number at a position in row-major order."""
    return tuple(map(int, torch.unravel_index(torch.tensor(position), tuple(shape))))
