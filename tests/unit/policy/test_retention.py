"""Which checkpoints are kept: tables, and properties over every history."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.policy import retention
from distckpt.policy.history import Entry, History
from distckpt.policy.policies import SavedFile, policies_of
from distckpt.policy.retention import Retained, rank_candidate

NAN = math.nan
HUGE = 10**400  # beyond the range of floats
PRIORITIES = st.one_of(st.integers(-3, 3), st.floats(allow_nan=False), st.sampled_from([math.inf, -math.inf]))
NAMES = st.sampled_from([f"{letter}.pt" for letter in "abcdefgh"])
SAVES = st.lists(st.tuples(PRIORITIES, NAMES), max_size=12)
LIMITS = st.one_of(st.none(), st.integers(1, 4))


def admit(history: Sequence[Entry], entry: Entry, *, n_saved: int | None, is_scored: bool = False) -> Retained:
    """Return the history of a handler with `n_saved` after a save."""
    policies = policies_of(None, n_saved, is_scored=is_scored)
    return retention.admit(history, SavedFile(entry[1], entry[0]), policies=policies, is_scored=is_scored)


def wants(history: Sequence[Entry], priority: float, *, n_saved: int | None, greater_or_equal: bool) -> bool:
    """Return True if a handler with `n_saved` and a score saves, which is so if one without a score does."""
    answers = [
        retention.wants(
            history,
            priority,
            policies=policies_of(None, n_saved, is_scored=is_scored),
            is_scored=is_scored,
            greater_or_equal=greater_or_equal,
        )
        for is_scored in (True, False)
    ]
    assert answers[0] == answers[1]
    return answers[0]


def saved(entries: list[Entry], n_saved: int | None) -> list[Entry]:
    """Return the history after these saves, whatever `wants` says."""
    history = History()
    for entry in entries:
        history = admit(history, entry, n_saved=n_saved).kept
    return list(history)


def readable(value: object) -> str:
    """Return a test's name that can be read."""
    return repr(value).replace(str(HUGE), "huge")


@pytest.mark.parametrize(
    ("history", "priority", "n_saved", "strict", "ties"),
    [
        ([], 1, 1, True, True),
        ([], NAN, 1, False, False),
        ([], NAN, None, False, False),
        ([], -math.inf, 1, True, True),
        ([(1, "a")], 1, 1, False, True),
        ([(1, "a")], 1.0, 1, False, True),
        ([(1, "a")], 0, 1, False, False),
        ([(1, "a")], 2, 1, True, True),
        ([(1, "a")], NAN, 1, False, False),
        ([(1, "a")], 0, 2, True, True),
        ([(1, "a"), (2, "b")], 1.5, 2, True, True),
        ([(1, "a"), (2, "b")], 0, None, True, True),
        ([(NAN, "a")], 0, 1, True, True),
        ([(NAN, "a")], -math.inf, 1, True, True),
        ([(NAN, "a")], NAN, 1, False, False),
        ([(-math.inf, "a")], -math.inf, 1, False, True),
        ([(1, "a")], HUGE, 1, True, True),
        ([(HUGE, "a")], 1.0, 1, False, False),
        ([(math.inf, "a")], HUGE, 1, False, False),
        ([(2**53, "a")], 2**53 + 1, 1, True, True),
    ],
    ids=readable,
)
def test_checkpoint_is_wanted_if_there_is_room_or_it_is_better(
    history: list[Entry], priority: float, n_saved: int | None, *, strict: bool, ties: bool
) -> None:
    assert wants(history, priority, n_saved=n_saved, greater_or_equal=False) is strict
    assert wants(history, priority, n_saved=n_saved, greater_or_equal=True) is ties


