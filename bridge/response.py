"""The order in which a response may be said: a state machine for each direction, side by side, and one for WebSockets.

An illegal step raises `ProtocolError` and changes nothing. Nothing is sent, locked or awaited here: each step gives
back what is to be sent.
"""

from __future__ import annotations

import enum
import http
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from bridge.errors import ProtocolError, shown
from bridge.headers import declared_length, decode_headers, encode_headers, is_bodiless

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from asgiref.typing import ASGISendEvent

    ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

__all__ = [
    "Accept",
    "AsgiResponse",
    "AsgiWebsocket",
    "Close",
    "Data",
    "Denial",
    "State",
    "WebsocketState",
    "WsgiResponse",
]


class State(enum.Enum):
    """How much of a response was said."""

    NOTHING = enum.auto()
    STARTED = enum.auto()
    """The app gave status and headers; they are kept back until the first block, and may still be replaced (WSGI)."""
    BODY = enum.auto()
    """Status and headers are out, and the body has begun."""
    TRAILERS = enum.auto()
    """The body is whole, and trailers are to come (ASGI)."""
    COMPLETE = enum.auto()


class _Length:
    """The count of a body's bytes against what its Content-Length declares."""

    def __init__(self, declared: int | None, bodiless: bool) -> None:
        self.declared = declared
        self.counted = 0
        # A response to HEAD declares what a GET would get, and has no body.
        self.remaining = None if declared is None or bodiless else declared

    def add(self, size: int) -> None:
        if self.remaining is not None:
            if size > self.remaining:
                raise ProtocolError(f"body has at least {self.counted + size} bytes, Content-Length is {self.declared}")
            self.remaining -= size
        self.counted += size

    def check_end(self, more: int = 0) -> None:
        """Raises if the body, ended after ``more`` bytes, has not its length."""
        if self.remaining is not None and self.remaining != more:
            if more > self.remaining:
                self.add(more)
            raise ProtocolError(f"body ended after {self.counted + more} bytes, Content-Length is {self.declared}")


# Read by name, and not by way of the enum, in what runs for every message.
NOTHING, STARTED, BODY, TRAILERS, COMPLETE = State

_UNKNOWN_LENGTH = _Length(None, False)
"""Of a response that has not started, and so counts nothing."""

_NO_MESSAGES: tuple[ASGISendEvent, ...] = ()

_is_status = re.compile(r"[2-9][0-9][0-9](?: [^\x00\r\n\u0100-\U0010ffff]*)?").fullmatch
"""PEP 3333 wants a reason phrase; gunicorn and others have always taken the number alone. No interim status, though:
a response that was started with 1xx would never come."""


