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

NUM_BATCHES = 4
CONTROL = ("control3", 0, 24)
"""The programs that are run with broken code: the same in each round, which finds each breakage."""
LIMIT_S = 1200.0


class Counts:
    """What was run, and what came of it.

    Args:
        seed: of this round.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.totals: Counter[str] = Counter()
        self.controls: list[str] = []

    def __str__(self) -> str:
        """Return it as text."""
        told = ", ".join(f"{self.totals[what]} {what}" for what in sorted(self.totals))
        lines = [f"[resumed programs] seed {self.seed}: {told}", *self.controls]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def counts(tell_in_the_end: Callable[[object], None]) -> Counts:
    """Return where programs are counted; it is printed in the end, past pytest's capture."""
    found = Counts(os.environ.get("DISTCKPT_CRASH_SEED") or str(secrets.randbelow(2**31)))
    tell_in_the_end(found)
    return found


def results_of(seed: str, first: int, num: int, breakage: str | None = None) -> list[dict[str, Any]]:
    """Run programs in a process of their own, which forks one for each start; return what came of each."""
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
def test_no_program_loses_a_file_or_takes_anothers(counts: Counts, programs: int, batch: int) -> None:
    first, end = (programs * number // NUM_BATCHES for number in (batch, batch + 1))
    results = results_of(counts.seed, first, end - first)
    counts.totals["programs"] += len(results)
    for name in results[0]:
        if name != "findings":
            counts.totals[name.removeprefix("num_")] += sum(result[name] for result in results)
    found = {first + at: result["findings"] for at, result in enumerate(results) if result["findings"]}
    shown = next(iter(found), 0)
    assert not found, f"{program_of(f'{counts.seed}/{shown}')}\nrepeat it with DISTCKPT_CRASH_SEED={counts.seed}"


@quick(2)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_same_programs_find_what_is_broken(counts: Counts, breakage: str) -> None:
    results = results_of(*CONTROL, breakage)
    num = sum(bool(result["findings"]) for result in results)
    counts.controls.append(f"[resumed programs] control, {breakage}: found in {num} of {len(results)}")
    assert num > 0
