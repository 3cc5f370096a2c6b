"""Results of ``bench_save.py --sharded`` as tables in plain text."""

from ci.savebench.summary import LoadRow, Row, ShardedRow, loads_of, rows_of, sharded_rows_of
from ci.savebench.table import spread_text, table_with
from ci.savebench.world import Measured

KIB = 2**10
LEGEND = """\
Each rank has a shard of every tensor. stall: duration of the call, on the slowest rank; /memcpy: relative to one memcpy
of as many bytes as a rank has; /tensors: relative to one memcpy per shard. durable: from the call until everything is
synced; /write: relative to a raw O_DIRECT write of as many bytes by all ranks. extra x: largest additional memory of
all ranks during a save, relative to the state. written x: bytes that all ranks wrote, relative to the state. exchanged:
what all ranks received over TCP until the save was durable. load: cold, into live objects, on as many ranks;
/read+copy: relative to a raw read of the same files by all ranks and one memcpy of a rank's share. read x: bytes that
all ranks read, relative to the checkpoint. one file: the second pass that makes one file of the checkpoint, cold and
synced (dcp_to_torch_save); distckpt's is one. lost: stall and longer steps until it is durable. Ratios are of the same
round. Medians of the rounds (smallest-largest). torch and torch_checkpointing sync nothing: a thread syncs their files
while training continues."""
_HEADS = (
    "stall s",
    "/memcpy",
    "/tensors",
    "durable s",
    "/write",
    "lost s",
    "extra x",
    "written x",
    "exchanged KiB",
    "load s",
    "/read+copy",
    "read x",
)


def sharded_table_of(measured: Measured, loaded: Measured | None) -> str:
    """Return the table of one world.

    Args:
        measured: the world that saved.
        loaded: a world of another size that loaded the same checkpoints; None if there was none.
    """
    more = {} if loaded is None else loads_of(loaded)
    beside = sharded_rows_of(measured)
    heads = ["", *_HEADS]
    if loaded is not None:
        ranks = "1 rank" if loaded.world_size == 1 else f"{loaded.world_size} ranks"
        heads += [f"load on {ranks} s", "/read+copy", "read x"]
    heads += ["one file s", "restores"]
    rows = {
        row.name: _cells(row, beside[row.name], measured, more.get(row.name), is_loaded=loaded is not None)
        for row in rows_of(measured)
    }
    text = table_with(measured, heads, rows)
    failed = {} if loaded is None else loaded.left_out
    return "\n".join(
        [text, *(f"  {name}, loaded on {loaded.world_size}: {why}" for name, why in failed.items() if loaded)]
    )


def _cells(row: Row, beside: ShardedRow, measured: Measured, load: LoadRow | None, *, is_loaded: bool) -> list[str]:
    cells = [
        row.name,
        spread_text(row.stall_s),
        f"{row.stall_by_share:.2f}",
        f"{row.stall_by_tensors:.2f}",
        spread_text(row.durable_s),
        f"{row.durable_by_write:.2f}",
        spread_text(row.lost_s),
        "-" if row.extra_bytes is None else f"{row.extra_bytes / measured.num_bytes:.2f}",
        f"{beside.written_by_size:.3f}",
        f"{beside.received_bytes / KIB:.0f}",
        spread_text(row.load_s),
        f"{beside.load_by_read:.2f}",
        f"{row.read_by_size:.2f}",
    ]
    if load is not None:
        cells += [spread_text(load.load_s), f"{load.load_by_read:.2f}", f"{load.read_by_size:.2f}"]
    elif is_loaded:
        cells += ["-", "-", "-"]
    num_torn = row.num_torn + (0 if load is None else load.num_torn)
    return [
        *cells,
        "-" if beside.consolidate_s is None else spread_text(beside.consolidate_s),
        f"NOT a snapshot ({num_torn} x)" if num_torn else "bit for bit",
    ]
