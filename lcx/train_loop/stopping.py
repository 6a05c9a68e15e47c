"""A polite end: SIGTERM and Ctrl-C ask the loop to save and leave; a second Ctrl-C interrupts at once."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether this run was asked to stop. Use as a context manager; all processes of a run agree on the step."""

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # With several processes JAX's coordinator watches for SIGTERM, and Ctrl-C interrupts at once.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def now(self, step: int) -> bool:
        """Whether to save and leave after `step`."""
        if jax.process_count() > 1:
            # JAX's coordinator passes a SIGTERM of any process on and names one step for all of them.
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
