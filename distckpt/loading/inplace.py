"""Bytes of a file, straight into the memory of live tensors.

Owns which live tensor may take its bytes as they stand in the file, and what stands in its place in the state
meanwhile: the live tensor itself. So torch's ``load_state_dict`` does all else that it does, and copies a tensor onto
itself, which is nothing. The state's own tensor is let go of: the reader fills what is still referred to, and nothing
else. Must not know where the bytes come from.
"""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from distckpt.loading.plain_objects import is_plain, tensors_of

__all__ = [
    "Claim",
    "Unread",
    "claims_of_module",
    "claims_of_optimizer",
    "read_into",
    "with_tensors",
    "without_overlap",
]

_LONELY = {0: object()}
"""What nobody else refers to."""
_LONELY_MEMORY = torch.empty(1)
"""A tensor whose memory nobody else refers to."""
_BOUNCE_BYTES = 16 << 20
"""What is read at once on the way to a tensor that cannot take the bytes as they are."""


class Unread(Protocol):
    """Where the bytes are that a state's tensors do not hold yet; see ``storage.opened``."""

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Return where a tensor's storage begins; None if it holds what it should."""

    def fill(self) -> None:
        """Read what is to stand in all storages that are still referred to into them."""

    def read(self, parts: Iterable[tuple[int, int, int]]) -> None:
        """Read bytes into memory: each part is an address, a number of bytes, and where they stand."""


class Claim(NamedTuple):
    """A live tensor that a state's tensor is to be loaded into.

    Attributes:
        path: the keys that lead to the state's tensor.
        live: the live one.
        stride: the state's strides; its shape is the live one's, where it has a place.
        dtype: the state's.
        at: where its bytes stand; None if they are not to go straight into the live one.
        is_as_it_is: whether the live tensor can take the bytes as they are.
    """

    path: tuple[Any, ...]
    live: torch.Tensor
    stride: tuple[int, ...]
    dtype: torch.dtype
    at: int | None
    is_as_it_is: bool = True


def claims_of_module(module: nn.Module, state: Mapping[str, Any], unread: Unread) -> list[Claim]:
    """Return what a plain module's state is to be loaded into."""
    return [
        _claim((key,), live, state[key], unread, may_bounce=True)
        for key, live in tensors_of(module).items()
        if isinstance(state.get(key), torch.Tensor)
    ]


def claims_of_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], unread: Unread) -> list[Claim]:
    """Return what a plain optimizer's state is to be loaded into, where it has tensors of its own already.

    A tensor that somebody else refers to is left alone, as in what ``state_dict()`` has returned before, and so is one
    whose memory has another user: torch's optimizers take the tensors that they load, and write nothing into those
    that they had.
    """
    claims = []
    as_loaded: Any = torch.optim.Optimizer._process_value_according_to_param_policy  # noqa: SLF001 - no public way
    for ours, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for number, parameter in zip(theirs["params"], ours["params"], strict=True):
            given = state["state"].get(number)
            if not isinstance(given, dict) or not _is_only_here(optimizer.state, parameter):
                continue
            held, group = optimizer.state[parameter], [{**theirs, "params": [number]}]
            for key in given.keys() & held.keys():
                if not _is_only_here(held, key) or not all(map(_has_dimensions, (held[key], given[key]))):
                    continue
                live = held[key]
                if not _has_memory_of_its_own(live):
                    continue
                if as_loaded(parameter, live, number, group, key) is live:  # else it would take a copy of it
                    claims.append(_claim(("state", number, key), live, given[key], unread, may_bounce=False))
    return claims


def _has_dimensions(value: Any) -> bool:
    """Return False for what is no tensor, and for a step's number: optimizers convert these as they like."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _is_only_here(mapping: Mapping[Any, Any], key: Any) -> bool:
    return key in mapping and sys.getrefcount(mapping[key]) <= sys.getrefcount(_LONELY[0])


def _has_memory_of_its_own(tensor: torch.Tensor) -> bool:
    """Return True if no other tensor, array or process uses a tensor's memory."""
    if not _takes_bytes(tensor):
        return True  # its bytes do not go straight into it
    storage, lonely = tensor.untyped_storage(), _LONELY_MEMORY.untyped_storage()
    count: Any = torch._C._storage_Use_Count  # noqa: SLF001 - no public way
    is_torchs = storage.resizable() and not storage.is_shared()  # else it is NumPy's, say, or a mapped file's
    return is_torchs and count(storage._cdata) <= count(lonely._cdata)  # noqa: SLF001 - torch's identity of a storage


