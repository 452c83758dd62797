"""A function over many seeds on all cores, by processes that end with the program in any case."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import parent_process

from tqdm import tqdm


def on_all_cores(function, items, title):
    """function(item) of each item, in their order, with a progress bar."""
    # processes, because drawing holds the interpreter lock
    with ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent) as pool:
        yield from tqdm(pool.map(function, items, chunksize=16), title, len(items))


def end_with_parent():
    """Let this process end when the one that started it does, also when that one is killed."""
    # The pool's processes would wait for work forever: they hold each other's queue open.
    threading.Thread(target=wait_and_end, daemon=True).start()


def wait_and_end():
    parent_process().join()
    os._exit(1)  # at once, from this thread, without what a whole program does at its end
