"""A WebSocket client that says what it is told, right or wrong: bytes, handshakes and frames. Here is no test."""

from __future__ import annotations

import re
import socket
import zlib
from typing import NamedTuple

__all__ = ["BINARY", "CLOSE", "CONTINUATION", "HANDSHAKE", "PING", "PONG", "TEXT", "Frame", "RawWebSocket", "frame"]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

HANDSHAKE = {
    "Host": "testserver",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
ACCEPTED = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The answer to this key (RFC 6455, 1.3)."""

MASK = b"\x37\xfa\x21\x3d"
# gunicorn's page of an error has a bare LF on CPython 3.14 and newer, where textwrap.dedent(), which it uses, takes the
# CR of an empty line for whitespace. (RFC 9112, 2.2 lets a client take that.)
HEAD_END = re.compile(rb"\r\n\r?\n")
FLATE_END = b"\x00\x00\xff\xff"
RSV1 = 4


class Frame(NamedTuple):
    """What came from the server."""

    opcode: int
    data: bytes
    fin: bool = True
    rsv: int = 0


def frame(
    opcode: int,
    data: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    length: int | None = None,
) -> bytes:
    """The bytes of a frame (RFC 6455, 5.2).

    Args:
        mask: None for a frame that is not masked.
        length: What the frame says, if not the truth.
    """
    size = len(data) if length is None else length
    masked = 0 if mask is None else 0x80
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if size < 126:
        head += bytes([masked | size])
    elif size < 1 << 16:
        head += bytes([masked | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([masked | 127]) + size.to_bytes(8, "big")
    if mask is None:
        return head + data
    if data:
        repeated = (mask * (len(data) // 4 + 1))[: len(data)]
        data = (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(data), "big")
    return head + mask + data


def close_data(code: int, reason: bytes = b"") -> bytes:
    return code.to_bytes(2, "big") + reason


def deflated(data: bytes) -> bytes:
    """A message as permessage-deflate has it, with no memory of others (RFC 7692, 7.2.1)."""
    deflate = zlib.compressobj(wbits=-12)
    return (deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH)).removesuffix(FLATE_END)


class RawWebSocket:
    """The client's end of a connection.

    Args:
        sock: Connected; it has a timeout, so that no wait is for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._received = bytearray()
        self._inflate = zlib.decompressobj(-15)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def ask(self, path: str = "/", extra: bytes = b"", **changes: str | None) -> None:
        """Send a handshake; with ``Sec_WebSocket_Key=None`` one without that header. ``extra`` follows in one piece."""
        headers = HANDSHAKE | {name.replace("_", "-"): value for name, value in changes.items()}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items() if value is not None]
        self.sock.sendall(f"GET {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1") + extra)

    def read_answer(self) -> int:
        """Read the head of the server's answer, and give its status."""
        while (end := HEAD_END.search(self._received)) is None:
            self._receive()
        head = bytes(self._received[: end.start()])
        del self._received[: end.end()]
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return self.status

    def open(self, path: str = "/", extra: bytes = b"", **changes: str | None) -> RawWebSocket:
        """Ask, and expect a yes."""
        self.ask(path, extra, **changes)
        assert self.read_answer() == 101, (self.status, self.headers)
        assert self.header("Sec-WebSocket-Accept") == ACCEPTED
        return self

    def send(self, opcode: int, data: bytes = b"", *, fin: bool = True, rsv: int = 0) -> None:
        self.sock.sendall(frame(opcode, data, fin=fin, rsv=rsv))

    def close(self, code: int = 1000, reason: bytes = b"") -> None:
        self.send(CLOSE, close_data(code, reason))

    def read(self) -> Frame:
        """The next frame.

        Raises:
            EOFError: The server has ended its side.
        """
        head = self.take(2)
        size = head[1] & 0x7F
        assert not head[1] & 0x80, "a server's frame is masked"
        if size == 126:
            size = int.from_bytes(self.take(2), "big")
        elif size == 127:
            size = int.from_bytes(self.take(8), "big")
        data = self.take(size)
        rsv = head[0] >> 4 & 7
        if rsv == RSV1:
            data, rsv = self._inflate.decompress(data + FLATE_END), 0
        return Frame(head[0] & 0xF, data, bool(head[0] & 0x80), rsv)

    def read_close(self) -> int | None:
        """Read frames until the server's close frame, and its code; None if the connection ends without one."""
        try:
            while True:
                got = self.read()
                if got.opcode == CLOSE:
                    return int.from_bytes(got.data[:2], "big") if got.data else 1005
        except (EOFError, ConnectionError):
            return None

    def read_end(self) -> None:
        """Expect that the server ends its side, and says nothing before."""
        try:
            rest = bytes(self._received) + self.sock.recv(1)
        except ConnectionResetError:
            return
        assert rest == b""

    def take(self, size: int) -> bytes:
        """The next bytes, whatever they are."""
        while len(self._received) < size:
            self._receive()
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(f"the connection ended after {bytes(self._received)!r}")
        self._received += data
