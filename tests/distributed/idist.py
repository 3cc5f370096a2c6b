"""ignite's own `idist`, for tests beside it."""

import contextlib
from collections.abc import Iterator

import ignite.distributed as idist
from ignite.distributed import utils
from ignite.distributed.comp_models.base import _SerialModel


@contextlib.contextmanager
def fresh_idist() -> Iterator[None]:
    """Let `idist` look for the job anew, and forget it afterwards: it keeps the first that it finds in a global."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    utils._set_model(_SerialModel(), temporary=True)
    assert idist.utils._need_to_sync, "a serial model is looked past"
