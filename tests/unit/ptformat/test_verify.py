"""Every byte of a checkpoint is checked before anything of it is used."""

import io
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

from distckpt import Checkpoint, CorruptCheckpointError, DiskSaver
from distckpt.ptformat.archive import read_archive, read_manifest
from distckpt.ptformat.layout import check_end
from distckpt.ptformat.manifest import SCHEMA, Manifest, TensorEntry, from_json, to_json
from distckpt.ptformat.reader import read_pt, verify
from distckpt.ptformat.verify import check_range, check_whole, find_faults, split_ranges
from distckpt.storage.local import LocalFile
from tests.distributed.programs import idle_engine
from tests.support.selection import quick

STATE = {
    "model": OrderedDict(weight=torch.arange(1500, dtype=torch.float32), bias=torch.ones(3), empty=torch.zeros(0)),
    "note": {"epoch": 3, "names": ["a", "b"], "best": 0.25},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    DiskSaver(tmp_path)(STATE, "a.pt")
    return tmp_path / "a.pt"


def is_noticed(path: Path, content: bytes | bytearray | None = None) -> bool:
    if content is not None:
        path.write_bytes(content)
    try:
        read_pt(path)
    except CorruptCheckpointError:
        return True
    return False


@quick(1)
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_flipped_byte_is_noticed(path: Path, mask: int) -> None:
    content = path.read_bytes()
    missed = []
    with path.open("r+b", buffering=0) as file:
        for at, value in enumerate(content):
            os.pwrite(file.fileno(), bytes([value ^ mask]), at)
            if not is_noticed(path):
                missed.append(at)
            os.pwrite(file.fileno(), bytes([value]), at)
    assert missed == []
    assert not is_noticed(path, content), "the control: as it was written, it is whole"


def test_every_truncation_is_noticed(path: Path) -> None:
    missed = []
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        if not is_noticed(path):
            missed.append(length)
    assert missed == []


@pytest.mark.parametrize("more", [b"\0", b"x", bytes(4096), bytes(100_000)])
def test_every_extension_is_noticed(path: Path, more: bytes) -> None:
    assert is_noticed(path, path.read_bytes() + more)
    assert is_noticed(path, more + path.read_bytes())


@pytest.mark.parametrize("length", [16, 512, 4096])
def test_every_hole_of_zeros_is_noticed(path: Path, length: int) -> None:
    content = path.read_bytes()
    for at in range(0, len(content), length):
        holed = content[:at] + bytes(length) + content[at + length :]
        if holed[: len(content)] != content:
            assert is_noticed(path, holed[: len(content)]), f"a hole at {at}"


def test_swapped_halves_are_noticed(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    assert is_noticed(path, content[middle:] + content[:middle])


def test_shares_find_together_what_one_reader_finds(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for flipped in (None, 1000, 6200, 100, content.index(b'"tensors"')):
        damaged = bytearray(content)
        if flipped is not None:
            damaged[flipped] ^= 4
        path.write_bytes(damaged)
        with LocalFile(path) as file:
            archive = read_archive(file)
            for num_ranks in (1, 2, 3, 7):
                shares = split_ranges(archive, num_ranks)
                checked = [check_range(file, archive, begin, end) for begin, end in shares]
                assert bool(find_faults(archive, checked)) == (flipped is not None)


def test_the_message_names_file_and_record(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[192 + 77] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CorruptCheckpointError,
        match=r"a\.pt is .*record data/0 \(tensor model\.weight\) has checksum [0-9a-f]{8} and should have",
    ):
        read_pt(path)
    assert torch.equal(read_pt(path, verified=False)["model"]["bias"], torch.ones(3)), "it can be asked for"


def test_the_message_names_the_tensors_of_a_file_without_a_manifest(tmp_path: Path) -> None:
    weight = torch.arange(1500, dtype=torch.float32)
    torch.save({"model": {"weight": weight, "tied": weight, "bias": torch.ones(3)}}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(weight.numpy().tobytes()) + 50] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(
        CorruptCheckpointError, match=r"record a/data/0 \(tensor model\.weight and 1 more\) has checksum"
    ):
        read_pt(tmp_path / "a.pt")


def test_the_message_names_the_tensors_where_the_manifest_is_damaged_too(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[192 + 77] ^= 1
    content[content.index(b'"tensors"')] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CorruptCheckpointError, match=r"record data/0 \(tensor model\.weight\) has .*record distckpt.json"
    ):
        read_pt(path)


@pytest.mark.parametrize("change", ["nothing", "cut", "cut far", "longer", "another tool"])
def test_the_end_alone_shows_whether_a_file_is_complete(path: Path, change: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "cut far": content[:6000], "longer": content + b"\0"}.get(change, content))
    if change == "another tool":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"mine"
    with LocalFile(path) as file:
        try:
            check_end(file.read, file.num_bytes)
        except ValueError:
            assert change != "nothing"
        else:
            assert change == "nothing"


def test_a_manifest_is_read_without_its_tensors(path: Path) -> None:
    with LocalFile(path) as file:
        whole, head = read_manifest(file), read_manifest(file, with_tensors=False)
    assert whole is not None
    assert head is not None
    assert (len(whole.tensors), head.tensors) == (3, ())
    assert head.wall_time_s == whole.wall_time_s
    formatted = json.dumps(json.loads(to_json(whole)), indent=1).encode()
    assert from_json(formatted, with_tensors=False) == head


def test_nothing_live_is_touched_by_a_damaged_file(tmp_path: Path) -> None:
    model = nn.Linear(40, 40)
    DiskSaver(tmp_path)(model.state_dict(), "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[256 + 500] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(CorruptCheckpointError):
        Checkpoint.load_objects({"model": model}, tmp_path / "a.pt")
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("how", ["torch", "torch without checksums", "another zip"])
def test_a_whole_file_of_somebody_elses_passes(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.pt"
    if how == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", b"text")
    else:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(how == "torch")
        try:
            torch.save(STATE, path)
        finally:
            torch.serialization.set_crc32_options(before)
    verify(path)


def test_a_flipped_byte_in_a_tensor_that_torch_saved_is_noticed(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.index(torch.arange(1500, dtype=torch.float32).numpy().tobytes())
    content[at + 50] ^= 1
    assert is_noticed(tmp_path / "a.pt", content)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(path: Path) -> None:
    with LocalFile(path) as file:
        archive = read_archive(file)
        os.truncate(path, 6000)
        assert find_faults(archive, [check_range(file, archive, 0, archive.num_bytes)])
        assert check_whole(file)


# -- what it says of itself --------------------------------------------------------------------------


def manifest_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        found: dict[str, Any] = json.loads(archive.read("archive/distckpt.json"))
    return found


def test_the_manifest_tells_of_the_run_and_of_every_tensor(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    engine = idle_engine()
    handler = Checkpoint({"model": model, "again": nn.Linear(1, 1)}, tmp_path, score_function=lambda _: 0.5)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0, 1], max_epochs=1)
    assert handler.last_checkpoint is not None
    path = tmp_path / handler.last_checkpoint
    said = manifest_of(path)
    assert (said["schema"], said["epoch"], said["iteration"]) == (SCHEMA, 1, 2)
    assert (said["score"], said["priority"], said["reason"]) == (0.5, 0.5, "EPOCH_COMPLETED")
    assert (said["world_size"], said["backend"]) == (1, "serial")
    assert said["versions"]["torch"] == torch.__version__
    assert said["wall_time_s"] == pytest.approx(path.stat().st_mtime, abs=60.0)
    tensors = [dict(zip(said["tensor_fields"], entry, strict=True)) for entry in said["tensors"]]
    assert [entry["name"] for entry in tensors] == ["model.weight", "model.bias", "again.weight", "again.bias"]
    weight = tensors[0]
    assert (weight["dtype"], weight["shape"], weight["num_bytes"]) == ("float32", [3, 2], 24)
    data = path.read_bytes()[weight["offset"] :][:24]
    assert data == model.weight.detach().numpy().tobytes(), "it can be found without any library"


@pytest.mark.parametrize("score", [None, 3, 0.1, float("inf"), float("-inf")])
def test_a_manifest_is_read_as_it_was_written(score: float | None) -> None:
    entries = tuple(
        TensorEntry(name=name, dtype="int8", shape=shape, record="data/0", offset=2**40, num_bytes=0, crc32=2**32 - 1)
        for name in ("ü.0", 'a "b"', "c\\d", "\n\t\0\x7f\u2028", "", "{}")
        for shape in ((), (2, 0), (2**31,))
    )
    manifest = Manifest(score=score, versions={"torch": "2"}, wall_time_s=1.5, tensors=entries, iteration=7)
    assert from_json(to_json(manifest)) == manifest
    json.loads(to_json(manifest), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_reader_passes_over_fields_that_it_does_not_know() -> None:
    found = json.loads(to_json(Manifest(versions={}, wall_time_s=0.0)))
    assert from_json(json.dumps({**found, "later": 1}).encode()).iteration is None


@pytest.mark.parametrize(
    "change",
    [lambda _: [], lambda said: {**said, "schema": SCHEMA + 1}, lambda said: {**said, "tensors": [{}]}, lambda _: {}],
    ids=["no mapping", "newer", "tensors without names", "empty"],
)
def test_what_is_no_manifest_is_refused(change: Callable[[Any], Any]) -> None:
    found = json.loads(to_json(Manifest(versions={}, wall_time_s=0.0)))
    with pytest.raises(ValueError, match="invalid manifest"):
        from_json(json.dumps(change(found)).encode())


def test_without_the_manifest_torch_reads_the_same(path: Path) -> None:
    loaded = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])  # type: ignore[index]
    assert loaded["note"] == STATE["note"]
