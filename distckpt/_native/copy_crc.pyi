from typing_extensions import Buffer

KERNELS: tuple[str, ...]

def check(data: Buffer, before: int = 0, kernel: str | None = None, /) -> int: ...
def copy_rows(
    target: Buffer,
    shift: int,
    sources: Buffer,
    rows: Buffer,
    first: int,
    last: int,
    crcs: Buffer,
    kernel: str | None = None,
    /,
) -> None: ...
