"""Ctrl-C before a program has begun and after it has ended: one line, never a traceback.

    if __name__ == "__main__":  # before torch is imported, which takes seconds
        from parts import interrupts
        interrupts.catch()

This module must import nothing that takes time.
"""

import os
import signal
from contextlib import contextmanager

STOPPED = 130  # exit code of a program that Ctrl-C has ended: 128 and the signal's number


def catch():
    """From now on Ctrl-C ends the process at once, with a line and exit code 130."""
    signal.signal(signal.SIGINT, leave)


def leave(number, frame):
    # No exception, which a library would report, or swallow, in the middle of its import.
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


@contextmanager
def raised():
    """Within it Ctrl-C raises KeyboardInterrupt again, so that a program can end by itself."""
    caught = signal.getsignal(signal.SIGINT) is leave
    if caught:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if caught:
            catch()
