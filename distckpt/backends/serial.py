"""The backend of a program without a distributed runtime: one rank, on which every collective is the identity."""

import torch

from distckpt.backends.base import Backend, ReduceOp, TensorOp


class SerialBackend(Backend):
    """The only rank of a job. No method waits."""

    name = "serial"

    @property
    def rank(self) -> int:
        """0."""
        return 0

    @property
    def world_size(self) -> int:
        """1."""
        return 1

    @property
    def local_rank(self) -> int:
        """0."""
        return 0

    @property
    def node(self) -> int:
        """0."""
        return 0

    def reduce_host(self, values: torch.Tensor, op: ReduceOp, *, what: object, timeout_s: float | None) -> torch.Tensor:
        """Return a copy of `values`."""
        del op, what, timeout_s
        return values.clone()

    def gather_host(self, data: bytes, num_bytes: int, *, what: object, timeout_s: float | None) -> list[bytes]:
        """Return a list of `data`."""
        del num_bytes, what, timeout_s
        return [data]

    def reduce_tensor(self, tensor: torch.Tensor, op: TensorOp) -> torch.Tensor:
        """Return a copy of `tensor`."""
        del op
        return tensor.detach().clone()

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return a list of a copy of `tensor`."""
        return [tensor.detach().clone()]

    def broadcast_tensor(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Return a copy of `tensor`."""
        del src
        return tensor.detach().clone()

    def next_object_id(self, kind: str) -> str | None:
        """Return None: there are no other ranks."""
        del kind
        return None

    def post_note(self, object_id: str, text: str) -> None:
        """Do nothing: there are no other ranks."""
        del object_id, text

    def store_barrier(self, name: str, *, depends_on: str | None, timeout_s: float | None) -> str | None:
        """Return None."""
        del name, depends_on, timeout_s
        return None
