"""Print a table of every contract test x every backend.

    python ci/contract_report.py FILE...    files that `pytest --outcomes FILE` wrote, one per environment

A cell counts the cases that passed. Exit status 1 if a test failed or was skipped, if a clause of the contract did not
run on one of the backends, or if a backend did not run at all. NCCL needs a GPU; without one its column says so.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

COLUMNS = ("serial", "gloo", "ours", "horovod", "xla", "nccl")
TITLES = {"ours": "plug-in"}
NEEDED = ("serial", "gloo", "horovod", "xla")
MULTI_RANK = {"gloo", "horovod", "xla"}


class Report:
    """Outcomes of all runs.

    Args:
        outcomes: one entry per test, as `tests/support/outcomes.py` writes them.
    """

    def __init__(self, outcomes: list[dict[str, Any]]) -> None:
        self._outcomes = outcomes
        self._cells: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        for one in outcomes:
            self._cells[one["test"]][one["backend"], one["outcome"]] += 1
        self._clauses = {one["test"] for one in outcomes if one["is_clause"]}
        self._reasons = {one["test"]: one["reason"] for one in outcomes if one["reason"]}
        self._backends = {one["backend"] for one in outcomes}

    def problems(self) -> list[str]:
        """Return the problems, one line each."""
        found = [f"{backend} was not run" for backend in NEEDED if backend not in self._backends]
        for test, cell in sorted(self._cells.items()):
            found += [f"{test}: {num} {what} on {where}" for (where, what), num in cell.items() if what != "passed"]
            ran = {backend for backend, _ in cell}
            if test in self._clauses - set(self._reasons) and not ran >= MULTI_RANK:
                found.append(f"{test}: a clause of the contract that did not run on {MULTI_RANK - ran}")
        return found

    def show(self) -> None:
        """Print the table, its notes and totals."""
        width = max((len(test) for test in self._cells), default=0)
        notes = {why: number for number, why in enumerate(sorted(set(self._reasons.values())), start=1)}
        print(f"{'test':{width}}" + "".join(f"{TITLES.get(column, column):>9}" for column in COLUMNS))
        for test in sorted(self._cells):
            note = f"  ({notes[self._reasons[test]]})" if test in self._reasons else ""
            print(f"{test:{width}}" + "".join(f"{self._text(test, column):>9}" for column in COLUMNS) + note)
        for why, number in notes.items():
            print(f"({number}) not on every backend: {why}")
        print("-: not on this backend: needs several ranks, or tests one runtime's entry point")
        if "nccl" not in self._backends:
            print("NCCL: not run, no GPU")
        totals = Counter(one["backend"] for one in self._outcomes if one["outcome"] == "passed")
        skipped = sum(one["outcome"] == "skipped" for one in self._outcomes)
        print(f"passed: {', '.join(f'{column} {totals[column]}' for column in COLUMNS)}; skipped: {skipped}")

    def _text(self, test: str, column: str) -> str:
        if column == "nccl" and column not in self._backends:
            return "not run"
        nums = {what: num for (where, what), num in self._cells[test].items() if where == column}
        return "+".join(str(num) if what == "passed" else f"{num} {what}" for what, num in nums.items()) or "-"


def main(paths: list[Path]) -> int:
    """Print the report; return 1 if there are problems."""
    report = Report([one for path in paths for one in json.loads(path.read_text(encoding="utf-8"))["outcomes"]])
    report.show()
    problems = report.problems()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return min(len(problems), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    sys.exit(main(parser.parse_args().files))
