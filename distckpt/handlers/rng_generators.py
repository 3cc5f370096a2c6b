"""The random number generators of this process <-> plain state.

Owns which generators there are and how each is read and set: Python's ``random``, NumPy's global one if it is
imported, torch's on the CPU and on the current CUDA device if CUDA is in use, and those that a program names: torch's,
Python's and NumPy's. A state holds tensors, numbers, text and dicts alone, so that it loads without executing code.
Rank-local; issues no collectives.
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

__all__ = ["capture", "derived", "is_generator", "put"]

_Generators = Mapping[str, Any]
_NUMPY_KIND = "MT19937"
_NUMPY_KINDS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_SEED_BYTES = (8, 16)
"""Lengths of states that begin with a seed, int64: an XLA device's, and a CUDA device's with its offset, int64."""


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
    state: dict[str, Any] = {"python": _state_of_python(random), "torch": torch.get_rng_state()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        held = numpy_random.get_state(legacy=False)
        if held["bit_generator"] == _NUMPY_KIND:  # a program may have put another kind in its place
            state["numpy"] = _state_of_numpy(held)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has not typed it
        state["cuda"] = torch.cuda.get_rng_state()
    if generators:
        state["generators"] = {name: _state_of(generator) for name, generator in generators.items()}
    return state


def is_generator(one: object) -> bool:
    """Return True for a generator of torch's, Python's or NumPy's whose state can be read and set."""
    if isinstance(one, torch.Generator):
        return True
    if isinstance(one, random.Random):
        return not isinstance(one, random.SystemRandom)
    return _is_numpys(one)


def derived(states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """Return a state for a rank that had none, from those of the other ranks: the same each time.

    Args:
        states: what :func:`capture` returned on these. One of the program's own generators that is equal on several
            ranks is meant to be, and stays so; all else differs for each rank.
        rank: which one.
    """
    digest = hashlib.blake2b(f"rank {rank}".encode())
    _feed(digest, list(states))
    words = digest.digest()
    model = states[0]
    state: dict[str, Any] = {
        key: _seeded(held, hashlib.blake2b(words + key.encode()).digest())
        for key, held in model.items()
        if key != "generators"
    }
    if "generators" in model:
        state["generators"] = {
            name: held
            if len(states) > 1 and all(_are_equal(held, one.get("generators", {}).get(name)) for one in states)
            else _seeded(held, hashlib.blake2b(words + b"own " + name.encode()).digest())
            for name, held in model["generators"].items()
        }
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
    _put_python(random, state["python"])
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
            _put_one(generators[name], held)
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


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return _state_of_python(generator)
    if _is_numpys(generator):
        is_older = hasattr(generator, "get_state")  # a RandomState, which keeps more than its bit generator does
        state = generator.get_state(legacy=False) if is_older else generator.bit_generator.state
        return {"numpy": json.dumps(state, default=_listed)}
    return generator.get_state()


def _put_one(generator: Any, held: Any) -> None:
    if isinstance(generator, random.Random):
        _put_python(generator, held)
    elif _is_numpys(generator):
        state = _arrayed(json.loads(held["numpy"]))
        if hasattr(generator, "set_state"):
            generator.set_state(state)
        else:
            generator.bit_generator.state = state
    else:
        generator.set_state(held)


def _is_numpys(one: object) -> bool:
    numpy_random = sys.modules.get("numpy.random")
    return numpy_random is not None and isinstance(one, numpy_random.Generator | numpy_random.RandomState)


def _listed(array: Any) -> Any:
    """Return an array or a scalar of NumPy's for JSON."""
    return {"array": array.tolist(), "dtype": str(array.dtype)} if array.ndim else array.item()


def _arrayed(state: Any) -> Any:
    """Undo :func:`_listed`."""
    if not isinstance(state, dict):
        return state
    if "dtype" in state:
        numpy: Any = importlib.import_module("numpy")
        return numpy.array(state["array"], dtype=state["dtype"])
    return {key: _arrayed(value) for key, value in state.items()}


def _state_of_python(generator: Any) -> dict[str, Any]:
    version, words, gauss = generator.getstate()
    return {"version": version, "words": _packed(words), "gauss": gauss}


def _put_python(generator: Any, held: Mapping[str, Any]) -> None:
    generator.setstate((held["version"], _unpacked(held["words"]), held["gauss"]))


def _state_of_numpy(held: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "words": _packed(held["state"]["key"].tolist()),
        "pos": int(held["state"]["pos"]),
        "has_gauss": int(held["has_gauss"]),
        "gauss": float(held["gauss"]),
    }


def _seeded(held: Any, seed: bytes) -> Any:
    """Return a state of the kind of `held`, from a seed; `held` itself where its kind is not known."""
    number = int.from_bytes(seed[:8], "little") >> 1
    fresh: Any = held
    if isinstance(held, torch.Tensor) and held.numel() in _SEED_BYTES:
        fresh = torch.frombuffer(bytearray(number.to_bytes(held.numel(), "little")), dtype=torch.uint8).clone()
    elif isinstance(held, torch.Tensor):
        of_torch = torch.Generator().manual_seed(number).get_state()
        fresh = of_torch if of_torch.shape == held.shape else held
    elif isinstance(held, Mapping) and "version" in held:
        fresh = _state_of_python(random.Random(number))  # noqa: S311 - no secret depends on it
    elif isinstance(held, Mapping):
        numpy_random: Any = importlib.import_module("numpy.random")
        if "numpy" not in held:
            return _state_of_numpy(numpy_random.RandomState(number % 2**32).get_state(legacy=False))
        state = json.loads(held["numpy"])
        if state["bit_generator"] in _NUMPY_KINDS:
            state |= getattr(numpy_random, state["bit_generator"])(number).state
            state |= {"has_gauss": 0} if "has_gauss" in state else {}
            fresh = {"numpy": json.dumps(state, default=_listed)}
    return fresh


def _are_equal(one: Any, other: Any) -> bool:
    first, second = hashlib.blake2b(), hashlib.blake2b()
    _feed(first, one)
    _feed(second, other)
    return first.digest() == second.digest()


def _feed(digest: "hashlib.blake2b", state: Any) -> None:
    if isinstance(state, torch.Tensor):
        digest.update(bytes(state.contiguous().view(torch.uint8).tolist()))
    elif isinstance(state, Mapping):
        for key in sorted(state):
            digest.update(repr(key).encode())
            _feed(digest, state[key])
    elif isinstance(state, list):
        for one in state:
            _feed(digest, one)
    else:
        digest.update(repr(state).encode())


def _packed(words: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Lay words of 32 bits into a tensor: uint8 (4 * len(words),), the lowest byte of each first."""
    return torch.frombuffer(bytearray(struct.pack(f"<{len(words)}I", *words)), dtype=torch.uint8).clone()


def _unpacked(data: torch.Tensor) -> tuple[int, ...]:
    raw = bytes(data.tolist())
    return struct.unpack(f"<{len(raw) // 4}I", raw)