class WsgiResponse:
    """What a WSGI app says, as the messages of an ASGI response.

    Args:
        method: The request's.
    """

    def __init__(self, method: str) -> None:
        self.state: State = NOTHING
        self.bodiless: bool = False
        self._method = method
        self._length = _UNKNOWN_LENGTH
        self._start: ASGISendEvent | None = None  # kept back in STARTED
        self._trailers: list[tuple[bytes, bytes]] | None = None  # once the app has said that there are some

    @property
    def declared(self) -> int | None:
        """The Content-Length that the app declared."""
        return self._length.declared

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None) -> None:
        """Take what the app gives to ``start_response`` (PEP 3333, "The start_response() Callable").

        Raises:
            ProtocolError: A second start without exc_info, or a malformed status or header.
            BaseException: The error in ``exc_info``, where status and headers are out already.
        """
        if exc_info and exc_info[1] is not None:
            try:
                if self.state not in (NOTHING, STARTED):
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # a frame that holds its own traceback is a cycle
        elif self.state is not NOTHING:
            raise ProtocolError(f"start_response() was called a second time without exc_info, with {shown(status)}")
        if not (isinstance(status, str) and _is_status(status)):
            raise ProtocolError(f"start_response() expected a status like '404 Not Found', got {shown(status)}")
        encoded = encode_headers(headers)
        declared = declared_length(encoded, b"content-length")
        code = int(status[:3])
        self.bodiless = is_bodiless(self._method, code)
        self._length = _Length(declared, self.bodiless)
        if declared is not None and code in (204, 304):
            # RFC 9110, 8.6, forbids it for the one. Of the other, uvicorn with httptools would wait for the bytes.
            encoded = [header for header in encoded if header[0] != b"content-length"]
        trailers = self._trailers is not None
        self._start = {"type": "http.response.start", "status": code, "headers": encoded, "trailers": trailers}
        self.state = STARTED

    def add_trailers(self, headers: list[tuple[str, str]]) -> None:
        """Take headers that are to follow the body; none, to say that some will be given later.

        Raises:
            ProtocolError: Status and headers are out, and did not tell of trailers; or one is malformed.
        """
        encoded = encode_headers(headers)
        if self._trailers is None:
            if self.state not in (NOTHING, STARTED):
                raise ProtocolError(f"trailers were first told of after the body had begun: {shown(headers)}")
            self._trailers = []
            if self._start is not None:
                self._start["trailers"] = True  # type: ignore[typeddict-unknown-key]
        self._trailers += encoded

    def block(self, data: bytes, last: bool = False) -> tuple[ASGISendEvent, ...]:
        """The messages for a block that the app yielded or wrote; none for an empty one.

        Args:
            last: Whether it is known that no block follows.

        Raises:
            ProtocolError: It is no bytes, comes before start_response() or after the end, or is longer than the
                Content-Length allows.
        """
        if not isinstance(data, bytes):
            raise ProtocolError(f"the app expected to give blocks of bytes, gave {shown(data)}")
        if not data:
            return self.end() if last else _NO_MESSAGES
        if self.state is not BODY:
            if self.state is NOTHING:
                raise ProtocolError("the app gave a block of its body before it called start_response()")
            if self.bodiless:
                return self.end() if self.state is STARTED else _NO_MESSAGES
            if self.state is COMPLETE and self._length.remaining != 0:  # where it is 0, the count says it better
                raise ProtocolError("the app gave a block of its body after the end of the response")
        if last:
            self._length.check_end(len(data))
        self._length.add(len(data))
        complete = last or self._length.remaining == 0
        body: ASGISendEvent = {"type": "http.response.body", "body": data, "more_body": not complete}
        started, self.state = self.state, COMPLETE if complete else BODY
        return (self._start, body) if started is STARTED else (body,)  # type: ignore[return-value]

    def file(self, path: str) -> tuple[ASGISendEvent, ...]:
        """The messages for a whole file that the server sends by itself (ASGI extension "Path Send")."""
        if self.state is not STARTED or self.bodiless:
            raise ProtocolError(
                f"a file may go by path once, after start_response(); got {path!r} in {self.state.name}"
            )
        self.state = COMPLETE
        return self._start, {"type": "http.response.pathsend", "path": path}  # type: ignore[return-value]

    def end_trailers(self) -> tuple[ASGISendEvent, ...]:
        """The messages that follow the last of the body."""
        if self._trailers is None:
            return _NO_MESSAGES
        trailers, self._trailers = self._trailers, None
        return ({"type": "http.response.trailers", "headers": trailers, "more_trailers": False},)

    def end(self) -> tuple[ASGISendEvent, ...]:
        """The messages for the end of the app's blocks; none where the last block was known to be the last.

        Raises:
            ProtocolError: The app never called start_response(), or its body is shorter than its Content-Length.
        """
        if self.state is COMPLETE:
            return _NO_MESSAGES
        if self.state is NOTHING:
            raise ProtocolError("the app gave a whole response without a call of start_response()")
        self._length.check_end()
        end: ASGISendEvent = {"type": "http.response.body", "body": b"", "more_body": False}
        started, self.state = self.state, COMPLETE
        return (self._start, end) if started is STARTED else (end,)  # type: ignore[return-value]


_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in http.HTTPStatus}
"""From plain ints to plain str: str() of the enum itself has changed between Python versions."""


