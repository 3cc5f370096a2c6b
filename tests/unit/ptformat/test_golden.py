"""Files of every schema load for ever, and what is written today is what the present schema says, to the byte."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CorruptCheckpointError, LoadError, UnsupportedCheckpoint, resume
from distckpt.ptformat.archive import read_archive
from distckpt.ptformat.image import plan_image
from distckpt.ptformat.layout import alignment_of
from distckpt.ptformat.manifest import SCHEMA, from_json
from distckpt.ptformat.reader import OpenCheckpoint, read_pt
from distckpt.ptformat.verify import check_range, find_faults, split_ranges
from distckpt.storage.local import LocalFile
from tests.golden.files import ABOUT, FOLDER, golden_state, name_of, write
from tests.support.equality import equal
from tests.support.selection import is_full
from tests.unit.toys import Notebook

FILES = sorted(FOLDER.glob("*.pt"))
NAMES = [path.name for path in FILES]
QUICK_STEP = 7
"""A quick run flips each seventh byte, from another first byte in each file."""
MANIFEST = "archive/distckpt.json"


def test_there_are_files_of_every_schema() -> None:
    assert sorted(NAMES) == sorted(name_of(num, schema) for num in (1, 2) for schema in range(1, SCHEMA + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_loads_to_what_was_saved(name: str) -> None:
    path = FOLDER / name
    assert equal(golden_state(), torch.load(path, weights_only=True))
    assert equal(golden_state(), torch.load(path, weights_only=True, mmap=True))
    assert equal(golden_state(), read_pt(path))
    views = read_pt(path)["views"]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    with OpenCheckpoint(path) as file:
        assert file.read_structure(), "it needs no fallback to torch.load"


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_loads_into_live_objects(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(50, 45))
            self.empty = nn.Parameter(torch.zeros(0))

    model, note = Model(), Notebook({})
    Checkpoint.load_objects({"model": model, "note": note}, FOLDER / name)
    assert torch.equal(model.weight, golden_state()["model"]["weight"])
    assert note.state == golden_state()["note"]


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_byte_of_a_golden_file_is_found(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    content = (FOLDER / name).read_bytes()
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    places = range(len(content)) if is_full(pytestconfig) else range(NAMES.index(name), len(content), QUICK_STEP)
    missed = []
    with path.open("r+b", buffering=0) as file:
        for at in places:
            value = content[at]
            os.pwrite(file.fileno(), bytes([value ^ 0x41]), at)
            try:
                read_pt(path)
                missed.append(at)
            except CorruptCheckpointError:
                pass
            os.pwrite(file.fileno(), bytes([value]), at)
    assert missed == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_a_golden_file_is_verified_in_shares(name: str, num_ranks: int) -> None:
    with LocalFile(FOLDER / name) as file:
        archive = read_archive(file)
        assert archive.is_own
        shares = split_ranges(archive, num_ranks)
        assert find_faults(archive, [check_range(file, archive, *share) for share in shares]) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_of_a_golden_file_says_the_same_in_every_schema(name: str) -> None:
    path = FOLDER / name
    with zipfile.ZipFile(path) as archive:
        found = from_json(archive.read(MANIFEST))
    assert (found.iteration, found.score, found.reason, found.versions) == (
        *(ABOUT.iteration, ABOUT.score, ABOUT.reason),
        ABOUT.versions,
    )
    assert [one.name for one in found.tensors] == [
        "own",
        "model.weight",
        "model.empty",
        "views.0",
        "views.1",
        "views.2",
    ]
    weight = found.tensors[1]
    data = path.read_bytes()[weight.offset : weight.offset + weight.num_bytes]
    assert data == golden_state()["model"]["weight"].numpy().tobytes()


@pytest.mark.parametrize("num_writers", [1, 2])
def test_what_is_written_today_is_the_golden_file_to_the_byte(tmp_path: Path, num_writers: int) -> None:
    """Where this fails the format has changed: raise the schema, keep the old rules, and make new golden files."""
    assert write(tmp_path, num_writers=num_writers).read_bytes() == (FOLDER / name_of(num_writers)).read_bytes()


def test_the_alignments_of_small_and_large_storages_are_those_of_schema_2() -> None:
    sizes = [1, 65_535, 65_536, 0, 64, 1 << 20, 3]
    offsets = [192, 256, 69_632, 135_232, 135_296, 139_264, 1_187_904]
    assert [record.offset for record in plan_image(sizes).records] == offsets
    assert [alignment_of(size, 2) for size in sizes] == [64, 64, 4096, 64, 64, 4096, 64]
    assert {alignment_of(size, 1) for size in sizes} == {4096}


# -- of a newer schema ---------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> Path:
    """Write the manifest of a golden file anew, and the archive around it by another tool."""
    with zipfile.ZipFile(FOLDER / name_of(1)) as old, zipfile.ZipFile(path, "w") as new:
        for one in old.namelist():
            data = old.read(one)
            if one == MANIFEST:
                data = json.dumps(change(json.loads(data)), **options).encode()
            new.writestr(one, data)
    return path


def newer_in_place(path: Path) -> Path:
    """Write a file as a newer distckpt would: with our layout, a higher number, and right checksums."""
    newer = replace(ABOUT, schema=SCHEMA + 1, versions={"distckpt": "9.1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.golden.files.ABOUT", newer)
        return write(path.parent, num_writers=1)


NEWER: dict[str, Callable[[Path], Path]] = {
    "in place": newer_in_place,
    "rewritten": lambda path: rewritten(
        path, lambda said: said | {"schema": SCHEMA + 1, "versions": {"distckpt": "9.1"}}
    ),
    "of another form": lambda path: rewritten(
        path, lambda _: {"tensors": {"all": "other"}, "versions": {"distckpt": "9.1"}, "schema": 3000}, indent=2
    ),
}


@pytest.mark.parametrize("kind", NEWER)
@pytest.mark.parametrize("verify", [True, False])
def test_a_newer_schema_is_refused_with_what_to_upgrade(tmp_path: Path, kind: str, *, verify: bool) -> None:
    path = NEWER[kind](tmp_path / "a.pt")
    note = Notebook({"page": 1})
    told = rf"{path.name} was written by distckpt 9\.1.*schema (3|3000), .*up to {SCHEMA}\. Upgrade distckpt"
    with pytest.raises(UnsupportedCheckpoint, match=told) as caught:
        Checkpoint.load_objects({"note": note}, path, verify=verify)
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert note.state == {"page": 1}


def test_resume_says_so_too(tmp_path: Path) -> None:
    NEWER["rewritten"](tmp_path / "a.pt")
    with pytest.raises(LoadError, match=rf"schema {SCHEMA + 1}.*Upgrade distckpt"):
        resume({"note": Notebook({})}, tmp_path)


def test_a_damaged_manifest_of_a_newer_schema_is_damaged(tmp_path: Path) -> None:
    path = newer_in_place(tmp_path / "a.pt")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"iteration": 27', b'"iteration": 28'))
    with pytest.raises(CorruptCheckpointError):
        read_pt(path)


@pytest.mark.parametrize("schema", [None, "2", 0, -1, 2.0, True, [2]])
def test_a_manifest_without_a_schema_does_not_keep_a_sound_file_from_loading(tmp_path: Path, schema: Any) -> None:
    path = rewritten(tmp_path / "a.pt", lambda said: said | {"schema": schema})
    assert equal(golden_state(), read_pt(path))


def test_the_schema_comes_first_in_the_manifest() -> None:
    with zipfile.ZipFile(FOLDER / name_of(1)) as archive:
        line = io.BytesIO(archive.read(MANIFEST)).readline()
    assert line.startswith(b'{"schema": 2, ')
    assert json.loads(line.rstrip(b",\n") + b"}")["versions"] == {"distckpt": "0.1.0", "torch": "2.13.0"}
