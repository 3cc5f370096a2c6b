"""``distckpt inspect``: show a checkpoint's manifest, and its tensors as a tree."""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distckpt.cli.output import Column, ExitCode, Output, Table, count, format_age, format_bytes, format_number
from distckpt.cli.progress import Progress
from distckpt.cli.sources import (
    Leaf,
    SafetensorsSource,
    Source,
    children_of,
    chunks,
    describe_value,
    dtype_name,
    find_key,
    find_ties,
    num_bytes_of,
    open_source,
    unique_names,
)
from distckpt.cli.structure import is_plain_tensor
from distckpt.policy.naming import describe_handler
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.records import parse_record

_COLUMNS = (
    Column("KEY", can_shrink=True),
    Column("DTYPE"),
    Column("SHAPE", is_number=True),
    Column("SIZE", is_number=True),
    Column("NORM", is_number=True),
)
_FIRST = 8
_MOST_NAMES = 5
_SCALARS = (str, int, float, bool, complex, bytes, type(None))


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    with open_source(arguments.file) as source:
        state, prefix = source.state, ""
        if arguments.key is not None:
            state, prefix = find_key(source.state, arguments.key), arguments.key
        ties = find_ties(source.state)
        found = [Leaf(".".join(filter(None, (prefix, name))), value) for name, value in unique_names(state)]
        tensors = [(name, value) for name, value in found if is_plain_tensor(value)]
        norms: dict[str, float] = {}
        if arguments.norms:
            with Progress("reading", sum(num_bytes_of(tensor) for _, tensor in tensors)) as progress, source.reading():
                norms = {name: _norm(source, tensor, progress) for name, tensor in tensors}
        document = _document(source, found, ties, norms)
        is_one = is_plain_tensor(state) and arguments.key is not None and arguments.norms
        statistics = _statistics(source, state) if is_one else None
        output.json(document if statistics is None else {**document, "statistics": statistics})
        if arguments.key is None:
            _print_head(source, output)
        output.line(f"{count(len(tensors), 'tensor')}, {format_bytes(sum(num_bytes_of(one) for _, one in tensors))}")
        table = Table(columns=_COLUMNS)
        _add_rows(table, state, prefix or None, prefix, 0, ties, norms)
        output.table(table)
        for name, value in (statistics or {}).items():
            output.line(f"{name}: {value if isinstance(value, list) else format_number(value)}")
    return ExitCode.OK


def _norm(source: Source, tensor: torch.Tensor, progress: Progress) -> float:
    """Return the Euclidean norm of a tensor, computed in float64."""
    total = 0.0
    for chunk in chunks(source, tensor):
        numbers = as_double(chunk).flatten()
        total += float(torch.dot(numbers, numbers))
        progress.advance(chunk.numel() * chunk.element_size())
    return math.sqrt(total) if math.isfinite(total) else total


def as_double(chunk: torch.Tensor) -> torch.Tensor:
    """Return elements as float64; a complex element becomes two."""
    return torch.view_as_real(chunk).to(torch.float64) if chunk.is_complex() else chunk.to(torch.float64)


def _statistics(source: Source, tensor: torch.Tensor) -> dict[str, Any]:
    """Return the statistics of one tensor's elements."""
    finite, num_nan, num_inf, total = 0, 0, 0, 0.0
    low, high = math.inf, -math.inf
    first: list[float] = []
    for chunk in chunks(source, tensor):
        numbers = as_double(chunk).flatten()
        first += numbers[: _FIRST - len(first)].tolist() if len(first) < _FIRST else []
        num_nan += int(numbers.isnan().sum())
        num_inf += int(numbers.isinf().sum())
        good = numbers[numbers.isfinite()]
        if good.numel():
            finite, total = finite + good.numel(), total + float(good.sum())
            low, high = min(low, float(good.min())), max(high, float(good.max()))
    return {
        "least": low if finite else None,
        "greatest": high if finite else None,
        "mean": total / finite if finite else None,
        "NaN": num_nan,
        "infinite": num_inf,
        "first": first,
    }


