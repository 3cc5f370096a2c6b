"""``distckpt convert`` keeps every bit, and leaves nothing half done."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.utils._pytree import tree_map_only

from distckpt import save
from distckpt.cli import sources
from distckpt.cli.sources import load, open_source
from distckpt.cli.structure import flatten, unflatten
from distckpt.ptformat.reader import read_pt, verify
from tests.support.equality import equal
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import quick
from tests.unit.cli.conftest import Command, flip
from tests.unit.directories import names_in
from tests.unit.toys import Notebook

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

OUTS = ["b.safetensors", "b", "b.pt"]


def rich_state() -> dict[str, Any]:
    """Return a state with all that formats find hard."""
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    model = OrderedDict(weight=base, tied=base, turned=base.t(), part=base[1:3, 2:5], empty=torch.zeros(0, 3))
    model["scalar"] = torch.tensor(7)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.complex64):
        model[str(dtype)] = torch.arange(5).to(dtype)
    model["float8"] = torch.arange(9).to(torch.float8_e4m3fn)
    model["large"] = torch.arange(100_000, dtype=torch.int32)
    model["odd"] = torch.tensor([float("nan"), float("-inf"), -0.0])
    return {
        "model": model,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "note": {"nan": float("nan"), "none": None, "big": 10**30, "text": "ü\n", 3: "three", 2.5: "more"},
        "more": {"size": torch.Size([2]), "bytes": b"\0\xff", "complex": 1 - 2j, "dtype": torch.bfloat16, "list": []},
    }


def contiguous(state: Any) -> Any:
    """Return a state with contiguous tensors: other formats keep no strides."""
    return tree_map_only(torch.Tensor, torch.Tensor.contiguous, state)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save({"all": Notebook(rich_state())}, tmp_path / "a.pt", step=7)


@pytest.mark.parametrize("source", ["distckpt", "torch"])
@pytest.mark.parametrize("out", OUTS)
def test_a_round_trip_keeps_every_bit(command: Command, path: Path, out: str, source: str) -> None:
    if source == "torch":
        torch.save(rich_state(), path)
    assert command("convert", path, path.parent / out).code == 0
    assert command("diff", path, path.parent / out).code == 0
    code, shown, err = command("convert", path.parent / out, path.parent / "c.pt")
    assert (code, err) == (0, "")
    assert shown.splitlines()[-1].startswith(f"{path.parent}/c.pt: 17 tensors, ")
    verify(path.parent / "c.pt")
    again = torch.load(path.parent / "c.pt", weights_only=True)
    assert equal(contiguous(again), contiguous(rich_state()))
    assert again["model"]["tied"].data_ptr() == again["model"]["weight"].data_ptr()
    assert names_in(path.parent) == sorted(["a.pt", "c.pt", out])


@pytest.mark.parametrize("out", OUTS)
def test_only_a_part_is_converted(command: Command, path: Path, out: str) -> None:
    assert command("convert", path, path.parent / out, "--only", "model").code == 0
    with open_source(path.parent / out) as source:
        assert list(source.state) == list(rich_state()["model"])
        assert torch.equal(load(source, source.state["turned"]), rich_state()["model"]["turned"])


@pytest.mark.parametrize(("only", "name"), [("model.weight", "weight"), (None, "tensor")])
def test_a_single_tensor_gets_a_name(command: Command, path: Path, only: str | None, name: str) -> None:
    if only is None:
        torch.save(torch.arange(3.0), path)
    for out in OUTS[:2]:
        assert command("convert", path, path.parent / out, *([] if only is None else ["--only", only])).code == 0
        assert [one["name"] for one in command("inspect", path.parent / out, "--json").json["tensors"]] == [name]


def test_progress_goes_along_and_the_record_does_not(command: Command, trained: Path, tmp_path: Path) -> None:
    for out in OUTS:
        assert command("convert", trained / "checkpoint_40.pt", tmp_path / out).code == 0
        manifest = command("inspect", tmp_path / out, "--json").json["manifest"]
        assert (manifest["epoch"], manifest["iteration"], manifest["record"]) == (4, 40, None)


def test_torch_distributed_checkpoint_opens_the_result(command: Command, path: Path) -> None:
    assert command("convert", path, path.parent / "b", "--only", "model").code == 0
    state: dict[str, Any] = {name: torch.zeros_like(one) for name, one in rich_state()["model"].items()}
    dcp.load(state, checkpoint_id=path.parent / "b", no_dist=True)
    assert equal(contiguous(dict(rich_state()["model"])), contiguous(state))


def test_safetensors_own_library_opens_the_result(command: Command, path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    assert command("convert", path, path.parent / "b.safetensors", "--only", "model").code == 0
    found = library.load_file(path.parent / "b.safetensors")
    assert equal(dict(sorted(found.items())), contiguous(dict(sorted(rich_state()["model"].items()))))
    library.save_file({"w": torch.arange(3.0)}, path.parent / "c.safetensors")
    assert command("convert", path.parent / "c.safetensors", path.parent / "c.pt").code == 0
    assert equal(read_pt(path.parent / "c.pt"), {"w": torch.arange(3.0)})


def test_a_flat_state_becomes_a_plain_safetensors_file(command: Command, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "a.pt")
    assert command("convert", tmp_path / "a.pt", tmp_path / "a.safetensors").code == 0
    metadata = command("inspect", tmp_path / "a.safetensors", "--json").json["metadata"]
    assert sorted(metadata) == ["distckpt.manifest", "format"]


def test_shards_of_several_ranks_are_put_together(command: Command, tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    dcp.save({"w": whole, "inner": {"b": torch.ones(2)}, "lr": 0.5}, checkpoint_id=tmp_path / "d", no_dist=True)
    metadata_path = tmp_path / "d" / ".metadata"
    found = pickle.loads(metadata_path.read_bytes())  # noqa: S301 - it was written above
    first, last = io_of(whole[:4]), io_of(whole[4:])
    (tmp_path / "d" / "two.distcp").write_bytes(first + last)
    form, storage = found.state_dict_metadata["w"], found.storage_data
    (key,) = [key for key in storage if key.fqn == "w"]
    info = type(storage[key])
    del storage[key]
    form.chunks = [
        dcp.metadata.ChunkStorageMetadata(torch.Size([begin, 0]), torch.Size([size, 4]))
        for begin, size in ((0, 4), (4, 2))
    ]
    storage[dcp.metadata.MetadataIndex("w", [0, 0])] = info("two.distcp", 0, len(first))
    storage[dcp.metadata.MetadataIndex("w", [4, 0])] = info("two.distcp", len(first), len(last))
    metadata_path.write_bytes(pickle.dumps(found))
    assert command("convert", tmp_path / "d", tmp_path / "d.pt").code == 0
    assert equal(read_pt(tmp_path / "d.pt"), {"w": whole, "inner": {"b": torch.ones(2)}, "lr": 0.5})


def io_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor as ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()


class Payload:
    """Its pickle calls a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_nothing_of_a_foreign_directory_is_executed(
    command: Command, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dcp.save(
        {"w": torch.ones(2), "v": Payload() if where == "value" else 1}, checkpoint_id=tmp_path / "d", no_dist=True
    )
    if where == "metadata":
        (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(Payload()))
    code, _, err = command("convert", tmp_path / "d", tmp_path / "d.pt")
    assert code == 2
    assert "mkdir" in err
    assert names_in(tmp_path) == ["d"]


def test_values_that_a_format_cannot_keep_are_refused(command: Command, tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2)},
        "random": np.arange(3),
        "seen": {1, 2},
        "c": torch.ones(1, dtype=torch.complex128),
    }
    torch.save(state, tmp_path / "a.pt")
    for out in OUTS[:2]:
        code, _, err = command("convert", tmp_path / "a.pt", tmp_path / out)
        assert code == 2
        assert "cannot keep random (numpy.ndarray), seen (builtins.set): convert a part with --only" in err
    torch.save({"c": state["c"]}, tmp_path / "a.pt")
    assert "cannot keep 'c' (complex128)" in command("convert", tmp_path / "a.pt", tmp_path / "b.safetensors").err
    assert names_in(tmp_path) == ["a.pt"]


