"""Worker processes that end with the process that started them, also when it is killed."""

import multiprocessing
import os
import threading


def end_with_parent(index: int, count: int) -> None:
    """To be called in a worker (of `count`, number `index`): from now on it ends when its parent does.

    A worker that waits for room in a queue would otherwise wait for ever for a parent that was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)  # nobody is left who could hear of anything else

    threading.Thread(target=watch, name=f"worker {index} of {count} waits for its parent", daemon=True).start()
