"""The random number generators of this process <-> plain state.

Owns which generators there are and how each is read and set: Python's ``random``, NumPy's global one if it is
imported, torch's on the CPU and on the current CUDA device if CUDA is in use, and those that a program names. A state
holds tensors, numbers, text and dicts alone, so that it loads without executing code. Must not know about ranks.
Rank-local; issues no collectives. Layer L2.
"""

import importlib
import random
import struct
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["capture", "put"]

_Generators = Mapping[str, torch.Generator]
_PYTHON_VERSION = 3  # of the tuple that random.getstate() returns
_NUMPY_KIND = "MT19937"


def capture(generators: _Generators | None = None) -> dict[str, Any]:
    """Return the state of every generator.

    Args:
        generators: the program's own, by name.

    Returns:
        ``python``, ``torch``, and where they are in use ``numpy``, ``cuda`` and ``generators``. Copies: what is drawn
        later does not change them.

    Example:
        >>> before = capture()
        >>> first = random.random()
        >>> put(before)
        []
        >>> random.random() == first
        True
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": _packed(words), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        held = numpy_random.get_state(legacy=False)
        if held["bit_generator"] == _NUMPY_KIND:  # a program may have put another kind in its place
            state["numpy"] = {
                "words": _packed(held["state"]["key"].tolist()),
                "pos": int(held["state"]["pos"]),
                "has_gauss": int(held["has_gauss"]),
                "gauss": float(held["gauss"]),
            }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has not typed it
        state["cuda"] = torch.cuda.get_rng_state()
    if generators:
        state["generators"] = {name: generator.get_state() for name, generator in generators.items()}
    return state


def put(state: Mapping[str, Any], generators: _Generators | None = None) -> list[str]:
    """Set every generator that `state` tells of: all of them, or none.

    Args:
        state: what :func:`capture` returned.
        generators: the program's own, by name.

    Returns:
        What the state tells of and is not there to be set, as phrases.

    Raises:
        ValueError: it is no such state.
    """
    before = capture(generators)
    try:
        return _put(state, generators or {})
    except Exception as error:  # each generator refuses in words of its own
        _put(before, generators or {})
        msg = f"this is no state of random number generators: {type(error).__name__}: {error}"
        raise ValueError(msg) from error


def _put(state: Mapping[str, Any], generators: _Generators) -> list[str]:
    absent = []
    python = state["python"]
    random.setstate((python["version"], _unpacked(python["words"]), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and not _put_numpy(state["numpy"]):
        absent.append(f"NumPy's global generator is missing, or not of the kind {_NUMPY_KIND}")
    if "cuda" in state:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        else:
            absent.append("there is no CUDA device here")
    for name, held in state.get("generators", {}).items():
        if name in generators:
            generators[name].set_state(held)
        else:
            absent.append(f"there is no generator {name!r} here")
    return absent


def _put_numpy(held: Mapping[str, Any]) -> bool:
    try:
        numpy_random: Any = importlib.import_module("numpy.random")
    except ImportError:
        return False
    if numpy_random.get_state(legacy=False)["bit_generator"] != _NUMPY_KIND:
        return False
    words = _unpacked(held["words"])
    numpy_random.set_state((_NUMPY_KIND, words, held["pos"], held["has_gauss"], held["gauss"]))
    return True


def _packed(words: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Lay words of 32 bits into a tensor: uint8 (4 * len(words),), the lowest byte of each first."""
    return torch.frombuffer(bytearray(struct.pack(f"<{len(words)}I", *words)), dtype=torch.uint8).clone()


def _unpacked(data: torch.Tensor) -> tuple[int, ...]:
    raw = bytes(data.tolist())
    return struct.unpack(f"<{len(raw) // 4}I", raw)