class AsgiResponse:
    """What an ASGI app sends, as a WSGI response.

    Args:
        method: The request's.
        extensions: The extensions that were offered to the app, by name.
    """

    def __init__(self, method: str, extensions: Mapping[str, Any]) -> None:
        self.state: State = NOTHING
        self.status: str = ""
        self.headers: list[tuple[str, str]] = []
        self.trailers: list[tuple[str, str]] = []
        self.path: str | None = None  # of the file to be sent as the body
        self.hints: deque[list[tuple[str, str]]] = deque()  # headers to be sent ahead of the response
        self._method = method
        self._extensions = extensions
        self.bodiless: bool = False
        self.has_trailers: bool = False  # the app has said that some will follow
        self._length = _UNKNOWN_LENGTH

    def send(self, message: Mapping[str, Any]) -> bytes:
        """Take a message and give back the block that it adds to the body, the empty one for none.

        Raises:
            ProtocolError: It is of an unknown type, out of order, or malformed.
        """
        try:
            kind = message["type"]
        except (TypeError, KeyError):
            raise ProtocolError(f"send() expected a message with a type, got {shown(message)}") from None
        if kind == "http.response.body":
            return self._body(message)
        if kind == "http.response.start":
            self._start(message)
        elif kind == "http.response.pathsend" and kind in self._extensions:
            self._pathsend(message)
        elif kind == "http.response.trailers" and kind in self._extensions:
            self._trailers(message)
        elif kind == "http.response.early_hint" and kind in self._extensions:
            self._early_hint(message)
        else:
            raise ProtocolError(f"send() got a message of type {shown(kind)}, which was not offered to the app")
        return b""

    def check_file(self, size: int) -> None:
        """Raises `ProtocolError` if the file that is to be the body has not the length that was declared."""
        self._length.check_end(size)

    def _start(self, message: Mapping[str, Any]) -> None:
        self._expect(NOTHING, message)
        status = message.get("status")
        if not isinstance(status, int) or not 200 <= status <= 999:
            raise ProtocolError(f"'http.response.start' expected an int from 200 to 999 as status, got {shown(status)}")
        headers = decode_headers(message.get("headers") or ())
        declared = declared_length(headers, "content-length")
        status = int(status)  # of an HTTPStatus
        self.headers = headers
        self.status = _STATUS_LINES.get(status) or f"{status} Unknown"
        self.bodiless = is_bodiless(self._method, status)
        self._length = _Length(declared, self.bodiless)
        self.has_trailers = bool(message.get("trailers", False)) and "http.response.trailers" in self._extensions
        self.state = STARTED

    def _body(self, message: Mapping[str, Any]) -> bytes:
        if self.state is not BODY:
            self._expect(STARTED, message)
        body = message.get("body", b"")
        if type(body) is not bytes:
            # Starlette's StreamingResponse sends memoryviews as they come.
            if not isinstance(body, (bytes, bytearray, memoryview)):
                raise ProtocolError(f"'http.response.body' expected bytes as body, got {shown(body)}")
            body = bytes(cast("bytes", body))
        more_body = message.get("more_body", False)
        if more_body:
            self._length.add(len(body))
            self.state = BODY
        else:
            self._length.check_end(len(body))
            self.state = TRAILERS if self.has_trailers else COMPLETE
        return b"" if self.bodiless else body

    def _pathsend(self, message: Mapping[str, Any]) -> None:
        self._expect(STARTED, message)
        path = message.get("path")
        if not isinstance(path, str) or not os.path.isabs(path):
            raise ProtocolError(f"'http.response.pathsend' expected an absolute path, got {shown(path)}")
        if not self.bodiless:
            self.path = path
        self.state = TRAILERS if self.has_trailers else COMPLETE

    def _trailers(self, message: Mapping[str, Any]) -> None:
        self._expect(TRAILERS, message)
        trailers = decode_headers(message.get("headers") or ())
        self.trailers += trailers
        if not message.get("more_trailers", False):
            self.state = COMPLETE

    def _early_hint(self, message: Mapping[str, Any]) -> None:
        links: Iterable[bytes] | None = message.get("links")
        if self.state not in (NOTHING, STARTED) or not isinstance(links, Iterable):
            raise ProtocolError(f"send() expected links, before the response's body, got {shown(message)}")
        self.hints.append(decode_headers([(b"Link", link) for link in links]))

    def _expect(self, state: State, message: Mapping[str, Any]) -> None:
        if self.state is not state:
            raise ProtocolError(f"send() expected {_EXPECTED[self.state]}, got {message['type']!r}")


