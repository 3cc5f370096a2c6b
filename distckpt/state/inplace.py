"""Bytes of a file, straight into the memory of live tensors.

Owns which live tensor may take its bytes as they stand in the file, and what stands in its place in the state
meanwhile: the live tensor itself. So a module's or an optimizer's own ``load_state_dict`` does all else that it does,
and copies a tensor onto itself, which is nothing. Must not know where the bytes come from. Layer L2, below
:mod:`distckpt.state.restore`.
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = [
    "Claim",
    "Unread",
    "claims_of_module",
    "claims_of_optimizer",
    "parameters_by_number",
    "read_into",
    "storages_in",
    "with_live",
    "without_overlap",
]

_LONELY = {0: object()}
"""What nobody else refers to."""
_NEVER_STORAGES = (str, bytes, bytearray, int, float, complex, bool, type(None), torch.dtype, torch.device)
_BOUNCE_BYTES = 16 << 20
"""What is read at once on the way to a tensor that cannot take the bytes as they are."""


class Unread(Protocol):
    """Where the bytes are that a state's tensors do not hold yet; see ``storage.opened``."""

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Return where a tensor's storage begins; None if it holds what it should."""

    def fill(self, storages: Iterable[torch.UntypedStorage] | None) -> None:
        """Read what is to stand in storages of the state into them; None for all."""

    def read(self, parts: Iterable[tuple[int, int, int]]) -> None:
        """Read bytes into memory: each part is an address, a number of bytes, and where they stand."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A live tensor that a state's tensor is to be loaded into.

    Attributes:
        path: the keys that lead to the state's tensor.
        live: the live one.
        given: the state's.
        at: where its bytes stand; None if they are not to go straight into the live one.
        is_as_it_is: whether the live tensor can take the bytes as they are.
    """

    path: tuple[Any, ...]
    live: torch.Tensor
    given: torch.Tensor
    at: int | None
    is_as_it_is: bool = True


def claims_of_module(module: nn.Module, state: Mapping[str, Any], unread: Unread) -> list[Claim]:
    """Return what a module's state is to be loaded into, by torch's rules of names."""
    claims = []
    for prefix, part in module.named_modules(remove_duplicate=False):
        kept = {key: item for key, item in part._buffers.items() if key not in part._non_persistent_buffers_set}  # noqa: SLF001
        for name, live in (*part._parameters.items(), *kept.items()):  # noqa: SLF001 - as load_state_dict does
            key = f"{prefix}.{name}" if prefix else name
            given = state.get(key)
            if live is not None and isinstance(given, torch.Tensor):
                claims.append(_claim((key,), live, given, unread, may_bounce=True))
    return claims


def claims_of_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], unread: Unread) -> list[Claim]:
    """Return what an optimizer's state is to be loaded into, where it has tensors of its own already.

    A tensor that somebody else refers to is left alone, as in what ``state_dict()`` has returned before: torch's
    optimizers take the tensors that they load, and write nothing into those that they had.
    """
    claims = []
    for number, parameter in parameters_by_number(optimizer, state):
        its_state = state["state"].get(number)
        if parameter not in optimizer.state or not isinstance(its_state, dict):
            continue
        if not _is_only_here(optimizer.state, parameter):
            continue
        held = optimizer.state[parameter]
        for key, given in its_state.items():
            if isinstance(given, torch.Tensor) and key in held and _is_only_here(held, key):
                live = held[key]
                if isinstance(live, torch.Tensor):
                    claims.append(_claim(("state", number, key), live, given, unread, may_bounce=False))
    return claims


