"""500 random programs of up to three handlers, killed and resumed up to five times.

No handler removes another's file, the newest whole state is the one resumed from, and the best are the best of the
scores as they were. `DISTCKPT_CRASH_SEED` repeats a round; its seed is printed with what was counted.
"""

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distckpt
from tests.crash.program_plans import program_of
from tests.crash.resumed_programs import BREAKAGES
from tests.support.selection import quick

pytestmark = pytest.mark.crash

NUM_BATCHES = 2
CONTROL = ("control3", 0, 24)
"""The programs that run with broken code, the same in each round. They find each breakage."""
LIMIT_S = 1200.0


class Summary:
    """Counts of the programs and of their results.

    Args:
        seed: the seed of this round.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.totals: Counter[str] = Counter()
        self.controls: list[str] = []

    def __str__(self) -> str:
        """Return it as text."""
        totals = ", ".join(f"{self.totals[what]} {what}" for what in sorted(self.totals))
        lines = [f"[resumed programs] seed {self.seed}: {totals}", *self.controls]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def summary(report_at_end: Callable[[object], None]) -> Summary:
    """Return the counts, which are printed at the end, past pytest's capture."""
    found = Summary(os.environ.get("DISTCKPT_CRASH_SEED") or str(secrets.randbelow(2**31)))
    report_at_end(found)
    return found


def results_of(seed: str, first: int, num: int, breakage: str | None = None) -> list[dict[str, Any]]:
    """Run programs in a new process, which forks one for each start; return their results."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.resumed_programs", seed, str(first), str(num), *filter(None, [breakage])],
        cwd=Path(distckpt.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_no_program_loses_a_file_or_takes_anothers(summary: Summary, programs: int, batch: int) -> None:
    first, end = (programs * number // NUM_BATCHES for number in (batch, batch + 1))
    results = results_of(summary.seed, first, end - first)
    summary.totals["programs"] += len(results)
    for name in results[0]:
        if name != "findings":
            summary.totals[name.removeprefix("num_")] += sum(result[name] for result in results)
    found = {first + at: result["findings"] for at, result in enumerate(results) if result["findings"]}
    shown = next(iter(found), 0)
    assert not found, f"{program_of(f'{summary.seed}/{shown}')}\nrepeat it with DISTCKPT_CRASH_SEED={summary.seed}"


@quick(1)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_same_programs_find_what_is_broken(summary: Summary, breakage: str) -> None:
    results = results_of(*CONTROL, breakage)
    num = sum(bool(result["findings"]) for result in results)
    summary.controls.append(f"[resumed programs] control, {breakage}: found in {num} of {len(results)}")
    assert num > 0
