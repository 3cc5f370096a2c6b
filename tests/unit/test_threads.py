"""How many threads a rank may use, by what the launcher tells."""

import os

import pytest
import torch

from distckpt._threads import get_num_threads


@pytest.mark.parametrize(
    ("local_world_size", "world_size", "num_cpus", "expected"),
    [
        (None, 1, 1, 1),
        (None, 1, 3, 3),
        (None, 1, 96, 4),
        (None, 8, 96, 4),
        (None, 64, 96, 1),
        ("8", 64, 24, 3),
        ("8", 64, 4, 1),
        ("0", 2, 4, 2),
        ("3", 2, 4, 2),
        ("two", 2, 4, 2),
    ],
)
def test_a_rank_has_its_part_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str | None, world_size: int, num_cpus: int, expected: int
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cpus)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert get_num_threads(world_size) == expected


def test_what_torch_may_use_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    for given, expected in ((2, 2), (16, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda given=given: given)
        assert get_num_threads(8) == expected
