"""The ranks that write one file together: those that see the coordinator's storage.

Paths do not tell which ranks see one storage. A probe file does:

1. (coordinator) begin a file in its storage, with a random number in it.
2. (all ranks) look for that file and its number in this rank's own storage.
3. (coordinator) delete the file. It never had a checkpoint's name.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distckpt.backends.base import Backend
from distckpt.coordination import phases
from distckpt.saving.snapshot import WriteRange
from distckpt.storage.base import Chunk, Storage

_NAME = "probe.pt"
_NUM_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterGroup:
    """The ranks that write one file, equal on every rank.

    Attributes:
        ranks: in the order of their ranges; the coordinator is the last.
        check_replicas: whether replicas are compared before the save.
    """

    ranks: tuple[int, ...]
    check_replicas: bool = False

    def range_of(self, rank: int) -> WriteRange | None:
        """Return the range that a rank writes; None if it writes nothing."""
        return WriteRange(rank, self.ranks) if rank in self.ranks else None


def find_writers(
    backend: Backend,
    sync_point: Callable[[str], phases.SyncPoint],
    storage: Storage,
    *,
    coordinator: int,
    same_node: bool,
    timeout_s: float | None,
) -> tuple[int, ...]:
    """Collective. Return the ranks that can write into the coordinator's file; equal on every rank.

    Args:
        backend: the job's backend.
        sync_point: makes a phase's sync point from its description.
        storage: this rank's storage.
        coordinator: rank that commits the file.
        same_node: leave out the ranks of other nodes.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        The ranks in ascending order, but for the coordinator, which is the last.
    """
    if backend.world_size == 1:
        return (0,)
    with contextlib.ExitStack() as stack:

        def create() -> list[str]:
            return stack.enter_context(_probe(storage)) if backend.rank == coordinator else []

        point = sync_point("making a probe file")
        probe = phases.run(backend, point, create, timeout_s=timeout_s)[coordinator]

        def look_for() -> list[int]:
            return [backend.node, int(bool(probe) and _sees(storage, *probe))]

        found = phases.run(backend, sync_point("looking for the probe file"), look_for, timeout_s=timeout_s)
    home = found[coordinator][0]
    others = [
        rank
        for rank, (node, sees) in enumerate(found)
        if rank != coordinator and sees and (node == home or not same_node)
    ]
    return (*others, coordinator)


class WriterSearch:
    """Finds the ranks that see the coordinator's storage, with a cache: see :func:`find_writers`.

    Args:
        backend: the job's backend.
        storage: this rank's storage.
        coordinator: rank that commits the file.
        same_node: leave out the ranks of other nodes.
        cache: keeps the result for later saves; None to find it anew.
        timeout_s: seconds to wait for the other ranks; None for the default.
    """

    def __init__(
        self,
        backend: Backend,
        storage: Storage,
        coordinator: int,
        *,
        same_node: bool = False,
        cache: "WriterCache | None" = None,
        timeout_s: float | None = None,
    ) -> None:
        self._key = backend, storage, coordinator, same_node
        self._cache = WriterCache() if cache is None else cache
        self._timeout_s = timeout_s

    def _cached(self) -> tuple[int, ...] | None:
        return self._cache.ranks if self._cache.key == self._key else None

    def is_known(self) -> bool:
        """Rank-local. Return True if this rank's cache holds the ranks."""
        return self._cached() is not None

    def find(self, sync_point: Callable[[str], phases.SyncPoint], *, is_known: bool = False) -> tuple[int, ...]:
        """Return the ranks, the coordinator last. Collective unless `is_known`, which must be equal on every rank."""
        found = self._cached() if is_known else None
        if found is None:
            backend, storage, coordinator, same_node = self._key
            found = find_writers(
                backend, sync_point, storage, coordinator=coordinator, same_node=same_node, timeout_s=self._timeout_s
            )
            self._cache.key, self._cache.ranks = self._key, found
        return found


class WriterCache:
    """The last result of a :class:`WriterSearch`. A copy is empty, since a backend cannot be copied."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.ranks: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (WriterCache, ())


@contextlib.contextmanager
def _probe(storage: Storage) -> Iterator[list[str]]:
    """Keep a probe file during the body; yield its token and its content, or nothing if it cannot be made."""
    with contextlib.ExitStack() as stack:
        found: list[str] = []
        with contextlib.suppress(OSError, ValueError):  # the save itself will raise
            file = stack.enter_context(storage.create(_NAME))
            content = secrets.token_hex(_NUM_BYTES // 2)
            file.write([Chunk(0, content.encode())])
            file.sync()
            found = [file.token, content]
        yield found


def _sees(storage: Storage, token: str, content: str) -> bool:
    with contextlib.suppress(OSError, ValueError), storage.join(_NAME, token) as file:
        return file.read(0, _NUM_BYTES) == content.encode()
    return False