_EXPECTED = {
    NOTHING: "'http.response.start'",
    STARTED: "'http.response.body'",
    BODY: "'http.response.body'",
    TRAILERS: "'http.response.trailers'",
    COMPLETE: "no message after the end of the response",
}


class WebsocketState(enum.Enum):
    """How far an app has gone with a WebSocket connection."""

    CONNECTING = enum.auto()
    """It has not answered the handshake."""
    DENYING = enum.auto()
    """It denies the connection by a response of its own (ASGI extension "Websocket Denial Response")."""
    OPEN = enum.auto()
    CLOSED = enum.auto()
    """It has closed or denied the connection."""


class Accept(NamedTuple):
    """The app accepts the connection."""

    subprotocol: str | None
    headers: list[tuple[str, str]]


class Data(NamedTuple):
    """The app sends a message; a text is in UTF-8."""

    payload: bytes
    is_text: bool


class Close(NamedTuple):
    """The app closes the connection."""

    code: int
    reason: str


class Denial(NamedTuple):
    """The app answers the handshake by an http response instead of accepting; these are messages of it."""

    messages: tuple[ASGISendEvent, ...]


REASON_LIMIT = 123
"""Bytes of the reason in a close frame (RFC 6455, 5.5: 125, less the code)."""


class AsgiWebsocket:
    """What an ASGI app sends into a WebSocket connection.

    Args:
        subprotocols: Those that the client offers.
        denial: The response to which the messages of each `Denial` are to be sent; it knows how much of it was said.
    """

    def __init__(self, subprotocols: Sequence[str], denial: AsgiResponse) -> None:
        self._subprotocols = subprotocols
        self._denial = denial
        self._accepted: WebsocketState | None = None  # the state from then on

    @property
    def state(self) -> WebsocketState:
        return self._accepted or _DENIAL_STATES[self._denial.state]

    def send(self, message: Mapping[str, Any]) -> Accept | Data | Close | Denial:
        """Take a message, and give back what it asks for.

        Raises:
            ProtocolError: It is of an unknown type, out of order, or malformed.
        """
        try:
            kind = message["type"]
        except (TypeError, KeyError):
            raise ProtocolError(f"send() expected a message with a type, got {shown(message)}") from None
        take = _WEBSOCKET_STEPS.get((self.state, kind)) if isinstance(kind, str) else None
        if take is None:
            raise ProtocolError(f"send() expected {_WEBSOCKET_EXPECTED[self.state]}, got {shown(kind)}")
        return take(self, message)

    def _accept(self, message: Mapping[str, Any]) -> Accept:
        subprotocol = message.get("subprotocol") or None  # an empty one is none: a token has a character (RFC 9110)
        if subprotocol is not None and subprotocol not in self._subprotocols:
            # RFC 6455, 4.1: the client would have to fail the connection.
            raise ProtocolError(
                f"'websocket.accept' expected None as subprotocol, or one that the client offers, of "
                f"{shown(list(self._subprotocols))}, got {shown(subprotocol)}"
            )
        headers = decode_headers(message.get("headers") or ())
        for name, _ in headers:
            if name.lower().startswith("sec-websocket-"):
                raise ProtocolError(f"'websocket.accept' got the header {name!r}, which is the server's to send")
        self._accepted = WebsocketState.OPEN
        # RFC 9110, 8.6: a 1xx response MUST NOT tell a length.
        return Accept(subprotocol, [header for header in headers if header[0].lower() != "content-length"])

    def _data(self, message: Mapping[str, Any]) -> Data:
        data, text = message.get("bytes"), message.get("text")
        if (data is None) == (text is None):
            raise ProtocolError(f"'websocket.send' expected either bytes or text, got {shown(message)}")
        if text is None:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise ProtocolError(f"'websocket.send' expected bytes as bytes, got {shown(data)}")
            return Data(bytes(cast("bytes", data)), is_text=False)
        if not isinstance(text, str):
            raise ProtocolError(f"'websocket.send' expected a str as text, got {shown(text)}")
        try:
            return Data(text.encode(), is_text=True)
        except UnicodeEncodeError:
            raise ProtocolError(f"'websocket.send' expected a text that UTF-8 can say, got {shown(text)}") from None

    def _close(self, message: Mapping[str, Any]) -> Close:
        code, reason = message.get("code"), message.get("reason")
        code = 1000 if code is None else code
        if not (isinstance(code, int) and (code in _CLOSE_CODES or 3000 <= code <= 4999)):
            raise ProtocolError(
                f"'websocket.close' expected a code that may be sent (RFC 6455, 7.4), got {shown(code)}"
            )
        if not (reason is None or isinstance(reason, str)):
            raise ProtocolError(f"'websocket.close' expected a str as reason, got {shown(reason)}")
        self._accepted = WebsocketState.CLOSED
        # "Can be any string", says ASGI: so what a frame cannot hold is cut off.
        short = (reason or "").encode("utf-8", "replace")[:REASON_LIMIT].decode("utf-8", "ignore")
        return Close(int(code), short)

    def _refuse(self, message: Mapping[str, Any]) -> Denial:
        return _FORBIDDEN

    def _deny(self, message: Mapping[str, Any]) -> Denial:
        return Denial(({**message, "type": message["type"].removeprefix("websocket.")},))  # type: ignore[arg-type]


