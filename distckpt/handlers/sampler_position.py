"""The recorded position of a ResumableSampler, and the recorded epoch of another sampler with ``set_epoch``.

A pass whose order was drawn under one epoch may continue under another one, if passes are not epochs.

An evaluator on the trainer's loader takes the sampler's next epoch. In the resumed run, handlers run again that ran
before the save. Neither may take the position at which the trainer continues, nor change the number of the epoch that
follows. Rank-local; issues no collectives.
"""

from collections.abc import Collection
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.data_loaders import find_epoch_sampler
from distckpt.handlers.ignite_hooks import get_iterator
from distckpt.handlers.progress import note_sampler_start
from distckpt.handlers.resume_point import ResumePoint
from distckpt.handlers.sample_order import draw_first_indices
from distckpt.samplers import batches_left, find_resumable


class SamplerPosition:
    """Gives the trainer's sampler its recorded position or epoch.

    Args:
        point: the recorded resume point. Without a sampler's state in it, the sampler keeps its own state.
        loaded: the restored objects. A sampler among them keeps its own epoch.
    """

    def __init__(self, point: ResumePoint, loaded: Collection[Any]) -> None:
        self._point = point
        self._loaded = loaded
        self._start: Any = None
        self._present_epoch: int | None = None

    def load(self, data: Any) -> int | None:
        """Load the position; return the number of batches left in the pass, or None if it is not known.

        If the trainer's iterator had drawn an index, its position is reserved until :meth:`begin_iterator`. Another
        sampler gets the epoch that it had at the save, unless the program has set one.
        """
        sampler, state = find_resumable(data), self._point.sampler
        if getattr(find_epoch_sampler(data), "epoch", None) == 0:  # the program has not set another one
            self._set_epoch(data, self._point.sampler_epoch)
        if sampler is None:
            return None
        if state is not None:
            sampler.load_state_dict(state)
            is_begun = self._point.is_drawn or state["position"] > 0
            sampler.distckpt_is_reserved = is_begun or (self._point.is_mid_pass and bool(data.num_workers))
        self._start = sampler.distckpt_start
        num_left = batches_left(data) if sampler.distckpt_is_positioned else None
        if num_left == 0 and len(data):  # the loader leaves out a last batch that is not whole
            sampler.distckpt_end_pass()
        return num_left

    def load_again(self, data: Any) -> None:
        """Load the position again if another iterator has drawn indices since."""
        sampler = find_resumable(data)
        if sampler is not None and self._point.sampler is not None and sampler.distckpt_start is not self._start:
            self.load(data)

    def begin_iterator(self, data: Any) -> None:
        """Let the next iterator, the trainer's, continue at the position; set the epoch under which its pass began."""
        sampler = find_resumable(data)
        if sampler is not None:
            sampler.distckpt_is_reserved = False
        self._present_epoch = self._set_epoch(data, self._point.pass_epoch)

    def end_drawing(self, engine: Engine, *, is_order_drawn: bool) -> None:
        """Let the trainer's iterator draw indices if it had, before handlers use the loader; set the present epoch.

        A loader with workers draws them when the iterator is made.
        """
        data = engine.state.dataloader
        if self._present_epoch is not None or (is_order_drawn and find_resumable(data) is not None):
            draw_first_indices(get_iterator(engine))
            note_sampler_start(engine, is_drawn=True)
        self._set_epoch(data, self._present_epoch)
        self._present_epoch = None

    def restore_next_epoch(self, engine: Engine) -> None:
        """Set the epoch of the following pass to the recorded one, after handlers that ran before the save too."""
        sampler, state = find_resumable(engine.state.dataloader), self._point.sampler
        if sampler is not None and state is not None and "next_epoch" in state:
            sampler.set_epoch(state["next_epoch"])

    def _set_epoch(self, data: Any, epoch: int | None) -> int | None:
        """Set the epoch of a sampler that is no ResumableSampler, unless it is None; return the former one, if set."""
        sampler = find_epoch_sampler(data)
        if epoch is None or sampler is None or any(sampler is one for one in self._loaded):
            return None
        former: int = sampler.epoch
        if former != epoch:  # it may start its pass again
            sampler.set_epoch(epoch)
        return former
