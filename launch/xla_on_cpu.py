"""Make torch_xla's replicas work when they are threads on a CPU.

This mends faults of torch_xla 2.9 on CPUs, where people try programs before they have a TPU, and where our tests run.

Two replicas meet in a collective only if they run the same compiled program. If both compiled the same graph at the
same time, each would get its own program, and both would wait forever. So one replica compiles first, and the other
finds the compiled program. The second must start as soon as it is there, because the first waits in the collective.

Reductions are traced one at a time as well: replicas that trace them at the same moment crash now and then. The same is
true of the first backward passes in a forked process, such as a process of `xmp.spawn`.
"""

import threading
from typing import Any

import torch

_MARK = "takes_turns"
_LOOK_S = 0.001
_LOCK = threading.Lock()


def take_turns() -> None:
    """Let this process's replicas compile one after the other. Does nothing the second time."""
    import torch_xla  # noqa: PLC0415 - only where it is what runs
    import torch_xla.core.xla_model as xm  # noqa: PLC0415 - as above
    import torch_xla.debug.metrics as met  # noqa: PLC0415 - as above
    import torch_xla.runtime as xr  # noqa: PLC0415 - as above

    xlac: Any = torch_xla._XLAC  # noqa: SLF001 - its functions have no other place
    run, trace = xlac._xla_step_marker, xm.all_reduce  # noqa: SLF001 - as above
    with _LOCK:
        if getattr(run, _MARK, False):
            return
        # After a fork, torch makes its autograd engine anew at the first use. Threads that do so at the same time leave
        # it without queues for the devices, and each backward pass of the process fails or hangs.
        torch.autograd.Variable._execution_engine.is_checkpoint_valid()  # noqa: SLF001 - the one that starts no thread
        turns = _Turns(lambda: xr.get_num_cached_compilation_graph() + (met.counter_value("CachedCompile") or 0))

        def step_marker(device: str, *args: Any, **kwargs: Any) -> None:
            mine = xlac._xla_real_devices([device])  # noqa: SLF001 - as above
            # Outside of the turn, before it and after: the replica that is waited for here needs a turn too.
            xlac._xla_wait_device_ops(mine)  # noqa: SLF001 - as above
            turn = turns.take()
            try:
                run(device, *args, **kwargs)
            finally:
                turns.end(turn)
            xlac._xla_wait_device_ops(mine)  # noqa: SLF001 - as above

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            with _LOCK:
                return trace(*args, **kwargs)

        vars(step_marker)[_MARK] = True
        xm.all_reduce = all_reduce
        xlac._xla_step_marker = step_marker  # noqa: SLF001 - as above


class _Turns:
    """Whose turn it is.

    Args:
        num_found: how many graphs were compiled, or found compiled, so far: it has risen once a turn may be passed on.
    """

    def __init__(self, num_found: Any) -> None:
        self._num_found = num_found
        self._free = threading.Condition()
        self._owner: object = None
        self._before = 0

    def take(self) -> object:
        """Wait for a turn; return what ends it."""
        turn = object()
        with self._free:
            while self._owner is not None and self._num_found() == self._before:
                self._free.wait(_LOOK_S)
            self._owner, self._before = turn, self._num_found()
        return turn

    def end(self, turn: object) -> None:
        """End a turn, if it was not passed on before."""
        with self._free:
            if self._owner is turn:
                self._owner = None
                self._free.notify()