def _document(source: Source, found: list[Leaf], ties: Mapping[str, str], norms: Mapping[str, float]) -> dict[str, Any]:
    tensors = [
        {
            "name": name,
            "dtype": dtype_name(value),
            "shape": list(value.shape),
            "num_bytes": num_bytes_of(value),
            "norm": norms.get(name),
            "tied_to": ties.get(name),
        }
        for name, value in found
        if is_plain_tensor(value)
    ]
    values = {name: _plain_value(value) for name, value in found if not is_plain_tensor(value)}
    metadata = dict(source.header.metadata) if isinstance(source, SafetensorsSource) else None
    return {
        "path": str(source.path),
        "format": source.kind,
        "num_bytes": source.num_bytes,
        "manifest": None if source.manifest is None else _manifest_document(source.manifest),
        "metadata": metadata,
        "tensors": tensors,
        "values": values,
    }


def _manifest_document(manifest: Manifest) -> dict[str, Any]:
    names = ("schema", "epoch", "iteration", "score", "priority", "reason", "world_size", "backend", "wall_time_s")
    found: dict[str, Any] = {name: getattr(manifest, name) for name in names}
    return {**found, "versions": dict(manifest.versions), "record": manifest.record}


def _plain_value(value: Any) -> Any:
    return value if isinstance(value, _SCALARS) and not isinstance(value, bytes | complex) else describe_value(value)


def _print_head(source: Source, output: Output) -> None:
    output.line(f"{source.path}: {source.kind}, {format_bytes(source.num_bytes)}")
    manifest = source.manifest
    if manifest is None:
        return
    saved_at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.wall_time_s))
    output.line(
        f"saved: {saved_at}, {format_age(time.time() - manifest.wall_time_s)} ago, on {manifest.reason or 'a call'}"
    )
    progress = {"step": manifest.iteration, "epoch": manifest.epoch, "score": manifest.score}
    known = [f"{name} {format_number(value)}" for name, value in progress.items() if value is not None]
    if known:
        output.line(f"progress: {', '.join(known)}")
    output.line(f"ranks: {manifest.world_size} ({manifest.backend})")
    output.line(f"versions: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    record = parse_record(manifest.record)
    if record is not None:
        origin = f", which went on from {record.run.lineage[-1]}" if record.run.lineage else ""
        output.line(f"run: {record.run.id}{origin}")
        output.line(f"handler: {describe_handler(record.handler)}")
        names = ", ".join(name for _, name in reversed(record.kept[-_MOST_NAMES:]))
        more = f", and {record.num_kept - _MOST_NAMES} more" if record.num_kept > _MOST_NAMES else ""
        is_long = len(record.kept) < record.num_kept  # a long history is not in the record
        output.line(f"its handler kept then: {count(record.num_kept, 'file') if is_long else names + more}")


def _add_rows(
    table: Table, item: Any, key: str | None, name: str, level: int, ties: Mapping[str, str], norms: Mapping[str, float]
) -> None:
    """Add the rows of an item and of all items in it."""
    lead = "  " * level
    pairs = children_of(item)
    if pairs and not _is_short(item):
        if key is not None:
            table.rows.append((f"{lead}{key}", "", "", "", ""))
        for below, value in pairs:
            _add_rows(table, value, below, f"{name}.{below}" if name else below, level + (key is not None), ties, norms)
        return
    shown = key or "(the whole file)"
    if not is_plain_tensor(item):
        table.rows.append((f"{lead}{shown} = {describe_value(item)}", "", "", "", ""))
        return
    tie = f" = {ties[name]}" if name in ties else ""
    norm = f"{norms[name]:.6g}" if name in norms else "-"
    shape = f"({', '.join(map(str, item.shape))})"
    table.rows.append((f"{lead}{shown}{tie}", dtype_name(item), shape, format_bytes(num_bytes_of(item)), norm))


def _is_short(item: Any) -> bool:
    """Return True for a sequence of only numbers and texts, which is shown as one value."""
    is_scalar: Callable[[Any], bool] = lambda one: isinstance(one, _SCALARS)  # noqa: E731 - used once
    return isinstance(item, list | tuple) and all(map(is_scalar, item))
