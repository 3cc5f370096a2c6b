"""The image of a ``.pt``: every byte has its locate, its owner and its checksum, and torch's own readers open it."""

import io
import itertools
import random
import subprocess
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.serialization import config

from distckpt._checksum import crc32
from distckpt.ptformat import image
from distckpt.ptformat.image import CopyItem, ImagePlan, Segment, ShardBuffer, build_tail, combine_checksums, plan_image
from distckpt.ptformat.layout import FOLDER, RecordLocation, build_directory, local_header, locate
from distckpt.ptformat.pickler import pickle_like_torch, pickle_state
from distckpt.saving.staging import HostMemory, Staging
from distckpt.storage.base import BLOCK_BYTES
from tests.support.equality import equal
from tests.unit.storages import bytes_of, storages_of

GIB = 1 << 30


def buffers_of(
    plan: ImagePlan, storages: Sequence[torch.UntypedStorage], num_ranks: int
) -> list[tuple[ShardBuffer, bytes]]:
    """Stage and check every rank's share; returns them in the order of the image, each with its bytes."""
    found = []
    for begin, end in plan.write_ranges(num_ranks):
        memory = HostMemory().view(end - begin)
        items = [CopyItem(*piece)._replace(at=piece.at - begin) for piece in plan.copy_items(begin, end)]
        staging = Staging(storages, items, memory, 0)
        staging.run()
        part = ShardBuffer(plan, memory, [Segment(begin, end, 0)] if begin < end else [])
        written = b""
        part.check(staging.wait_until)
        for at, chunk in itertools.chain.from_iterable(part.chunks()):
            assert at == begin + len(written)
            written += bytes(chunk)
        found.append((part, written))
    return found


def whole(
    storages: Sequence[torch.UntypedStorage],
    pickled: bytes = b"",
    replicated: Collection[int] = (),
    num_ranks: int = 1,
) -> bytes:
    plan = plan_image([storage.nbytes() for storage in storages], replicated)
    parts = buffers_of(plan, storages, num_ranks)
    crcs = combine_checksums(plan, [part.checked for part, _ in parts])
    image = bytearray().join(written for _, written in parts)
    for at, header in plan.boundary_headers([end for _, end in plan.write_ranges(num_ranks)], crcs):
        image[at : at + len(header)] = header
    return bytes(image) + build_tail(plan, crcs, pickled, b"{}")


def file_of(state: Any, path: Path, **kwargs: Any) -> Path:
    pickled = pickle_state(state)
    path.write_bytes(whole(pickled.storages, pickled.data, **kwargs))
    return path


def zoo() -> dict[str, Any]:
    """Tensors of every make that a checkpoint may hold and torch loads without code."""
    base = torch.arange(20, dtype=torch.float32)
    dtypes = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
    return {
        "dtypes": {str(dtype): torch.tensor([0.0, 1.0, 1.0]).to(dtype) for dtype in dtypes},
        "base": base,
        "view": base[3:9],
        "transposed": base.view(4, 5).t(),
        "expanded": torch.ones(1).expand(7),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": nn.Parameter(torch.ones(2)),
        "needs_grad": torch.ones(2, requires_grad=True),
        "sparse": torch.sparse_coo_tensor(
            torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (4,), check_invariants=True
        ),
        "numbers": [1, 2.5, True, None, "text", (1, 2), OrderedDict(a=1)],
    }


