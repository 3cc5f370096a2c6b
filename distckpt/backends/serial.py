"""The backend of a program without a distributed runtime: one rank, on which every collective is the identity."""

from typing import Any

import torch

from distckpt.backends.base import Backend, ReduceOp, TensorOp


class SerialBackend(Backend):
    """The only rank of a job. No method waits."""

    name = "serial"
    rank, world_size, local_rank, node = 0, 1, 0, 0

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        return values.clone()

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        return [data]

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        return tensor.detach().clone()

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach().clone()]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        return tensor.detach().clone()

    def next_object_id(self, kind: str) -> str | None:
        return None

    def post_note(self, object_id: str, text: str) -> None:
        del object_id, text

    def store_barrier(self, name: str, *, depends_on: str | None, timeout_s: float | None) -> str | None:
        return None


class SingleRank(SerialBackend):
    """A world of one rank, for a save during an exception: the other ranks may never come.

    It keeps the rank's number in the job, and issues no collectives.

    Args:
        backend: the job's backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.rank = backend.rank

    def sync_device(self, tree: Any, *, to_host: bool) -> Any:
        return self._backend.sync_device(tree, to_host=to_host)
