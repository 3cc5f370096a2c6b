"""``distckpt inspect`` shows what is in a file."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt.cli import sources
from distckpt.ptformat.safetensors_format import build_safetensors_header
from tests.unit.cli.conftest import Command


def test_the_tree_of_a_checkpoint(command: Command, trained: Path) -> None:
    code, out, err = command("inspect", trained / "checkpoint_40.pt")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{trained}/checkpoint_40.pt: a checkpoint of distckpt, schema 2, ")
    assert lines[2] == "progress: step 40, epoch 4"
    assert re.fullmatch(r"run: [0-9a-f]+, which went on from [0-9a-f]+", lines[5])
    assert lines[6:8] == ["handler: checkpoint by step", "its handler kept then: checkpoint_40.pt, checkpoint_30.pt"]
    assert lines[8:] == [
        "2 tensors, 32 B",
        "KEY       DTYPE     SHAPE  SIZE    NORM",
        "model",
        "  weight  float32  (2, 3)  24 B  7.4162",
        "  bias    float32     (2)   8 B       0",
        "trainer",
        "  epoch_length = 10",
        "  iteration = 40",
        "  max_epochs = 4",
    ]


def test_json_has_manifest_tensors_and_values(command: Command, trained: Path) -> None:
    found = command("inspect", trained / "checkpoint_40.pt", "--json").json
    assert found["manifest"]["record"]["number"] == 1
    assert found["values"] == {"trainer.epoch_length": 10, "trainer.iteration": 40, "trainer.max_epochs": 4}
    assert found["tensors"][0] == {
        "name": "model.weight",
        "dtype": "float32",
        "shape": [2, 3],
        "num_bytes": 24,
        "norm": pytest.approx(55**0.5),
        "tied_to": None,
    }


def test_a_key_shows_its_values(command: Command, trained: Path) -> None:
    out = command("inspect", trained / "checkpoint_40.pt", "--key", "model.weight").out
    assert out.splitlines()[1:] == [
        "KEY           DTYPE     SHAPE  SIZE    NORM",
        "model.weight  float32  (2, 3)  24 B  7.4162",
        "least: 0",
        "greatest: 5",
        "mean: 2.5",
        "NaN: 0",
        "infinite: 0",
        "first: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]",
    ]
    below = command("inspect", trained / "checkpoint_40.pt", "--key", "model", "--json").json["tensors"]
    assert [one["name"] for one in below] == ["model.weight", "model.bias"]


def test_a_wrong_key_names_similar_ones(command: Command, trained: Path) -> None:
    code, out, err = command("inspect", trained / "checkpoint_40.pt", "--key", "model.wieght")
    assert (code, out) == (2, "")
    assert "there is no key 'model.wieght'; similar keys: model.weight" in err


def test_views_ties_and_rare_values(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 64)
    base = torch.arange(60.0).reshape(6, 10)
    state: dict[Any, Any] = {
        "base": base,
        "tied": base,
        "turned": base.t(),
        "part": base[1:3, 2:5],
        "odd": torch.tensor([float("nan"), float("inf"), 1.0]),
        "half": torch.ones(100, dtype=torch.bfloat16),
        "complex": torch.tensor([3 + 4j]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "long": list(range(1000)),
        "empty": {},
        "sparse": torch.ones(2, 2).to_sparse(),
        1: "one",
        "1": "text one",
        "control": "\x1b[2J",
    }
    torch.save(state, tmp_path / "a.pt")
    result = command("inspect", tmp_path / "a.pt", "--json")
    assert result.code == 0
    tensors = {one["name"]: one for one in result.json["tensors"]}
    for name in ("base", "tied", "turned", "part"):
        assert tensors[name]["norm"] == pytest.approx(float(state[name].double().norm())), name
    assert (tensors["tied"]["tied_to"], tensors["turned"]["tied_to"]) == ("base", None)
    assert (tensors["half"]["norm"], tensors["complex"]["norm"], tensors["none"]["norm"]) == (10.0, 5.0, 0.0)
    assert tensors["odd"]["norm"] == "nan"
    assert result.json["values"]["1"] == "one"
    assert result.json["values"]["1#2"] == "text one"
    shown = command("inspect", tmp_path / "a.pt").out
    assert "\x1b" not in shown
    assert "tied = base" in shown
    assert "sparse = a tensor of layout sparse_coo, shape (2, 2)" in shown


def test_a_single_tensor_and_an_older_format(command: Command, tmp_path: Path) -> None:
    torch.save(torch.ones(4), tmp_path / "one.pt")
    assert "(the whole file)  float32" in command("inspect", tmp_path / "one.pt").out
    torch.save({"w": torch.ones(4)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert command("inspect", tmp_path / "old.pt", "--json").json["tensors"][0]["norm"] == 2.0


def test_a_safetensors_file(command: Command, tmp_path: Path) -> None:
    header = build_safetensors_header([("b.w", "F32", (2,)), ("rare", "F8_E4M3", (1,))], {"format": "pt"})
    (tmp_path / "a.safetensors").write_bytes(header + torch.tensor([3.0, 4.0]).numpy().tobytes() + b"\0")
    found = command("inspect", tmp_path / "a.safetensors", "--json").json
    assert found["metadata"] == {"format": "pt"}
    assert [(one["name"], one["norm"]) for one in found["tensors"]] == [("b.w", 5.0), ("rare", 0.0)]
    (tmp_path / "a.safetensors").write_bytes(header)
    code, _, err = command("inspect", tmp_path / "a.safetensors")
    assert code == 1
    assert "is no safetensors file, or is damaged: its tensors end at byte" in err


class Payload:
    """Its pickle calls a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("what", ["missing", "directory", "pipe", "text", "unsafe", "cut"])
def test_what_cannot_be_inspected_is_told_in_a_line(command: Command, tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.pt"
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        path = Path("/dev/null")
    elif what == "text":
        path.write_text("text")
    elif what == "unsafe":
        torch.save({"a": Payload()}, path)
    elif what == "cut":
        torch.save({"model": nn.Linear(9, 9).state_dict()}, path)
        path.write_bytes(path.read_bytes()[:-100])
    code, out, err = command("inspect", path)
    assert code == (1 if what in ("text", "cut") else 2)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("distckpt: ")
    assert "executed" not in out + err.replace("executed by", "").replace("was executed", "").replace("executing", "")
