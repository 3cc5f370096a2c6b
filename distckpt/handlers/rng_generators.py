"""Read and set the states of this process's random number generators.

These are Python's ``random``, NumPy's global generator if NumPy is imported, torch's on the CPU and, if CUDA is in use,
on the current device, and named generators of torch, Python and NumPy. A state consists of tensors, numbers, text and
dicts, so it loads without executing code. Rank-local; issues no collectives.
"""

import hashlib
import importlib
import json
import random
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_NUMPY_GLOBAL = "MT19937"
_NUMPY_KINDS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_SEED_BYTES = (8, 16)
"""Sizes of states that start with a seed, int64: an XLA device's, and a CUDA device's, with an offset, int64."""


def is_generator(obj: object) -> bool:
    """Return True for a generator of torch, Python or NumPy whose state can be read and set."""
    if isinstance(obj, torch.Generator):
        return True
    if isinstance(obj, random.Random):
        return not isinstance(obj, random.SystemRandom)
    return _is_from_numpy(obj)


def capture(generators: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return copies of the states of all generators.

    The keys are ``python``, ``torch``, and, if in use, ``numpy``, ``cuda`` and ``generators``, for the named ones.

    Example:
        >>> before = capture()
        >>> first = random.random()
        >>> restore(before)
        []
        >>> random.random() == first
        True
    """
    state: dict[str, Any] = {"python": _read_python(random), "torch": torch.get_rng_state()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_state = numpy_random.get_state(legacy=False)
        if numpy_state["bit_generator"] == _NUMPY_GLOBAL:  # a program may have replaced it by another kind
            state["numpy"] = _pack_numpy(numpy_state)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has not typed it
        state["cuda"] = torch.cuda.get_rng_state()
    if generators:
        state["generators"] = {name: _read(generator) for name, generator in generators.items()}
    return state


def restore(state: Mapping[str, Any], generators: Mapping[str, Any] | None = None) -> list[str]:
    """Set all generators of a state, or none. Return a phrase for each generator that does not exist here.

    Raises:
        ValueError: `state` is no state of random number generators.
    """
    before = capture(generators)
    try:
        return _restore(state, generators or {})
    except Exception as error:  # each kind of generator raises another type
        _restore(before, generators or {})
        raise ValueError(f"this is no state of random number generators: {type(error).__name__}: {error}") from error


def derive(states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """Return a state for a new rank, a pure function of the other ranks' states.

    A named generator with the same state on several ranks keeps it. All other states differ from rank to rank.
    """
    words = hashlib.blake2b(f"rank {rank}".encode() + _to_bytes(list(states))).digest()
    first = states[0]
    derived: dict[str, Any] = {
        key: _seed(state, hashlib.blake2b(words + key.encode()).digest())
        for key, state in first.items()
        if key != "generators"
    }
    if "generators" in first:
        derived["generators"] = {
            name: state
            if len(states) > 1 and len({_to_bytes(one.get("generators", {}).get(name)) for one in states}) == 1
            else _seed(state, hashlib.blake2b(words + b"own " + name.encode()).digest())
            for name, state in first["generators"].items()
        }
    return derived


def _restore(state: Mapping[str, Any], generators: Mapping[str, Any]) -> list[str]:
    absent = []
    _set_python(random, state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state and not _set_numpy_global(state["numpy"]):
        absent.append(f"NumPy's global generator is missing, or not of the kind {_NUMPY_GLOBAL}")
    if "cuda" in state:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        else:
            absent.append("there is no CUDA device here")
    for name, generator_state in state.get("generators", {}).items():
        if name in generators:
            _set(generators[name], generator_state)
        else:
            absent.append(f"there is no generator {name!r} here")
    return absent


def _read(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return _read_python(generator)
    if _is_from_numpy(generator):
        is_legacy = hasattr(generator, "get_state")  # a RandomState, which has more state than its bit generator
        state = generator.get_state(legacy=False) if is_legacy else generator.bit_generator.state
        return {"numpy": _numpy_to_json(state)}
    return generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        _set_python(generator, state)
    elif _is_from_numpy(generator):
        numpy_state = _arrays_from_json(json.loads(state["numpy"]))
        if hasattr(generator, "set_state"):
            generator.set_state(numpy_state)
        else:
            generator.bit_generator.state = numpy_state
    else:
        generator.set_state(state)


def _read_python(generator: Any) -> dict[str, Any]:
    version, words, gauss = generator.getstate()
    return {"version": version, "words": _pack(words), "gauss": gauss}


def _set_python(generator: Any, state: Mapping[str, Any]) -> None:
    generator.setstate((state["version"], _unpack(state["words"]), state["gauss"]))


def _set_numpy_global(state: Mapping[str, Any]) -> bool:
    try:
        numpy_random: Any = importlib.import_module("numpy.random")
    except ImportError:
        return False
    if numpy_random.get_state(legacy=False)["bit_generator"] != _NUMPY_GLOBAL:
        return False
    numpy_random.set_state((_NUMPY_GLOBAL, _unpack(state["words"]), state["pos"], state["has_gauss"], state["gauss"]))
    return True


def _is_from_numpy(obj: object) -> bool:
    numpy_random = sys.modules.get("numpy.random")
    return numpy_random is not None and isinstance(obj, numpy_random.Generator | numpy_random.RandomState)


def _numpy_to_json(state: Any) -> str:
    def to_plain(array: Any) -> Any:  # or a scalar
        return {"array": array.tolist(), "dtype": str(array.dtype)} if array.ndim else array.item()

    return json.dumps(state, default=to_plain)


def _arrays_from_json(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if "dtype" in state:
        numpy: Any = importlib.import_module("numpy")
        return numpy.array(state["array"], dtype=state["dtype"])
    return {key: _arrays_from_json(value) for key, value in state.items()}


def _pack_numpy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "words": _pack(state["state"]["key"].tolist()),
        "pos": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _seed(state: Any, seed: bytes) -> Any:
    """Return a state of the same kind, made from a seed; the state itself if its kind is not known."""
    number = int.from_bytes(seed[:8], "little") >> 1
    if isinstance(state, torch.Tensor):
        if state.numel() in _SEED_BYTES:
            return torch.frombuffer(bytearray(number.to_bytes(state.numel(), "little")), dtype=torch.uint8).clone()
        seeded = torch.Generator().manual_seed(number).get_state()
        return seeded if seeded.shape == state.shape else state
    if not isinstance(state, Mapping):
        return state
    if "version" in state:
        return _read_python(random.Random(number))  # noqa: S311 - no secret depends on it
    numpy_random: Any = importlib.import_module("numpy.random")
    if "numpy" not in state:
        return _pack_numpy(numpy_random.RandomState(number % 2**32).get_state(legacy=False))
    numpy_state = json.loads(state["numpy"])
    if numpy_state["bit_generator"] in _NUMPY_KINDS:
        numpy_state |= getattr(numpy_random, numpy_state["bit_generator"])(number).state
        numpy_state |= {"has_gauss": 0} if "has_gauss" in numpy_state else {}
    return {"numpy": _numpy_to_json(numpy_state)}


def _to_bytes(state: Any) -> bytes:
    if isinstance(state, torch.Tensor):
        return bytes(state.contiguous().view(torch.uint8).tolist())
    if isinstance(state, Mapping):
        return b"".join(repr(key).encode() + _to_bytes(state[key]) for key in sorted(state))
    if isinstance(state, list):
        return b"".join(map(_to_bytes, state))
    return repr(state).encode()


def _pack(words: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Return 32-bit words as a tensor: uint8 (4 * len(words),), little-endian."""
    return torch.frombuffer(bytearray(struct.pack(f"<{len(words)}I", *words)), dtype=torch.uint8).clone()


def _unpack(data: torch.Tensor) -> tuple[int, ...]:
    raw = bytes(data.tolist())
    return struct.unpack(f"<{len(raw) // 4}I", raw)