def pickle_by_torch(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


def trained() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("make", [zoo, trained, list, lambda: torch.ones(3), lambda: {"a": torch.ones(2)[1:]}])
def test_the_exact_pickle_is_torchs_to_the_byte(make: Callable[[], Any]) -> None:
    state = make()
    assert pickle_like_torch(state).data == pickle_by_torch(state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_pickle_of_rare_kinds_is_torchs_too() -> None:
    quantised = torch.quantize_per_tensor(torch.tensor([0.0, 1.0]), 0.1, 0, torch.qint8)
    typed = torch.FloatStorage([1.0, 2.0])  # type: ignore[no-untyped-call]
    noted = torch.ones(2)
    noted.note = "an attribute"  # type: ignore[attr-defined]
    for state in (quantised, typed, torch.ones(3).untyped_storage(), torch.empty(2, device="meta"), noted):
        assert pickle_state(state).data == pickle_by_torch(state)


def test_memory_that_is_viewed_as_two_types_is_refused_as_torch_does() -> None:
    tensor = torch.ones(4)
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        pickle_state([tensor, tensor.view(torch.int32)])


@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=["read", "mapped"])
@pytest.mark.parametrize("computed", [False, True], ids=["offsets read", "offsets computed"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_torch_loads_every_kind_of_tensor_to_the_bit(
    tmp_path: Path, options: dict[str, Any], *, computed: bool, num_ranks: int
) -> None:
    state = {"zoo": zoo(), "trained": trained(), "large": torch.randn(3_000_000)}
    num_storages = len(pickle_state(state).storages)
    path = file_of(state, tmp_path / "a.pt", replicated=range(num_storages), num_ranks=num_ranks)
    with config.patch({"load.calculate_storage_offsets": computed}):  # type: ignore[attr-defined]
        loaded = torch.load(path, weights_only=True, **options)
    assert equal(state, loaded)
    assert loaded["zoo"]["view"].untyped_storage().data_ptr() == loaded["zoo"]["base"].untyped_storage().data_ptr()


def test_unzip_finds_nothing_wrong(tmp_path: Path) -> None:
    path = file_of({"zoo": zoo(), "trained": trained()}, tmp_path / "a.pt")
    done = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "No errors detected" in done.stdout


def test_storages_are_aligned_and_shared_ones_are_written_once() -> None:
    tensor = torch.ones(5000)
    pickled = pickle_state([tensor, tensor[1:], torch.ones(1)])
    assert len(pickled.storages) == 2
    plan = plan_image([storage.nbytes() for storage in pickled.storages])
    assert [record.offset % alignment for record, alignment in zip(plan.records, (64, 64), strict=True)] == [0, 0]


sizes = st.lists(st.sampled_from([0, 1, 4, 63, 64, 4000, 4096, 4097, 8192, 65_535, 65_536, 1_000_003]), max_size=12)


@given(sizes=sizes, num_ranks=st.integers(1, 5), data=st.data())
def test_any_number_of_shares_makes_the_same_file(sizes: list[int], num_ranks: int, data: st.DataObject) -> None:
    replicated = data.draw(st.sets(st.sampled_from(range(len(sizes))))) if sizes else set()
    storages = storages_of(*sizes)
    plan = plan_image(sizes, replicated)
    shares = plan.write_ranges(num_ranks)
    assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])], "nothing is left out"
    assert shares[-1][1] == plan.end
    assert all(begin % BLOCK_BYTES == 0 for begin, _ in shares)
    assert all(record.offset >= shares[-1][0] for number, record in zip(plan.storage_numbers, plan.records, strict=True)
               if number not in replicated), "what is the saving rank's own is in its share"  # fmt: skip
    one = whole(storages, b"pickle", replicated)
    assert whole(storages, b"pickle", replicated, num_ranks) == one
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        assert archive.testzip() is None
        assert archive.read(f"{FOLDER}/data.pkl") == b"pickle"
        for number, storage in enumerate(storages):
            assert archive.read(f"{FOLDER}/data/{number}") == bytes_of(storage)


def test_shares_of_equal_tensors_are_about_equal() -> None:
    plan = plan_image([1_000_000] * 40, range(40))
    lengths = [end - begin for begin, end in plan.write_ranges(4)]
    assert max(lengths) - min(lengths) < 3 * BLOCK_BYTES


def test_one_tensor_is_split_inside() -> None:
    plan = plan_image([64 << 20], [0])
    lengths = [end - begin for begin, end in plan.write_ranges(4)]
    assert max(lengths) - min(lengths) <= 4 * BLOCK_BYTES


def test_bytes_that_nobody_checked_are_noticed() -> None:
    plan = plan_image([8192], [0])
    parts = buffers_of(plan, storages_of(8192), 2)
    with pytest.raises(ValueError, match=r"record data/0 do not cover its 8192 bytes"):
        combine_checksums(plan, [parts[0][0].checked])