def parameters_by_number(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield which parameter each number in an optimizer's state stands for; the groups are known to fit."""
    for ours, theirs in zip(optimizer.param_groups, state["param_groups"], strict=True):
        yield from zip(theirs["params"], ours["params"], strict=True)


def _is_only_here(mapping: Mapping[Any, Any], key: Any) -> bool:
    return sys.getrefcount(mapping[key]) <= sys.getrefcount(_LONELY[0])


def _claim(
    path: tuple[Any, ...], live: torch.Tensor, given: torch.Tensor, unread: Unread, *, may_bounce: bool
) -> Claim:
    if not (_is_plain(live) and _is_plain(given) and live.shape == given.shape and given.device.type == "cpu"):
        return Claim(path, live, given, None)
    at = unread.place_of(given)
    if at is None or not given.numel() or not _is_dense(given):
        return Claim(path, live, given, None)
    at += int(given.storage_offset()) * given.element_size()
    has_same_form = live.dtype == given.dtype and _is_dense(live) and _strides(live) == _strides(given)
    if live.device.type == "cpu" and has_same_form:
        return Claim(path, live, given, at)
    if not may_bounce and not (has_same_form and live.device.type == "cuda"):
        return Claim(path, live, given, None)
    can_copy = live.dtype == given.dtype or not (live.is_complex() or given.is_complex())
    is_safe = live.device.type in ("cpu", "cuda") and _is_dense(live) and can_copy
    return Claim(path, live, given, at if is_safe else None, is_as_it_is=False)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not nn.parameter.is_lazy(tensor)
        and tensor.device.type in ("cpu", "cuda")
    )


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides that tell where an element lies: those of dimensions of one element do not."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements fill a block of memory, each in a place of its own."""
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
    spans = sorted(
        ((str(claim.live.device), *_span(claim), number) for number, claim in enumerate(claims) if claim.live.numel())
    )
    good: list[int] = []
    while spans:
        device, _, end, _ = spans[0]
        num = 1
        while num < len(spans) and spans[num][0] == device and spans[num][1] < end:
            end = max(end, spans[num][2])
            num += 1
        cluster, spans = spans[:num], spans[num:]
        kinds = {(begin, end, claims[number].at, claims[number].given.dtype) for _, begin, end, number in cluster}
        if len(kinds) == 1 and claims[cluster[0][3]].at is not None:
            good.extend(number for *_, number in cluster)
    return [claims[number] for number in sorted(good)]


def _span(claim: Claim) -> tuple[int, int]:
    """Return the addresses that a live tensor lies between."""
    live = claim.live
    if live.device.type not in ("cpu", "cuda") or live.layout is not torch.strided:
        return 0, 0
    if _is_dense(live):
        return live.data_ptr(), live.data_ptr() + live.nbytes
    storage = live.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def with_live(state: Any, claims: Iterable[tuple[tuple[Any, ...], torch.Tensor]]) -> Any:
    """Return a state with live tensors in the places that lead to them; the one given is not changed."""
    twin, below = copy.copy(state), dict[Any, list[tuple[tuple[Any, ...], torch.Tensor]]]()
    for (key, *rest), live in claims:
        if rest:
            below.setdefault(key, []).append((tuple(rest), live))
        else:
            twin[key] = live
    for key, inner in below.items():
        twin[key] = with_live(state[key], inner)
    return twin


def storages_in(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a state.

    Raises:
        LookupError: it holds something that may hide others.
    """
    if isinstance(tree, torch.Tensor):
        if tree.layout is torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from storages_in(key)
            yield from storages_in(item)
    elif isinstance(tree, list | tuple | set):
        for item in tree:
            yield from storages_in(item)
    elif not isinstance(tree, _NEVER_STORAGES):
        raise LookupError(type(tree))  # noqa: TRY004 - no fault of anybody's


def read_into(claims: Sequence[Claim], unread: Unread) -> None:
    """Read the bytes of live tensors into them, each once.

    Raises:
        OSError: they cannot be read; some tensors have been written to.
    """
    once = {(str(claim.live.device), claim.live.data_ptr()): claim for claim in claims}.values()
    direct = [claim for claim in once if claim.is_as_it_is]
    unread.read((claim.live.data_ptr(), claim.live.nbytes, claim.at) for claim in direct if claim.at is not None)
    for claim in once:
        if not claim.is_as_it_is:
            _bounce(claim, unread)


def _bounce(claim: Claim, unread: Unread) -> None:
    """Read a tensor's bytes through memory of their own, a piece at a time where both lie in one order."""
    live, given, at = claim.live.detach(), claim.given, claim.at
    if at is None:
        return
    if live.is_contiguous() and given.is_contiguous():
        live, given = live.view(-1), given.view(-1)
        step = max(_BOUNCE_BYTES // given.element_size(), 1)
        host = torch.empty(min(step, given.numel()), dtype=given.dtype)
        for begin in range(0, given.numel(), step):
            piece = host[: given.numel() - begin]
            unread.read([(piece.data_ptr(), piece.nbytes, at + begin * given.element_size())])
            live[begin : begin + step].copy_(piece)
        return
    host = torch.empty_strided(given.size(), given.stride(), dtype=given.dtype)
    unread.read([(host.data_ptr(), given.nbytes, at)])
    live.copy_(host)
