"""Every layout x dtype x number of saving ranks x loading job x placement x way of saving, bit for bit; counts printed.

What is loaded is compared with the whole tensors that were cut, with `full_tensor()`, and with what
torch.distributed.checkpoint has saved and loaded of the same state.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import distckpt
from tests.distributed.test_sharded_loading import (
    SHARDED,
    Layout,
    Tensors,
    bits,
    distribute,
    gathered,
    layouts,
    numbered,
    plain,
    step,
)
from tests.distributed.test_sharded_loading import (
    whole as with_whole_tensors,
)
from tests.support import run_ranks
from tests.support.equality import equal
from tests.support.selection import is_full

pytestmark = [
    pytest.mark.only_on("gloo", why="device meshes over Gloo"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of its own calls
    pytest.mark.slow,
]

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
SAVING = LOADING = (1, 2, 3, 4)
WAYS = ("foreground", "background")
NUM_STEPS = 6
PLACEMENTS = ("own", "replicated", "rows", "last dimension")
Cell = tuple[str, int]
"""Name of a layout, and number of ranks that saved."""


def wholes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, torch.Tensor]]:
    """Return layout and whole tensor by name, of each dtype."""
    return {
        f"{layout} {str(dtype).removeprefix('torch.')}": (layout, numbered(shape, dtype))
        for layout, shape in shapes.items()
        for dtype in DTYPES
    }


def shapes_of(found: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _, _) in found.items()}


def over_all_ranks(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of which each rank has a part: torch.distributed.checkpoint takes no others."""
    return {name: one for name, one in tensors.items() if "sub-mesh" not in name}


