"""How much memory a save takes, measured apart from its time: a sampler would slow it down.

Owns what is held against what.
"""

import ctypes
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from ci.savebench.contestant import Contestant
from ci.savebench.job import Job
from ci.savebench.measure import Watch
from ci.savebench.sampler import Sampler

__all__ = ["Memory"]


class _Nobody(Contestant):
    """Saves nothing; all else is as for the others, so that what a process does for the first time is not theirs."""

    name = "nobody"
    writes_one_file = True

    def save(self, path: Path) -> None:
        path.touch()


class Memory:
    """The peak of all ranks while a new contestant saves a few times, less that of a run before it that saves nothing.

    What it holds from save to save is in it.

    Args:
        job: to train between.
        sampler: of all ranks, on rank 0; the others return 0 for everything.
    """

    def __init__(self, job: Job, sampler: Sampler | None) -> None:
        self._job, self._sampler = job, sampler

    def extra_bytes(self, kind: type[Contestant], labels: Sequence[str]) -> int:
        """Collective. Return it for saves of these names.

        Raises:
            MissingError: this version lacks what the contestant needs.
            ImportError: it is not installed.
        """
        without = self._without_a_save()

        def save() -> None:
            contestant = kind(self._job)
            for label in labels:
                Watch(self._job, contestant, contestant.folder / label, max_after=0)
                self._job.meeting.barrier()
                if self._job.rank == 0:
                    contestant.remove(contestant.folder / label)
            contestant.close()

        return max(0, self._peak(save) - without)

    def _without_a_save(self) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what others freed is not to be used again unseen
        nobody = _Nobody(self._job)
        peak = self._peak(lambda: Watch(self._job, nobody, nobody.folder / "none", max_after=0))
        if self._job.rank == 0:
            nobody.remove(nobody.folder / "none")
        return peak

    def _peak(self, work: Callable[[], object]) -> int:
        self._job.meeting.barrier()
        if self._sampler is not None:
            self._sampler.peak()
        self._job.meeting.barrier()
        work()
        self._job.meeting.barrier()
        return 0 if self._sampler is None else self._sampler.peak()
