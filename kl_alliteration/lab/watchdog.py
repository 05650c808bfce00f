"""A limit on the time of a function that has to run where it is called: it is interrupted, or the process ends."""

import os
import signal
import sys
import threading
import time

GRACE = 5.0  # seconds that a function has to come back once it was interrupted
LONGEST = 1e8  # three years: more than timers take is no limit

# Two signals that nobody needs. The first is sent by a thread, and is ignored where nobody handles it. The second
# comes by the processor's clock, also while C code such as `re` holds the interpreter's lock and no thread can run.
SIGNALS = [getattr(signal, name) for name in ("SIGURG", "SIGVTALRM") if hasattr(signal, name)]


class TimeIsUp(BaseException):
    """Raised in the middle of the function; no `Exception`, so that the function's own `except` does not take it."""


class Watch:
    """What the function's thread and the one beside it know of each other."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.told = self.done = False
        self.over = threading.Event()

    def interrupt(self, number, frame) -> None:
        """The handler of both signals."""
        if self.done or self.told:
            return
        left = self.deadline - time.monotonic()
        if left > 0.001:  # several threads were busy, so that their clock ran ahead
            signal.setitimer(signal.ITIMER_VIRTUAL, left)
            return
        self.told = True
        raise TimeIsUp

    def wait(self, seconds: float, thread: int | None, words: str) -> None:
        """In a thread of its own: wait, interrupt, wait again, end."""
        if self.over.wait(seconds):
            return
        if thread is not None:
            signal.pthread_kill(thread, SIGNALS[0])
        else:
            self.told = True
        if not self.over.wait(GRACE):
            sys.stdout.flush()
            print(f"error: {words}, nor came back when it was interrupted", file=sys.stderr, flush=True)
            os._exit(3)


def limited(function, seconds: float | None, words: str, **kwargs):
    """`function(**kwargs)`, and [`TimeIsUp`] when it has not come back after `seconds`; `None` is no limit.

    The function stays on the thread that calls it. On the main thread it is interrupted by signals that are the user's
    again afterwards; `SIGALRM` is never touched. A function that does not come back within `GRACE` seconds of that,
    because it waits in C code or takes every exception for its own, ends the process with status 3 and one line,
    `words`. So does one on another thread, or where there are no such signals: those cannot be interrupted.

    What cannot be kept: C code that neither lets go of the interpreter's lock nor looks at signals goes on, since
    nothing of Python's runs beside it.
    """
    if seconds is None or seconds > LONGEST:
        return function(**kwargs)
    watch, before = Watch(seconds), {}
    on_main = threading.current_thread() is threading.main_thread() and len(SIGNALS) == 2
    beside = threading.Thread(
        target=watch.wait, args=(seconds, threading.get_ident() if on_main else None, words), daemon=True
    )
    try:
        if on_main:
            before = {number: signal.signal(number, watch.interrupt) for number in SIGNALS}
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        beside.start()
        try:
            return function(**kwargs)
        finally:
            watch.done = True  # from here on the handler does nothing
    finally:
        watch.done = True
        watch.over.set()
        beside.join()  # nothing of it is under way when the handlers go
        if before:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if watch.told:
            raise TimeIsUp
