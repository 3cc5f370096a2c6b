"""torch.save, ignite's Checkpoint and torch.distributed.checkpoint.

They sync nothing, so a thread syncs their files while training continues.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import ignite.handlers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ignite.engine import Engine, Events
from torch.distributed.checkpoint import DefaultSavePlanner, staging
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ci.savebench.contestant import Contestant, MissingError
from ci.savebench.job import Job


class TorchSave(Contestant):
    """torch.save on rank 0, torch.load on every rank."""

    name = "torch.save"
    writes_one_file = True

    def save(self, path: Path) -> None:
        """Save on rank 0."""
        if self.job.rank == 0:
            torch.save(self.job.state(), path)

    def load(self, where: Path) -> None:
        """Load on every rank."""
        self.job.load_state(torch.load(where, map_location="cpu", weights_only=True))


class IgniteCheckpoint(Contestant):
    """ignite's Checkpoint with its DiskSaver, which keeps the latest one."""

    name = "ignite Checkpoint"
    writes_one_file = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        saver = ignite.handlers.DiskSaver(str(self.folder), require_empty=False)
        self._checkpoint = ignite.handlers.Checkpoint(
            job.wrapped(), saver, n_saved=1, global_step_transform=lambda *_: job.num_steps
        )

    def attach(self, engine: Engine, *, at: int, path: Path) -> None:
        """Attach the handler."""
        del path
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=at), self._checkpoint)

    def where(self, path: Path) -> Path:
        """Return the only file."""
        del path
        (found,) = self.folder.glob("*.pt")
        return found

    def load(self, where: Path) -> None:
        """Load on every rank."""
        ignite.handlers.Checkpoint.load_objects(self.job.wrapped(), checkpoint=str(where))

    def remove(self, path: Path) -> None:
        """Do nothing: the next save removes the file."""


class DcpSave(Contestant):
    """torch.distributed.checkpoint.save: each rank writes a part."""

    name = "DCP save"
    consolidates = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Its own group: a thread's collectives would mix with those of the training.
        self._group = dist.new_group(backend="gloo")
        self._future: Future[Any] | None = None

    def save(self, path: Path) -> None:
        """Save on all ranks."""
        dcp.save(self.job.state(), checkpoint_id=path, process_group=self._group)

    def load(self, where: Path) -> None:
        """Load everything in place on every rank."""
        state = self.job.state()
        dcp.load(state, checkpoint_id=where, process_group=self._group)
        self.job.load_state(state)

    def consolidate(self, where: Path, target: Path) -> None:
        """Read everything into one process, and torch.save it."""
        dcp_to_torch_save(where, target)

    def close(self) -> None:
        """Destroy the group."""
        dist.destroy_process_group(self._group)


class DcpThread(DcpSave):
    """async_save by default: a copy into new memory, then a thread."""

    name = "DCP async_save"
    is_background = True
    consolidates = False  # its files are those of DCP save

    def save(self, path: Path) -> None:
        """Copy the state, and start the write."""
        response = dcp.async_save(
            self.job.state(), checkpoint_id=path, process_group=self._group, **self.extra_arguments()
        )
        self._future = response if isinstance(response, Future) else response.upload_completion

    def extra_arguments(self) -> dict[str, Any]:
        """Return additional arguments of async_save."""
        return {}

    def complete(self, path: Path) -> None:
        """Wait for the thread."""
        del path
        if self._future is not None:
            self._future.result()


class DcpCache(DcpThread):
    """async_save that plans once, and checks later that the plan still holds."""

    name = "DCP async_save, plan cache"

    def extra_arguments(self) -> dict[str, Any]:
        """Return the planner."""
        return {"planner": DefaultSavePlanner(enable_plan_caching=True)}


class DcpStager(DcpThread):
    """async_save with a stager that reuses its memory."""

    name = "DCP async_save, stager"
    is_memory_shared: ClassVar[bool] = False
    options: ClassVar[dict[str, bool]] = {"use_pinned_memory": False, "use_non_blocking_copy": False}

    def __init__(self, job: Job) -> None:
        if not hasattr(staging, "DefaultStager"):
            msg = f"torch {torch.__version__} has no DefaultStager"
            raise MissingError(msg)
        super().__init__(job)
        self._stager = staging.DefaultStager(
            staging.StagingOptions(
                use_shared_memory=self.is_memory_shared,
                use_async_staging=False,
                **self.options,
            )
        )

    def extra_arguments(self) -> dict[str, Any]:
        """Return the stager."""
        return {"async_stager": self._stager}

    def close(self) -> None:
        """Free the memory."""
        self._stager.close()
        super().close()


class DcpPinned(DcpStager):
    """The same in pinned memory, copied from the device without blocking until its end."""

    name = "DCP async_save, pinned"
    options: ClassVar[dict[str, bool]] = {"use_pinned_memory": True, "use_non_blocking_copy": True}

    def __init__(self, job: Job) -> None:
        if not torch.cuda.is_available():
            msg = "pinned memory needs a CUDA device"
            raise MissingError(msg)
        super().__init__(job)


class DcpProcess(DcpThread):
    """async_save in a process that is reused."""

    name = "DCP async_save, process"

    def extra_arguments(self) -> dict[str, Any]:
        """Return the process type."""
        return {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def close(self) -> None:
        """End the process too."""
        _end_process()
        super().close()


class DcpProcessStager(DcpStager):
    """async_save in a process, with a stager in shared memory."""

    name = "DCP async_save, process, stager"
    is_memory_shared = True

    def extra_arguments(self) -> dict[str, Any]:
        """Return the stager and the process type."""
        return {**super().extra_arguments(), "async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def close(self) -> None:
        """End the process too."""
        _end_process()
        super().close()


def _end_process() -> None:
    from torch.distributed.checkpoint import _async_process_executor as executor  # noqa: PLC0415 - not in every torch

    executor._CHECKPOINT_PROCESS = None  # noqa: SLF001 - there is no public way; the next save starts another
