"""The faults of ignite's handlers that must not be here, each with the tests that show it and its absence.

The table is checked: a test that is renamed or removed is missed here.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

WITH_SEVERAL_RANKS: dict[str, list[str]] = {
    "early stopping's score": [
        "distributed/test_stops.py::test_ignites_early_stopping_stops_one_rank_and_hangs_the_rest",
        "distributed/test_stops.py::test_ignites_early_stopping_pairs_a_reduction_with_a_training_step_in_silence",
        "distributed/test_stops.py::test_early_stopping_stops_all_ranks_at_the_same_event",
        "distributed/test_stops.py::test_reductions_after_early_stopping_pair_with_each_other",
    ],
    "NaN on one rank only": [
        "distributed/test_stops.py::test_ignites_terminate_on_nan_stops_one_rank_and_hangs_the_rest",
        "distributed/test_stops.py::test_nan_on_one_rank_stops_all_at_the_same_iteration_and_the_log_names_it",
    ],
    "the clock, in TimeLimit": [
        "distributed/test_stops.py::test_ignites_time_limit_stops_one_rank_and_hangs_the_rest",
        "distributed/test_stops.py::test_the_first_clock_that_runs_out_stops_all_ranks_at_the_same_iteration",
    ],
    "the score, in Checkpoint": [
        "distributed/test_scores.py::test_ignites_ranks_believe_in_files_of_their_own",
        "distributed/test_scores.py::test_last_checkpoint_is_one_for_all_ranks_and_on_disk",
    ],
    "... with ZeroRedundancyOptimizer": [
        "distributed/test_sharded_optimizer.py::test_ignites_ranks_hang_in_the_consolidation",
        "distributed/test_sharded_optimizer.py::test_a_sharded_optimizer_is_consolidated_on_all_ranks_or_on_none",
        "distributed/test_sharded_optimizer.py::test_directory_of_the_saving_rank_is_the_one_written_to",
    ],
    "an error while saving on the saving rank": [
        "distributed/test_save_errors.py::test_ignite_raises_on_one_rank_and_has_removed_the_older_checkpoint",
        "distributed/test_save_errors.py::test_ignites_other_ranks_hang_after_an_error_on_one",
        "distributed/test_save_errors.py::test_error_on_the_saving_rank_is_raised_on_all_and_the_older_checkpoint_stands",
        "distributed/test_save_errors.py::test_what_stood_before_loads_and_the_next_save_works",
        "distributed/test_save_errors.py::test_no_rank_hangs_after_an_error_on_one",
    ],
    "a require_empty violation": [
        "distributed/test_directories.py::test_ignites_saving_rank_refuses_alone_and_the_others_hang",
        "distributed/test_directories.py::test_every_rank_refuses_a_shared_directory_that_is_not_empty",
        "distributed/test_directories.py::test_what_only_the_saving_rank_sees_reaches_the_others_at_the_first_event",
    ],
    "handler state loaded on rank 0 only": [
        "distributed/test_loaded_state.py::test_ignites_histories_diverge",
        "distributed/test_loaded_state.py::test_ignites_early_stopping_forgets_on_the_other_ranks",
        "distributed/test_loaded_state.py::test_coordinators_history_holds_on_all_ranks",
        "distributed/test_loaded_state.py::test_coordinators_patience_holds_on_all_ranks",
    ],
    "an old file deleted by hand": [
        "distributed/test_removal.py::test_ignites_saving_rank_raises_alone_and_the_others_hang",
        "distributed/test_removal.py::test_a_file_removed_by_hand_is_a_warning_and_no_more",
    ],
    "SAVED_CHECKPOINT and a slow write": [
        "distributed/test_saved_event.py::test_ignites_ranks_tell_of_a_file_that_does_not_exist_yet",
        "distributed/test_saved_event.py::test_ranks_tell_of_a_checkpoint_once_it_is_committed",
    ],
    "a handler built on rank 0 only": [
        "distributed/test_first_event.py::test_ignites_constructor_hangs_the_job",
        "distributed/test_first_event.py::test_a_constructor_disturbs_nobody",
        "distributed/test_first_event.py::test_first_event_names_the_rank_that_lacks_the_handler",
        "contracts/test_own_group.py::test_one_rank_alone_may_build_every_handler",
    ],
}

WITH_ONE_PROCESS: dict[str, list[str]] = {
    "a NaN score blocks every later checkpoint": [
        "distributed/test_one_process_faults.py::test_ignites_nan_score_blocks_every_later_checkpoint",
        "distributed/test_one_process_faults.py::test_a_nan_score_is_not_better_than_anything",
    ],
    "early stopping takes each NaN for an improvement": [
        "distributed/test_one_process_faults.py::test_ignites_early_stopping_takes_nan_for_an_improvement",
        "distributed/test_one_process_faults.py::test_nan_is_no_improvement",
    ],
    "two checkpoints on one event with global_step_from_engine": [
        "distributed/test_one_process_faults.py::test_ignites_second_checkpoint_on_an_event_is_named_by_another",
        "distributed/test_one_process_faults.py::test_both_checkpoints_on_an_event_are_named_by_it",
    ],
    "a listener for SAVED_CHECKPOINT before the first save": [
        "distributed/test_one_process_faults.py::test_ignites_cannot_be_listened_to_before_the_first_save",
        "distributed/test_one_process_faults.py::test_ours_can_be_listened_to_before_the_first_save",
    ],
    "the old checkpoint is removed before the new one is written": [
        "distributed/test_one_process_faults.py::test_ignite_removes_first_and_syncs_nothing",
        "distributed/test_one_process_faults.py::test_ours_syncs_then_renames_then_syncs_then_removes",
        "distributed/test_one_process_faults.py::test_a_killed_save_leaves_the_older_checkpoint_where_ignites_leaves_none",
        "distributed/test_save_errors.py::test_ignite_raises_on_one_rank_and_has_removed_the_older_checkpoint",
    ],
    "no fsync, and temporary files that stay for ever": [
        "distributed/test_one_process_faults.py::test_ours_syncs_then_renames_then_syncs_then_removes",
        "distributed/test_one_process_faults.py::test_a_killed_save_leaves_the_older_checkpoint_where_ignites_leaves_none",
        "distributed/test_directories.py::test_files_have_the_permissions_that_the_umask_gives",
    ],
}

OF_IDIST: dict[str, list[str]] = {
    "floats, text and dictionaries between ranks": [
        "contracts/test_beside_idist.py::test_values_that_idist_damages_come_back_equal_from_ours",
        "contracts/test_objects.py::test_every_rank_receives_an_equal_object",
        "contracts/test_numbers.py::test_a_float_that_one_rank_brings_keeps_its_bits",
    ],
    "MAX over a NaN": [
        "contracts/test_beside_idist.py::test_a_nan_is_found_by_a_flag_where_idists_maximum_hides_it",
    ],
}

WITH_THREE_RANKS_TOO = (
    "early stopping's score",
    "NaN on one rank only",
    "the clock, in TimeLimit",
    "the score, in Checkpoint",
    "... with ZeroRedundancyOptimizer",
    "an error while saving on the saving rank",
    "a require_empty violation",
    "handler state loaded on rank 0 only",
    "an old file deleted by hand",
    "SAVED_CHECKPOINT and a slow write",
    "a handler built on rank 0 only",
)


@cache
def functions_of(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("fault", "tests"), [*WITH_SEVERAL_RANKS.items(), *WITH_ONE_PROCESS.items(), *OF_IDIST.items()]
)
def test_fault_has_its_tests(fault: str, tests: list[str]) -> None:
    missing = [test for test in tests if test.partition("::")[2] not in functions_of(test.partition("::")[0])]
    assert missing == [], fault


@pytest.mark.parametrize("fault", [*WITH_SEVERAL_RANKS, *WITH_ONE_PROCESS])
def test_fault_is_shown_with_ignite_and_its_absence_with_ours(fault: str) -> None:
    tests = [test.partition("::")[2] for test in (WITH_SEVERAL_RANKS | WITH_ONE_PROCESS)[fault]]
    assert any("ignite" in test for test in tests), fault
    assert any("ignite" not in test for test in tests), fault


@pytest.mark.parametrize("fault", WITH_THREE_RANKS_TOO)
def test_what_divides_ranks_is_tested_with_three(fault: str) -> None:
    """A test names the sizes of its worlds in its decorators."""
    decorators = [
        ast.unparse(decorator)
        for path, _, name in (test.partition("::") for test in WITH_SEVERAL_RANKS[fault])
        for decorator in functions_of(path)[name].decorator_list
    ]
    assert any("WORLDS" in text for text in decorators), fault


@pytest.mark.parametrize(
    ("fault", "tests"), [*WITH_SEVERAL_RANKS.items(), *WITH_ONE_PROCESS.items(), *OF_IDIST.items()]
)
def test_fault_is_tested_in_a_quick_run_too(fault: str, tests: list[str]) -> None:
    decorators = [
        ast.unparse(decorator)
        for path, _, name in (test.partition("::") for test in tests)
        for decorator in functions_of(path)[name].decorator_list
    ]
    assert not [text for text in decorators if text.startswith(("full_only", "quick"))], fault