def test_keys_of_one_text_are_told_apart_where_the_format_can(command: Command, tmp_path: Path) -> None:
    state = {3: torch.ones(1), "3": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pt")
    assert command("convert", tmp_path / "a.pt", tmp_path / "b.safetensors").code == 0
    assert command("convert", tmp_path / "b.safetensors", tmp_path / "c.pt").code == 0
    assert equal(read_pt(tmp_path / "c.pt"), state)
    code, _, err = command("convert", tmp_path / "a.pt", tmp_path / "b")
    assert (code, names_in(tmp_path)) == (2, ["a.pt", "b.safetensors", "c.pt"])
    assert "cannot write" in err


def test_views_that_are_separated_are_told(command: Command, tmp_path: Path) -> None:
    base = torch.arange(4.0)
    torch.save({"base": base, "part": base[1:], "own": torch.ones(1)}, tmp_path / "a.pt")
    out = command("convert", tmp_path / "a.pt", tmp_path / "a.safetensors").out
    assert out.splitlines()[0].startswith("1 tensor that shared memory with others have their own")


def test_a_damaged_file_is_not_converted(command: Command, tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    save({"model": model}, tmp_path / "a.pt")
    flip(tmp_path / "a.pt", model.weight.detach().numpy().tobytes()[:64])
    for out in OUTS:
        code, _, err = command("convert", tmp_path / "a.pt", tmp_path / out)
        assert code == 1
        assert "(tensor weight) has checksum" in err
    assert names_in(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a.pt", "is the file itself"),
        ("old.pt", "exists: --force replaces it"),
        ("full", "exists, and is no empty directory"),
        ("link.pt", "is no regular file"),
        ("none/b.pt", "is no directory: create it first"),
        ("b.bin", "does not say its format: give --to pt"),
        (".distckpt-x.tmp", "does not say its format"),
    ],
)
def test_names_that_do_not_fit_are_told(command: Command, path: Path, out: str, message: str) -> None:
    (path.parent / "old.pt").write_text("old")
    (path.parent / "link.pt").symlink_to("old.pt")
    (path.parent / "full").mkdir()
    (path.parent / "full" / "x").touch()
    before = names_in(path.parent)
    code, _, err = command("convert", path, path.parent / out)
    assert (code, names_in(path.parent)) == (2, before)
    assert message in err
    assert (path.parent / "old.pt").read_text() == "old"


def test_force_replaces_a_file(command: Command, path: Path) -> None:
    (path.parent / "b.pt").write_text("old")
    assert command("convert", path, path.parent / "b.pt", "--force").code == 0
    verify(path.parent / "b.pt")


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_conversion_that_fails_leaves_nothing(
    command: Command, path: Path, out: str, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0
    original = sources.PtSource.read

    def read(self: Any, *arguments: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise error
        original(self, *arguments)

    monkeypatch.setattr(sources.PtSource, "read", read)
    result = command("convert", path, path.parent / out, "--only", "model")
    assert result.code == (130 if error is KeyboardInterrupt else 2)
    assert names_in(path.parent) == ["a.pt"]


SIGNALLED = """
import os, sys
from distckpt.cli import main, sources
from distckpt.policy.naming import is_temp
read, calls = sources.PtSource.read, []
def signalled(*given):
    calls.append(given)
    if len(calls) == 50:
        assert any(map(is_temp, os.listdir(os.path.dirname(sys.argv[3])))), "nothing is half done yet"
        os.kill(os.getpid(), int(sys.argv.pop()))
    read(*given)
sources.PtSource.read = signalled
sys.exit(main(sys.argv[1:4]))
"""


@quick(2)
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_file(tmp_path: Path, out: str, number: signal.Signals) -> None:
    torch.save({str(at): torch.ones(1000) for at in range(100)}, tmp_path / "a.pt")
    called = [sys.executable, "-c", SIGNALLED, "convert", str(tmp_path / "a.pt"), str(tmp_path / out), str(int(number))]
    done = subprocess.run(called, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PROGRAM_LIMIT_S)
    assert done.returncode == (130 if number is signal.SIGINT else 143), done.stderr
    assert done.stderr == f"distckpt: {'interrupted' if number is signal.SIGINT else 'terminated'}\n"
    assert names_in(tmp_path) == ["a.pt"]


def test_an_unfinished_directory_is_listed(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    states: list[str] = []

    def read(*_: Any) -> None:
        found = command("ls", tmp_path, "--json").json["files"]
        states.extend(one["state"] for one in found if one["name"] != "a.pt")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.PtSource, "read", read)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it was killed
    assert command("convert", tmp_path / "a.pt", tmp_path / "b").code == 130
    read_after = command("ls", tmp_path, "--json").json["files"]
    assert states == ["being written"]
    assert [one["state"] for one in read_after] == ["left over", "complete"]
    assert read_after[0]["detail"] == "its process is dead. Delete it"


def test_a_structure_is_built_again() -> None:
    state = rich_state()
    flat = flatten(state)
    assert flat.structure is not None
    assert equal(unflatten(flat.structure, flat.tensors), state)
    assert list(flat.tensors)[:2] == ["model.weight", "model.tied"]
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    flat = flatten([parameter])
    (again,) = unflatten(flat.structure or "", flat.tensors)
    assert isinstance(again, nn.Parameter)
    assert not again.requires_grad
    ordered = OrderedDict(a=torch.ones(1))
    ordered._metadata = {"version": 2}  # type: ignore[attr-defined]
    flat = flatten(ordered)
    assert unflatten(flat.structure or "", flat.tensors)._metadata == {"version": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tensor":"none"}', '{"dtype":"load"}', '{"call":1}', "[" * 100_000])
def test_a_damaged_structure_is_damage(text: str) -> None:
    with pytest.raises(ValueError, match="its structure is damaged"):
        unflatten(text, {})
