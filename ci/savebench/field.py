"""The contestants, in the order of the tables."""

from ci.savebench.contestant import Contestant
from ci.savebench.ours import Background, BackgroundShared, Foreground, Shared
from ci.savebench.snapshot_ones import SnapshotAsyncTake, SnapshotTake
from ci.savebench.torch_ones import (
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
    DcpStager,
    DcpProcess,
    DcpProcessStager,
    SnapshotTake,
    SnapshotAsyncTake,
)
FIELD: dict[str, type[Contestant]] = {kind.name: kind for kind in _KINDS}
