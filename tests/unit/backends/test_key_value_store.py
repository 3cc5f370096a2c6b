"""TorchKeyValueStore over real stores: no call waits longer than its limit, and none is lost once the store answers."""

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distckpt.backends import key_value_store
from distckpt.backends.key_value_store import TorchKeyValueStore
from tests.support.selection import quick

DeadHost = tuple[TorchKeyValueStore, TorchKeyValueStore]
LIMIT_S = 0.3
SLACK_S = 10.0
"""By how much a call may overrun its limit on a busy machine; a hang is a minute."""
_ENOUGH = timedelta(seconds=60)

_SERVER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""

# Not `put`: the store acknowledges no note, so one is sent into a frozen host's socket and is read when it wakes.
CALLS: dict[str, Callable[[TorchKeyValueStore, float], object]] = {
    "claim": lambda kv, limit_s: kv.set_default("note", "text", limit_s=limit_s),
    "look": lambda kv, limit_s: kv.get_many(["note", "none"], limit_s=limit_s),
    "count": lambda kv, limit_s: kv.add("number", 1, limit_s=limit_s),
}


class Server:
    """A process that hosts a store, as torchrun's agent does."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:2"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 60.0)[0]:
            self.end()
            raise AssertionError("the store's host did not start")
        self.port = int(self.process.stdout.readline())

    def connect(self, prefix: str) -> dist.Store:
        """Return a connection, under a prefix."""
        return dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=_ENOUGH))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process for a while."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # on a busy machine its threads go on for a moment
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.communicate(timeout=10.0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return a process that hosts a store."""
    host = Server()
    try:
        yield host
    finally:
        host.end()


@pytest.fixture
def store(server: Server, request: pytest.FixtureRequest) -> dist.Store:
    """Return a connection to a place of the test's own in it."""
    return server.connect(request.node.name)


@pytest.fixture
def kv(store: dist.Store) -> Iterator[TorchKeyValueStore]:
    """Return a store whose job ends with the test."""
    is_open = True
    yield TorchKeyValueStore(store, lambda: is_open)
    is_open = False


def store_threads() -> list[threading.Thread]:
    """Return the workers of all stores."""
    return [thread for thread in threading.enumerate() if thread.name == "distckpt-store"]


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- notes -------------------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "file", "hash"])
def any_board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TorchKeyValueStore]:
    """Return a store over each kind of store."""
    stores: dict[str, Callable[[], dist.Store]] = {
        "tcp": lambda: request.getfixturevalue("store"),
        "file": lambda: dist.PrefixStore("p", dist.FileStore(str(tmp_path / "store"), 1)),
        "hash": lambda: dist.PrefixStore("p", dist.HashStore()),
    }
    is_open = True
    yield TorchKeyValueStore(stores[request.param](), lambda: is_open)
    is_open = False


def test_a_note_is_read_as_it_was_written_last(any_board: TorchKeyValueStore) -> None:
    any_board.set("a", "one", limit_s=5.0)
    any_board.set("a", "two \N{BUG}", limit_s=5.0)
    any_board.set("empty", "", limit_s=5.0)
    assert any_board.get_many(["a", "none", "empty"], limit_s=5.0) == ["two \N{BUG}", None, ""]
    assert any_board.get_many(["a"], limit_s=5.0) == ["two \N{BUG}"]
    assert any_board.get_many(["a", "empty"], limit_s=5.0) == ["two \N{BUG}", ""]
    assert any_board.get_many(["none"], limit_s=5.0) == [None]
    assert any_board.get_many([], limit_s=5.0) == []


def test_the_first_claim_stands(any_board: TorchKeyValueStore) -> None:
    assert any_board.set_default("a", "mine", limit_s=5.0) == "mine"
    assert any_board.set_default("a", "yours", limit_s=5.0) == "mine"
    assert any_board.get_many(["a"], limit_s=5.0) == ["mine"]


def test_what_was_taken_back_can_be_claimed_again(any_board: TorchKeyValueStore) -> None:
    any_board.set_default("a", "mine", limit_s=5.0)
    any_board.set("a", "", limit_s=5.0)
    assert any_board.set_default("a", "yours", limit_s=5.0) == "yours"