_FORBIDDEN = Denial(
    (
        {
            "type": "http.response.start",
            "status": 403,
            "headers": [(b"Content-Type", b"text/plain"), (b"Content-Length", b"0")],
            "trailers": False,
        },
        {"type": "http.response.body", "body": b"", "more_body": False},
    )
)
"""For an app that closes the connection instead of accepting it (ASGI, "Close - send event")."""

_CLOSE_CODES = frozenset([1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014])
"""RFC 6455, 7.4.1, and what was registered since, less those that may not be sent."""

_WebsocketStep = Callable[[AsgiWebsocket, Mapping[str, Any]], Accept | Data | Close | Denial]

_WEBSOCKET_STEPS: dict[tuple[WebsocketState, Any], _WebsocketStep] = {
    (WebsocketState.CONNECTING, "websocket.accept"): AsgiWebsocket._accept,
    (WebsocketState.CONNECTING, "websocket.close"): AsgiWebsocket._refuse,
    (WebsocketState.CONNECTING, "websocket.http.response.start"): AsgiWebsocket._deny,
    (WebsocketState.DENYING, "websocket.http.response.body"): AsgiWebsocket._deny,
    (WebsocketState.OPEN, "websocket.send"): AsgiWebsocket._data,
    (WebsocketState.OPEN, "websocket.close"): AsgiWebsocket._close,
}

_DENIAL_STATES = {
    NOTHING: WebsocketState.CONNECTING,
    STARTED: WebsocketState.DENYING,
    BODY: WebsocketState.DENYING,
    COMPLETE: WebsocketState.CLOSED,
}

_WEBSOCKET_EXPECTED = {
    WebsocketState.CONNECTING: "'websocket.accept', 'websocket.close' or 'websocket.http.response.start'",
    WebsocketState.DENYING: "'websocket.http.response.body'",
    WebsocketState.OPEN: "'websocket.send' or 'websocket.close'",
    WebsocketState.CLOSED: "no message after the connection was closed",
}
