"""The tables, as plain text. Owns how numbers look; computes none."""

from ci.savebench.field import FIELD
from ci.savebench.summary import Row, Spread, limits_of, rows_of
from ci.savebench.world import Measured, gist_of

__all__ = ["table_of"]

MIB = 2**20
HEADS = (
    "",
    "stall s",
    "/memcpy",
    "/share",
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
stall: of the call, on the slowest rank. durable: from the call until everything is synced. cold load: into live
objects, on all ranks. /memcpy, /share: against a rank's copy of as many bytes as the whole state has, and as its share
has, by one memcpy; /tensors: against a copy of its share by one memcpy a tensor, all in the same round. (glibc's memcpy
writes past the caches from a size on that `ld.so --list-tunables` tells; distckpt always, if it can.) /write: against a
raw write of a share by each rank; /read+copy: against such a read of the same files, and a memcpy of all. read x: bytes
that all ranks read from storage, of the checkpoint's. extra: the most memory that all ranks hold more than without
a save. step x: a step until the save is durable, against one without.
lost: stall and longer steps until it is durable. Medians of the rounds (smallest-largest). torch, ignite and
torchsnapshot sync nothing: a thread beside the training did it for them. The older checkpoint was removed at no cost to
them, where distckpt and ignite's handler remove it in the save; distckpt's is durable when that begins."""


def table_of(measured: Measured) -> str:
    """Return the table of one world, with its limits and those who were left out."""
    ranks = "1 rank" if measured.world_size == 1 else f"{measured.world_size} ranks"
    lines = [f"{ranks}; state: {measured.num_tensors} tensors, {measured.num_bytes / MIB:.0f} MiB"]
    limits = limits_of(measured)
    if limits:
        copies = f"memcpy of all {_spread(limits['memcpy_s'])}, of a share {_spread(limits['memcpy_share_s'])}"
        copies += f"; tensor by tensor {_spread(limits['tensors_s'])}, of a share {_spread(limits['tensors_share_s'])}"
        storage = f"raw write {_spread(limits['write_s'])}; raw read {_spread(limits['read_s'])}"
        lines.append(f"  limits, s: {copies}; {storage}")
    order = list(FIELD)
    rows = sorted(rows_of(measured), key=lambda row: order.index(row.name))
    cells = [HEADS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADS))]
    widths[0] = max(widths[0], *map(len, measured.left_out), 0)
    for first, *others in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *padded]))
    for name, why in sorted(measured.left_out.items(), key=lambda one: order.index(one[0])):
        kind, _, text = why.partition(": ")
        lines.append(f"  {name.ljust(widths[0])}  {kind}: {gist_of(text)}")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _spread(row.stall_s),
        f"{row.stall_by_memcpy:.2f}",
        f"{row.stall_by_share:.2f}",
        f"{row.stall_by_tensors:.2f}",
        _spread(row.durable_s),
        f"{row.durable_by_write:.2f}",
        _spread(row.load_s),
        f"{row.load_by_read:.2f}",
        f"{row.read_by_size:.2f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / MIB:.0f}",
        f"{row.step_ratio:.2f}" if FIELD[row.name].is_background else "-",
        _spread(row.lost_s),
        f"NOT a snapshot ({row.num_torn} x)" if row.num_torn else "bit for bit",
    )


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"
