"""Faults for the demo and the tests: a NaN, a signal or a death, on one rank, in one iteration.

This is the meaning of ``--fault``. The module does not import distckpt: faults come from outside of it.
"""

import os
import signal
from dataclasses import dataclass
from typing import Self

KINDS = ("nan", "sigterm", "sigkill")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens, when, and to whom.

    Attributes:
        kind: one of ``nan``: the loss is NaN; ``sigterm``: told to stop, as by a cluster that wants the machine back;
            ``sigkill``: dies.
        iteration: in which.
        rank: on which.
    """

    kind: str
    iteration: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``KIND@ITERATION:RANK``.

        Raises:
            ValueError: it is something else.
        """
        kind, _, place = text.partition("@")
        iteration, _, rank = place.partition(":")
        if kind not in KINDS or not iteration.isdecimal() or not rank.isdecimal():
            raise ValueError(f"a fault should be KIND@ITERATION:RANK, KIND one of {', '.join(KINDS)}; given {text!r}")
        return cls(kind, int(iteration), int(rank))

    def strike(self, iteration: int, rank: int, loss: float) -> float:
        """Let it happen if it is time; return the loss.

        A process that the launcher started again is spared: it would die in the same place for ever.
        """
        if (iteration, rank) != (self.iteration, self.rank) or num_restarts() > 0:
            return loss
        if self.kind == "nan":
            return float("nan")
        os.kill(os.getpid(), signal.SIGTERM if self.kind == "sigterm" else signal.SIGKILL)
        return loss


def num_restarts() -> int:
    """Return how often torchrun has started the ranks of this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
