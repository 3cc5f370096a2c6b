"""Which ranks see the same directory: found out by a probe file, not assumed.

Owns that question. Must not know what is written there.

The protocol:

1. (all ranks) the saving rank begins a file in its directory and writes a number into it that nobody can guess.
2. (all ranks) each looks into its own directory, whatever its path: does it see that file, with that number in it?
3. (saving rank) the file is removed; it never had a checkpoint's name.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.storage.base import Storage

__all__ = ["WriterCache", "find_writers"]

_NAME = "probe.pt"
_NUM_BYTES = 16


def find_writers(
    backend: Backend,
    place: Callable[[str], phases.SyncPoint],
    storage: Storage,
    *,
    coordinator: int,
    is_node_enough: bool,
    timeout_s: float | None,
) -> tuple[int, ...]:
    """Collective. Return the ranks that can write into the coordinator's file, in rank order, the same on every rank.

    Args:
        backend: the job's.
        place: makes the place of a phase from what is done in it.
        storage: of this rank.
        coordinator: the saving rank; always among those that are returned.
        is_node_enough: leave out the ranks of other nodes, whatever they see.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """
    if backend.world_size == 1:
        return (0,)
    with contextlib.ExitStack() as stack:

        def make() -> list[str]:
            return stack.enter_context(_probe(storage)) if backend.rank == coordinator else []

        probe = phases.run(backend, place("making a probe file"), make, timeout_s=timeout_s)[coordinator]

        def look() -> list[int]:
            return [backend.node, int(bool(probe) and _sees(storage, *probe))]

        found = phases.run(backend, place("looking for the probe file"), look, timeout_s=timeout_s)
    home = found[coordinator][0]
    return tuple(
        rank
        for rank, (node, sees) in enumerate(found)
        if rank == coordinator or (sees and (node == home or not is_node_enough))
    )


class WriterCache:
    """What :func:`find_writers` found last. A copy knows nothing."""

    def __init__(self) -> None:
        self._where: tuple[Any, ...] = ()
        self._ranks: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WriterCache":
        """Return a new one: a backend cannot be copied."""
        return WriterCache()

    def __reduce__(self) -> tuple[Any, ...]:
        """Start anew in another process."""
        return (WriterCache, ())

    def of(self, backend: Backend, storage: Storage, coordinator: int) -> tuple[int, ...] | None:
        """Return the ranks that write into the coordinator's file, if they are known. Rank-local."""
        return self._ranks if self._where == (backend, storage, coordinator) else None

    def find(
        self,
        backend: Backend,
        place: Callable[[str], phases.SyncPoint],
        storage: Storage,
        *,
        coordinator: int,
        is_node_enough: bool,
        timeout_s: float | None,
    ) -> None:
        """Collective. Find out, and remember; see :func:`find_writers`."""
        self._ranks = find_writers(
            backend,
            place,
            storage,
            coordinator=coordinator,
            is_node_enough=is_node_enough,
            timeout_s=timeout_s,
        )
        self._where = (backend, storage, coordinator)


@contextlib.contextmanager
def _probe(storage: Storage) -> Iterator[list[str]]:
    """Have a probe file while the body runs; yields its name and what is in it, or nothing where none can be made."""
    with contextlib.ExitStack() as stack:
        found: list[str] = []
        with contextlib.suppress(OSError, ValueError):  # the save itself will say what is wrong there
            new = stack.enter_context(storage.create(_NAME))
            token = secrets.token_hex(_NUM_BYTES // 2)
            new.write(token.encode(), 0)
            new.sync()
            found = [new.token, token]
        yield found


def _sees(storage: Storage, temp: str, token: str) -> bool:
    with contextlib.suppress(OSError, ValueError), storage.join(_NAME, temp) as file:
        return file.read(0, _NUM_BYTES) == token.encode()
    return False
