"""The request's body: as a stream for WSGI, as messages for ASGI. Both pull from a callable; no thread is known."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from bridge.errors import BadRequest, ProtocolError, shown
from bridge.headers import content_length, is_self_delimited

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from _typeshed import WriteableBuffer
    from asgiref.typing import HTTPDisconnectEvent, HTTPRequestEvent

__all__ = ["BodyReader", "InputStream", "LengthRequired", "WsgiInput"]

PIECE = 64 * 1024
"""Bytes asked from a server's wsgi.input at once: gunicorn, gevent and granian block until all of them are there."""


class InputStream(io.RawIOBase):
    """A request's body as a raw file; ``io.BufferedReader`` makes ``wsgi.input`` of it.

    Args:
        next_chunk: Gives the next bytes of the body, empty at its end and from then on. What it raises, a read raises.
    """

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        self._next_chunk = next_chunk
        self._rest = memoryview(b"")  # of a chunk that was longer than what was asked for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        chunk = self._rest or memoryview(self._next_chunk())
        # No view of it has a name here: this frame may live on, in a traceback of what has run in the event loop while
        # this read waited for it, and from CPython 3.15 on the buffer cannot be read out of while a view is there.
        size = min(len(chunk), memoryview(buffer).nbytes)
        memoryview(buffer).cast("B")[:size] = chunk[:size]
        self._rest = chunk[size:]
        return size


class WsgiInput:
    """``wsgi.input``: a buffered `InputStream`, made when the app first uses it.

    Most requests have no body, and the buffer alone takes 8 KiB: too much for each of thousands that wait for a thread.

    Args:
        next_chunk: As for `InputStream`.
    """

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        self._next_chunk = next_chunk
        self._reader: io.BufferedReader | None = None

    def _open(self) -> io.BufferedReader:
        reader = self._reader
        if reader is None:
            reader = self._reader = io.BufferedReader(InputStream(self._next_chunk))
        return reader

    def read1(self, size: int = -1) -> bytes:
        """What is there of the body, and if nothing is, the next chunk of it."""
        return self._open().read1(size)

    def __getattr__(self, name: str) -> Any:  # read, readline, readlines, and all else that a file has
        return getattr(self._open(), name)

    def __iter__(self) -> io.BufferedReader:
        return self._open()


class LengthRequired(BadRequest):
    """Raised when a request's body is in chunks that the server does not take apart."""


class BodyReader:
    """A request's body as the messages that ``receive()`` gives.

    It reads by ``read(n)`` with n > 0 alone: granian's stream has no other that works, and gunicorn's ``read()`` would
    take all of it into memory.

    Args:
        environ: ``wsgi.input``, ``wsgi.input_terminated``, ``CONTENT_LENGTH`` and ``HTTP_TRANSFER_ENCODING`` are
            looked at.

    Raises:
        BadRequest: CONTENT_LENGTH is no plain decimal.
        LengthRequired: There is none, and a Transfer-Encoding in its place that the server leaves to the app.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        length, stream = environ.get("CONTENT_LENGTH"), environ.get("wsgi.input")
        if length:
            self._remaining: int | None = content_length(length)
            if is_self_delimited(environ):
                self._remaining = None
        else:
            # Without a length only a stream that ends by itself can be read (PEP 3333, "Input and Error Streams").
            self._remaining = None if environ.get("wsgi.input_terminated") else 0
            if self._remaining == 0 and environ.get("HTTP_TRANSFER_ENCODING"):
                if type(stream) is not io.BytesIO:  # the whole body, as httpx's WSGITransport gives it
                    raise LengthRequired("the body needs a Content-Length here: this server takes no chunks apart")
                self._remaining = None
        if stream is None:
            stream, self._remaining = io.BytesIO(), 0
        # None after the last message. Of a stream of our own the chunks come as they arrive, not in full pieces.
        self._read: Callable[[int], bytes] | None = stream.read1 if type(stream) is WsgiInput else stream.read
        self.complete: bool = self._remaining == 0

    def next_message(self) -> HTTPRequestEvent | HTTPDisconnectEvent:
        """Read the next piece, which may block.

        Returns:
            ``http.request``, of which the last has ``more_body`` false; ``http.disconnect`` where the body ends before
            its length or cannot be read, and once the body is complete.

        Raises:
            ProtocolError: The server's stream gave no bytes.
        """
        if self._read is None:
            return {"type": "http.disconnect"}
        if self.complete:
            self._read = None
            return {"type": "http.request", "body": b"", "more_body": False}
        try:
            data = self._read(PIECE if self._remaining is None else min(PIECE, self._remaining))
        except (OSError, ValueError):
            # As servers say that the client left or (cheroot and eventlet by ValueError) that its chunks are malformed.
            self._read = None
            return {"type": "http.disconnect"}
        if not isinstance(data, bytes):
            self._read = None
            raise ProtocolError(f"wsgi.input expected to give bytes, gave {shown(data)}")
        if self._remaining is None:
            self.complete = not data
        else:
            data = data[: self._remaining]  # a stream that ignores the size asked for may give more
            self._remaining -= len(data)
            self.complete = self._remaining == 0
        if self.complete:
            self._read = None
        elif not data:
            self._read = None
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": data, "more_body": not self.complete}
