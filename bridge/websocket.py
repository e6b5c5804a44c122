"""A WebSocket on a WSGI server's socket: its handshake, and messages out of frames. No app and no thread is known here.

Frames, negotiation and compression are the ``websockets`` package's (extra ``bridge[websocket]``), by its sans-I/O
``ServerProtocol``; here are the socket, the loop, and what bounds time and memory. The package is imported when the
first client asks for a WebSocket.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import io
import os
import socket
import ssl
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from bridge.errors import BadRequest, ClientDisconnected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from websockets.frames import Frame
    from websockets.server import ServerProtocol

    from bridge.response import Accept, Close, Data

__all__ = ["Connection", "Handshake", "Refusal", "find_socket"]

PIECE = 64 * 1024
"""Bytes read at once, and about those written."""

READS = 4
"""Pieces that are read before other connections have their turn."""

WINDOW = 64 * 1024
"""Bytes of messages that may wait for the app, or for the client, until the other side is held."""

MESSAGES = 64
"""Messages that may wait for the app, however small. What one read brings comes on top."""

SLICE = 1024
"""Bytes that are unpacked at once, where messages may be compressed: to a thousandth."""

MESSAGE_BYTES = 16 * 1024 * 1024
"""The longest message that is taken: uvicorn's default."""

PING_SECONDS = 20.0
"""How often the client is pinged, and how long it may take to answer: uvicorn's defaults."""

CLOSE_SECONDS = 5.0
"""How long the client may take to close its side. A thread of the server waits for it; clients take a round trip."""

BURST = 16
"""Messages that an app may send before the loop gets a turn: a send that need not wait would never give it one."""

CONTINUATION, TEXT, BINARY = 0, 1, 2
"""Opcodes (RFC 6455, 5.2)."""

WINDOW_BITS = 12
"""Of permessage-deflate: 4 KiB and not 32 KiB, as the ``websockets`` package and uvicorn choose, so that thousands of
connections fit into memory."""


# -- The server's socket ----------------------------------------------------------------------------------------------


def find_socket(environ: Mapping[str, Any]) -> tuple[socket.socket, Callable[[], bytes]] | None:
    """The socket on which an HTTP/1.1 request came, where the server lets it be seen; None where it does not.

    Returns:
        The socket, and what gives the bytes that the server has already read behind the request. That is called once,
        when the socket no longer blocks.
    """
    if os.name == "nt":  # its event loop can watch no sockets
        return None
    stream = environ.get("wsgi.input")
    sock = environ.get("gunicorn.socket")
    if sock is not None:
        return sock, partial(_unread_by_gunicorn, stream)
    sock = environ.get("werkzeug.socket")
    if sock is not None:
        return sock, partial(_unread_by_file, stream)
    # A file made of the socket: wsgiref gives it itself, and so does gevent's pywsgi if there is an Upgrade; cheroot
    # gives a stream around it.
    for file in (stream, getattr(stream, "rfile", None)):
        sock = getattr(getattr(file, "raw", None), "_sock", None)
        if sock is not None:
            return sock, partial(_unread_by_file, file)
    return None


def _unread_by_gunicorn(stream: Any) -> bytes:
    unreader = getattr(getattr(stream, "reader", None), "unreader", None)
    if unreader is None:  # middleware has put a stream of its own in the place
        return b""
    data: bytes = unreader.buf.getvalue()
    unreader.buf = io.BytesIO()
    return data


def _unread_by_file(stream: Any) -> bytes:
    try:
        return stream.read1(PIECE) or b""  # what is buffered; if nothing is, one read of the socket
    except (AttributeError, OSError):  # a stream of middleware's; and so says TLS that there is nothing to read
        return b""


# -- The handshake ----------------------------------------------------------------------------------------------------


