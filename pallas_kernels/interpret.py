"""Whether Pallas kernels are interpreted, for tests on a host that has no device for them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

_MODE: contextvars.ContextVar[Any] = contextvars.ContextVar("lcx_pallas_interpret", default=False)


def mode() -> Any:
    """What `pallas_call(interpret=...)` gets: False outside `interpreted`."""
    return _MODE.get()


@contextlib.contextmanager
def interpreted(how: Any = True) -> Iterator[None]:
    """Kernels traced inside the block are interpreted, on any platform.

    Args:
      how: True for Pallas' fast interpreter; an object such as `pltpu.InterpretParams(detect_races=True)` for one that
        simulates memories, copies and semaphores.
    """
    token = _MODE.set(how)
    try:
        yield
    finally:
        _MODE.reset(token)