def _claim(
    path: tuple[Any, ...], live: torch.Tensor, given: torch.Tensor, unread: Unread, *, may_bounce: bool
) -> Claim:
    stride: tuple[int, ...] = ()
    dtype = given.dtype
    if not (_takes_bytes(live) and _takes_bytes(given) and live.shape == given.shape and given.is_cpu):
        return Claim(path, live, stride, dtype, None)
    at = unread.place_of(given)
    if at is None or not given.numel() or not _is_dense(given):
        return Claim(path, live, stride, dtype, None)
    at += int(given.storage_offset()) * dtype.itemsize
    stride = given.stride()
    has_same_form = live.dtype == dtype and _is_dense(live) and _have_same_order(live, given)
    if live.is_cpu and has_same_form:
        return Claim(path, live, stride, dtype, at)
    if not may_bounce and not (has_same_form and live.is_cuda):
        return Claim(path, live, stride, dtype, None)
    can_copy = live.dtype == dtype or not (live.is_complex() or given.is_complex())
    return Claim(path, live, stride, dtype, at if _is_dense(live) and can_copy else None, is_as_it_is=False)


def _takes_bytes(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and (tensor.is_cpu or tensor.is_cuda) and not (tensor.is_conj() or tensor.is_neg())


def _have_same_order(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.stride() == other.stride() or _strides(one) == _strides(other)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides that tell where an element lies: those of dimensions of one element do not."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements fill a block of memory, each in a place of its own."""
    if tensor.is_contiguous():
        return True
    expected = 1
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in dimensions if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def without_overlap(claims: Sequence[Claim]) -> list[Claim]:
    """Return those that may be read in any order: nothing else is loaded into their memory, but the same bytes again.

    Args:
        claims: of all objects, those without a place in the file too.
    """
    spans = sorted((*_span(one), number) for number, one in enumerate(claims) if one.live.numel())
    clusters: list[list[Claim]] = []
    kinds: list[set[tuple[int, int, int | None, torch.dtype]]] = []
    until = ("", 0)
    for device, begin, end, number in spans:
        if (device, begin) >= until:
            clusters.append([])
            kinds.append(set())
            until = (device, end)
        one = claims[number]
        clusters[-1].append(one)
        kinds[-1].add((begin, end, one.at, one.dtype))
        until = max(until, (device, end))
    alike = [one for one, its in zip(clusters, kinds, strict=True) if len(its) == 1 and one[0].at is not None]
    return [claim for cluster in alike for claim in cluster]


def _span(claim: Claim) -> tuple[str, int, int]:
    """Return the device of a live tensor, and the addresses that it lies between."""
    live = claim.live
    device = "cpu" if live.is_cpu else str(live.device)
    if not (live.is_cpu or live.is_cuda) or live.layout is not torch.strided:
        return device, 0, 0
    if _is_dense(live):
        begin = live.data_ptr()
        return device, begin, begin + live.nbytes
    storage = live.untyped_storage()
    return device, storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def with_tensors(state: Any, tensors: Iterable[tuple[tuple[Any, ...], torch.Tensor]]) -> Any:
    """Return a state with tensors in the places that lead to them; the one given is not changed."""
    twin, below = copy.copy(state), dict[Any, list[tuple[tuple[Any, ...], torch.Tensor]]]()
    for (key, *rest), tensor in tensors:
        if rest:
            below.setdefault(key, []).append((tuple(rest), tensor))
        else:
            twin[key] = tensor
    for key, inner in below.items():
        twin[key] = with_tensors(state[key], inner)
    return twin


def read_into(claims: Sequence[Claim], unread: Unread) -> None:
    """Read the bytes of live tensors into them, each once.

    Raises:
        OSError: they cannot be read; some tensors have been written to.
    """
    once = {_span(claim)[:2]: claim for claim in claims}.values()
    direct = [claim for claim in once if claim.is_as_it_is]
    unread.read((claim.live.data_ptr(), claim.live.nbytes, claim.at) for claim in direct if claim.at is not None)
    for claim in once:
        if not claim.is_as_it_is:
            _bounce(claim, unread)


def _bounce(claim: Claim, unread: Unread) -> None:
    """Read a tensor's bytes through memory of their own, a piece at a time where both lie in one order."""
    live, dtype, at = claim.live.detach(), claim.dtype, claim.at
    if at is None:
        return
    form = torch.empty_strided(live.size(), claim.stride, dtype=dtype, device="meta")
    if not (live.is_contiguous() and form.is_contiguous()):
        host = torch.empty_strided(live.size(), claim.stride, dtype=dtype, device="cpu")
        unread.read([(host.data_ptr(), host.nbytes, at)])
        live.copy_(host)
        return
    live = live.view(-1)
    step = max(_BOUNCE_BYTES // dtype.itemsize, 1)
    host = torch.empty(min(step, live.numel()), dtype=dtype, device="cpu")
    for begin in range(0, live.numel(), step):
        piece = host[: live.numel() - begin]
        unread.read([(piece.data_ptr(), piece.nbytes, at + begin * dtype.itemsize)])
        live[begin : begin + step].copy_(piece)
