"""Policies that are combined: against an oracle that sees all files that were ever saved, and what each refuses."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.policy.history import History
from distckpt.policy.policies import (
    BestN,
    EveryHours,
    EveryNSteps,
    LastN,
    Policy,
    SavedFile,
    check_policies,
    explain,
    firsts,
    from_plain,
    policies_of,
    to_plain,
)
from distckpt.policy.retention import admit, wants

MINUTES = st.integers(0, 400).map(lambda minutes: 60 * minutes)
STEPS = st.one_of(st.integers(-3, 60), st.floats(allow_nan=True), st.just(10**400), st.none())
SCORES = st.one_of(st.integers(-2, 2), st.floats(allow_nan=False))
NUMBERS = st.integers(1, 4)
TIMED = st.one_of(NUMBERS.map(lambda n: EveryNSteps(5 * n)), NUMBERS.map(EveryHours), st.just(EveryHours(0.7)))
SCORED = st.lists(st.one_of(NUMBERS.map(LastN), NUMBERS.map(BestN), TIMED), min_size=1, max_size=4).map(tuple)
RANKED_BY_STEP = st.lists(st.one_of(NUMBERS.map(LastN), TIMED), min_size=1, max_size=4).map(tuple)


def firsts_slowly(files: Sequence[SavedFile], policy: EveryNSteps | EveryHours) -> set[str]:
    """Return the first files of the periods, each file compared with all before it."""

    def period(file: SavedFile) -> float | None:
        if isinstance(policy, EveryHours):
            return math.floor((file.time_s or 0) / (policy.hours * 3600))
        step = file.step or 0
        return step // policy.n if step == 0 or step >= policy.n else None

    known = [file for file in files if not policy.is_unknown(file)]
    return {file.name for file in files if policy.is_unknown(file)} | {
        file.name
        for at, file in enumerate(known)
        if period(file) is not None and all(period(file) != period(older) for older in known[:at])
    }


def kept_slowly(files: Sequence[SavedFile], policies: Sequence[Policy]) -> set[str]:
    """Return what policies keep of all scored files that were ever saved: nothing is forgotten between the saves."""
    kept = {files[-1].name}
    for policy in policies:
        if isinstance(policy, LastN):
            kept |= {file.name for file in files[-policy.n :]}
        elif isinstance(policy, BestN):
            order = sorted(range(len(files)), key=lambda at: (files[at].priority, at))
            kept |= {files[at].name for at in order[-policy.n :]}
        else:
            kept |= firsts_slowly(files, policy)
    return kept


@given(st.lists(st.tuples(SCORES, STEPS, MINUTES), min_size=1, max_size=25), SCORED)
def test_files_of_a_scored_handler_are_those_that_an_oracle_keeps(
    saves: list[tuple[float, float | None, int]], keep: tuple[Policy, ...]
) -> None:
    policies, history, ever = policies_of(keep, 1, is_scored=True), History(), list[SavedFile]()
    for number, (score, step, time_s) in enumerate(saves):
        if not wants(history, score, policies=policies, is_scored=True, greater_or_equal=True):
            assert all(isinstance(policy, BestN) for policy in keep)
            continue
        file = SavedFile(f"{number}.pt", score, step, time_s)
        ever.append(file)
        before = {name for _, name in history}
        retained = admit(history, file, policies=policies, is_scored=True)
        history = retained.kept
        wanted = kept_slowly(ever, keep)
        assert {name for _, name in history} == wanted
        assert set(retained.evicted) == (before | {file.name}) - wanted
        reasons = explain(history.files, policies, is_scored=True)
        assert set(reasons) == wanted
        assert retained.reasons == tuple(dict.fromkeys(reason for _, reason in reasons[file.name]))


@given(st.lists(st.tuples(st.integers(1, 9), MINUTES), min_size=1, max_size=25), RANKED_BY_STEP)
def test_files_of_a_handler_without_scores_are_those_that_an_oracle_keeps(
    saves: list[tuple[int, int]], keep: tuple[Policy, ...]
) -> None:
    policies, history, ever, step = policies_of(keep, 1, is_scored=False), History(), list[SavedFile](), 0
    for more, time_s in saves:
        step += more
        assert wants(history, step, policies=policies, is_scored=False, greater_or_equal=False)
        ever.append(SavedFile(f"{step}.pt", step, step, time_s))
        history = admit(history, ever[-1], policies=policies, is_scored=False).kept
        assert {name for _, name in history} == kept_slowly(ever, keep)


@given(
    st.lists(st.tuples(SCORES, STEPS, MINUTES, st.sampled_from("abcdefgh")), min_size=1, max_size=20),
    st.lists(st.one_of(SCORED, st.just(None)), min_size=20, max_size=20),
    st.booleans(),
)
def test_a_decision_that_looks_at_few_files_is_that_which_looks_at_all(
    saves: list[tuple[float, float | None, int, str]],
    keeps: list[tuple[Policy, ...] | None],
    is_scored: bool,  # noqa: FBT001 - a strategy's
) -> None:
    # Files are overwritten, policies change, steps and times go back.
    quick = slow = History()
    keep: tuple[Policy, ...] = (LastN(2),)
    for (priority, step, time_s, name), given_keep in zip(saves, keeps, strict=False):
        keep = keep if given_keep is None else given_keep
        policies, file = policies_of(keep, 1, is_scored=is_scored), SavedFile(name, priority, step, time_s)
        one = admit(quick, file, policies=policies, is_scored=is_scored)
        other = admit(History(slow, slow.files), file, policies=policies, is_scored=is_scored)
        assert (list(one.kept), one.kept.files) == (list(other.kept), other.kept.files)
        assert (sorted(one.evicted), one.reasons) == (sorted(other.evicted), other.reasons)
        assert name in {kept for _, kept in one.kept}
        quick, slow = one.kept, other.kept


def test_a_decision_does_not_look_at_each_of_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = (LastN(3), EveryNSteps(10), EveryHours(1), BestN(2))
    history = History(
        [(number, f"{number}.pt") for number in range(20_000)],
        [SavedFile(f"{number}.pt", number, 10 * number, 60 * number) for number in range(20_000)],
    )
    history = admit(history, SavedFile("a.pt", 1, 200_000, 60 * 20_000), policies=policies, is_scored=True).kept
    looked_at, evicted = list[str](), tuple[str, ...]()

    def count(self: EveryNSteps, file: SavedFile) -> int | None:
        looked_at.append(file.name)
        return found(self, file)

    found = EveryNSteps.period_of
    monkeypatch.setattr(EveryNSteps, "period_of", count)
    for number in range(20):
        step = 200_003 + 4 * number
        file = SavedFile(f"b{step}.pt", 0.5, step, 60 * 20_000 + number)
        retained = admit(history, file, policies=policies, is_scored=True)
        history, evicted = retained.kept, retained.evicted
    assert set(looked_at) == {f"b{200_003 + 4 * number}.pt" for number in range(20)}
    assert evicted == ("b200067.pt",)


@pytest.mark.parametrize("policies", [(BestN(3),), (LastN(2), EveryNSteps(100_000))])
def test_the_first_decision_on_thousands_is_no_product_of_their_numbers(policies: tuple[Policy, ...]) -> None:
    compared = 0

    class Name(str):
        """A name that counts comparisons."""

        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str(self) == str(other)

    names = [Name(f"{number}.pt") for number in range(2000)]
    history = History(
        [(number, name) for number, name in enumerate(names)],
        [SavedFile(name, number, number, 0) for number, name in enumerate(names)],
    )
    retained = admit(history, SavedFile("new.pt", 1, 3000, 0), policies=policies, is_scored=True)
    assert len(retained.kept) <= 4
    assert compared < 20_000


def test_n_saved_is_a_policy() -> None:
    assert policies_of(None, 3, is_scored=True) == (BestN(3),)
    assert policies_of(None, 3, is_scored=False) == (LastN(3),)
    assert policies_of(None, None, is_scored=True) == ()


@pytest.mark.parametrize(
    ("keep", "added"),
    [
        ((BestN(2),), ()),
        ((BestN(2), EveryNSteps(5)), (LastN(1),)),
        ((EveryHours(1),), (LastN(1),)),
        ((LastN(4), EveryHours(1)), ()),
    ],
)
def test_the_newest_is_always_kept(keep: tuple[Policy, ...], added: tuple[Policy, ...]) -> None:
    assert policies_of(keep, 1, is_scored=True) == (*keep, *added)


def test_a_lower_limit_does_not_push_out_better_ones() -> None:
    history = [(number, f"{number}.pt") for number in range(1, 6)]
    policies = policies_of(None, 2, is_scored=True)
    assert not wants(history, 3.5, policies=policies, is_scored=True, greater_or_equal=True)
    assert wants(history, 4, policies=policies, is_scored=True, greater_or_equal=True)
    retained = admit(history, SavedFile("new.pt", 4.5), policies=policies, is_scored=True)
    assert list(retained.kept) == [(4.5, "new.pt"), (5, "5.pt")]


def test_steps_that_are_no_multiples_are_kept_at_the_first_save_after_one() -> None:
    files = [SavedFile(f"{step}", step, step) for step in (0, 7, 99, 101, 130, 200, 299, 450, 460)]
    assert [file.name for file, _ in firsts(files, EveryNSteps(100))] == ["0", "101", "200", "450"]
    assert [reason for _, reason in firsts(files, EveryNSteps(100))] == [
        "step 0",
        "first from step 100",
        "step 200",
        "first from step 400",
    ]


def test_a_file_of_unknown_step_or_time_is_kept() -> None:
    files = [SavedFile("a", 1), SavedFile("b", 2, math.nan, 1e300), SavedFile("c", 3, math.inf, -1.0)]
    assert [reason for _, reason in firsts(files, EveryNSteps(10))] == ["its step is unknown"] * 3
    assert [reason for _, reason in firsts(files, EveryHours(10))] == ["its time is unknown"] * 3


def test_periods_of_hours_begin_at_midnight() -> None:
    midnight_s = 20_000 * 86_400
    minutes = {"23:50": -10, "00:10": 10, "05:59": 359, "06:00": 360, "06:01": 361}
    files = [SavedFile(name, 0, None, midnight_s + 60 * minute) for name, minute in minutes.items()]
    found = [(file.name, reason) for file, reason in firsts(files, EveryHours(6))]
    assert [name for name, _ in found] == ["23:50", "00:10", "06:00"]
    assert found[-1][1] == "first from 2024-10-04 06:00 UTC"


@given(SCORED)
def test_policies_come_back_from_json(keep: tuple[Policy, ...]) -> None:
    assert from_plain(to_plain(keep)) == keep
    assert all(str(policy) == repr(eval(repr(policy))) for policy in keep)  # noqa: S307 - of this file


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LastN(0), ValueError, "LastN should be given a positive int, but given 0"),
        (lambda: BestN(n=True), TypeError, "BestN should be given an int, but given <class 'bool'>"),
        (lambda: EveryNSteps(1.5), TypeError, "EveryNSteps should be given an int, but given <class 'float'>"),  # type: ignore[arg-type]
        (lambda: EveryHours("6"), TypeError, "EveryHours should be given a number of hours, but given <class 'str'>"),  # type: ignore[arg-type]
        (lambda: EveryHours(0), ValueError, "at least a minute, but given 0"),
        (lambda: EveryHours(math.nan), ValueError, "at least a minute, but given nan"),
        (lambda: EveryHours(math.inf), ValueError, "at least a minute, but given inf"),
        (lambda: check_policies(LastN(1), is_scored=False), TypeError, "a list of LastN, BestN, .* but given <class"),
        (lambda: check_policies([3], is_scored=False), TypeError, "but given 3 in it"),
        (lambda: check_policies([LastN], is_scored=False), TypeError, "LastN'> in it"),
        (lambda: check_policies([], is_scored=False), ValueError, "is empty. Without it, n_saved=None keeps all"),
        (lambda: check_policies([BestN(1)], is_scored=False), ValueError, "BestN in argument keep needs a score"),
    ],
)
def test_wrong_policies_are_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
