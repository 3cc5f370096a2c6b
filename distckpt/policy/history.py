"""The checkpoints that a handler keeps, as a value: priorities and names, and what policies know of the files."""

import bisect
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

from distckpt._values import is_nan
from distckpt.policy.policies import Policy, SavedFile

Entry = tuple[int | float, str]
"""A kept checkpoint: its priority (higher is better) and its file name."""

PolicyKey = tuple[tuple[Policy, ...], bool]
"""Policies, and whether they see scores as priorities."""
_MAX_CHANGED_NAMES, _MAX_SEARCHES = 256, 8


def digest_of(value: object) -> str:
    """Return a digest of a plain value."""
    return hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=16).hexdigest()


class Settled(NamedTuple):
    """What a decision leaves for the next decision by the same policies, so that this one looks at few files only.

    Attributes:
        key: the policies, and whether priorities are scores.
        loose: names of the files that no policy with periods keeps, in the order of the saves.
        recent: names of the newest files, in the order of the saves.
        periods: for each policy with periods the last period that has a file; None for none.
    """

    key: PolicyKey
    loose: tuple[str, ...]
    recent: tuple[str, ...]
    periods: tuple[int | None, ...]


class History(Sequence[Entry]):
    """The kept checkpoints, lowest priority first. It does not change.

    Adding a checkpoint to a history of thousands copies references, and does not sort or hash the others again.

    Args:
        entries: the kept checkpoints.
        files: what is known of some of them, in the order of the saves. The others count as older.

    Attributes:
        entries: see above.
        digest: text. Histories with equal digests are equal. Equal histories have equal digests if they were made by
            the same additions and removals.
        settled: left by the decision that made this history; None if it was not made by one.

    Example:
        >>> history = History([(1, "a.pt"), (3, "c.pt")])
        >>> history.replace({"a.pt"}, SavedFile("b.pt", 2)).entries
        ((2, 'b.pt'), (3, 'c.pt'))
    """

    __slots__ = ("_changed", "_files", "_is_regular", "digest", "entries", "settled")

    def __init__(self, entries: Iterable[Entry] = (), files: Iterable[SavedFile] = ()) -> None:
        found, known = tuple(entries), {file.name: file for file in files}
        keys, priorities = [_sort_key(entry) for entry in found], {name: priority for priority, name in found}
        by_name = {name: SavedFile(name, priority) for name, priority in priorities.items() if name not in known}
        for name, file in known.items():
            if name in priorities:
                by_name[name] = file._replace(priority=priorities[name])
        # A history that a user loads may be in another order, or hold a name twice.
        is_regular = keys == sorted(keys) and len(by_name) == len(found)
        digest = digest_of((found, [tuple(file) for file in by_name.values()]) if known else found)
        self._fill(found, digest, by_name, {}, is_regular=is_regular)

    def _fill(
        self,
        entries: tuple[Entry, ...],
        digest: str,
        files: Mapping[str, SavedFile],
        changed: dict[str, SavedFile | None],
        *,
        is_regular: bool,
    ) -> None:
        self.entries, self.digest, self._is_regular = entries, digest, is_regular
        self._files, self._changed = files, changed  # in `changed`: added to `files` since, or None if removed
        self.settled: Settled | None = None

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def has_name(self, name: str) -> bool:
        """Return True if a checkpoint of that file name is kept."""
        return self._find(name) is not None

    def _find(self, name: str) -> SavedFile | None:
        return self._changed[name] if name in self._changed else self._files.get(name)

    @property
    def files(self) -> list[SavedFile]:
        """The files in the order of their saves. Those of which nothing is known come first, by their priorities."""
        changed = self._changed
        return [
            *(file for name, file in self._files.items() if name not in changed),
            *(file for file in changed.values() if file is not None),
        ]

    def with_priorities(self, entries: Iterable[Entry]) -> "History":
        """Return a history of the same files with other priorities."""
        return History(entries, self.files)

    def from_highest(self, priority: float) -> Iterator[Entry]:
        """Return the checkpoints from the highest down; those below `priority` may be left out."""
        for entry in reversed(self.entries):
            if self._is_regular and entry[0] < priority:
                return
            yield entry

    def replace(self, removed: Collection[str], added: SavedFile | None = None) -> "History":
        """Return the history without the `removed` names, and with an added checkpoint, which is the newest.

        Among equal priorities the added checkpoint counts as the highest one.
        """
        entries = self._without(removed)
        entry = None if added is None else (added.priority, added.name)
        if not self._is_regular:
            gone = {*removed, *(() if added is None else (added.name,))}
            files = [file for file in self.files if file.name not in gone]
            return History(
                entries if entry is None else sorted([*entries, entry], key=_sort_key),
                files if added is None else [*files, added],
            )
        if entry is not None:
            at = bisect.bisect_right(entries, _sort_key(entry), key=_sort_key)
            entries = entries[:at] + (entry,) + entries[at:]  # noqa: RUF005 - a third of the time
        changed = {**self._changed, **dict.fromkeys(removed)}
        if added is not None:
            changed.pop(added.name, None)
            changed[added.name] = added
        digest = digest_of((self.digest, sorted(removed), None if added is None else tuple(added)))
        made = History.__new__(History)
        made._fill(entries, digest, self._files, changed, is_regular=True)  # noqa: SLF001 - an object of this class
        if len(changed) > _MAX_CHANGED_NAMES:
            made._fill(entries, digest, {file.name: file for file in made.files}, {}, is_regular=True)  # noqa: SLF001
        return made

    def _without(self, removed: Collection[str]) -> tuple[Entry, ...]:
        entries = self.entries
        found = [file for file in map(self._find, removed) if file is not None]
        if not self._is_regular or len(found) > _MAX_SEARCHES:
            gone = frozenset(removed)
            return tuple(entry for entry in entries if entry[1] not in gone)
        places = []
        for file in found:
            key = _sort_key((file.priority, file.name))
            at = bisect.bisect_left(entries, key, key=_sort_key)
            while entries[at][1] != file.name:
                at += 1
            places.append(at)
        for at in sorted(places, reverse=True):
            entries = entries[:at] + entries[at + 1 :]
        return entries


def _sort_key(entry: Entry) -> tuple[bool, int | float]:
    # Histories of older releases may hold NaN: it sorts before all numbers, and is evicted first.
    return (False, 0) if is_nan(entry[0]) else (True, entry[0])
