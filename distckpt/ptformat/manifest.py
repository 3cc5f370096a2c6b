"""What a checkpoint says of itself: the record ``distckpt.json`` inside the ``.pt``.

Owns the fields and their JSON. Must not know how the file is laid out or written.

Its first line, closed by a brace, is JSON of its own: all but the tensors. :func:`read_head` needs no more.

Fields that a newer version adds are passed over by an older reader. What changes the meaning of others, or the layout
of the file, gets a new number in :data:`SCHEMA`: newer ones are refused, older ones are read by their own rules.

1. each tensor is an object; every storage stands on a border of 4096 bytes (distckpt 0.1).
2. each tensor is a list, in the order of ``tensor_fields``; small storages stand on borders of 64 bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from json.encoder import encode_basestring as quoted
from typing import Any, NamedTuple

__all__ = ["SCHEMA", "Head", "Manifest", "TensorEntry", "from_json", "number_from", "read_head", "to_json"]

SCHEMA = 2
"""The newest, and what is written."""


class TensorEntry(NamedTuple):
    """One tensor.

    Attributes:
        name: the keys that lead to it in the checkpoint, joined by dots.
        dtype: e.g. ``float32``.
        shape: its sizes.
        record: the record that holds its storage, e.g. ``data/0``.
        offset: where in the file its first element lies, in bytes.
        num_bytes: of its elements.
        crc32: of the whole record.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    record: str
    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes:
        epoch: of the engine on whose event it was saved; None outside of a run.
        iteration: the same engine's.
        score: what it was ranked by, if by a score.
        priority: by which it is kept or evicted.
        reason: why it was saved, e.g. ``ITERATION_COMPLETED``.
        world_size: number of ranks of the job.
        backend: the job's, e.g. ``gloo``.
        versions: of the libraries that wrote it, by name.
        wall_time_s: when its capture began, in seconds since 1970 (UTC).
        record: what a later run needs of the handler and the run that saved it, as plain JSON (its keys are listed in
            :mod:`distckpt.handlers.build_manifest`); None where a save handler was called by itself.
        tensors: in the order of the checkpoint.
        schema: of this manifest.
    """

    epoch: int | None = None
    iteration: int | None = None
    score: int | float | None = None
    priority: int | float | None = None
    reason: str | None = None
    world_size: int = 1
    backend: str = "serial"
    versions: Mapping[str, str]
    wall_time_s: float
    record: Mapping[str, Any] | None = None
    tensors: tuple[TensorEntry, ...] = ()
    schema: int = SCHEMA


class Head(NamedTuple):
    """What is asked of a manifest before anything else is.

    Attributes:
        schema: its number.
        writer: the version of distckpt that wrote it.
        record: see :class:`Manifest`.
    """

    schema: int
    writer: str
    record: Mapping[str, Any] | None = None


_TENSOR_FIELDS = TensorEntry._fields
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no numbers for them


def to_json(manifest: Manifest) -> bytes:
    """Return a manifest as JSON: one line a tensor.

    Example:
        >>> text = to_json(Manifest(versions={"torch": "2.13.0"}, wall_time_s=0.0, iteration=7))
        >>> from_json(text).iteration
        7
    """
    names = [field.name for field in fields(Manifest) if field.name not in ("tensors", "schema", "record")]
    head = {"schema": manifest.schema} | {name: getattr(manifest, name) for name in names}
    head |= {
        "versions": dict(manifest.versions),
        "score": _plain(manifest.score),
        "priority": _plain(manifest.priority),
        "tensor_fields": _TENSOR_FIELDS,
    }
    if manifest.record is not None:
        head["record"] = _plain(manifest.record)
    # By hand, in a fifth of json's time: it is made beside training.
    lines = ",\n".join(
        f'[{quoted(name)},"{dtype}",[{",".join(map(str, shape))}],"{record}",{offset},{num_bytes},{crc}]'
        for name, dtype, shape, record, offset, num_bytes, crc in manifest.tensors
    )
    text = json.dumps(head, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8; what stands for it there is JSON's own escape.
    return f'{text[:-1]},\n"tensors": [\n{lines}\n]}}\n'.encode(errors="backslashreplace")


def read_head(data: bytes) -> Head:
    """Read a manifest's schema, who wrote it, and its record: of any schema, past or future.

    Raises:
        ValueError: it does not say.
    """
    first_line = data.partition(b"\n")[0].rstrip(b", ") + b"}"
    for text in (first_line, data):  # all of it where another tool has formatted it
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        schema = found.get("schema") if isinstance(found, dict) else None
        if type(schema) is int and schema >= 1:
            break
    else:
        msg = "it has no schema"
        raise ValueError(msg)
    versions, record = found.get("versions"), found.get("record")
    writer = versions.get("distckpt") if isinstance(versions, dict) else None
    return Head(schema, writer if isinstance(writer, str) else "unknown", record if isinstance(record, dict) else None)


def from_json(data: bytes) -> Manifest:
    """Read a manifest, of this schema or an older one.

    Raises:
        ValueError: it is none, or of a newer schema.
    """
    try:
        schema = read_head(data).schema
        if schema > SCHEMA:
            msg = f"it is of schema {schema}, and this version of distckpt reads up to {SCHEMA}"
            raise ValueError(msg)  # noqa: TRY301 - one error for all that a manifest cannot be
        found = json.loads(data)
        order = found.pop("tensor_fields", None)
        tensors = tuple(_tensor_entry(entry, order) for entry in found.pop("tensors", ()))
        known = {field.name: found[field.name] for field in fields(Manifest) if field.name in found}
        for name in ("score", "priority"):
            known[name] = number_from(known.get(name))
        return Manifest(**known, tensors=tensors)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        msg = f"this is no manifest of a checkpoint's: {error}"
        raise ValueError(msg) from error


def number_from(value: Any) -> Any:
    """Return what :func:`to_json` was given, of a number that it has written; JSON has none that are not finite."""
    return _NOT_FINITE[value] if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _tensor_entry(entry: Any, order: Sequence[str] | None) -> TensorEntry:
    found = entry if order is None else dict(zip(order, entry, strict=True))  # without an order: schema 1's objects
    known = {name: found[name] for name in _TENSOR_FIELDS}
    return TensorEntry(**{**known, "shape": tuple(known["shape"])})