def test_parts_that_are_ready_together_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "CHUNK_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(image, "MOST_BYTES", 32 * BLOCK_BYTES)
    plan = plan_image([100 * BLOCK_BYTES])
    cuts = [*range(0, plan.end, 4 * BLOCK_BYTES), plan.end]
    segments = [Segment(begin, end, begin) for begin, end in itertools.pairwise(cuts)]
    memory = memoryview(random.Random(6).randbytes(plan.end)).cast("B")
    part = ShardBuffer(plan, memoryview(bytearray(memory)), segments)
    is_reached, is_open = threading.Event(), threading.Event()
    half = plan.end // 2 // BLOCK_BYTES * BLOCK_BYTES

    def wait_for(offset: int) -> None:
        if offset > half:
            is_reached.set()
            assert is_open.wait(60)

    with ThreadPoolExecutor(1) as pool:
        is_checked = pool.submit(part.check, wait_for)
        written, lengths = bytearray(), []
        assert is_reached.wait(60)
        for chunks in part.chunks():
            lengths.append(sum(len(one.data) for one in chunks) // BLOCK_BYTES)
            for at, data in chunks:
                assert at == len(written)
                written += data
            if len(written) > half - 4 * BLOCK_BYTES:  # what was ready came without the rest
                is_open.set()
                assert is_checked.result(60)
    assert len(written) == plan.end
    first, last = plan.records[0].offset, plan.records[0].offset + 100 * BLOCK_BYTES
    assert written[first:last] == memory[first:last]
    assert lengths == [32, 16, 32, 21]


def test_more_than_four_gibibytes_are_described_by_zip64(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    pickled = pickle_state({"small": torch.arange(3)})
    plan = plan_image([5 * GIB, 24, 4 * GIB])
    data = bytes_of(pickled.storages[0])
    with path.open("wb") as file:  # its holes take no space
        for record in plan.records:
            file.seek(record.header)
            file.write(local_header(record, 7) + (data if record.num_bytes == len(data) else b"x"))
        file.seek(plan.end)
        file.write(build_tail(plan, [7, crc32(data), 9], b"pickle", b"{}"))
        file.seek(0)
        for record, content in zip(plan.head, (b"3\n", b"little"), strict=True):
            file.write(local_header(record, crc32(content)) + content)
    with zipfile.ZipFile(path) as archive:
        found = {info.filename: info for info in archive.infolist()}
        assert [found[f"{FOLDER}/data/{number}"].file_size for number in range(3)] == [5 * GIB, 24, 4 * GIB]
        assert [found[f"{FOLDER}/data/{number}"].CRC for number in range(3)] == [7, crc32(data), 9]
        assert archive.read(f"{FOLDER}/data/1") == data
        assert archive.read(f"{FOLDER}/data.pkl") == b"pickle", "beyond nine gibibytes"
    done = subprocess.run(["unzip", "-v", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torch_loads_what_lies_beyond_four_gibibytes(tmp_path: Path) -> None:
    small = torch.arange(3)
    path = tmp_path / "large.pt"
    pickled = pickle_state({"hole": torch.zeros(1, dtype=torch.uint8), "small": small})
    plan = plan_image([5 * GIB, 24])
    with path.open("wb") as file:
        for record, content in zip(plan.head, (b"3\n", b"little"), strict=True):
            file.write(local_header(record, crc32(content)) + content)
        crc = crc32(bytes_of(pickled.storages[1]))
        file.seek(plan.records[0].header)
        file.write(local_header(plan.records[0], 0))
        file.seek(plan.records[1].header)
        file.write(local_header(plan.records[1], crc) + bytes_of(pickled.storages[1]))
        file.seek(plan.end)
        file.write(build_tail(plan, [0, crc], pickled.data, b"{}"))
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["small"], small)


@pytest.mark.parametrize("alignment", [64, BLOCK_BYTES])
def test_an_aligned_record_has_room_for_its_padding(alignment: int) -> None:
    for at in range(BLOCK_BYTES - 120, BLOCK_BYTES + 10):
        record = locate("data/0", 8, at, alignment=alignment)
        assert record.offset % alignment == 0
        assert record.offset - at < alignment + 80
        assert len(local_header(record, 0)) == record.offset - record.header


def test_an_empty_archive_has_an_end() -> None:
    with zipfile.ZipFile(io.BytesIO(build_directory([], 0))) as archive:
        assert archive.namelist() == []
    assert RecordLocation("a", 0, 30, 5).end == 35
