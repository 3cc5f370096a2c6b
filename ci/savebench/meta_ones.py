"""Contestants of Meta's torch_checkpointing (0.1.1); the environment `bench` has it installed.

It syncs nothing, so a thread syncs its files while training continues.
"""

import importlib
from pathlib import Path
from typing import Any

from ci.savebench.contestant import Contestant
from ci.savebench.job import Job

START_S = 120


class MetaSave(Contestant):
    """CheckpointManager: each rank writes its shards; with a resharder for each object also what describes them.

    0.1.1 gathers that description in tensors on CUDA devices. So without one there is no resharder, and only the same
    number of ranks loads the checkpoint.
    """

    name = "torch_checkpointing"
    reshards = False

    def __init__(self, job: Job) -> None:
        library: Any = importlib.import_module("torch_checkpointing")
        config: Any = importlib.import_module("torch_checkpointing.config")
        resharder: Any = importlib.import_module("torch_checkpointing.default_resharder")
        storage: Any = importlib.import_module("torch_checkpointing.storage.filesystem")
        super().__init__(job)
        arguments = {"resharder": resharder.DefaultResharder()} if job.device.type == "cuda" else {}
        self._manager = library.CheckpointManager(
            library.CheckpointManager.Config(
                items={name: library.ItemSpec(**arguments) for name in job.objects()},
                save=self.saver_config(config),
                # Its O_DIRECT fails with EINVAL: it does not align what it writes.
                storage_config=storage.LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self._future: Any = None

    def saver_config(self, config: Any) -> Any:
        """Return the part of the configuration that says how to save."""
        return config.SyncCheckpointSaverConfig()

    def save(self, path: Path) -> None:
        """Save on all ranks."""
        self.job.step_guard = self._manager.lock
        self._future = self._manager.save(str(path), self.job.state())

    def complete(self, path: Path) -> None:
        """Wait for its process."""
        del path
        if self._future is not None:
            self._future.result()

    def load(self, where: Path) -> None:
        """Load in place on every rank."""
        state = self.job.state()
        self.job.load_state(dict(self._manager.load(str(where), into=state)))

    def close(self) -> None:
        """End its process."""
        self._manager.close()
        super().close()


class MetaAsync(MetaSave):
    """The same with a copy on a thread, which the optimizer's step waits for, and a process that writes."""

    name = "torch_checkpointing async"
    is_background = True

    def saver_config(self, config: Any) -> Any:
        """Return the defaults, with more time for the process to start on a busy machine."""
        process = config.CheckpointProcessConfig(subprocess_init_timeout_secs=START_S)
        return config.AsyncCheckpointSaverConfig(process_config=process)
