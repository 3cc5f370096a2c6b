"""One rank's snapshot of a state: from captured objects to bytes in a file.

Owns planning, staging and writing on one rank. Must not know about engines, nor how ranks agree. Layer L4, below
:mod:`distckpt.save`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distckpt.manifest import Manifest, TensorEntry, to_json
from distckpt.state.staging import Copy, HostMemory, Staging, num_staging_threads
from distckpt.storage.archive import BLOCK_BYTES
from distckpt.storage.direct import write_at
from distckpt.storage.disk import Directory, NewFile, WriteReceipt
from distckpt.storage.image import ImagePlan, Part, crcs_of, plan_image, tail_of
from distckpt.storage.pickling import Pickled, pickle_state
from distckpt.storage.ptfile import is_ordinary, write_pt
from distckpt.storage.verify import check_whole

__all__ = ["Snapshot", "write_file"]


class Snapshot:
    """A state's image in host memory.

    Args:
        pickled: the state.
        plan: of its image.
        memory: where to stage it; in use until the snapshot is written.
    """

    def __init__(self, pickled: Pickled, plan: ImagePlan, memory: HostMemory) -> None:
        view = memory.take(plan.end)
        self._rest = b""
        self._pickled = pickled
        self._plan = plan
        self._part = Part(plan, view, 0, plan.end)
        self._staging = Staging(pickled.storages, (Copy(*piece) for piece in plan.pieces(0, plan.end)), view, 0)

    def staging_beside(self) -> contextlib.AbstractContextManager[None]:
        """Copy the bytes on other threads while the body runs."""
        return self._staging.beside(num_staging_threads())

    def write_image(self, new: NewFile) -> list[tuple[int, int, int]]:
        """Write the image's bytes into a file, each as soon as it is staged.

        Returns:
            What was checked; see :class:`~distckpt.storage.image.Part`.

        Raises:
            SaveError: the operating system refused.
        """
        done = 0
        try:
            with new.opened_directly() as file:
                for at, chunk in self._part.chunks(self._staging.wait_for):
                    num_whole = len(chunk) // BLOCK_BYTES * BLOCK_BYTES
                    file.write(chunk[:num_whole], at)
                    self._rest = bytes(chunk[num_whole:])  # of the image's last chunk alone: it goes with the tail
                    done += num_whole
        except OSError as error:
            raise new.refused("writing", done, error) from error
        return self._part.checked

    def write_tail(self, new: NewFile, checked: Sequence[Sequence[tuple[int, int, int]]], about: Manifest) -> int:
        """Write what comes after the image.

        Args:
            new: the file.
            checked: of all shares, in the order of the image.
            about: the manifest, but for its tensors.

        Returns:
            The file's length.

        Raises:
            SaveError: the operating system refused.
        """
        crcs = crcs_of(self._plan, checked)
        tail = tail_of(self._plan, crcs, self._pickled.data, to_json(replace(about, tensors=self._entries(crcs))))
        at = self._plan.end - len(self._rest)
        try:
            write_at(new.fd, memoryview(self._rest + tail), at)
        except OSError as error:
            raise new.refused("writing", at, error) from error
        return self._plan.end + len(tail)

    def _entries(self, crcs: Sequence[int]) -> tuple[TensorEntry, ...]:
        by_storage = {
            number: (slot, crc) for number, slot, crc in zip(self._plan.order, self._plan.slots, crcs, strict=True)
        }
        entries = []
        for tensor in self._pickled.tensors():
            slot, crc = by_storage[tensor.storage]
            entries.append(
                TensorEntry(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    record=slot.name,
                    offset=slot.offset + tensor.begin_bytes,
                    num_bytes=tensor.num_bytes,
                    crc32=crc,
                )
            )
        return tuple(entries)


def write_file(
    directory: Directory,
    name: str,
    state: Any,
    *,
    memory: HostMemory,
    about: Manifest,
    options: Mapping[str, Any],
    atomic: bool,
) -> WriteReceipt:
    """Write a state as a file, whole and durable, and return when it is. Rank-local; issues no collectives.

    Args:
        directory: where.
        name: relative to it.
        state: what ``torch.save`` takes.
        memory: where to stage it.
        about: the manifest, but for its tensors.
        options: keyword arguments of ``torch.save``.
        atomic: see :meth:`~distckpt.storage.disk.Directory.create`.

    Raises:
        ValueError: the name would leave the directory, or a symlink is in the way.
        SaveError: the operating system refused; what was there before is untouched.
        CommitNotDurable: the file is there, but may not survive a power cut.
    """
    if not is_ordinary(options):  # another pickler's, or the older format: torch's own writer knows them
        return directory.write(name, lambda sink: write_pt(state, sink, options), atomic=atomic)
    pickled = pickle_state(state, protocol=options.get("pickle_protocol", 2))
    plan = plan_image([storage.nbytes() for storage in pickled.storages])
    with directory.create(name, atomic=atomic) as new:
        snapshot = Snapshot(pickled, plan, memory)
        with snapshot.staging_beside():
            checked = snapshot.write_image(new)
        return new.commit(snapshot.write_tail(new, [checked], about), check_whole)
