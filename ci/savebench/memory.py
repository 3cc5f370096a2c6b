"""Measure the memory that a save takes, apart from its time: sampling slows it down."""

import ctypes
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from ci.savebench.contestant import Contestant
from ci.savebench.job import Job
from ci.savebench.measure import Stopwatch
from ci.savebench.sampler import Sampler


class _Nobody(Contestant):
    """A contestant that saves nothing: its run takes what a process allocates only once."""

    name = "nobody"
    writes_one_file = True

    def save(self, path: Path) -> None:
        path.touch()


class Memory:
    """Measures the peak memory of all ranks during saves, minus the peak of a run without a save.

    Memory that a contestant keeps between saves is included.

    Args:
        job: the training job.
        sampler: samples all ranks, on rank 0; None on other ranks, which return 0.
    """

    def __init__(self, job: Job, sampler: Sampler | None) -> None:
        self._job, self._sampler = job, sampler

    def extra_bytes(self, kind: type[Contestant], labels: Sequence[str]) -> int:
        """Collective. Return the additional bytes for one save per label.

        Raises:
            MissingError: the installed version lacks what the contestant needs.
            ImportError: the library is not installed.
        """
        without = self._without_a_save()

        def save() -> None:
            contestant = kind(self._job)
            for label in labels:
                Stopwatch(self._job, contestant, contestant.folder / label, max_after=0)
                self._job.meeting.barrier()
                if self._job.rank == 0:
                    contestant.remove(contestant.folder / label)
            contestant.close()

        return max(0, self._peak(save) - without)

    def _without_a_save(self) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # so that no freed memory is reused unseen
        nobody = _Nobody(self._job)
        peak = self._peak(lambda: Stopwatch(self._job, nobody, nobody.folder / "none", max_after=0))
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
