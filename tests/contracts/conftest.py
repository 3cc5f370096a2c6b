"""Fixtures of the contract's suite."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.support.store import ADDRESS


@pytest.fixture
def launcher_port() -> Iterator[int]:
    """Serve a store as torchrun does, and give its port: for ranks that join a job by ``env://``.

    Such a store holds one job's keys for as long as it lives, so each test has its own.
    """
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield store.port
    del store