@pytest.mark.parametrize(
    ("history", "entry", "n_saved", "kept", "evicted"),
    [
        ([], (1, "a"), 1, [(1, "a")], []),
        ([(1, "a")], (2, "b"), 1, [(2, "b")], ["a"]),
        ([(1, "a")], (2, "b"), None, [(1, "a"), (2, "b")], []),
        ([(1, "a"), (2, "b")], (1.5, "c"), 2, [(1.5, "c"), (2, "b")], ["a"]),
        # The same name: its file was overwritten, so nothing else goes and the name is not removed.
        ([(1, "a")], (0, "a"), 1, [(0, "a")], []),
        ([(1, "a"), (2, "b")], (3, "a"), 2, [(2, "b"), (3, "a")], []),
        # The newer of a tie is the higher.
        ([(1, "a"), (1, "b")], (1, "c"), 3, [(1, "a"), (1, "b"), (1, "c")], []),
        ([(1, "a"), (1, "b")], (1, "c"), 2, [(1, "b"), (1, "c")], ["a"]),
        # Even a worse one is kept once it is committed: its file is there.
        ([(5, "a")], (1, "b"), 1, [(1, "b")], ["a"]),
        ([(NAN, "a"), (1, "b")], (0, "c"), 2, [(0, "c"), (1, "b")], ["a"]),
        ([(1, "a"), (HUGE, "b")], (5, "c"), 2, [(5, "c"), (HUGE, "b")], ["a"]),
        ([(NAN, "a")], (0, "c"), None, [(NAN, "a"), (0, "c")], []),
        # A smaller n_saved than before.
        ([(1, "a"), (2, "b"), (3, "c")], (4, "d"), 2, [(3, "c"), (4, "d")], ["a", "b"]),
    ],
    ids=readable,
)
def test_admitted_checkpoint_replaces_the_lowest(
    history: list[Entry], entry: Entry, n_saved: int | None, kept: list[Entry], evicted: list[str]
) -> None:
    retained = admit(history, entry, n_saved=n_saved)
    assert repr(list(retained.kept)) == repr(kept)  # NaN equals nothing, its text does
    assert list(retained.evicted) == evicted


@given(SAVES, LIMITS, st.tuples(PRIORITIES, NAMES))
def test_new_checkpoint_is_kept_and_never_evicted(saves: list[Entry], n_saved: int | None, entry: Entry) -> None:
    history = saved(saves, n_saved)
    retained = admit(history, entry, n_saved=n_saved)
    assert entry in retained.kept
    assert entry[1] not in retained.evicted
    assert n_saved is None or len(retained.kept) <= n_saved
    assert [name for _, name in retained.kept] == list(dict.fromkeys(name for _, name in retained.kept))
    priorities = [priority for priority, _ in retained.kept]
    assert priorities == sorted(priorities)


@given(SAVES, LIMITS, st.tuples(PRIORITIES, NAMES))
def test_every_old_file_is_either_kept_or_evicted(saves: list[Entry], n_saved: int | None, entry: Entry) -> None:
    history = saved(saves, n_saved)
    retained = admit(history, entry, n_saved=n_saved)
    others = {name for _, name in history} - {entry[1]}
    left = {name for _, name in retained.kept} - {entry[1]}
    assert left | set(retained.evicted) == others
    assert not left & set(retained.evicted)


@given(st.lists(PRIORITIES, max_size=15), st.integers(1, 4), st.booleans())
def test_best_scores_are_kept(scores: list[float], n_saved: int, greater_or_equal: bool) -> None:  # noqa: FBT001 - a strategy's
    history = History()
    for turn, score in enumerate(scores):
        if wants(history, score, n_saved=n_saved, greater_or_equal=greater_or_equal):
            history = admit(history, (score, f"{turn}.pt"), n_saved=n_saved, is_scored=True).kept
    assert [score for score, _ in history] == sorted(scores)[-n_saved:]
    if greater_or_equal:  # of equal ones the newest; else which of them depends on when there was room
        newest_wins = sorted(range(len(scores)), key=lambda turn: (scores[turn], turn))
        assert {int(name.removesuffix(".pt")) for _, name in history} == set(newest_wins[-n_saved:])


