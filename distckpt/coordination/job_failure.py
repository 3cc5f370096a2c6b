"""Why a job cannot go on, in a form that travels between its ranks.

Owns the fault's text, and the error that each rank raises for it. Must not know how it was found out.
"""

import json
from dataclasses import asdict, dataclass

from distckpt.errors import DistckptError, RankFailure, RankLost, RemoteTraceback, remote_rank_error

__all__ = ["Fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a job cannot go on.

    Attributes:
        ranks: who is lost, or who raised.
        text: what happened, without a subject that is known from `ranks`.
        by: the rank that found it out.
        step: the iteration it happened in, as far as known.
        failure: the exception, where a rank raised.
    """

    ranks: tuple[int, ...]
    text: str
    by: int
    step: int
    failure: RankFailure | None = None

    @staticmethod
    def key(era: int) -> str:
        """Return where the fault of an era is written: the time between two runs that ended since a rank raised."""
        return f"watch/fault/{era}" if era else "watch/fault"

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Fault":
        """Rebuild it from :meth:`encode`."""
        fields = json.loads(text)
        failure = fields.pop("failure")
        if failure is not None:
            failure = RankFailure(**{**failure, "kinds": tuple(failure["kinds"])})
        return Fault(**{**fields, "ranks": tuple(fields["ranks"])}, failure=failure)

    def error(self, rank: int) -> DistckptError:
        """Return the error that `rank` raises for it."""
        if self.failure is not None and rank not in self.ranks:
            error: DistckptError = remote_rank_error(f"iteration {self.step}", [self.failure])
            error.__cause__ = RemoteTraceback(f"--- rank {self.failure.rank} ---\n{self.failure.traceback}")
            return error
        if rank in self.ranks:
            what = "it raised earlier" if self.failure else "the other ranks have given it up"
            return RankLost(f"rank {rank} cannot go on, {what}: {self.text}", self.ranks)
        return RankLost(f"rank {rank}: {self.text}. The job cannot go on.", self.ranks)
