"""A function over many seeds on all cores, by processes that end with the program in any case."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import parent_process

from tqdm import tqdm


def on_all_cores(function, items, title):
    """function(item) of each item, in their order, with a progress bar."""
    # processes, because drawing holds the interpreter lock
    # after Ctrl-C pool.map cancels what has not begun, in which a second Ctrl-C must not disturb it
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent)
    with interrupted_once(), pool:
        yield from tqdm(pool.map(function, items, chunksize=16), title, len(items))


@contextmanager
def interrupted_once():
    """Within it Ctrl-C raises KeyboardInterrupt, but a second one does not disturb the tidying."""
    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent():
    """Let this process end when the one that started it does, also when that one is killed."""
    # Ctrl-C reaches all processes; one that it ended while it held the queue would stop the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pool's processes would wait for work forever: they hold each other's queue open.
    threading.Thread(target=wait_and_end, daemon=True).start()


def wait_and_end():
    parent_process().join()
    os._exit(1)  # at once, from this thread, without what a whole program does at its end