@given(st.lists(st.one_of(PRIORITIES, st.just(NAN)), max_size=15), st.integers(1, 3))
def test_nan_among_the_scores_changes_nothing(scores: list[float], n_saved: int) -> None:
    def history_of(values: list[float]) -> list[float]:
        history = History()
        for turn, value in enumerate(values):
            if wants(history, value, n_saved=n_saved, greater_or_equal=True):
                history = admit(history, (value, f"{turn}.pt"), n_saved=n_saved, is_scored=True).kept
        return [priority for priority, _ in history]

    assert history_of(scores) == history_of([score for score in scores if not math.isnan(score)])


@given(SAVES, LIMITS, st.tuples(PRIORITIES, NAMES))
def test_history_that_was_handed_in_is_not_changed(saves: list[Entry], n_saved: int | None, entry: Entry) -> None:
    history = saved(saves, n_saved)
    before = list(history)
    admit(history, entry, n_saved=n_saved)
    assert history == before


# -- histories of thousands ------------------------------------------------------------------------


def admitted_slowly(history: list[Entry], entry: Entry, n_saved: int | None) -> list[Entry]:
    """Return the history after a save, sorted anew."""
    kept = [old for old in history if old[1] != entry[1]]
    num_evicted = 0 if n_saved is None else max(0, len(kept) - n_saved + 1)
    evicted = {name for _, name in kept[:num_evicted]}
    return sorted([*(old for old in kept if old[1] not in evicted), entry], key=lambda one: one[0])


@given(st.lists(st.tuples(PRIORITIES, NAMES), max_size=5), SAVES, LIMITS)
def test_a_history_is_what_sorting_it_anew_gives(loaded: list[Entry], saves: list[Entry], n_saved: int | None) -> None:
    # What a user loads may be in any order, and hold a name twice.
    history, slow = History(loaded), list(loaded)
    for entry in saves:
        history, slow = admit(history, entry, n_saved=n_saved).kept, admitted_slowly(slow, entry, n_saved)
        assert list(history) == slow
        assert {name for name in "abcdefgh" if history.has_name(f"{name}.pt")} == {name[0] for _, name in slow}


def test_a_history_knows_its_names_after_many_saves() -> None:
    history = History((number, f"{number}.pt") for number in range(1000))
    for number in range(1000, 2000):
        history = admit(history, (number, f"{number}.pt"), n_saved=1000).kept
        assert history.has_name(f"{number}.pt")
        assert history.has_name(f"{number - 999}.pt")
        assert not history.has_name(f"{number - 1000}.pt")
    assert list(history) == [(number, f"{number}.pt") for number in range(1000, 2000)]


@given(SAVES, st.tuples(PRIORITIES, NAMES), LIMITS)
def test_the_same_saves_give_the_same_digest_and_others_another(
    saves: list[Entry], entry: Entry, n_saved: int | None
) -> None:
    one, other = History(saves), History(saves)
    assert one.digest == other.digest
    one, other = admit(one, entry, n_saved=n_saved).kept, admit(other, entry, n_saved=n_saved).kept
    assert one.digest == other.digest
    assert admit(one, (1, "another.pt"), n_saved=n_saved).kept.digest != one.digest
    assert one.replace([entry[1]]).digest != one.digest
    assert History([(1, "a.pt"), (1, "b.pt")]).digest != History([(1, "b.pt"), (1, "a.pt")]).digest


@given(SAVES, PRIORITIES, st.sets(NAMES))
def test_files_of_former_runs_rank_below_a_new_step_that_is_not_above_them(
    loaded: list[Entry], step: float, former: set[str]
) -> None:
    _, ranked = rank_candidate(History(loaded), score=None, global_step=step, is_mid_epoch=False, former=former)
    if any(value >= step for value, name in loaded if name in former):
        names = [name for _, name in loaded]
        assert [name for _, name in ranked] == sorted(names, key=lambda name: name not in former)
        assert all(value == -math.inf for value, name in ranked if name in former)
    else:
        assert list(ranked) == loaded
