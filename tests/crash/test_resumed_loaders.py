"""The samples that a resumed run trains, and their order, over a table of samplers, workers, stops and ranks.

On as many ranks as before, each rank trains the batches of an uninterrupted run. On another number, each sample of each
epoch is trained exactly once, or all ranks refuse, or all ranks warn, before the first batch. The results are counted
and printed.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.resumed_loaders import BATCH_SIZE, LENGTH, MAX_EPOCHS, SAMPLERS, STOPS, WORKERS, Cell, Leg, run_leg
from tests.support.selection import only_on, quick

WORLDS = [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2), (2, 3)]
QUICK = {"ResumableSampler", "DistributedSampler", "RandomSampler with a generator", "BatchSampler of a RandomSampler"}
"""The samplers of the quick selection on several ranks."""
SPLITTING = ("ResumableSampler", "DistributedSampler")
"""Samplers that split the data among the ranks. With the others each rank draws all of the data."""

pytestmark = [pytest.mark.slow, only_on("gloo", why="about loaders of processes, on one to three ranks")]


class Summary:
    """The number of cells by result."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, int], Counter[str]] = {}

    def __str__(self) -> str:
        """Return it as text."""
        lines = []
        for (before, after), ends in sorted(self.ends.items()):
            messages = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
            lines.append(f"[resumed loaders] {before} -> {after} ranks: {ends.total()} cells: {messages}")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def summary(report_at_end: Callable[[object], None]) -> Summary:
    """Return the counts, which are printed at the end, past pytest's capture."""
    found = Summary()
    report_at_end(found)
    return found


def cells_of(sampler: str, worlds: tuple[int, int], *, is_whole: bool) -> list[Cell]:
    """Return the cells of a test."""
    if is_whole:
        return [Cell(sampler, kind, stops) for kind in WORKERS for stops in STOPS]
    if sampler in QUICK:
        cells = [Cell(sampler, "no workers", stops) for stops in STOPS]
        return [*cells, Cell(sampler, "persistent workers", "twice")] if worlds == (1, 1) else cells
    return [Cell(sampler, "no workers", "in an epoch")] if worlds == (1, 1) else []


@quick(20)
@pytest.mark.parametrize("worlds", WORLDS, ids=lambda worlds: "{} to {}".format(*worlds))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_run_trains_the_samples_of_an_uninterrupted_run(
    tmp_path: Path, summary: Summary, sampler: str, worlds: tuple[int, int], *, is_whole: bool
) -> None:
    cells = cells_of(sampler, worlds, is_whole=is_whole)
    before, after = worlds
    # An uninterrupted run does not depend on the stops: one for each kind of workers.
    kinds = list(dict.fromkeys(cell.workers for cell in cells))
    runs = run_leg(tmp_path, [(f"alone, {kind}", Cell(sampler, kind, "in an epoch"), None) for kind in kinds], before)
    alone = dict(zip(kinds, runs, strict=True))
    legs: list[list[list[Leg]]] = [[] for _ in cells]
    for number_of_stops in range(1 + max(map(len, STOPS.values()))):
        # A run that stops twice starts on `before` ranks, and resumes both times on `after` ranks.
        pending = [
            (number, stops[number_of_stops] if number_of_stops < len(stops) else None)
            for number, cell in enumerate(cells)
            for stops in [STOPS[cell.stops]]
            if number_of_stops <= len(stops) and not any(leg.refused for ranks in legs[number] for leg in ranks)
        ]
        ran = run_leg(
            tmp_path,
            [(f"cell {number}", cells[number], stop) for number, stop in pending],
            after if number_of_stops else before,
        )
        for (number, _), ranks in zip(pending, ran, strict=True):
            legs[number].append(ranks)
    for number, cell in enumerate(cells):
        try:
            end = end_of(cell, worlds, alone[cell.workers], legs[number])
        except AssertionError as error:
            error.add_note(f"{cell}, {worlds}\nalone: {alone[cell.workers]}\nparts: {legs[number]}")
            raise
        summary.ends.setdefault(worlds, Counter())[end] += 1


def end_of(cell: Cell, worlds: tuple[int, int], alone: list[Leg], legs: list[list[Leg]]) -> str:
    """Check a cell, and return its result."""
    assert not any(leg.refused or leg.warned for leg in alone + legs[0]), "nothing is resumed there"
    before, after = worlds
    resumed = [leg for ranks in legs[1:] for leg in ranks]
    refused = [leg.refused for leg in resumed if leg.refused]
    if refused:
        assert before != after
        assert len(refused) == after, "all ranks refuse"
        assert all("ResumableSampler" in why for why in refused)
        assert not any(leg.batches for leg in legs[-1]), "nothing was trained"
        assert cell.sampler != "ResumableSampler"
        return "refused"
    if before == after:
        for rank, leg in enumerate(alone):
            assert [batch for ranks in legs for batch in ranks[rank].batches] == leg.batches
        warned = [what for leg in resumed for what in leg.warned]
        assert all("the loader starts new workers" in what for what in warned)
        return "as alone"
    assert all(any(f"a job of {before} ranks" in what for what in leg.warned) for leg in legs[1]), "of the numbers"
    if cell.sampler in SPLITTING:
        for epoch in range(1, MAX_EPOCHS + 1):
            seen = Counter(
                one for ranks in legs for leg in ranks for at, some in leg.batches if at == epoch for one in some
            )
            assert set(seen) == set(range(LENGTH))
            padding = seen.total() - LENGTH
            assert padding < after, "what is left of an epoch may not divide by the ranks: its first samples come again"
            assert not padding or epoch in {at for at, _ in STOPS[cell.stops]}
        return "each sample once"
    for rank in range(min(before, after)):
        whole = [batch for ranks in legs for batch in ranks[rank].batches]
        assert len(whole) == MAX_EPOCHS * LENGTH // BATCH_SIZE
        assert whole == alone[rank].batches
    if STOPS[cell.stops] != STOPS["at its end"]:
        assert all(any("each rank draws" in what for what in leg.warned) for leg in legs[1])
    return "warned"
