"""The module inside DistributedDataParallel, DataParallel and torch.compile, and the names these give to its state."""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

_COMPILED = "_orig_mod"
"""The child of an OptimizedModule that is the compiled module; ``torch.compile`` puts it into all names."""
_COMPILED_PARALLEL = f"{_COMPILED}.module."
"""How the names of a compiled DistributedDataParallel begin."""
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_STATE_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")


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
    """Return the object inside the outermost wrapper of `obj`; `obj` itself if there is none."""
    if isinstance(obj, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return obj.module
    # Not imported here: the import takes seconds, and a compiled module exists only after it.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and type(obj) is dynamo.OptimizedModule and not _has_own_state(obj):
        return obj._orig_mod  # noqa: SLF001 - torch.compile has no public way
    return obj


def _has_own_state(compiled: nn.Module) -> bool:
    """Return True if a compiled module saves or loads something else than the module inside of it."""
    own = vars(compiled)
    return (
        bool(own["_parameters"] or own["_buffers"] or own["_modules"].keys() - {_COMPILED})
        or any(own.get(hooks) for hooks in _STATE_HOOKS)
        or not own.keys().isdisjoint(_STATE_METHODS)
    )


def rename_for_module(module: nn.Module, state: Any) -> Any:
    """Return a state under the names of `module`, whether the saved module or parts of it were compiled or not.

    Args:
        module: unwrapped; parts of it may be compiled.
        state: a state dict, saved before or after ``torch.compile``.

    Returns:
        `state` itself if nothing was or is compiled, or if two names would become equal; else a new mapping of the same
        tensors.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> list(rename_for_module(layer, {"_orig_mod.weight": layer.weight}))
        ['weight']
    """
    if not isinstance(state, Mapping):
        return state
    paths = [f"{path}." for path, _ in module.named_modules(remove_duplicate=False)]
    compiled = {without_compiled(path): path for path in paths if path.endswith(f"{_COMPILED}.")}
    names = [key for key in state if isinstance(key, str)]
    if not compiled and not any(f"{_COMPILED}." in name for name in names):
        return state
    is_parallel = all(name.startswith(_COMPILED_PARALLEL) for name in names) and "module." not in paths
    names = [name.removeprefix(_COMPILED_PARALLEL) for name in names] if is_parallel else names
    # A part that was compiled in the saved module too keeps its names, also those of its own buffers or hooks.
    settled = {plain for plain, path in compiled.items() if any(name.startswith(path) for name in names)}

    def rename(name: str) -> str:
        name = name.removeprefix(_COMPILED_PARALLEL) if is_parallel else name
        plain = without_compiled(name)
        prefix = max((path for path in compiled if plain.startswith(path)), key=len, default=None)
        if prefix in settled:
            return name
        return plain if prefix is None else compiled[prefix] + plain[len(prefix) :]

    renamed: Any = OrderedDict((rename(key) if isinstance(key, str) else key, item) for key, item in state.items())
    if len(renamed) != len(state):
        return state
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):  # by module path; a wrapper's entry comes before its module's
        renamed._metadata = {rename(f"{path}.")[:-1] if path else path: item for path, item in metadata.items()}  # noqa: SLF001
    return renamed


def without_compiled(name: str) -> str:
    """Return a parameter's name without what ``torch.compile`` has put into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
