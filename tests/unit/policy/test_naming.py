"""What a checkpoint is called, and which names are refused."""

import math
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.policy.naming import (
    TEMP_PREFIX,
    TEMP_SUFFIX,
    basename,
    check_name,
    default_pattern,
    format_score,
    is_temp,
    render,
)

FIELDS = {
    "filename_prefix": "best",
    "name": "model",
    "global_step": 12,
    "score_name": "acc",
    "score": "0.5",
    "ext": "pt",
}


@pytest.mark.parametrize(
    ("choice", "pattern"),
    [
        ({}, "{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}"),
        ({"with_prefix": False}, "{name}_{global_step}_{score_name}={score}.{ext}"),
        ({"with_score_name": False}, "{filename_prefix}_{name}_{global_step}_{score}.{ext}"),
        ({"with_global_step": False}, "{filename_prefix}_{name}_{score_name}={score}.{ext}"),
        ({"with_prefix": False, "with_score": False, "with_score_name": False}, "{name}_{global_step}.{ext}"),
        ({"with_global_step": False, "with_score_name": False, "with_prefix": False}, "{name}_{score}.{ext}"),
    ],
)
def test_pattern_carries_what_was_asked_for(choice: dict[str, bool], pattern: str) -> None:
    assert default_pattern(**choice) == pattern


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"with_score": False, "with_score_name": False, "with_global_step": False},
            "At least one of with_score and with_global_step should be True.",
        ),
        ({"with_score": False}, "If with_score_name is True, with_score should be also True"),
    ],
)
def test_impossible_pattern_is_refused(choice: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_pattern(**choice)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (7, "7"),
        (-3, "-3"),
        (True, "True"),
        (2**70, str(2**70)),
        (0.12345, "0.1235"),
        (1.0, "1.0000"),
        (-0.0, "-0.0000"),
        (1e-9, "0.0000"),
        (1e20, "100000000000000000000.0000"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_integral_scores_stand_as_they_are_and_others_with_four_decimals(score: float, text: str) -> None:
    assert format_score(score) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15))
def test_score_in_a_name_is_within_half_of_its_last_decimal(score: float) -> None:
    assert float(format_score(score)) == pytest.approx(score, rel=1e-15, abs=0.5001e-4)


@pytest.mark.parametrize(
    ("prefix", "name", "expected"),
    [("best", "model", "best_model"), ("", "model", "model"), ("a/b", "model", "a/b_model"), ("best", "", "best_")],
)
def test_basename_joins_prefix_and_name(prefix: str, name: str, expected: str) -> None:
    assert basename(prefix, name) == expected


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (default_pattern(), "best_model_12_acc=0.5.pt"),
        ("{name}.{ext}", "model.pt"),
        ("{global_step:06d}.pt", "000012.pt"),
        ("{{{name}}}", "{model}"),
        ("constant", "constant"),
    ],
)
def test_pattern_is_filled(pattern: str, name: str) -> None:
    assert render(pattern, FIELDS) == name


def test_unknown_field_is_a_key_error_that_names_it_and_the_known_ones() -> None:
    with pytest.raises(KeyError) as caught:
        render("{name}_{epoch}.{ext}", FIELDS)
    for part in ("'epoch'", "{name}_{epoch}.{ext}", "ext, filename_prefix, global_step, name, score, score_name"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{TEMP_PREFIX}a{TEMP_SUFFIX}", True),
        (f"{TEMP_PREFIX}{TEMP_SUFFIX}", True),
        ("a.pt", False),
        ("a.tmp", False),
        (f"{TEMP_PREFIX}a.pt", False),
        (f"x{TEMP_PREFIX}a{TEMP_SUFFIX}", False),
    ],
)
def test_only_own_temporary_files_are_taken_for_such(name: str, *, expected: bool) -> None:
    assert is_temp(name) is expected


def test_temporary_files_are_hidden_and_no_checkpoints() -> None:
    assert TEMP_PREFIX.startswith(".")
    assert not TEMP_SUFFIX.endswith(".pt")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.pt", ("a.pt",)),
        ("fold0/best_3.pt", ("fold0", "best_3.pt")),
        ("./a//b/./c.pt", ("a", "b", "c.pt")),
        ("..a.pt", ("..a.pt",)),
        ("a..pt", ("a..pt",)),
        ("...", ("...",)),
        ("検査点 ß.pt", ("検査点 ß.pt",)),
        ("a\nb.pt", ("a\nb.pt",)),
        ("a\\b.pt", ("a\\b.pt",)),
        (f"{TEMP_PREFIX}a{TEMP_SUFFIX}/b.pt", (f"{TEMP_PREFIX}a{TEMP_SUFFIX}", "b.pt")),
    ],
)
def test_name_inside_the_directory_is_taken_apart(name: str, parts: tuple[str, ...]) -> None:
    assert check_name(name) == parts


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "it is empty"),
        ("/etc/passwd", "it is absolute"),
        ("//a", "it is absolute"),
        ("..", "would leave the directory"),
        ("../a.pt", "would leave the directory"),
        ("a/../../b.pt", "would leave the directory"),
        ("a/..", "would leave the directory"),
        (".", "it names a directory"),
        ("a/", "it names a directory"),
        ("a/.", "it names a directory"),
        ("a\0.pt", "it holds a NUL"),
        ("/../\0", "it holds a NUL"),
        ("\ud800.pt", "cannot be encoded"),
        (f"{TEMP_PREFIX}x{TEMP_SUFFIX}", "reserved for temporary files"),
        (f"sub/{TEMP_PREFIX}x{TEMP_SUFFIX}", "reserved for temporary files"),
    ],
)
def test_other_names_are_refused_with_the_reason(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        check_name(name, what="basename")
    assert "Argument basename should name a file inside the checkpoint directory" in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, b"a.pt", ["a.pt"]])
def test_name_that_is_no_text_is_a_type_error(name: object) -> None:
    with pytest.raises(TypeError, match=f"Argument filename should be a string, but given {type(name)}"):
        check_name(name)  # type: ignore[arg-type]


@given(st.text(alphabet=st.sampled_from("./" + string.ascii_letters + "é\0 "), max_size=12))
def test_accepted_name_resolves_to_inside_the_directory(name: str) -> None:
    try:
        parts = check_name(name)
    except ValueError:
        return
    assert parts
    assert os.path.normpath(f"/base/{name}") == "/".join(["/base", *parts])
