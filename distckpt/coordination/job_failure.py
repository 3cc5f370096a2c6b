"""The failure of a job: why it cannot go on, in a form that travels between its ranks."""

import json
from dataclasses import asdict, dataclass

from distckpt.errors import DistckptError, RankFailure, RankLost, RemoteTraceback, remote_rank_error


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure:
    """Why a job cannot go on.

    Attributes:
        ranks: the ranks that are lost, or the rank that raised.
        text: what happened.
        by: the rank that found out.
        step: its iteration, as far as known.
        failure: the exception, if a rank raised one.
    """

    ranks: tuple[int, ...]
    text: str
    by: int
    step: int
    failure: RankFailure | None = None

    def encode(self) -> str:
        """Return the failure as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "JobFailure":
        """Return the failure that :meth:`encode` wrote."""
        fields = json.loads(text)
        failure = fields.pop("failure")
        if failure is not None:
            failure = RankFailure(**{**failure, "kinds": tuple(failure["kinds"])})
        return JobFailure(**{**fields, "ranks": tuple(fields["ranks"])}, failure=failure)

    def error(self, rank: int) -> DistckptError:
        """Return the error that `rank` raises."""
        if self.failure is not None and rank not in self.ranks:
            error: DistckptError = remote_rank_error(f"iteration {self.step}", [self.failure])
            error.__cause__ = RemoteTraceback(f"--- rank {self.failure.rank} ---\n{self.failure.traceback}")
            return error
        if rank in self.ranks:
            why = "it raised earlier" if self.failure else "the other ranks have given it up"
            return RankLost(f"rank {rank} cannot go on, {why}: {self.text}", self.ranks)
        return RankLost(f"rank {rank}: {self.text}. The job cannot go on.", self.ranks)
