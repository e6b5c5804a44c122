"""Files in responses: the wrapper that WSGI apps hand them over in, and when a file may go by its path."""

from __future__ import annotations

import io
import os
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FileWrapper", "PathFile", "sendable_path"]

BLOCK_SIZE = 256 * 1024
"""Bytes read at once. Bigger blocks gain nothing measurable; apps ask for 4 or 8 KiB out of habit."""

_BUFFERED = (io.BufferedReader, io.BufferedRandom)


class FileWrapper:
    """An iterable over a file's blocks, as ``wsgi.file_wrapper``; PEP 3333, "Optional Platform-Specific File Handling".

    Args:
        filelike: Anything with ``read(size)``. Its ``close()``, if it has one, is called once the response is over.
        block_size: The app's wish, in bytes. Bigger blocks are read where the wish is small.
    """

    def __init__(self, filelike: Any, block_size: int = BLOCK_SIZE) -> None:
        self.filelike = filelike
        self.block_size: int = max(block_size, BLOCK_SIZE)
        if hasattr(filelike, "close"):
            self.close: Callable[[], None] = filelike.close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block: bytes = self.filelike.read(self.block_size)
        if not block:
            raise StopIteration
        return block


class PathFile:
    """A file of which the response's end is told, for the ``wsgi.file_wrapper`` of a server.

    Servers look for ``fileno()`` and ``tell()`` to send it without reading it, else they read it; all of them close it.

    Args:
        path: Of a regular file.
        on_close: Called at the first ``close()``, after the file was closed.
    """

    def __init__(self, path: str, on_close: Callable[[], None]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._on_close = on_close
        self.name = path

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size) or b""

    def fileno(self) -> int:
        return self._file.fileno()

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(BLOCK_SIZE):
            yield block

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._on_close()


def sendable_path(filelike: Any, length: int | None) -> str | None:
    """The path by which a server may send a whole file by itself, None if it has to be read.

    ``http.response.pathsend`` names a file and no range: so it must be a regular file, unread so far, as long as the
    response says, and still the one that its name leads to.

    Args:
        filelike: What the app put into its file wrapper.
        length: The response's Content-Length, None if it declares none.
    """
    try:
        file = filelike.raw if type(filelike) in _BUFFERED else filelike
        # Others with a name and a fileno() give what is not in the file (gzip), or remove it when closed (tempfile).
        if type(file) is not io.FileIO and type(file) is not PathFile:
            return None
        name = file.name
        if not isinstance(name, str) or not os.path.isabs(name):
            return None
        opened = os.fstat(filelike.fileno())
        named = os.stat(name)
        unread = filelike.tell() == 0
    except (OSError, ValueError):  # closed, detached or gone
        return None
    if not stat.S_ISREG(opened.st_mode) or not os.path.samestat(opened, named):
        return None
    return name if unread and length in (None, opened.st_size) else None
