"""The files and histories that a random program has to leave, computed with lists in place of files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distckpt.policy.history import Entry, History
from distckpt.policy.policies import Policy, SavedFile, policies_of
from distckpt.policy.retention import admit, wants
from tests.crash.program_plans import FOREIGN, Program, Result, Start

__all__ = ["Expected"]


@dataclass
class Kept:
    """The files that one handler has to keep.

    Attributes:
        history: the files. The priority without a score is the number of files saved before.
        orphans: files that may still exist, because a kill came before their removal.
        is_tidy: whether the handler has saved in the present start, or was resumed from. It leaves no orphans then.
    """

    history: History = field(default_factory=History)
    orphans: set[str] = field(default_factory=set)
    is_tidy: bool = False

    @property
    def entries(self) -> list[Entry]:
        """The priorities and names, lowest first."""
        return list(self.history)


class Expected:
    """The files on the disk and in the handlers' histories, as they should be.

    Args:
        program: the program.
        result: its findings get what is wrong.
    """

    def __init__(self, program: Program, result: Result) -> None:
        self.program = program
        self.result = result
        self.kept = [Kept() for _ in program.specs]
        self.owner: dict[str, int] = {}
        self.saved_at: dict[str, int] = {}
        self.scores: dict[int, float] = {}
        self.wanted: dict[int, bool] = {}
        self.num_saves = 0
        self.collided: set[int] = set()

    def path(self, at: int, name: str) -> str:
        """Return the path of a handler's file."""
        return f"{self.program.specs[at].folder}/{name}"

    def find(self, text: str) -> None:
        """Add a finding."""
        self.result.findings.append(text)

    def take(self, line: dict[str, Any], start: Start) -> None:
        """Follow one line of a start's journal."""
        getattr(self, f"_{line['what']}")(line, start)

    def _resumed(self, line: dict[str, Any], start: Start) -> None:
        del start
        self.scores.clear()
        self.wanted.clear()
        for kept in self.kept:
            kept.is_tidy = False
        spec = self.program.specs[0]
        own = {
            path: at
            for path, at in self.saved_at.items()
            if (self.owner.get(path) == 0 or self.program.by_directory) and path.startswith(f"{spec.folder}/")
        }
        newest = max(own, key=lambda path: own[path], default=None)
        if line["file"] is None:  # it starts afresh: the files are of a run that it does not continue
            self.kept = [Kept() for _ in self.program.specs]
            self.owner.clear()
        if self.program.by_directory and any("/" in path.partition("/")[2] for path in own):
            return  # resume does not search the folders of a directory
        if line["file"] != newest:
            self.find(f"resumed from {line['file']}, and the newest is {newest}")
        self.result.num_resumes += line["file"] is not None
        if newest is not None and not self.program.by_directory and 0 not in self.collided:
            names, wanted = [name for _, name in line["history"]], [name for _, name in self.kept[0].entries]
            if names != wanted:
                self.find(f"the history is {names} after a resume, and not {wanted}")
            self.kept[0].is_tidy = True

    def _scored(self, line: dict[str, Any], start: Start) -> None:
        at, score = line["handler"], float(line["score"])
        self._settle(at)
        self.scores[at] = score
        self.result.num_decisions += 1
        policies = self._policies(at, start)
        history = self.kept[at].history
        self.wanted[at] = wants(history, score, policies=policies, is_scored=True, greater_or_equal=False)

    def _policies(self, at: int, start: Start) -> tuple[Policy, ...]:
        return policies_of(start.keep[at], start.n_saved[at], is_scored=self.program.specs[at].is_scored)

    def _settle(self, at: int) -> None:
        """Check the last decision of a handler."""
        if self.wanted.pop(at, False) and at not in self.collided:
            self.find(f"handler {at}: a score of {self.scores[at]!r} was not saved, with {self.kept[at].entries}")

    def _saved(self, line: dict[str, Any], start: Start) -> None:
        at, name = line["handler"], line["name"]
        spec, kept, path = self.program.specs[at], self.kept[at], self.path(at, name)
        self.num_saves += 1
        self.result.num_saves += 1
        if self.owner.get(path, at) != at:
            self.collided |= {at, self.owner[path]}
        self.owner[path], self.saved_at[path] = at, self.num_saves
        if spec.is_scored:
            if not self.wanted.pop(at, False) and at not in self.collided:
                self.find(f"handler {at}: {name} was saved for {self.scores.get(at)!r}, with {kept.entries}")
            priority = self.scores[at]
        else:
            priority = float(self.num_saves)
        file = SavedFile(name, priority, self._step(at, line, start))
        policies = self._policies(at, start)
        # A history made anew: the expected decision looks at all files.
        whole = History(kept.history, kept.history.files)
        retained = admit(whole, file, policies=policies, is_scored=spec.is_scored)
        kept.history, kept.is_tidy = retained.kept, True
        kept.orphans = {one for one in (*retained.evicted, *kept.orphans) if one != name}

    def _step(self, at: int, line: dict[str, Any], start: Start) -> float:
        """Return the step that policies see."""
        iteration, epoch = int(line["iteration"]), int(line["epoch"])
        if self.program.specs[at].is_scored:
            return iteration
        return {"iteration": iteration, "epoch": epoch, "small": iteration * 1e-6}[start.steps]

    def _removed(self, line: dict[str, Any], start: Start) -> None:
        del start
        at, name = line["handler"], line["name"]
        self.result.num_removals += 1
        if line["owner"] not in (at, None):
            self.find(f"handler {at} removed {name}, which is handler {line['owner']}'s")
        if name not in self.kept[at].orphans and at not in self.collided:
            self.find(f"handler {at} removed {name}, and should have kept {self.kept[at].entries}")
        path = self.path(at, name)
        self.owner.pop(path, None)
        self.saved_at.pop(path, None)
        self.kept[at].orphans.discard(name)

    def _kept(self, line: dict[str, Any], start: Start) -> None:
        del start
        at = line["handler"]
        self._settle(at)
        wanted = [name for _, name in self.kept[at].entries]
        if at not in self.collided and line["names"] and line["names"] != wanted:
            self.find(f"handler {at} keeps {line['names']}, and should keep {wanted}")

    def _ended(self, line: dict[str, Any], start: Start) -> None:
        del line, start

    def look(self, folder: Path) -> None:
        """Compare with the disk: kept files exist, and others do not, except orphans."""
        for at, kept in enumerate(self.kept):
            gone = [name for _, name in kept.entries if not (folder / self.path(at, name)).exists()]
            if gone and at not in self.collided:
                self.find(f"handler {at} keeps {gone}, which is not there")
        for where in ("a", "b"):
            for path in (folder / where).rglob("*.pt"):
                name = path.relative_to(folder).as_posix()
                owner = self.owner.get(name)
                if path.name in FOREIGN or owner is None or owner in self.collided:
                    continue
                kept = self.kept[owner]
                known = {entry[1] for entry in kept.entries} | (set() if kept.is_tidy else kept.orphans)
                if name.partition("/")[2] not in known:
                    self.find(f"{name} is left of handler {owner}")
            for name in () if self.program.by_directory else FOREIGN:
                if not (folder / where / name).exists():
                    self.find(f"{where}/{name} of another program was removed")
