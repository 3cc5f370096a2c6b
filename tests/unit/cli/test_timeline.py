"""What ``distckpt plot`` makes of records and files: sessions, their ends, lost work."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.cli.survey import survey
from distckpt.cli.svg import linear_ticks
from distckpt.cli.time_axis import TimeAxis
from distckpt.cli.timeline import COMPLETE, ENDED, KILLED, NO_END, Timeline, iteration_time, make_timeline
from distckpt.cli.timeline_picture import draw_timeline
from tests.unit.cli.conftest import train

SVG = "{http://www.w3.org/2000/svg}"
Event = dict[str, Any]
BEGIN_S = 1_795_946_400.0


def session(
    name: str,
    begin_s: float,
    first: int,
    reached: int,
    *,
    run: str | None = None,
    every: int = 10,
    resumed: tuple[str, list[str]] | None = None,
    limit: int = 100,
    ends: Sequence[Event] = (),
    **facts: Any,
) -> list[Event]:
    """Return the events of a session that trains an iteration a second, and saves every few if it has a run."""
    start_s = BEGIN_S + begin_s
    events: list[Event] = []
    if resumed is not None:
        events.append(
            {"event": "resume", "at_s": start_s - 1, "run": resumed[0], "lineage": resumed[1], "file": "f.pt"}
        )
    events.append({"event": "start", "at_s": start_s, "iteration": first, "max_epochs": 1, "epoch_length": limit})
    for iteration in range(first + 1, reached + 1):
        at_s = start_s + iteration - first
        if run is not None and iteration % every == 0:
            save = {"event": "save", "at_s": at_s, "iteration": iteration, "run": run, "file": f"{run}_{iteration}.pt"}
            events.append(save | {"handler": "c by step", "stall_s": 0.1, "durable_s": 0.2} | facts)
        elif iteration == reached:
            events.append({"event": "progress", "at_s": at_s, "iteration": iteration})
    events += [{"at_s": start_s + reached - first, "iteration": reached} | event for event in ends]
    return [event | {"session": name} for event in events]


END: Event = {"event": "end"}
KILLED_TWICE = [
    *session("a", 0, 0, 33, run="r1"),
    *session("b", 100, 30, 58, run="r2", resumed=("r1", [])),
    *session("c", 10_000, 50, 100, run="r3", resumed=("r2", ["r1"]), ends=[END]),
]


def ends_of(timeline: Timeline) -> list[tuple[str, int]]:
    return [(one.outcome, one.lost) for one in timeline.sessions]


def texts_of(picture: bytes) -> list[str]:
    return [one.text or "" for one in ET.fromstring(picture).iter(f"{SVG}text")]  # noqa: S314 - made here


def test_what_a_killed_run_had_trained_after_its_last_save_is_lost() -> None:
    timeline = make_timeline(KILLED_TWICE, [])
    assert ends_of(timeline) == [(KILLED, 3), (KILLED, 8), (COMPLETE, 0)]
    assert timeline.lost == 11
    texts = texts_of(draw_timeline(timeline, "run"))
    assert {"killed, at least 3 lost", "killed, at least 8 lost", "complete"} <= set(texts)
    assert any("3 sessions; 10 saves, 0 still there; 2 killed; 11 iterations lost" in text for text in texts)


def test_the_order_of_the_lines_does_not_matter() -> None:
    expected = make_timeline(KILLED_TWICE, [])
    assert ends_of(make_timeline(KILLED_TWICE[::-1], [])) == ends_of(expected)


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ([{"event": "stop", "reason": "preempted"}, END], "preempted"),
        ([{"event": "stop", "reason": "nan"}, {"event": "error", "type": "SystemExit"}], "SystemExit"),
        ([{"event": "error", "type": "ValueError"}], "ValueError"),
        ([END], ENDED),
        ([], NO_END),
    ],
)
def test_a_session_ends_as_its_last_events_tell(ends: list[Event], outcome: str) -> None:
    timeline = make_timeline(session("a", 0, 0, 33, run="r1", ends=ends), [])
    assert ends_of(timeline) == [(outcome, 0)]


def test_a_signal_is_told_with_the_stop() -> None:
    signal: Event = {"event": "signal", "signals": [{"rank": 1, "signal": "SIGTERM"}]}
    ends = [signal, {"event": "stop", "reason": "preempted"}, END]
    timeline = make_timeline(session("a", 0, 0, 33, run="r1", ends=ends), [])
    assert "preempted (rank 1: SIGTERM)" in texts_of(draw_timeline(timeline, "run"))


def test_an_error_loses_what_is_trained_again_too() -> None:
    first = session("a", 0, 0, 33, run="r1", ends=[{"event": "error", "type": "ValueError"}])
    timeline = make_timeline([*first, *session("b", 50, 30, 100, resumed=("r1", []), ends=[END])], [])
    assert ends_of(timeline) == [("ValueError", 3), (COMPLETE, 0)]


def test_a_run_that_was_killed_before_its_first_save_has_lost_all() -> None:
    timeline = make_timeline([*session("a", 0, 0, 7), *session("b", 20, 0, 100, run="r", ends=[END])], [])
    assert ends_of(timeline) == [(KILLED, 7), (COMPLETE, 0)]
    again = [event for event in KILLED_TWICE if event["session"] != "c"]
    again += [*session("c", 500, 50, 54, resumed=("r2", ["r1"]))]
    again += session("d", 600, 50, 100, run="r4", resumed=("r2", ["r1"]), ends=[END])
    assert ends_of(make_timeline(again, []))[-2:] == [(KILLED, 4), (COMPLETE, 0)]


def test_a_resume_from_before_the_last_session_loses_all_of_it() -> None:
    events = [event for event in KILLED_TWICE if event["session"] != "c"]
    events += [*session("d", 600, 20, 100, run="r4", resumed=("r1", []), ends=[END])]
    timeline = make_timeline(events, [])
    assert ends_of(timeline) == [(KILLED, 3), (KILLED, 38), (COMPLETE, 0)]


def test_jobs_beside_each_other_and_runs_that_begin_anew_lose_nothing() -> None:
    jobs = [*session("a", 0, 0, 33, run="r1"), *session("b", 5, 0, 100, run="r2", ends=[END])]
    assert ends_of(make_timeline(jobs, [])) == [(NO_END, 0), (COMPLETE, 0)]
    other = [*session("a", 0, 0, 33, run="r1"), *session("b", 50, 10, 100, resumed=("r0", []), ends=[END])]
    assert ends_of(make_timeline(other, [])) == [(NO_END, 0), (COMPLETE, 0)]
    anew = [*session("a", 0, 0, 33, run="r1"), *session("b", 50, 0, 100, run="r2", ends=[END])]
    assert ends_of(make_timeline(anew, [])) == [(NO_END, 0), (COMPLETE, 0)]


def test_files_tell_of_runs_without_a_record(tmp_path: Path) -> None:
    train(tmp_path, num_epochs=2)
    train(tmp_path, num_epochs=4)
    timeline = make_timeline([], survey(tmp_path, recursive=False))
    assert [one.outcome for one in timeline.sessions] == [NO_END] * len(timeline.sessions)
    assert {save.iteration for save in timeline.saves} == {20, 30, 40}
    assert all(save.is_there and save.stall_s is None for save in timeline.saves)
    assert any("by" in (save.handler or "") and save.score is not None for save in timeline.saves)
    assert timeline.sessions[0].runs <= timeline.sessions[-1].ancestors
    assert "no timings recorded" in texts_of(draw_timeline(timeline, "run"))


def test_a_file_whose_save_the_record_lacks_joins_the_session_that_saved_it(tmp_path: Path) -> None:
    train(tmp_path, num_epochs=2)
    entries = survey(tmp_path, recursive=False)
    (run,) = {entry.record.run.id for entry in entries if entry.record is not None}
    saved_s = min(entry.saved_s for entry in entries)
    start = {"event": "start", "at_s": saved_s - 5.0, "iteration": 0, "session": "a"}
    named = {"event": "save", "run": run, "at_s": saved_s, "session": "a", "iteration": 10, "file": "gone.pt"}
    for events in ([start], [start, named]):
        timeline = make_timeline(events, entries)
        (found,) = timeline.sessions
        assert sum(save.is_there for save in found.saves) == len(entries)
        assert found.reached == 20


def test_the_saves_of_the_record_know_their_files(tmp_path: Path) -> None:
    train(tmp_path, num_epochs=1)
    entries = survey(tmp_path, recursive=False)
    events = [
        {"event": "save", "at_s": 1.0, "file": entry.name, "run": None if entry.record is None else entry.record.run.id}
        for entry in entries
    ]
    timeline = make_timeline([*events, {"event": "save", "at_s": 2.0, "file": "gone.pt", "run": "r"}], entries)
    assert [save.is_there for save in timeline.others] == [True] * len(entries) + [False]


def test_a_long_run_stays_legible_and_small() -> None:
    many = session("a", 0, 0, 50_000, run="r1", limit=50_000, ends=[END], score=0.5)
    picture = draw_timeline(make_timeline(many, []), "run")
    assert len(picture) < 100_000
    assert sum(1 for _ in ET.fromstring(picture).iter()) < 300  # noqa: S314 - made here
    assert any("5,000 saves" in text for text in texts_of(picture))


def test_names_with_control_characters_and_tags_make_no_other_picture() -> None:
    name = 'a\x1b[2J\x00</text><script>\ufffe\udce9&"'
    signal: Event = {"event": "signal", "signals": [{"rank": 0, "signal": name}]}
    ends = [signal, {"event": "stop", "reason": name}, END]
    events = session("a", 0, 0, 20, run=name, ends=ends, handler=name, score=0.5)
    picture = draw_timeline(make_timeline(events, []), name)
    assert ET.fromstring(picture).find(f".//{SVG}script") is None  # noqa: S314 - made here
    assert b"\\x1b" in picture
    assert picture.isascii()


NUMBERS: list[Any] = [True, -1, 3, 20, 10**400, 0.5, -1e308, 1e308, float("inf"), float("nan")]
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [*NUMBERS, None, "x", "nan", [], [1, [2]], {}, [{"rank": 1}], [{"rank": [], "signal": {}}]]
)
KINDS = st.sampled_from(["start", "resume", "progress", "save", "signal", "stop", "error", "end", "other"])
FIELDS = ["iteration", "epoch_length", "max_epochs", "max_iters", "run", "lineage", "file", "handler", "score"]
FIELDS += ["stall_s", "durable_s", "signals", "reason", "type", "num_bytes", "epoch"]
EVENTS = st.builds(
    lambda kind, at_s, name, fields: fields | {"event": kind, "at_s": at_s, "session": name},
    KINDS,
    st.floats(0.0, 1e10) | st.integers(0, 10**10),
    st.sampled_from(["a", "b", None, 3]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
)


@given(st.lists(EVENTS, min_size=1, max_size=12))
def test_no_record_is_too_strange_to_be_drawn(events: list[Mapping[str, Any]]) -> None:
    timeline = make_timeline(events, [])
    if timeline.sessions or timeline.others:
        ET.fromstring(draw_timeline(timeline, "run"))  # noqa: S314 - made here


def test_iterations_between_known_points_are_interpolated() -> None:
    (found,) = make_timeline(session("a", 0, 10, 40, run="r", every=15), []).sessions
    assert [iteration_time(found, at) - BEGIN_S for at in (0, 10, 20, 30, 40, 99)] == [0, 0, 10, 20, 30, 30]


SPANS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e5)).map(lambda one: (one[0], sum(one))), min_size=1)


@given(SPANS, st.lists(st.floats(-1e6, 2e6), min_size=2))
def test_a_later_time_is_never_left_of_an_earlier_one(spans: list[tuple[float, float]], times: list[float]) -> None:
    axis = TimeAxis(spans, 10.0, 100.0)
    places = [axis.x(at_s) for at_s in sorted(times)]
    assert all(first <= second + 1e-6 for first, second in itertools.pairwise(places))
    assert 10.0 - 1e-6 <= min(places) <= max(places) <= 110.0 + 1e-6
    ticks = [x for x, _ in axis.ticks()]
    assert ticks == sorted(ticks)


def test_long_pauses_are_cut_out_and_short_ones_are_not() -> None:
    axis = TimeAxis([(0.0, 100.0), (101.0, 200.0), (5000.0, 5100.0)], 0.0, 315.0)
    (pause,) = axis.pauses
    assert (pause.length_s, pause.left, pause.width) == (4800.0, 200.0, 15.0)
    assert [axis.x(at_s) for at_s in (0.0, 100.5, 200.0, 3000.0, 5000.0, 5100.0)] == [0, 100.5, 200, 200, 215, 315]
    assert "minutes" in axis.label


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (5.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (0.0, 1e-300)]
)
def test_an_axis_without_a_length_has_at_most_one_tick(low: float, high: float) -> None:
    assert len(linear_ticks(low, high, 5)) <= 1 or high > 0.0
