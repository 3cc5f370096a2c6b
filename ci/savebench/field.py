"""The contestants, in the order of the tables."""

from ci.savebench.contestant import Contestant
from ci.savebench.meta_ones import MetaAsync, MetaSave
from ci.savebench.ours import Background, BackgroundShared, Foreground, Shared
from ci.savebench.snapshot_ones import SnapshotAsyncTake, SnapshotTake
from ci.savebench.torch_ones import (
    DcpCache,
    DcpPinned,
    DcpProcess,
    DcpProcessStager,
    DcpSave,
    DcpStager,
    DcpThread,
    IgniteCheckpoint,
    TorchSave,
)

_KINDS: tuple[type[Contestant], ...] = (
    Foreground,
    Shared,
    Background,
    BackgroundShared,
    TorchSave,
    IgniteCheckpoint,
    DcpSave,
    DcpThread,
    DcpCache,
    DcpStager,
    DcpPinned,
    DcpProcess,
    DcpProcessStager,
    SnapshotTake,
    SnapshotAsyncTake,
    MetaSave,
    MetaAsync,
)
FIELD: dict[str, type[Contestant]] = {kind.name: kind for kind in _KINDS}
_REPLICATED = tuple(name for name, kind in FIELD.items() if kind not in (DcpCache, DcpPinned, MetaSave, MetaAsync))
_SHARDED = tuple(
    kind.name for kind in (Foreground, Background, DcpSave, DcpThread, DcpCache, DcpProcess, MetaSave, MetaAsync)
)
_ON_CUDA = tuple(kind.name for kind in (Foreground, Background, TorchSave, DcpSave, DcpThread, DcpPinned))
_SHARDED_ON_CUDA = tuple(kind.name for kind in (Foreground, Background, DcpSave, DcpThread, DcpPinned, MetaAsync))


def names_of(*, is_sharded: bool, device: str) -> tuple[str, ...]:
    """Return the names of the contestants that save a job's state by default.

    Args:
        is_sharded: whether each rank has a shard of the state.
        device: type of the device that has it.
    """
    if device == "cuda":
        return _SHARDED_ON_CUDA if is_sharded else _ON_CUDA
    return _SHARDED if is_sharded else _REPLICATED
