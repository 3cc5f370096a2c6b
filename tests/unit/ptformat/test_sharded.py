"""What is known of a device mesh is asked of torch once."""

import gc

import torch

from distckpt.ptformat.sharded import mesh_ranks


class Mesh:
    """Counts how often it is asked."""

    def __init__(self, ranks: list[list[int]]) -> None:
        self._ranks = torch.tensor(ranks)
        self.num_asked = 0

    @property
    def mesh(self) -> torch.Tensor:
        self.num_asked += 1
        return self._ranks

    @property
    def shape(self) -> torch.Size:
        return self._ranks.shape


def test_a_mesh_is_asked_once_for_its_ranks() -> None:
    first, second = Mesh([[0, 1], [2, 3]]), Mesh([[4], [6]])
    for _ in range(3):
        assert mesh_ranks(first) == ((0, 1, 2, 3), (2, 2))
        assert mesh_ranks(second) == ((4, 6), (2, 1))
    assert (first.num_asked, second.num_asked) == (1, 1)


def test_what_is_known_of_a_mesh_goes_with_it() -> None:
    """Another mesh may get the same id."""
    for rank in range(20):
        assert mesh_ranks(Mesh([[rank]])) == ((rank,), (1, 1))
        gc.collect()
