"""TensorBoard's event files."""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

FLUSH_SECONDS = 30.0


class EventFile:
    """Scalars, written in the calling thread. start: the first step; TensorBoard drops older points from there on.

    tensorboardX's SummaryWriter has its own thread. If that thread dies, for instance of a full disk, training blocks
    for ever.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write(step=start, session_log=SessionLog(status=SessionLog.START))  # makes TensorBoard drop older points
        self._flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        self._write(step=step, summary=scalar(name, value))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **fields))

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()