class Refusal(BadRequest):
    """Raised when a client's handshake is wrong.

    Attributes:
        status: As ``start_response`` takes it.
        headers: Those that the answer needs beside what describes its body.
    """

    def __init__(self, message: str, status: str, headers: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Handshake:
    """A client's handshake (RFC 6455, 4.2), checked, and the answer to it.

    Args:
        environ: That of a request which asks for a WebSocket.

    Raises:
        Refusal: It is wrong.
        ImportError: The ``websockets`` package is not installed.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        from websockets.datastructures import Headers
        from websockets.exceptions import InvalidHandshake
        from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
        from websockets.http11 import Request
        from websockets.protocol import OPEN
        from websockets.server import ServerProtocol

        version = environ.get("HTTP_SEC_WEBSOCKET_VERSION", "")
        if version.strip() != "13":
            headers = [("Sec-WebSocket-Version", "13")]  # RFC 6455, 4.4
            if not str(environ.get("SERVER_SOFTWARE")).startswith("WSGIServer"):
                # RFC 9110, 15.5.22. They are hop-by-hop, which wsgiref refuses; the other servers let them pass.
                headers += [("Upgrade", "websocket"), ("Connection", "Upgrade")]
            raise Refusal(f"expected Sec-WebSocket-Version 13, got {version[:20]!r}", "426 Upgrade Required", headers)
        if environ.get("CONTENT_LENGTH") not in (None, "", "0") or "HTTP_TRANSFER_ENCODING" in environ:
            raise Refusal("a handshake has no body", "400 Bad Request", [])
        asked = Headers(Upgrade="websocket", Connection="Upgrade")
        for name in ("Sec-WebSocket-Key", "Sec-WebSocket-Version", "Sec-WebSocket-Extensions"):
            value = environ.get("HTTP_" + name.upper().replace("-", "_"))
            if value is not None:
                asked[name] = value.strip()
        deflate = ServerPerMessageDeflateFactory(
            server_max_window_bits=WINDOW_BITS,
            client_max_window_bits=WINDOW_BITS,
            compress_settings={"memLevel": 5},
        )
        self.protocol: ServerProtocol = ServerProtocol(state=OPEN, extensions=[deflate], max_size=MESSAGE_BYTES)
        response = self.protocol.accept(Request("/", asked))
        if response.status_code != 101:
            error = self.protocol.handshake_exc
            words = str(error) if isinstance(error, InvalidHandshake) else "the handshake is malformed"
            raise Refusal(words, "400 Bad Request", [])
        self._head = response.serialize()

    def answer(self, step: Accept) -> bytes:
        """The response to the client, with what the app adds to it."""
        lines = [f"{name}: {value}\r\n" for name, value in step.headers]
        if step.subprotocol is not None:
            lines.append(f"Sec-WebSocket-Protocol: {step.subprotocol}\r\n")
        return self._head[:-2] + "".join(lines).encode("latin-1") + b"\r\n"


# -- Theory -----------------------------------------------------------------------------------------------------------
#
# All of a connection runs in the app's loop, whoever runs that. The server's thread has lent the socket, and waits for
# `on_over`; from then on it is the server's again, in the mode in which it was.
#
# The socket is read and written through the server's own object, which does not block meanwhile: asyncio's own ways of
# reading refuse TLS sockets, and cannot take over one that is connected. So the loop only watches the descriptor. TLS
# may have to write before it can read, and the other way round: `_read_needs` and `_write_needs` say for what each of
# them waits. And it may hold decrypted bytes that no descriptor tells of: `pending()`.
#
# What happens to the connection is said once: `_goodbye` is the message of its end, which the app receives after the
# messages that came before, and ever again. It is set when the client closes or leaves, when it breaks the protocol,
# is too slow, or when our side closes. Whatever the client sends after that is read and thrown away.
#
# Then the closing handshake goes on alone: our close frame goes out, our side of the TCP connection is shut down when
# RFC 6455 says so, the client's is waited for. `_finish` is the end of all, the only way to it, and at the latest
# CLOSE_SECONDS after the first of these steps.
#
# Memory is bounded by not reading: while WINDOW bytes or MESSAGES messages wait for the app, and while more than WINDOW
# bytes wait for the client, to whom each of its pings would add a pong. Compressed messages may be many times as long
# as what was read: they are unpacked slice by slice, and the rest waits as it came. An app that sends to a client which
# does not read waits in send(). A client that makes no progress from one ping to the next is given up; but not if it is
# our app that keeps its answer from being read.


class Connection:
    """An open WebSocket connection.

    Args:
        loop: In which everything here is called.
        sock: The server's.
        handshake: The client's.
        on_left: Called when the connection has ended otherwise than by `close`; the app has ``websocket.disconnect`` to
            receive.
        on_over: Called last, when the socket is the server's again.

    Attributes:
        is_over: Whether it was.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        handshake: Handshake,
        on_left: Callable[[], object],
        on_over: Callable[[], object],
    ) -> None:
        self.is_over: bool = False
        self._loop = loop
        self._sock = sock
        self._handshake = handshake
        self._protocol = handshake.protocol
        self._on_left = on_left
        self._on_over = on_over
        self._is_tls = hasattr(sock, "pending") and hasattr(sock, "unwrap")  # gevent has a class of its own
        self._fd = sock.fileno()
        self._timeout = sock.gettimeout()  # the server's, given back at the end
        # From the client
        self._incoming = b""  # what is still packed; empty unless the app holds the client
        self._slice = SLICE if self._protocol.extensions else PIECE
        self._messages: deque[dict[str, Any]] = deque()
        self._size = 0  # of the messages, in bytes or characters
        self._goodbye: dict[str, Any] | None = None
        self._partial = bytearray()  # of a message that is not whole yet
        self._decoder: codecs.IncrementalDecoder | None = None  # checks it if it is a text
        self._ended = False  # the client sends no more
        self._heard = True  # something came, or went out, since the last ping
        # To the client
        self._outgoing = bytearray()
        self._shuts = False  # our side ends with what is outgoing
        self._burst = 0
        # What the loop watches
        self._reads = False
        self._read_needs = self._write_needs = False  # the other direction than their own
        self._watched = (False, False)  # reading, writing
        self._receivers: list[asyncio.Future[None]] = []
        self._senders: list[asyncio.Future[None]] = []
        self._pinging: asyncio.TimerHandle | None = None
        self._closing: asyncio.TimerHandle | None = None

    # -- For the app --------------------------------------------------------------------------------------------------

    def open(self, step: Accept, get_unread: Callable[[], bytes]) -> None:
        """Take the socket, and answer the handshake."""
        self._sock.setblocking(False)
        self._pinging = self._loop.call_later(PING_SECONDS, self._ping)
        self._outgoing += self._handshake.answer(step)
        unread = get_unread()
        if unread:
            self._take(unread)
        else:
            self._go_on()

    async def receive(self) -> dict[str, Any]:
        """The next message; the last one again and again."""
        while not self._messages:
            if self._goodbye is not None:
                return self._goodbye.copy()
            await self._wait(self._receivers)
        held = self._holds_client()
        message = self._messages.popleft()
        self._size -= _size(message)
        if held and not self.is_over:
            self._feed(self._incoming)
            self._go_on()
        return message

    async def send(self, data: Data) -> None:
        """Send a message; wait if the client is slow.

        Raises:
            ClientDisconnected: The connection has ended, maybe while it was waited for.
        """
        await self._wait_for_room()  # others may send at once, or this one may have given up waiting before
        if self._goodbye is not None:
            raise _left()
        (self._protocol.send_text if data.is_text else self._protocol.send_binary)(data.payload)
        self._go_on()
        self._burst += 1
        if self._burst >= BURST:
            self._burst = 0
            await asyncio.sleep(0)
        await self._wait_for_room()
        if self.is_over:
            raise _left()

    async def _wait_for_room(self) -> None:
        while len(self._outgoing) > WINDOW and self._goodbye is None:
            await self._wait(self._senders)

    async def _wait(self, waiters: list[asyncio.Future[None]]) -> None:
        """Wait among others until they are woken; who is cancelled leaves nothing behind."""
        waiter = self._loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            waiters.remove(waiter)  # also if they have been woken: then nobody looks at this list any more
            raise

    def close(self, step: Close) -> None:
        """Close the connection from our side, which the app has asked for."""
        if self._goodbye is None:
            self._protocol.send_close(*step)
            self._say_goodbye(*step)
            self._feed(self._incoming)  # the client may have closed, too
            self._go_on()

    def go_away(self, step: Close) -> None:
        """Close the connection from our side, which the app does not know of."""
        if self._goodbye is None:
            self.close(step)
            self._on_left()

    def abort(self) -> None:
        """End it at once."""
        if not self.is_over:
            self._finish()

    def break_off(self, step: Close) -> None:
        """The same, but try to say so to the client."""
        self.go_away(step)
        self.abort()

    def cut(self) -> None:
        """Cut the line, from any thread: whoever comes next can neither send nor wait for anything on it.

        By a descriptor of its own, since TLS's objects are for one thread at a time.
        """
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as twin:
            twin.shutdown(socket.SHUT_RDWR)

    # -- Frames -------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Take what the client has sent, the empty bytes for its end."""
        if data:
            self._heard = True
            self._feed(self._incoming + data)
        else:
            self._ended = True
            self._protocol.receive_eof()
            self._take_frames()
        self._go_on()

    def _feed(self, data: bytes) -> None:
        """Unpack what has come, as far as the app keeps up."""
        start = 0
        while start < len(data) and (self._goodbye is not None or not self._holds_client()):
            self._protocol.receive_data(data[start : start + self._slice])
            self._take_frames()
            start += self._slice
        self._incoming = data[start:]

    def _take_frames(self) -> None:
        for event in self._protocol.events_received():
            if self._goodbye is not None:
                break
            self._take_frame(cast("Frame", event))
        if self._goodbye is None:
            self._look_for_end()

    def _take_frame(self, frame: Frame) -> None:
        if frame.opcode == TEXT:
            self._decoder = codecs.getincrementaldecoder("utf-8")()
        elif frame.opcode not in (BINARY, CONTINUATION):
            return  # the protocol has answered it
        if self._decoder is not None:
            try:
                self._decoder.decode(frame.data, final=frame.fin)  # a mistake ends the connection in its own frame
            except UnicodeDecodeError as error:
                self._fail(1007, f"{error.reason} at position {error.start}")
                return
        self._partial += frame.data  # one buffer: a list of pieces of two bytes would take thirty times their size
        frame.data = b""  # the parser keeps the frame until the next one comes
        if frame.fin:
            self._take_message()

    def _take_message(self) -> None:
        message: dict[str, Any] = {"type": "websocket.receive"}
        if self._decoder is None:
            message["bytes"] = bytes(self._partial)
        else:
            message["text"] = self._partial.decode()
        self._partial = bytearray()
        self._decoder = None
        self._messages.append(message)
        self._size += _size(message)
        self._receivers = _wake(self._receivers)

    def _look_for_end(self) -> None:
        """Tell the app if the protocol says that the connection has ended."""
        received, error = self._protocol.close_rcvd, self._protocol.parser_exc
        sent = self._protocol.close_sent
        if error is not None and sent is not None:  # the client broke the protocol
            self._leave(sent.code, sent.reason)
        elif received is not None:
            self._leave(received.code, received.reason)
        elif self._ended:
            self._leave(1006, "")

    def _fail(self, code: int, reason: str) -> None:
        self._protocol.fail(code, reason)
        self._leave(code, reason)

    def _leave(self, code: int, reason: str) -> None:
        self._say_goodbye(code, reason)
        self._on_left()

    def _say_goodbye(self, code: int, reason: str) -> None:
        self._goodbye = {"type": "websocket.disconnect", "code": int(code), "reason": reason}
        self._partial = bytearray()
        self._receivers = _wake(self._receivers)
        self._senders = _wake(self._senders)

    def _ping(self) -> None:
        """Look whether the client has shown any life since the last time, and ask it for a sign."""
        self._pinging = None
        if self._goodbye is not None:
            return
        if not (self._heard or self._holds_client()):
            self._protocol.fail(1011, "keepalive ping timeout")  # as uvicorn says it
            self._leave(1006, "")
        else:
            self._heard = False
            self._pinging = self._loop.call_later(PING_SECONDS, self._ping)
            if not self._outgoing:  # else it would have to wait, and shows life by reading
                self._protocol.send_ping(os.urandom(4))
        self._go_on()

    # -- The socket ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do what is to be done after anything has happened."""
        if self.is_over:
            return
        for piece in self._protocol.data_to_send():
            if piece:
                self._outgoing += piece
            else:
                self._shuts = True
        if self._closing is None and (self._goodbye is not None or self._ended):
            self._closing = self._loop.call_later(CLOSE_SECONDS, self._finish)
        self._write()

    def _read(self) -> None:
        """Read until nothing is left, or until it is the loop's turn.

        Who stops after one piece would have to be told again that there is more: no descriptor tells of what TLS has
        decrypted, and uvloop tells of a reset together with the data before it, and then never again.
        """
        for _ in range(READS):
            if self.is_over or not self._wants_to_read():
                return
            data = self._read_piece()
            if data is None:
                return
            self._take(data)
        self._loop.call_soon(self._read)

    def _read_piece(self) -> bytes | None:
        self._read_needs = False
        try:
            return self._sock.recv(PIECE)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._read_needs = True
        except (OSError, ValueError):
            self._finish()
            return None
        self._watch()
        return None

    def _write(self) -> None:
        """Send what is outgoing, as far as the client takes it."""
        if not self._send_outgoing():
            self._finish()
            return
        if self._senders and len(self._outgoing) <= WINDOW:
            self._senders = _wake(self._senders)
        if not self._outgoing:
            if self._shuts:
                self._shut()
            if self._ended or self._protocol.close_rcvd is not None:  # the client sends no more, or should not
                self._finish()
                return
        self._watch()

    def _send_outgoing(self) -> bool:
        """Do so; and say whether the connection is whole.

        The slice is taken back before anything else is done: a buffer that is lent cannot change, and the frame of a
        send() that failed, which is Python code for TLS and for gevent, lives on with what it was given in the error.
        """
        self._write_needs = False
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as whole, whole[: 4 * PIECE] as piece:
                    sent = self._sock.send(piece)
                if not sent:  # so gevent says for TLS that it would have to wait
                    break
                del self._outgoing[:sent]
                self._heard = self._heard or bool(self._outgoing)
        except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLWantReadError:
            self._write_needs = True
        except (OSError, ValueError):
            return False
        except BaseException:  # an interrupt: how much was sent is not known, and nothing may be sent twice
            self._outgoing = bytearray()
            raise
        return True

    def _shut(self) -> None:
        """End our side; the client's goes on."""
        self._shuts = False
        try:
            if self._is_tls:
                cast("ssl.SSLSocket", self._sock).unwrap()  # all it can do without waiting is to say that we have ended
            else:
                self._sock.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            pass

    def _wants_to_read(self) -> bool:
        if self._ended or len(self._outgoing) > WINDOW:  # also after a goodbye: pings are answered as long as we read
            return False
        return self._goodbye is not None or not self._holds_client()

    def _holds_client(self) -> bool:
        """Whether the app is so slow that nothing more is read for it."""
        return self._size > WINDOW or len(self._messages) >= MESSAGES

    def _pending(self) -> bool:
        return not self.is_over and self._is_tls and cast("ssl.SSLSocket", self._sock).pending() > 0

    def _watch(self) -> None:
        """Have the loop watch the socket for what is waited for."""
        reads, writes = self._wants_to_read(), bool(self._outgoing)
        if reads and not self._reads and self._pending():
            self._loop.call_soon(self._read)  # what came before it was held
        self._reads = reads
        watched = (
            (reads and not self._read_needs) or (writes and self._write_needs),
            (writes and not self._write_needs) or (reads and self._read_needs),
        )
        before, self._watched = self._watched, watched
        if watched[0] and not before[0]:
            self._loop.add_reader(self._fd, self._be_ready)
        elif before[0] and not watched[0]:
            self._loop.remove_reader(self._fd)
        if watched[1] and not before[1]:
            self._loop.add_writer(self._fd, self._be_ready)
        elif before[1] and not watched[1]:
            self._loop.remove_writer(self._fd)

    def _be_ready(self) -> None:
        if self._outgoing:
            self._write()
        self._read()

    def _finish(self) -> None:
        """The end of the connection: nobody reads or writes any more."""
        self.is_over = True
        try:
            self._let_go()
        finally:
            self._on_over()  # whatever has failed: the server's thread waits for it

    def _let_go(self) -> None:
        for timer in (self._pinging, self._closing):
            if timer is not None:
                timer.cancel()
        if self._watched[0]:
            self._loop.remove_reader(self._fd)
        if self._watched[1]:
            self._loop.remove_writer(self._fd)
        self._outgoing = bytearray()
        try:
            # Whatever the server does with it next, it can neither send nor wait for anything on it.
            self._sock.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):
            pass
        try:
            self._sock.settimeout(self._timeout)
        except (OSError, ValueError):
            pass
        if self._goodbye is None:
            self._leave(1006, "")


def _size(message: dict[str, Any]) -> int:
    data: bytes | str = message["bytes"] if "bytes" in message else message["text"]
    return len(data)


def _left() -> ClientDisconnected:
    return ClientDisconnected(errno.ECONNRESET, "the WebSocket connection has ended")


def _wake(futures: list[asyncio.Future[None]]) -> list[asyncio.Future[None]]:
    """End the wait of each, and give back the new list of those who wait."""
    for future in futures:
        if not future.done():
            future.set_result(None)
    return []
