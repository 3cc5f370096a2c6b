"""The manifest: the record ``distckpt.json`` inside a ``.pt`` file.

Its first line plus a closing brace is JSON of its own: all fields but the tensors. :func:`read_head` needs no more.

Older readers ignore fields that a newer version adds. A change of a field's meaning or of the file's layout needs a new
number in :data:`SCHEMA`: a newer schema is refused, an older one is read by its own rules. The schemas:

1. Each tensor is an object; every storage is aligned to 4096 bytes (distckpt 0.1).
2. Each tensor is a list, in the order of ``tensor_fields``; small storages are aligned to 64 bytes.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from json.encoder import encode_basestring as quoted
from typing import Any, NamedTuple

from distckpt._values import to_json_value

SCHEMA = 2
"""The newest schema, and the one that is written."""


class TensorEntry(NamedTuple):
    """A tensor.

    Attributes:
        name: the keys that lead to it in the checkpoint, joined by dots.
        dtype: such as ``float32``.
        shape: its sizes.
        record: the record of its storage, such as ``data/0``.
        offset: of its first element in the file, in bytes.
        num_bytes: length of its elements.
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
        epoch: the saving engine's; None outside of a run.
        iteration: the saving engine's.
        score: by which it was ranked; None without a score.
        priority: by which it is kept or evicted.
        reason: why it was saved, such as ``ITERATION_COMPLETED``.
        world_size: number of ranks.
        backend: the job's, such as ``gloo``.
        key: that of the single object whose bare state the file holds; None if it holds a mapping of states.
        versions: of the libraries that wrote it, by name.
        wall_time_s: when its capture began, in seconds since 1970 (UTC).
        record: what a later run needs of the handler and of the run, as plain JSON
            (:mod:`distckpt.handlers.build_manifest`); None if a save handler was called by itself.
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
    key: str | None = None
    versions: Mapping[str, str]
    wall_time_s: float
    record: Mapping[str, Any] | None = None
    tensors: tuple[TensorEntry, ...] = ()
    schema: int = SCHEMA


class Head(NamedTuple):
    """The part of a manifest that is read first.

    Attributes:
        schema: its number.
        writer: the version of distckpt that wrote it.
        record: see :class:`Manifest`.
        iteration: see :class:`Manifest`.
        wall_time_s: see :class:`Manifest`; None if it is no number.
        key: see :class:`Manifest`; None too in older files.
        reason: see :class:`Manifest`.
    """

    schema: int
    writer: str
    record: Mapping[str, Any] | None = None
    iteration: int | None = None
    wall_time_s: float | None = None
    key: str | None = None
    reason: str | None = None


_TENSOR_FIELDS = TensorEntry._fields
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no such numbers


def to_json(manifest: Manifest) -> bytes:
    """Return a manifest as JSON, one line a tensor.

    Example:
        >>> text = to_json(Manifest(versions={"torch": "2.13.0"}, wall_time_s=0.0, iteration=7))
        >>> from_json(text).iteration
        7
    """
    names = [field.name for field in fields(Manifest) if field.name not in ("tensors", "schema", "key", "record")]
    head = {"schema": manifest.schema} | {name: getattr(manifest, name) for name in names}
    head |= {
        "versions": dict(manifest.versions),
        "score": to_json_value(manifest.score),
        "priority": to_json_value(manifest.priority),
        "tensor_fields": _TENSOR_FIELDS,
    }
    if manifest.key is not None:
        head["key"] = manifest.key
    if manifest.record is not None:
        head["record"] = to_json_value(manifest.record)
    # Five times as fast as json.dumps: this runs while training does.
    lines = ",\n".join(
        f'[{quoted(name)},"{dtype}",[{",".join(map(str, shape))}],"{record}",{offset},{num_bytes},{crc}]'
        for name, dtype, shape, record, offset, num_bytes, crc in manifest.tensors
    )
    text = json.dumps(head, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8: it becomes JSON's escape.
    return f'{text[:-1]},\n"tensors": [\n{lines}\n]}}\n'.encode(errors="backslashreplace")


def read_head(data: bytes) -> Head:
    """Return the head of a manifest of any schema, past or future.

    Raises:
        ValueError: it names no schema.
    """
    for text in (_first_line(data), data):  # all of it, in case another tool has formatted it
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        schema = found.get("schema") if isinstance(found, dict) else None
        if type(schema) is int and schema >= 1:
            break
    else:
        raise ValueError("it has no schema")
    versions, record = found.get("versions"), found.get("record")
    writer = versions.get("distckpt") if isinstance(versions, dict) else None
    iteration, wall_time_s = found.get("iteration"), found.get("wall_time_s")
    key, reason = found.get("key"), found.get("reason")
    return Head(
        schema,
        writer if isinstance(writer, str) else "unknown",
        record if isinstance(record, dict) else None,
        iteration if type(iteration) is int else None,
        wall_time_s if isinstance(wall_time_s, float) else None,
        key if isinstance(key, str) else None,
        reason if isinstance(reason, str) else None,
    )


def _first_line(data: bytes) -> bytes:
    return data.partition(b"\n")[0].rstrip(b", ") + b"}"


def from_json(data: bytes, *, with_tensors: bool = True) -> Manifest:
    """Return a manifest of this schema or an older one.

    Args:
        data: the record.
        with_tensors: False for a manifest without its tensors, which takes as long for many tensors as for none.

    Raises:
        ValueError: it is no manifest, or has a newer schema.
    """
    try:
        schema = read_head(data).schema
        if schema > SCHEMA:
            raise ValueError(f"it has schema {schema}, and this version of distckpt reads up to {SCHEMA}")  # noqa: TRY301 - one error path
        found = _load_without_tensors(data) if not with_tensors else json.loads(data)
        order = found.pop("tensor_fields", None)
        tensors = tuple(_tensor_entry(entry, order) for entry in found.pop("tensors", ()))
        known = {field.name: found[field.name] for field in fields(Manifest) if field.name in found}
        for name in ("score", "priority"):
            known[name] = number_from(known.get(name))
        return Manifest(**known, tensors=tensors)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"invalid manifest: {error}") from error


def _load_without_tensors(data: bytes) -> Any:
    with contextlib.suppress(ValueError):
        found = json.loads(_first_line(data))
        if "schema" in found:
            return found
    return {
        name: value for name, value in json.loads(data).items() if name != "tensors"
    }  # another tool has formatted it


def number_from(value: Any) -> Any:
    """Return a number that :func:`to_json` has written; it writes those that are not finite as text."""
    return _NOT_FINITE[value] if isinstance(value, str) else value


def _tensor_entry(entry: Any, order: Sequence[str] | None) -> TensorEntry:
    found = entry if order is None else dict(zip(order, entry, strict=True))  # schema 1 has objects and no order
    known = {name: found[name] for name in _TENSOR_FIELDS}
    return TensorEntry(**{**known, "shape": tuple(known["shape"])})
