"""The experiments of both papers, their statistics and pictures, and the measurements of speed and size."""

import multiprocessing
import os
import signal
import threading


def begin_worker() -> None:
    """Of a study's worker: it leaves Ctrl-C to its parent, and ends at once when that ends, in whatever way.

    It is here because a worker that knows it needs to import nothing else first, which takes seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent  # a worker has one

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
