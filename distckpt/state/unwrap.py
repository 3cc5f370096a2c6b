"""DistributedDataParallel, DataParallel, torch.compile -> the module the user wrote.

Owns which wrappers there are and how to see through them. Must not know what is done with the module.
Layer L2.
"""

import sys
from typing import Any

from torch import nn

__all__ = ["unwrap", "unwrap_once"]


def unwrap(obj: Any) -> Any:
    """Return the module that `obj` wraps, through any nesting of wrappers; `obj` itself if it wraps none.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    while (inner := unwrap_once(obj)) is not obj:
        obj = inner
    return obj


def unwrap_once(obj: Any) -> Any:
    """Return what the outermost wrapper of `obj` wraps; `obj` itself if there is none."""
    if isinstance(obj, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return obj.module
    if _is_compiled(obj):
        return obj._orig_mod  # noqa: SLF001 - torch.compile offers no other way to it
    return obj


def _is_compiled(obj: Any) -> bool:
    # Not imported here: it takes seconds, and there is no compiled module before somebody else imported it.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(obj, dynamo.OptimizedModule)
