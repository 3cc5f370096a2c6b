from typing import Any

from typing_extensions import Buffer

def have_values(
    objects: list[Any], rows: list[tuple[Any, ...]], attributes: tuple[str, ...], methods: tuple[str, ...], /
) -> bool: ...
def have_layouts(api: object, objects: list[Any], layouts: list[bytes], addresses: Buffer, /) -> bool: ...
