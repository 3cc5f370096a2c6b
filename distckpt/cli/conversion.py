"""``distckpt convert``: write a checkpoint in another format.

Tensors are read and written in chunks (DCP: one at a time). A ``.pt`` file is verified first: otherwise damaged bytes
would get valid checksums. The result is renamed to its final name when it is durable.
"""

import argparse
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distckpt.cli.output import CommandError, ExitCode, Output, count, format_bytes
from distckpt.cli.progress import Progress
from distckpt.cli.sources import PtSource, Source, chunks, dtype_name, find_key, memory_of, num_bytes_of, open_source
from distckpt.cli.structure import MANIFEST, STRUCTURE, FlatState, flatten, is_plain_tensor
from distckpt.cli.verification import check_file
from distckpt.policy.naming import is_temp
from distckpt.ptformat.manifest import SCHEMA, Manifest, to_json
from distckpt.ptformat.pickler import pickle_state
from distckpt.ptformat.safetensors_format import DTYPES, build_safetensors_header
from distckpt.ptformat.stream_writer import write_streamed
from distckpt.ptformat.verify import check_whole
from distckpt.storage.direct_io import BufferedWriter
from distckpt.storage.local import LocalStorage

PT, SAFETENSORS, DCP = "pt", "safetensors", "dcp"
_FORMATS = {".pt": PT, ".pth": PT, ".ckpt": PT, ".safetensors": SAFETENSORS, "": DCP}
_MOST_SHOWN = 3
_NAMES = {name: kind for kind, name in DTYPES.items()}


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    out: Path = arguments.out
    kind = arguments.to or _FORMATS.get(out.suffix)
    if kind is None:
        raise CommandError(f"the name {out} does not say its format: give --to pt, --to safetensors or --to dcp")
    _check_out(arguments.file, out, kind, force=arguments.force)
    with open_source(arguments.file) as source:
        state = source.state if arguments.only is None else find_key(source.state, arguments.only)
        if is_plain_tensor(state) and kind != PT:  # these formats hold tensors by name
            state = {(arguments.only or "tensor").rpartition(".")[2]: state}
        manifest = _manifest_of(source)
        if isinstance(source, PtSource):
            with Progress("verifying", source.num_bytes) as progress:
                source.opened.raise_for_faults(source.opened.faults(check_file(source.opened, progress)))
        flat = flatten(state)
        num_bytes = sum(num_bytes_of(tensor) for tensor in flat.tensors.values())
        with Progress("converting", num_bytes) as progress, source.reading():
            if kind == PT:
                _write_pt(source, state, manifest, out, progress)
            elif kind == SAFETENSORS:
                _write_safetensors(source, _checked(flat, out), manifest, out, progress)
            else:
                _write_dcp(source, state, _checked(flat, out), manifest, out)
    if kind != PT and flat.num_separated:
        output.line(f"{count(flat.num_separated, 'tensor')} that shared memory with others have their own in {out}")
    output.json({"out": str(out), "format": kind, "num_tensors": len(flat.tensors), "num_bytes": num_bytes})
    output.line(f"{out}: {count(len(flat.tensors), 'tensor')}, {format_bytes(num_bytes)}")
    return ExitCode.OK


def _check_out(file: Path, out: Path, kind: str, *, force: bool) -> None:
    """Raise a CommandError if the result cannot be written to `out`."""
    if is_temp(out.name):
        raise CommandError(f"{out} is a name of temporary files: give another name")
    if not out.parent.is_dir():
        raise CommandError(f"{out.parent} is no directory: create it first")
    if not os.path.lexists(out):
        return
    found = out.lstat()
    if file.exists() and out.exists() and file.samefile(out):
        raise CommandError(f"{out} is the file itself: give another name")
    if kind == DCP:
        if not stat.S_ISDIR(found.st_mode) or any(out.iterdir()):
            raise CommandError(f"{out} exists, and is no empty directory: give another name")
    elif not stat.S_ISREG(found.st_mode):
        raise CommandError(f"{out} is no regular file: give another name")
    elif not force:
        raise CommandError(f"{out} exists: --force replaces it")


def _checked(flat: FlatState, out: Path) -> FlatState:
    """Return the state if a format that holds only tensors can keep it."""
    if flat.refused:
        more = f", and {len(flat.refused) - _MOST_SHOWN} more" if len(flat.refused) > _MOST_SHOWN else ""
        what = ", ".join(flat.refused[:_MOST_SHOWN])
        raise CommandError(f"{out} cannot keep {what}{more}: convert a part with --only, such as --only model")
    return flat


def _manifest_of(source: Source) -> Manifest:
    """Return the source's manifest without its record, so that no handler counts the result as its own."""
    if source.manifest is not None:
        return replace(source.manifest, record=None, tensors=(), priority=None, schema=SCHEMA)
    try:
        version = metadata.version("distckpt")
    except metadata.PackageNotFoundError:  # run from a source folder
        version = "unknown"
    versions = {"distckpt": version, "torch": str(torch.__version__)}
    return Manifest(versions=versions, wall_time_s=time.time(), reason="convert")


def _write_pt(source: Source, state: Any, manifest: Manifest, out: Path, progress: Progress) -> None:
    pickled = pickle_state(state)

    def read(storage: torch.UntypedStorage, begin: int, memory: memoryview) -> None:
        view: Any = torch.empty(0, dtype=torch.uint8)
        source.read(view.set_(storage), begin, memory)
        progress.advance(len(memory))

    with LocalStorage(out.parent).create(out.name) as new:
        new.commit(write_streamed(new, pickled, read, manifest), check_whole)


def _write_safetensors(source: Source, flat: FlatState, manifest: Manifest, out: Path, progress: Progress) -> None:
    forms = []
    order = sorted(
        flat.tensors.items(), key=lambda pair: -pair[1].element_size()
    )  # aligned, as safetensors' own writer
    for name, tensor in order:
        kind = _NAMES.get(dtype_name(tensor))
        if kind is None or name == "__metadata__":
            raise CommandError(
                f"{out} cannot keep {name!r} ({dtype_name(tensor)}): safetensors has no such dtype or name"
            )
        forms.append((name, kind, tuple(tensor.shape)))
    try:
        header = build_safetensors_header(forms, {"format": "pt", **_texts(flat, manifest)})
    except ValueError as error:
        raise CommandError(f"{out} cannot be written: {error}") from error
    with LocalStorage(out.parent).create(out.name) as new:
        writer = BufferedWriter(new.write)
        writer.write(header)
        for _, tensor in order:
            for chunk in chunks(source, tensor):
                writer.write(memory_of(chunk.view(torch.uint8)))
                progress.advance(chunk.numel() * chunk.element_size())
        writer.flush()
        new.commit(writer.num_bytes)


def _write_dcp(source: Source, state: Any, flat: FlatState, manifest: Manifest, out: Path) -> None:
    from distckpt.cli import dcp  # noqa: PLC0415 - slow to import

    if not isinstance(state, Mapping):
        raise CommandError(f"{out} needs a mapping by name: convert a part with --only")
    dcp.write_dcp(source, state, _texts(flat, manifest), out)


def _texts(flat: FlatState, manifest: Manifest) -> dict[str, str]:
    metadata = {MANIFEST: to_json(manifest).decode()}
    return metadata if flat.structure is None else {**metadata, STRUCTURE: flat.structure}
