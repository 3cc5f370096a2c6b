"""A yes or no that is on its way from an accelerator to the host.

Owns the copy that nothing waits for. Must not know what was asked.
"""

import torch

__all__ = ["PendingFlag"]


class PendingFlag:
    """An answer computed on an accelerator, copied to the host without a synchronisation.

    Args:
        flag: bool (), on any device.

    Example:
        >>> answer = PendingFlag(torch.tensor(True))
        >>> answer.is_here() and answer.value()
        True
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            # Pinned: a copy into pageable memory waits for the device.
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch ships it without types
            self._event.record(torch.cuda.current_stream(flag.device))
        else:
            self._host = flag

    def is_here(self) -> bool:
        """Tell whether the answer has come. Waits for nothing."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]  # as above

    def value(self) -> bool:
        """Return the answer, once it is here."""
        return bool(self._host)

    def number(self) -> torch.Tensor:
        """Return the answer where it was computed: bool (). Waits for nothing."""
        return self._flag
