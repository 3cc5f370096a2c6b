"""Results as tables in plain text."""

from collections.abc import Mapping, Sequence

from ci.savebench.field import FIELD
from ci.savebench.summary import Row, Spread, limits_of, rows_of
from ci.savebench.world import Measured, summary_of

MIB = 2**20
HEADS = (
    "",
    "stall s",
    "/memcpy",
    "/range",
    "/tensors",
    "durable s",
    "/write",
    "cold load s",
    "/read+copy",
    "read x",
    "extra MiB",
    "step x",
    "lost s",
    "restores",
)
LEGEND = """\
stall: duration of the call, on the slowest rank. durable: from the call until everything is synced. cold load: into
live objects, on all ranks. /memcpy, /range: relative to one memcpy of the state's size, and of a rank's range of it;
/tensors: relative to one memcpy per tensor of that range, in the same round. (glibc's memcpy bypasses the caches above
a size that `ld.so --list-tunables` shows; distckpt always does if the CPU can.) /write: relative to a raw write of a
range by each rank; /read+copy: relative to a raw read of the same files and one memcpy of all. read x: bytes that all
ranks read from storage, relative to the checkpoint. extra: largest additional memory of all ranks during a save.
step x: duration of a step until the save is durable, relative to one without a save.
lost: stall and longer steps until it is durable. Medians of the rounds (smallest-largest). torch, ignite and
torchsnapshot sync nothing: a thread syncs their files while training continues. Removing the older checkpoint costs
them nothing here; distckpt and ignite's handler remove it in the save, distckpt after the new one is durable."""


def table_of(measured: Measured) -> str:
    """Return the table of one world, with its limits and the contestants without results."""
    rows = {row.name: _cells(row) for row in rows_of(measured)}
    return table_with(measured, HEADS, rows)


def table_with(measured: Measured, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a table of one world, with its limits and the contestants without results.

    Args:
        measured: the world.
        heads: one for each column; the first is empty.
        rows: the cells of each contestant, its name first.
    """
    ranks = "1 rank" if measured.world_size == 1 else f"{measured.world_size} ranks"
    lines = [f"{ranks}; state: {measured.num_tensors} tensors, {measured.num_bytes / MIB:.0f} MiB"]
    limits = limits_of(measured)
    if limits:
        copy, share, each, each_share = (
            spread_text(limits[name]) for name in ("memcpy_s", "memcpy_share_s", "tensors_s", "tensors_share_s")
        )
        copies = f"memcpy of all {copy}, of a range {share}; tensor by tensor {each}, of a range {each_share}"
        storage = f"raw write {spread_text(limits['write_s'])}; raw read {spread_text(limits['read_s'])}"
        lines.append(f"  limits, s: {copies}; {storage}")
    order = list(FIELD)
    cells = [heads, *(rows[name] for name in sorted(rows, key=order.index))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    widths[0] = max(widths[0], *map(len, measured.left_out), 0)
    for first, *others in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *padded]))
    for name, why in sorted(measured.left_out.items(), key=lambda one: order.index(one[0])):
        kind, _, text = why.partition(": ")
        lines.append(f"  {name.ljust(widths[0])}  {kind}: {summary_of(text)}")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        spread_text(row.stall_s),
        f"{row.stall_by_memcpy:.2f}",
        f"{row.stall_by_share:.2f}",
        f"{row.stall_by_tensors:.2f}",
        spread_text(row.durable_s),
        f"{row.durable_by_write:.2f}",
        spread_text(row.load_s),
        f"{row.load_by_read:.2f}",
        f"{row.read_by_size:.2f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / MIB:.0f}",
        f"{row.step_ratio:.2f}" if FIELD[row.name].is_background else "-",
        spread_text(row.lost_s),
        f"NOT a snapshot ({row.num_torn} x)" if row.num_torn else "bit for bit",
    )


def spread_text(spread: Spread) -> str:
    """Return a median, and the smallest and largest value."""
    return f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"