def save_all(folder: str, ways: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Save the tensors of all layouts, each way, and by torch.distributed.checkpoint; return their shapes."""
    found = layouts()
    known = wholes(shapes_of(found))
    tensors: dict[str, Any] = {name: distribute(whole, found[layout]) for name, (layout, whole) in known.items()}
    for name, (layout, whole) in known.items():
        if found[layout][1].get_coordinate() is not None:
            assert torch.equal(gathered(tensors[name]), bits(whole)), name
    for way in ways:
        net = Tensors(tensors)
        if way == "foreground":
            distckpt.save({"net": net}, f"{folder}/{way}.pt")
        else:
            distckpt.async_save({"net": net}, f"{folder}/{way}.pt").wait()
    dcp.save(over_all_ranks(tensors), checkpoint_id=f"{folder}/dcp")
    return shapes_of(found)


def placed(layout: Layout, what: str, over_all: DeviceMesh) -> Layout | None:
    """Return the layout into which a tensor is loaded; None if there is none of that kind."""
    shape = layout[0]
    if what == "own":
        return layout
    if what == "replicated":
        return shape, over_all, [Replicate()]
    return (shape, over_all, [Shard(0 if what == "rows" else len(shape) - 1)]) if shape else None


def load_all(folders: Mapping[int, str], ways: Sequence[str]) -> Counter[Cell]:
    """Load each file into each placement; return how many tensors were compared."""
    found, counts = layouts(), Counter[Cell]()
    known = wholes(shapes_of(found))
    for num_saving, folder in folders.items():
        theirs: dict[str, Any] = {
            name: distribute(torch.zeros_like(whole), found[layout]) for name, (layout, whole) in known.items()
        }
        dcp.load(over_all_ranks(theirs), checkpoint_id=f"{folder}/dcp")
        for way, what in itertools.product(ways, PLACEMENTS):
            targets = {name: placed(found[layout], what, found["rows"][1]) for name, (layout, _) in known.items()}
            live = {
                name: distribute(torch.zeros_like(known[name][1]), place)
                for name, place in targets.items()
                if place is not None
            }
            distckpt.load({"net": Tensors(live)}, f"{folder}/{way}.pt", strict=False)
            for name, ours in live.items():
                case = f"{name}, saved on {num_saving} ranks in the {way}, loaded as {what}"
                (layout, whole), place = known[name], targets[name]
                assert place is not None
                local = bits(ours.to_local())
                assert torch.equal(local, bits(distribute(whole, place).to_local())), case
                if what == "own" and name in over_all_ranks(theirs):
                    assert torch.equal(local, bits(theirs[name].to_local())), case
                counts[layout, num_saving] += 1
    return counts


def load_plain(folders: Mapping[int, str], ways: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Counter[Cell]:
    """Load each file into plain tensors, and by torch alone; return how many tensors were compared."""
    counts, known = Counter[Cell](), wholes(shapes)
    for (num_saving, folder), way in itertools.product(folders.items(), ways):
        net = Tensors({name: torch.zeros_like(whole) for name, (_, whole) in known.items()})
        distckpt.load({"net": net}, f"{folder}/{way}.pt")
        of_torch = torch.load(f"{folder}/{way}.pt", weights_only=True, mmap=True)
        for name, (layout, whole) in known.items():
            for one in (net.state_dict()[name], of_torch[name]):
                assert type(one) is torch.Tensor
                assert torch.equal(bits(one), bits(whole)), f"{name}, saved on {num_saving} ranks in the {way}"
            counts[layout, num_saving] += 1
    return counts


def table_of(counts: Counter[Cell], saving: Sequence[int], loading: Sequence[int], ways: Sequence[str]) -> str:
    """Return the counts as a table."""
    jobs = f"plain tensors and, as {', '.join(PLACEMENTS)}, on {', '.join(map(str, loading))} ranks"
    lines = [
        f"[sharded matrix] {counts.total()} cells bit-equal to the whole tensor, by layout and number of saving ranks,",
        f"each {len(DTYPES)} dtypes x saved in the {' and '.join(ways)} x loaded into {jobs}",
        f"{'layout':24}" + "".join(f"{num:>7}" for num in saving),
    ]
    found = dict.fromkeys(layout for layout, _ in counts)
    lines += [f"{layout:24}" + "".join(f"{counts[layout, num]:>7}" for num in saving) for layout in found]
    return "\n".join(lines)


def test_every_layout_is_saved_and_loaded_bit_for_bit_on_every_number_of_ranks(
    tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    saving, loading, ways = (SAVING, LOADING, WAYS) if is_full(pytestconfig) else ([2, 4], [3], ["background"])
    folders = {num: str(tmp_path / str(num)) for num in saving}
    shapes: Mapping[str, Sequence[int]] = {}
    for num, folder in folders.items():
        Path(folder).mkdir()
        shapes = run_ranks(save_all, num, folder, ways)[0]
    counts = load_plain(folders, ways, shapes)
    for num in loading:
        counts += run_ranks(load_all, num, folders, ways)[0]
    with capsys.disabled():
        print(f"\n{table_of(counts, saving, loading, ways)}", file=sys.stderr)  # noqa: T201 - the counts belong in the log
    num_layouts = len(shapes)
    # A number of no dimension has neither rows nor a last dimension.
    num_placed = 1 + len(loading) * len(PLACEMENTS)
    assert counts.total() == len(saving) * len(ways) * len(DTYPES) * (num_layouts * num_placed - 2 * len(loading))


def train_with_a_stop(path: str, kind: str, num_before: int) -> None:
    """Train for some steps; do so again with a save, and a load into new objects, after the first ones."""

    def made() -> tuple[Any, torch.optim.Optimizer]:
        net = SHARDED[kind](plain())
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    def state_of(net: Any, optimizer: torch.optim.Optimizer) -> Any:
        return with_whole_tensors({"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})

    pending = list[distckpt.PendingSave]()
    net, optimizer = made()
    for number in range(NUM_STEPS):
        step(net, optimizer)
        if number + 1 == num_before:
            pending.append(distckpt.async_save({"net": net, "optimizer": optimizer}, path))
    alone = state_of(net, optimizer)
    pending[0].wait()
    net, optimizer = made()
    distckpt.load({"net": net, "optimizer": optimizer}, path)
    assert not equal(state_of(net, optimizer), alone)
    for _ in range(NUM_STEPS - num_before):
        step(net, optimizer)
    assert equal(state_of(net, optimizer), alone)


@pytest.mark.parametrize("num_before", [1, NUM_STEPS - 1])
@pytest.mark.parametrize(("kind", "world_size"), [("fsdp", 2), ("fsdp", 3), ("tensor parallel", 4), ("hybrid", 4)])
def test_a_training_goes_on_bit_for_bit(tmp_path: Path, kind: str, world_size: int, num_before: int) -> None:
    run_ranks(train_with_a_stop, world_size, str(tmp_path / "a.pt"), kind, num_before)