def test_numbers_begin_at_nothing(any_board: TorchKeyValueStore) -> None:
    assert [any_board.add("n", amount, limit_s=5.0) for amount in (0, 1, 0, 41)] == [0, 1, 1, 42]


def test_one_of_many_claims_stands_for_all(server: Server) -> None:
    kvs = [TorchKeyValueStore(server.connect("contest"), lambda: True) for _ in range(4)]
    with ThreadPoolExecutor(len(kvs)) as ranks:
        stands = list(ranks.map(lambda at: kvs[at].set_default("a", f"rank {at}", limit_s=20.0), range(4)))
    assert len(set(stands)) == 1
    assert kvs[0].get_many(["a"], limit_s=5.0) == stands[:1]


def test_any_thread_may_ask(kv: TorchKeyValueStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        counted = list(threads.map(lambda _: kv.add("n", 1, limit_s=20.0), range(200)))
    assert sorted(counted) == list(range(1, 201))


# -- a host that does not answer ---------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("was_used", [True, False], ids=["used before", "new"])
def test_a_call_ends_within_its_limit_while_the_host_is_frozen(
    server: Server, kv: TorchKeyValueStore, call: str, *, was_used: bool
) -> None:
    if was_used:
        kv.set("note", "before", limit_s=5.0)
    with server.frozen():
        for _ in range(3):
            begin_s = time.monotonic()
            with pytest.raises(TimeoutError, match=r"did not answer within 0\.3 s"):
                CALLS[call](kv, LIMIT_S)
            assert time.monotonic() - begin_s + 0.01 >= LIMIT_S
            assert time.monotonic() - begin_s < LIMIT_S + SLACK_S


def test_calls_of_several_threads_end_while_the_host_is_frozen(server: Server, kv: TorchKeyValueStore) -> None:
    def ask(_number: int) -> float:
        begin_s = time.monotonic()
        with pytest.raises(TimeoutError):
            kv.get_many(["note"], limit_s=LIMIT_S)
        return time.monotonic() - begin_s

    with server.frozen(), ThreadPoolExecutor(6) as threads:
        assert max(threads.map(ask, range(6))) < LIMIT_S + SLACK_S


def test_a_store_works_again_once_its_host_does(server: Server, kv: TorchKeyValueStore) -> None:
    kv.set("note", "before", limit_s=5.0)
    for number in range(3):
        with server.frozen():
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    kv.get_many(["note"], limit_s=0.1)
        kv.set("note", f"after {number}", limit_s=5.0)
        assert kv.get_many(["note"], limit_s=5.0) == [f"after {number}"]


def test_what_was_given_up_before_it_began_is_not_done_later(server: Server, kv: TorchKeyValueStore) -> None:
    kv.add("n", 1, limit_s=5.0)
    with server.frozen():
        with pytest.raises(TimeoutError):
            kv.get_many(["note"], limit_s=0.1)  # holds the connection
        for _ in range(3):
            with pytest.raises(TimeoutError):
                kv.add("n", 1, limit_s=0.1)
    assert kv.add("n", 0, limit_s=5.0) == 1


def test_a_note_to_a_frozen_host_is_read_when_it_wakes(server: Server, kv: TorchKeyValueStore) -> None:
    kv.set("note", "before", limit_s=5.0)
    with server.frozen():
        begin_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            kv.set("note", "meanwhile", limit_s=LIMIT_S)
        assert time.monotonic() - begin_s < LIMIT_S + SLACK_S
    assert kv.get_many(["note"], limit_s=5.0) == ["meanwhile"]


@pytest.fixture
def dead_host() -> Iterator[tuple[TorchKeyValueStore, TorchKeyValueStore]]:
    """Return two stores of a host that has died: one that had been used before, and a new one."""
    host = Server()
    try:
        used, new = (TorchKeyValueStore(host.connect("p"), lambda: True) for _ in range(2))
        used.set("note", "before", limit_s=5.0)
        used.get_many(["note"], limit_s=5.0)
    finally:
        host.end()
    yield used, new  # noqa: PT022 - the kvs live as long as the test


def test_a_host_that_died_is_told_from_one_that_is_frozen(
    dead_host: DeadHost,
) -> None:
    begin_s = time.monotonic()
    for call in (*CALLS.values(), *CALLS.values()):
        with pytest.raises(ConnectionError, match="the job's store is gone"):
            call(dead_host[0], 20.0)
    with pytest.raises(ConnectionError, match="the job's store is gone"):
        dead_host[0].set("note", "text", limit_s=20.0)
    assert time.monotonic() - begin_s < 15.0


def test_a_first_call_to_a_host_that_died_ends_within_its_limit(
    dead_host: DeadHost,
) -> None:
    for call in CALLS.values():
        begin_s = time.monotonic()
        with pytest.raises(OSError, match="the job's store"):  # it cannot tell yet: a host may be slow to start
            call(dead_host[1], LIMIT_S)
        assert time.monotonic() - begin_s < LIMIT_S + SLACK_S


def test_a_guest_on_a_connection_hears_at_once_that_its_host_died() -> None:
    host = Server()
    try:
        kv = TorchKeyValueStore(host.connect("p"), lambda: True, is_guest=True)
        assert kv.add("n", 1, limit_s=5.0) == 1
    finally:
        host.end()
    begin_s = time.monotonic()
    with pytest.raises(ConnectionError, match="the job's store is gone"):
        kv.add("n", 1, limit_s=20.0)
    assert time.monotonic() - begin_s < 15.0


# -- where it is kept --------------------------------------------------------------------------------


def test_the_place_of_a_store_is_known(store: dist.Store, tmp_path: Path) -> None:
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    guest = dist.TCPStore("127.0.0.1", own.port, is_master=False)
    places = [
        TorchKeyValueStore(one, lambda: True).host()
        for one in (
            own,
            dist.PrefixStore("p", guest),
            store,
            dist.FileStore(str(tmp_path / "file"), 1),
            dist.HashStore(),
        )
    ]
    assert places == ["this process", "this process", "this machine", "", ""]


def test_an_address_is_known_as_ones_own() -> None:
    assert key_value_store._is_own_address("127.0.0.1")
    assert key_value_store._is_own_address("localhost")
    assert not key_value_store._is_own_address("192.0.2.7"), "of a network for examples (RFC 5737)"
    assert not key_value_store._is_own_address("no-such-host.invalid")


# -- its thread --------------------------------------------------------------------------------------


def test_a_store_that_nobody_asks_has_no_thread(store: dist.Store) -> None:
    before = store_threads()
    kv = TorchKeyValueStore(store, lambda: True)
    assert store_threads() == before
    assert kv.is_open()


def test_its_thread_ends_with_the_job_and_comes_back_when_it_is_asked(store: dist.Store) -> None:
    before = set(store_threads())
    is_open = True
    kv = TorchKeyValueStore(store, lambda: is_open)
    kv.set("note", "text", limit_s=5.0)
    assert len(set(store_threads()) - before) == 1
    is_open = False
    assert not kv.is_open()
    wait_until(lambda: not set(store_threads()) - before)
    assert kv.get_many(["note"], limit_s=5.0) == ["text"]
    wait_until(lambda: not set(store_threads()) - before)


def test_its_thread_ends_with_the_store(store: dist.Store) -> None:
    before = set(store_threads())
    kv = TorchKeyValueStore(store, lambda: True)
    kv.set("note", "text", limit_s=5.0)
    assert len(set(store_threads()) - before) == 1
    del kv
    gc.collect()
    wait_until(lambda: not set(store_threads()) - before)


def test_a_closed_store_refuses_as_one_whose_store_is_gone(kv: TorchKeyValueStore) -> None:
    kv.set("note", "text", limit_s=5.0)
    kv.close()
    for call in CALLS.values():
        with pytest.raises(ConnectionError, match="this process has left the job"):
            call(kv, 5.0)


def test_the_end_of_a_store_waits_for_a_call_that_was_given_up(server: Server, kv: TorchKeyValueStore) -> None:
    before = set(store_threads())
    kv.set("note", "text", limit_s=5.0)
    with server.frozen():
        with pytest.raises(TimeoutError):
            kv.get_many(["note"], limit_s=0.1)
        begin_s = time.monotonic()
        kv.close(LIMIT_S)
        assert LIMIT_S <= time.monotonic() - begin_s + 0.01 < LIMIT_S + SLACK_S, "a frozen host holds it no longer"
        assert set(store_threads()) - before
    kv.close(10.0)
    assert not set(store_threads()) - before


def test_the_end_of_a_store_that_nobody_asked_waits_for_nothing(kv: TorchKeyValueStore) -> None:
    kv.close(10.0)
    kv.close(10.0)


# -- how its process ends ----------------------------------------------------------------------------

_BEGIN = """
import atexit, contextlib, os, sys, threading, time
from datetime import timedelta
import torch.distributed as dist
from distckpt.backends.key_value_store import TorchKeyValueStore
from distckpt._threads import join_at_exit, start_thread

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
is_inside = threading.Event()

def call_slowly(store=store):  # is inside the store for half a second
    is_inside.set()
    with contextlib.suppress(dist.DistStoreError):
        store.wait(["never"], timedelta(seconds=0.5))

class SlowEnd:  # takes time once the interpreter is being taken down
    def __del__(self, sleep=time.sleep):
        sleep(1.0)

slow = SlowEnd()

def wait_until_inside():
    is_inside.wait()
    time.sleep(0.2)  # the thread still has to enter the store's own code, which no flag can tell
"""
_GIVEN_UP = """
kv = TorchKeyValueStore(store, lambda: True)
with contextlib.suppress(TimeoutError):
    kv._ask(call_slowly, 0.1)
"""
_AS_GUEST = """
kv = TorchKeyValueStore(store, lambda: True, is_guest=True)
with contextlib.suppress(TimeoutError), contextlib.closing(kv):
    kv._ask(call_slowly, 0.1)
"""
_IN_A_FUNCTION_AT_EXIT = """
kv = TorchKeyValueStore(store, lambda: True)
def leave():
    with contextlib.suppress(TimeoutError):
        kv._ask(call_slowly, 0.1)
atexit.register(leave)
"""
_ENDS = {
    "idle": "kv = TorchKeyValueStore(store, lambda: True); kv.set('leaving', 'now', limit_s=20.0)",
    "given up": _GIVEN_UP,
    "given up, by a guest": _AS_GUEST,
    "given up, the store dropped": f"{_GIVEN_UP}\ndel kv",
    "given up, the job over": _GIVEN_UP.replace("lambda: True", "lambda: False"),
    "given up, at exit": _IN_A_FUNCTION_AT_EXIT,
    "given up, beside a forked child": f"{_GIVEN_UP}\nif os.fork():\n    os.wait()",
    "a helper's": "start_thread(call_slowly); wait_until_inside()",
    "a daemon's": (
        "one = threading.Thread(target=call_slowly, daemon=True); one.start(); wait_until_inside(); join_at_exit(one)"
    ),
}


def run_to_its_end(program: str, port: int) -> subprocess.CompletedProcess[str]:
    """Run a program beside a store."""
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(
        [sys.executable, "-c", program, str(port)], cwd=root, capture_output=True, text=True, timeout=60.0, check=False
    )


@quick(3)
@pytest.mark.parametrize("end", _ENDS)
def test_a_process_that_ends_with_a_call_in_the_store_exits_with_0(server: Server, end: str) -> None:
    done = run_to_its_end(_BEGIN + _ENDS[end], server.port)
    assert done.returncode == 0, done.stderr


def test_control_a_daemon_thread_in_the_store_aborts_the_process(server: Server) -> None:
    program = f"{_BEGIN}\nthreading.Thread(target=call_slowly, daemon=True).start(); wait_until_inside()"
    assert run_to_its_end(program, server.port).returncode == -signal.SIGABRT


def test_a_store_that_does_not_answer_holds_a_process_no_longer_than_the_limit(server: Server) -> None:
    program = f"""{_BEGIN}
from distckpt.backends import key_value_store
key_value_store.EXIT_LIMIT_S = 0.5
kv = TorchKeyValueStore(store, lambda: True)
kv.set("note", "text", limit_s=20.0)
os.kill({server.process.pid}, {int(signal.SIGSTOP)})
with contextlib.suppress(TimeoutError):
    kv.get_many(["note"], limit_s=0.1)
"""
    begin_s = time.monotonic()
    try:
        done = run_to_its_end(program, server.port)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin_s < 30.0
