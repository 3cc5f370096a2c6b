"""DistributedDataParallel, DataParallel, torch.compile -> the module the user wrote.

Owns which wrappers there are, how to see through them, and which names they give to a module's state. Must not know
what is done with the module.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["under_own_names", "unwrap", "unwrap_once"]

_COMPILED = "_orig_mod"
"""The child of an OptimizedModule that is the module itself: ``torch.compile`` puts it into all names."""
_COMPILED_PARALLEL = f"{_COMPILED}.module."
"""... and how the names of a compiled DistributedDataParallel begin."""


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


def under_own_names(module: nn.Module, state: Any) -> Any:
    """Return a state under the names that a module has for it, whether it or parts of it are compiled, or were.

    Args:
        module: unwrapped; parts of it may be compiled.
        state: a state dict, of the module as it is, as it was before ``torch.compile``, or after.

    Returns:
        The same state if all names are the module's, or two would become one; else a new one of the same tensors.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> list(under_own_names(layer, {"_orig_mod.weight": layer.weight}))
        ['weight']
    """
    if not isinstance(state, Mapping):
        return state
    own = [f"{path}." for path, _ in module.named_modules(remove_duplicate=False)]
    compiled = {_plain(path): path for path in own if path.endswith(f"{_COMPILED}.")}
    names = [key for key in state if isinstance(key, str)]
    if not compiled and not any(f"{_COMPILED}." in name for name in names):
        return state
    is_parallel = all(name.startswith(_COMPILED_PARALLEL) for name in names) and "module." not in own

    def renamed(name: str) -> str:
        plain = _plain(name.removeprefix(_COMPILED_PARALLEL) if is_parallel else name)
        prefix = max((one for one in compiled if plain.startswith(one)), key=len, default=None)
        return plain if prefix is None else compiled[prefix] + plain[len(prefix) :]

    return _renamed(state, renamed)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _renamed(state: Mapping[Any, Any], name_of: Callable[[str], str]) -> Any:
    twin: Any = OrderedDict((name_of(key) if isinstance(key, str) else key, item) for key, item in state.items())
    if len(twin) != len(state):
        return state
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):  # of modules by path; a wrapper's comes before that of the module inside
        twin._metadata = {name_of(f"{path}.")[:-1] if path else path: item for path, item in metadata.items()}  # noqa: SLF001
    return twin
