"""Worker processes that end when the process that started them ends, even if it is killed."""

import multiprocessing
import os
import threading


def end_with_parent(index: int, count: int) -> None:
    """Call this in worker number `index` of `count`: from then on, the worker ends when its parent does.

    Otherwise a worker that waits for room in a queue would wait forever after its parent was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # no process is left to report anything to

    threading.Thread(target=watch, name=f"worker {index} of {count} waits for its parent", daemon=True).start()
