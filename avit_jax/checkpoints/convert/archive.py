"""Untrusted zip files. No part is unpacked before its size is known, and all parts together have a limit."""

import io
import sys
import zipfile
from pathlib import Path
from types import TracebackType

from avit_jax.checkpoints.convert.limits import MAX_DIRECTORY, MAX_PARTS, allowance
from avit_jax.runtime.files import shown


class _Source(io.FileIO):
    """The file that zipfile reads, with a limit for each read: it reads the whole table of contents in one call."""

    most = MAX_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes. Raises ValueError if zipfile asks for a table of contents beyond the limit."""
        if size is not None and size > self.most:
            raise ValueError(f"its table of contents takes {size} bytes: no checkpoint has so many parts")
        return super().read(size) or b""

    def __del__(self) -> None:
        """Close the file: code that reads its tensors later does not know that there is an archive."""
        self.close()


class Archive:
    """The parts of a zip file by name. Raises ValueError if there are more than a checkpoint has."""

    def __init__(self, path: Path) -> None:
        self._size = path.stat().st_size
        self._left = allowance(self._size)
        source = _Source(path)
        try:
            self._zip = zipfile.ZipFile(source)
        except BaseException:
            source.close()
            raise
        source.most = sys.maxsize
        self._source = source
        infos = self._zip.infolist()
        if len(infos) > MAX_PARTS:
            self.close()
            raise ValueError(f"it is a zip file of {len(infos)} parts: a checkpoint has at most {MAX_PARTS}")
        self._infos = {info.filename: info for info in infos}
        self.names = list(self._infos)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """The content of a part, its checksum verified. Raises ValueError if it has more than `most` bytes."""
        info = self._infos.get(name)
        if info is None:
            raise ValueError(f"its part {shown(name)} is missing")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its part {shown(name)} is compressed in a way that neither torch nor NumPy uses")
        stored = info.compress_type == zipfile.ZIP_STORED
        if info.compress_size > self._size or (stored and info.file_size != info.compress_size):
            raise ValueError(f"its part {shown(name)} is larger than the file")
        if most is not None and info.file_size > most:
            raise ValueError(f"its part {shown(name)} has {info.file_size} bytes: at most {most} are allowed")
        self._left -= info.file_size
        if self._left < 0:
            raise ValueError(
                f"its parts take more than {allowance(self._size)} bytes when unpacked, and the file has {self._size}: "
                "weights do not compress that well"
            )
        with self._zip.open(info) as stream:
            return stream.read(info.file_size)  # without a size, zipfile unpacks everything there is

    def is_compressed(self, name: str) -> bool:
        """Whether a part is stored compressed."""
        return name in self._infos and self._infos[name].compress_type != zipfile.ZIP_STORED

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._source.close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
