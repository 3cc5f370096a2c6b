"""The recorded position of a ResumableSampler, for a resumed run in which other engines use the same loader.

An evaluator on the trainer's loader takes the sampler's next epoch. In the resumed run, handlers run again that ran
before the save. Neither may take the position at which the trainer continues, nor change the number of the epoch that
follows. Rank-local; issues no collectives.
"""

from typing import Any

from ignite.engine import Engine

from distckpt.handlers.ignite_hooks import get_iterator
from distckpt.handlers.progress import note_sampler_start
from distckpt.handlers.resume_point import ResumePoint
from distckpt.handlers.sample_order import draw_first_indices
from distckpt.samplers import batches_left, find_resumable


class SamplerPosition:
    """Gives the trainer's sampler its recorded position.

    Args:
        point: the recorded resume point. Without a sampler's state in it, the sampler keeps its own state.
    """

    def __init__(self, point: ResumePoint) -> None:
        self._point = point
        self._start: Any = None

    def load(self, data: Any) -> int | None:
        """Load the position; return the number of batches left in the pass, or None if it is not known.

        If the trainer's iterator had drawn an index, its position is reserved until :meth:`release`.
        """
        sampler, state = find_resumable(data), self._point.sampler
        if sampler is None:
            return None
        if state is not None:
            sampler.load_state_dict(state)
            is_begun = self._point.is_drawn or state["position"] > 0
            sampler.distckpt_is_reserved = is_begun or (self._point.is_mid_pass and bool(data.num_workers))
        self._start = sampler.distckpt_start
        return batches_left(data) if sampler.distckpt_is_positioned else None

    def load_again(self, data: Any) -> None:
        """Load the position again if another iterator has drawn indices since."""
        sampler = find_resumable(data)
        if sampler is not None and self._point.sampler is not None and sampler.distckpt_start is not self._start:
            self.load(data)

    def release(self, data: Any) -> None:
        """Let the next iterator, the trainer's, continue at the position."""
        sampler = find_resumable(data)
        if sampler is not None:
            sampler.distckpt_is_reserved = False

    def draw_first_indices(self, engine: Engine) -> None:
        """Let the trainer's iterator draw indices, before handlers of the event iterate over the loader."""
        if find_resumable(engine.state.dataloader) is not None:
            draw_first_indices(get_iterator(engine))
            note_sampler_start(engine, is_drawn=True)

    def restore_next_epoch(self, engine: Engine) -> None:
        """Set the epoch of the following pass to the recorded one, after handlers that ran before the save too."""
        sampler, state = find_resumable(engine.state.dataloader), self._point.sampler
        if sampler is not None and state is not None and "next_epoch" in state:
            sampler.set_epoch(state["next_epoch"])
