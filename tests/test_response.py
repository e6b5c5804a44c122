"""The order in which a response may be said: tables of wrong steps, and any order of steps against a tiny model."""

from __future__ import annotations

import re
import sys
import traceback
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import BridgeError, ProtocolError
from bridge.response import (
    Accept,
    AsgiResponse,
    AsgiWebsocket,
    Close,
    Data,
    Denial,
    State,
    WebsocketState,
    WsgiResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

Message = dict[str, Any]
Headers = list[tuple[str, str]]

ORDERS = 500
"""Of steps, that are tried. Each takes a millisecond, and the rare ones are those that matter."""


class AppError(Exception):
    """What went wrong in an app."""


def exc_info(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType]:
    """What ``sys.exc_info()`` gives where an app catches the error."""
    try:
        raise error
    except BaseException:
        info = sys.exc_info()
        assert info[0]
        return info


def snapshot(response: WsgiResponse | AsgiResponse) -> dict[str, object]:
    """All that a step could have changed."""
    state = dict(vars(response))
    return {key: dict(vars(value)) if key == "_length" else repr(value) for key, value in state.items()}


def state_of(response: WsgiResponse | AsgiResponse) -> State:
    """The state, of which a type checker does not believe that it stays the same."""
    return response.state


# -- WsgiResponse ----------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers), "trailers": False}


def body(data: bytes = b"", more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


def started(headers: Headers | None = None, status: str = "200 OK", method: str = "GET") -> WsgiResponse:
    response = WsgiResponse(method)
    response.start(status, headers or [])
    return response


def test_of_equal_content_lengths_one_is_sent_on() -> None:
    """[W14] [A8]"""
    (start, _) = started([("Content-Length", "5"), ("content-length", "5")]).block(b"12345")
    assert start["headers"] == [(b"content-length", b"5")]  # type: ignore[typeddict-item]
    response = AsgiResponse("GET", {})
    response.send(START | {"headers": [(b"content-length", b"5"), (b"Content-Length", b"5")]})
    assert response.headers == [("content-length", "5")]


def test_the_start_goes_out_with_the_first_block_that_is_not_empty() -> None:
    """[W11]"""
    response = WsgiResponse("GET")
    assert response.block(b"") == ()  # PEP 3333 has middleware say so that there is nothing yet
    response.start("404 Not Found", [("X-A", "1"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("Connection", "close")])
    assert state_of(response) is State.STARTED
    assert response.block(b"") == ()
    headers = [(b"x-a", b"1"), (b"set-cookie", b"a"), (b"set-cookie", b"b")]
    assert response.block(b"a") == (head(404, headers), body(b"a", True))
    assert state_of(response) is State.BODY
    assert response.block(b"") == ()
    assert response.block(b"b") == (body(b"b", True),)
    assert response.end() == (body(),)
    assert state_of(response) is State.COMPLETE
    assert response.end() == ()


def test_an_empty_body_is_one_message() -> None:
    """[W11]"""
    assert started().end() == (head(), body())


def test_the_last_block_ends_the_response() -> None:
    """[W11]"""
    response = started()
    assert response.block(b"a", last=True) == (head(), body(b"a"))
    assert state_of(response) is State.COMPLETE
    assert response.end() == ()
    assert started().block(b"", last=True) == (head(), body())


def test_the_block_that_reaches_the_content_length_ends_the_response() -> None:
    """[W11], [W14]"""
    response = started([("Content-Length", "3")])
    assert response.declared == 3
    assert response.block(b"ab")[1] == body(b"ab", True)
    assert response.block(b"c") == (body(b"c"),)
    assert response.block(b"") == ()
    assert response.end() == ()


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")]
)
@pytest.mark.parametrize("blocks", [[], [b""], [b"ab"], [b"a", b"b"], [b"more than is declared"]])
@pytest.mark.parametrize("headers", [[], [("Content-Length", "5")]])
def test_a_bodiless_response_has_no_body(method: str, status: str, blocks: list[bytes], headers: Headers) -> None:
    """[W14]: to HEAD, a Content-Length says what GET would get."""
    response = started(headers, status, method)
    assert response.bodiless
    messages = [message for block in blocks for message in response.block(block)]
    messages += response.end()
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
    assert messages[0]["headers"] == ([(b"content-length", b"5")] if headers and method == "HEAD" else [])  # type: ignore[typeddict-item]
    assert messages[1] == body()


def test_a_file_goes_by_its_path() -> None:
    """[W18]"""
    response = started([("Content-Length", "5")])
    assert response.file("/f")[1:] == ({"type": "http.response.pathsend", "path": "/f"},)
    assert response.end() == ()


@pytest.mark.parametrize("status", ["200", "200 ", "200 OK", "299 \xe9\t", "999 What?", "404 Not Found"])
def test_a_status(status: str) -> None:
    """[W10]"""
    assert started(status=status).end()[0] == head(int(status[:3]))


BAD_STATUSES = [
    *("", "20", "2000", "200OK", "200\tOK", " 200 OK", "abc", "OK", "2x0 OK", "-200 OK", "20.0", "000 No", "+20 OK"),
    *("100 Continue", "101 Switching Protocols", "199 No"),
    *("200 a\r\nb: c", "200 OK\n", "200\n", "200 \x00", "\u0662\u0660\u0660 OK", "200 \u20ac", "200 \ud800"),
    *(b"200 OK", 200, None, HTTPStatus.OK, ["200 OK"]),
]


@pytest.mark.parametrize("status", BAD_STATUSES, ids=repr)
def test_a_malformed_status_is_an_error(status: Any) -> None:
    """[W10]"""
    with pytest.raises(ProtocolError, match=r"start_response\(\) expected a status like '404 Not Found', got "):
        started(status=status)


OK: tuple[Any, ...] = ("start", "200 OK", [])
FIVE: tuple[Any, ...] = ("start", "200 OK", [("Content-Length", "5")])


@pytest.mark.parametrize(
    ("steps", "wrong", "message"),
    [
        ([OK], OK, r"start_response\(\) was called a second time without exc_info, with '200 OK'"),
        ([OK, ("block", b"a")], OK, r"start_response\(\) was called a second time"),
        ([OK, ("end",)], OK, r"start_response\(\) was called a second time"),
        ([], ("block", b"a"), r"the app gave a block of its body before it called start_response\(\)"),
        ([], ("end",), r"the app gave a whole response without a call of start_response\(\)"),
        ([("block", b"")], ("end",), r"the app gave a whole response without a call of start_response\(\)"),
        ([OK], ("block", "text"), "the app expected to give blocks of bytes, gave 'text'"),
        ([OK], ("block", ""), "the app expected to give blocks of bytes, gave ''"),
        ([OK], ("block", bytearray(b"a")), "blocks of bytes, gave bytearray"),
        ([OK], ("block", memoryview(b"a")), "blocks of bytes, gave <memory"),
        ([OK], ("block", None), "blocks of bytes, gave None"),
        ([OK], ("block", 5), "blocks of bytes, gave 5"),
        ([FIVE], ("block", b"123456"), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE, ("block", b"123")], ("block", b"456"), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE, ("block", b"12345")], ("block", b"6"), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE], ("block", b"123456", True), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE], ("block", b"123", True), "body ended after 3 bytes, Content-Length is 5"),
        ([FIVE, ("block", b"123")], ("end",), "body ended after 3 bytes, Content-Length is 5"),
        ([FIVE], ("end",), "body ended after 0 bytes, Content-Length is 5"),
        ([FIVE], ("block", b"", True), "body ended after 0 bytes, Content-Length is 5"),
        (
            [OK, ("block", b"a", True)],
            ("block", b"b"),
            "the app gave a block of its body after the end of the response",
        ),
        ([OK, ("end",)], ("block", b"b"), "after the end of the response"),
        ([FIVE, ("file", "/f")], ("block", b"b"), "after the end of the response"),
        ([], ("file", "/f"), r"once, after start_response\(\); got '/f' in NOTHING"),
        ([OK, ("block", b"a")], ("file", "/f"), "got '/f' in BODY"),
        ([OK, ("file", "/f")], ("file", "/f"), "got '/f' in COMPLETE"),
        ([("start", "204 No Content", [])], ("file", "/f"), "got '/f' in STARTED"),
        ([], ("start", "200 OK", [("A", "b\r\nc")]), "has a CR, LF or NUL"),
        ([], ("start", "200 OK", [("Content-Length", "x")]), "expected a plain decimal as Content-Length"),
        ([], ("start", "200 OK", None), "expected a list of headers, got None"),
    ],
)
def test_a_wrong_step_of_a_wsgi_app(steps: list[tuple[Any, ...]], wrong: tuple[Any, ...], message: str) -> None:
    """[W10], [W14], [S1]"""
    response = WsgiResponse("GET")
    for name, *arguments in steps:
        getattr(response, name)(*arguments)
    before = snapshot(response)
    with pytest.raises(ProtocolError, match=message):
        getattr(response, wrong[0])(*wrong[1:])
    assert snapshot(response) == before


def test_exc_info_replaces_headers_that_are_not_out() -> None:
    """[W10]"""
    response = started([("Content-Length", "5"), ("X-Old", "1")])
    response.start("500 Oh", [("X-New", "1")], exc_info(AppError()))
    assert response.declared is None
    assert response.block(b"sorry, very much", last=True) == (head(500, [(b"x-new", b"1")]), body(b"sorry, very much"))


def test_exc_info_may_come_with_the_first_start() -> None:
    """[W10]"""
    response = WsgiResponse("GET")
    response.start("500 Oh", [], exc_info(AppError()))
    assert response.end() == (head(500), body())


def test_exc_info_replaces_a_response_by_a_bodiless_one_and_back() -> None:
    """[W10]"""
    response = started(status="204 No Content")
    response.start("500 Oh", [], exc_info(AppError()))
    assert not response.bodiless
    response.start("204 No Content", [], exc_info(AppError()))
    assert response.block(b"a") == (head(204), body())


@pytest.mark.parametrize("last", [False, True])
def test_exc_info_raises_the_apps_error_once_headers_are_out(last: bool) -> None:
    """[W10]: with its traceback, and whatever else is wrong."""
    response = started()
    response.block(b"a", last=last)
    before = snapshot(response)
    error = AppError("oh")
    info = exc_info(error)
    with pytest.raises(AppError) as caught:
        response.start("malformed", [], info)
    assert caught.value is error
    assert "exc_info" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert snapshot(response) == before


def test_a_malformed_replacement_changes_nothing() -> None:
    """[W10]"""
    response = started([("X-Old", "1")])
    with pytest.raises(ProtocolError):
        response.start("500 Oh", [("X", "\n")], exc_info(AppError()))
    assert response.end() == (head(200, [(b"x-old", b"1")]), body())


class WsgiModel:
    """PEP 3333 in few words. Each step gives the messages expected, or None where it must be refused."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.start: Message | None = None
        self.length: int | None = None
        self.sent = 0
        self.out = False  # the start
        self.complete = False

    def step(self, name: str, *arguments: Any) -> tuple[Message, ...] | None:
        legal: tuple[Message, ...] | None = getattr(self, f"_{name}")(*arguments)
        return legal

    @property
    def bodiless(self) -> bool:
        return self.start is not None and (self.method == "HEAD" or self.start["status"] in (204, 304))

    def _start(self, status: str, headers: Headers, info: object = None) -> tuple[Message, ...] | None:
        if self.out or (self.start and not info) or "\n" in status or any(value == "bad" for _, value in headers):
            return None
        kept = [] if status[:3] in ("204", "304") else headers  # all of them are a Content-Length
        self.start = head(int(status[:3]), [(name.lower().encode(), value.encode()) for name, value in kept])
        self.length = int(headers[0][1]) if headers else None
        return ()

    def _block(self, data: Any, last: bool = False) -> tuple[Message, ...] | None:
        if not isinstance(data, bytes):
            return None
        if not data:
            return self._end() if last else ()
        if self.start is None:
            return None
        if self.bodiless:
            return self._end()
        total = self.sent + len(data)
        if self.complete or (self.length is not None and (total > self.length or (last and total < self.length))):
            return None
        self.sent = total
        self.complete = last or total == self.length
        return self._say(body(data, not self.complete))

    def _end(self) -> tuple[Message, ...] | None:
        if self.complete:
            return ()
        if self.start is None or (not self.bodiless and self.length not in (None, self.sent)):
            return None
        self.complete = True
        return self._say(body())

    def _file(self, path: str) -> tuple[Message, ...] | None:
        if self.start is None or self.out or self.bodiless:
            return None
        self.complete = True
        return self._say({"type": "http.response.pathsend", "path": path})

    def _say(self, message: Message) -> tuple[Message, ...]:
        out, self.out = self.out, True
        return (message,) if out or self.start is None else (self.start, message)


INFO = exc_info(AppError())

starts = st.tuples(
    st.just("start"),
    st.sampled_from(["200 OK", "200 OK", "204 No", "200\n"]),
    st.sampled_from([[], [], [("Content-Length", "0")], [("Content-Length", "3")], [("Content-Length", "bad")]]),
    st.sampled_from([None, INFO]),
)
blocks = st.tuples(
    st.just("block"), st.sampled_from([b"", b"a", b"ab", b"abc", "text", None]), st.sampled_from([False, False, True])
)
ends = st.sampled_from([("end",), ("end",), ("file", "/f")])
# Most begin as they should, or else few would come far.
wsgi_steps = st.builds(
    lambda first, rest: [*first, *rest],
    st.sampled_from([[OK], [("start", "200 OK", [("Content-Length", "3")])], []]),
    st.lists(st.one_of(starts, blocks, blocks, ends), max_size=8),
)


@settings(max_examples=ORDERS)
@given(st.sampled_from(["GET", "GET", "HEAD"]), wsgi_steps)
def test_any_order_of_a_wsgi_apps_steps(method: str, steps: list[tuple[Any, ...]]) -> None:
    """[W10], [W11], [W14]: a legal step gives what the model says, an illegal one raises and changes nothing."""
    response, model, unspoiled = WsgiResponse(method), WsgiModel(method), WsgiResponse(method)
    said: list[Any] = []
    for name, *arguments in steps:
        before = snapshot(response)
        expected = model.step(name, *arguments)
        if expected is None:
            with pytest.raises((ProtocolError, AppError)) as caught:
                getattr(response, name)(*arguments)
            assert isinstance(caught.value, BridgeError) or arguments[-1] is INFO
            assert snapshot(response) == before
        else:
            assert (getattr(response, name)(*arguments) or ()) == expected
            assert (getattr(unspoiled, name)(*arguments) or ()) == expected  # it never hears of the illegal steps
            said += expected
    assert [message["type"] for message in said].count("http.response.start") <= 1
    data = [message["body"] for message in said if message["type"] == "http.response.body"]
    assert all(data[:-1])  # no empty messages in between
    if response.declared is not None:
        assert len(b"".join(data)) <= response.declared


# -- AsgiResponse ----------------------------------------------------------------------------------------------------

PATHSEND: dict[str, Any] = {"http.response.pathsend": {}}
TRAILERS: dict[str, Any] = {"http.response.trailers": {}}
START: Message = {"type": "http.response.start", "status": 200}
BODY: Message = {"type": "http.response.body"}


def sent(*messages: Message, method: str = "GET", extensions: dict[str, Any] | None = None) -> AsgiResponse:
    response = AsgiResponse(method, extensions or {})
    for message in messages:
        response.send(message)
    return response


def test_messages_become_a_wsgi_response() -> None:
    """[A6], [A8]"""
    response = AsgiResponse("GET", {})
    assert state_of(response) is State.NOTHING
    headers = [
        (b"content-type", b"text/plain"),
        (b"connection", b"close"),
        (b"set-cookie", b"a"),
        (b"set-cookie", b"b"),
    ]
    assert response.send({"type": "http.response.start", "status": 404, "headers": headers}) == b""
    assert (response.state, response.status) == (State.STARTED, "404 Not Found")
    assert response.headers == [("content-type", "text/plain"), ("set-cookie", "a"), ("set-cookie", "b")]
    assert response.send(body(b"a", True)) == b"a"
    assert state_of(response) is State.BODY
    assert response.send(body(b"", True)) == b""
    assert response.send(body(b"b")) == b"b"
    assert state_of(response) is State.COMPLETE


def test_a_message_needs_only_what_the_specification_requires() -> None:
    """[A8]"""
    response = sent(START)
    assert response.send(BODY) == b""
    assert (response.state, response.status, response.headers) == (State.COMPLETE, "200 OK", [])


@pytest.mark.parametrize("data", [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a.b.c")[::2]])
def test_a_body_may_be_any_bytes(data: Any) -> None:
    """[A8]: Starlette's StreamingResponse sends memoryviews as they come."""
    block = sent(START).send({"type": "http.response.body", "body": data})
    assert type(block) is bytes
    assert block == b"abc"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, "200 OK"),
        (404, "404 Not Found"),
        (HTTPStatus.NOT_FOUND, "404 Not Found"),
        (299, "299 Unknown"),
        (600, "600 Unknown"),
        (999, "999 Unknown"),
    ],
)
def test_a_status_gets_its_phrase(status: int, line: str) -> None:
    """[A6]"""
    response = sent({"type": "http.response.start", "status": status})
    assert response.status == line
    assert type(response.status) is str


@pytest.mark.parametrize("status", [0, 1, 99, 100, 101, 199, 1000, -200, True, "200", "200 OK", 200.0, None, b"200"])
def test_a_malformed_asgi_status_is_an_error(status: Any) -> None:
    """[A8]"""
    with pytest.raises(ProtocolError, match=r"'http.response.start' expected an int from 200 to 999 as status, "):
        sent({"type": "http.response.start", "status": status})


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"5")]])
def test_a_bodiless_asgi_response_has_no_body(method: str, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """[A8]"""
    response = AsgiResponse(method, PATHSEND)
    response.send(head(status, headers))
    assert response.send(body(b"more than five", True)) == b""
    assert response.send(body(b"more")) == b""
    assert state_of(response) is State.COMPLETE
    by_path = AsgiResponse(method, PATHSEND)
    by_path.send(head(status, headers))
    by_path.send({"type": "http.response.pathsend", "path": "/f"})
    assert (by_path.path, by_path.state) == (None, State.COMPLETE)


def test_a_file_is_named() -> None:
    """[A12]"""
    response = sent(START, {"type": "http.response.pathsend", "path": "/f"}, extensions=PATHSEND)
    assert (response.path, response.state) == ("/f", State.COMPLETE)


def test_trailers_come_after_the_body() -> None:
    """[A12]"""
    response = sent(START | {"trailers": True}, body(b"a"), extensions=TRAILERS)
    assert state_of(response) is State.TRAILERS
    response.send({"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": True})
    assert state_of(response) is State.TRAILERS
    response.send({"type": "http.response.trailers", "headers": [(b"b", b"2")]})
    assert (response.trailers, response.state) == ([("a", "1"), ("b", "2")], State.COMPLETE)


def test_trailers_that_the_server_cannot_send_are_not_waited_for() -> None:
    """[A12]"""
    assert sent(START | {"trailers": True}, BODY).state is State.COMPLETE


ANNOUNCED = START | {"trailers": True}
FIVE_BYTES = START | {"headers": [(b"content-length", b"5")]}
FILE: Message = {"type": "http.response.pathsend", "path": "/f"}
TRAILER: Message = {"type": "http.response.trailers", "headers": [(b"a", b"1")]}


@pytest.mark.parametrize(
    ("messages", "wrong", "message"),
    [
        ([], BODY, r"send\(\) expected 'http.response.start', got 'http.response.body'"),
        ([], FILE, "expected 'http.response.start', got 'http.response.pathsend'"),
        ([], TRAILER, "expected 'http.response.start', got 'http.response.trailers'"),
        ([START], START, "expected 'http.response.body', got 'http.response.start'"),
        ([START], TRAILER, "expected 'http.response.body', got 'http.response.trailers'"),
        ([START, body(b"a", True)], START, "expected 'http.response.body', got 'http.response.start'"),
        ([START, body(b"a", True)], FILE, "expected 'http.response.body', got 'http.response.pathsend'"),
        ([START, BODY], BODY, "expected no message after the end of the response, got 'http.response.body'"),
        ([START, BODY], START, "expected no message after the end of the response, got 'http.response.start'"),
        ([START, FILE], BODY, "expected no message after the end of the response, got 'http.response.body'"),
        ([START, FILE], FILE, "expected no message after the end of the response, got 'http.response.pathsend'"),
        ([START, BODY], TRAILER, "expected no message after the end of the response, got 'http.response.trailers'"),
        ([ANNOUNCED, BODY], BODY, "expected 'http.response.trailers', got 'http.response.body'"),
        ([ANNOUNCED, FILE, TRAILER], TRAILER, "expected no message after the end of the response"),
        ([], None, r"send\(\) expected a message with a type, got None"),
        ([], {}, r"send\(\) expected a message with a type, got {}"),
        ([], "http.response.start", r"send\(\) expected a message with a type, got 'http.response.start'"),
        ([], {"type": "http.request"}, "got a message of type 'http.request', which was not offered to the app"),
        ([], {"type": "websocket.accept"}, "of type 'websocket.accept', which was not offered"),
        ([], {"type": "http.response.push"}, "of type 'http.response.push', which was not offered"),
        ([], {"type": None}, "of type None, which was not offered"),
        ([], {"type": ["http.response.start"]}, r"of type \['http.response.start'\], which was not offered"),
        ([], {"type": "http.response.start"}, "expected an int from 200 to 999 as status, got None"),
        ([], START | {"headers": 5}, "expected an iterable of headers, got 5"),
        ([], START | {"headers": [("a", "b")]}, "expected bytes as header name, got 'a'"),
        ([], START | {"headers": [(b"a", b"b\nc")]}, "has a CR, LF or NUL"),
        ([], START | {"headers": [(b"content-length", b"-1")]}, "expected a plain decimal as Content-Length"),
        ([START], BODY | {"body": "text"}, "'http.response.body' expected bytes as body, got 'text'"),
        ([START], BODY | {"body": None}, "'http.response.body' expected bytes as body, got None"),
        ([START], BODY | {"body": [b"a"]}, "'http.response.body' expected bytes as body, got "),
        ([FIVE_BYTES], body(b"123456", True), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE_BYTES], body(b"123456"), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE_BYTES, body(b"12345", True)], body(b"6", True), "body has at least 6 bytes, Content-Length is 5"),
        ([FIVE_BYTES, body(b"123", True)], body(b""), "body ended after 3 bytes, Content-Length is 5"),
        ([FIVE_BYTES], BODY, "body ended after 0 bytes, Content-Length is 5"),
        ([START], FILE | {"path": "f"}, "'http.response.pathsend' expected an absolute path, got 'f'"),
        ([START], FILE | {"path": b"/f"}, "'http.response.pathsend' expected an absolute path, got b'/f'"),
        ([START], {"type": "http.response.pathsend"}, "expected an absolute path, got None"),
        ([ANNOUNCED, BODY], TRAILER | {"headers": [(b"a", b"\r")]}, "has a CR, LF or NUL"),
    ],
)
def test_a_wrong_message_of_an_asgi_app(messages: list[Message], wrong: Any, message: str) -> None:
    """[A8], [S1]"""
    response = sent(*messages, extensions=PATHSEND | TRAILERS)
    before = snapshot(response)
    with pytest.raises(ProtocolError, match=message):
        response.send(wrong)
    assert snapshot(response) == before


@pytest.mark.parametrize("message", [FILE, TRAILER])
def test_what_was_not_offered_may_not_be_sent(message: Message) -> None:
    """[A12], [A8]"""
    response = sent(START | {"trailers": True})
    with pytest.raises(ProtocolError, match="which was not offered to the app"):
        response.send(message)
    assert response.send(body(b"a")) == b"a"


class AsgiModel:
    """The HTTP specification in few words: which message may come, what it adds to the body, None if it is refused."""

    def __init__(self, method: str, extensions: dict[str, Any]) -> None:
        self.method = method
        self.extensions = extensions
        self.next = {"start"}
        self.bodiless = self.trailers = False
        self.length: int | None = None
        self.sent = 0

    def step(self, message: Message) -> bytes | None:
        kind = message["type"].removeprefix("http.response.")
        if kind not in self.next or message.get("bad"):
            return None
        if kind == "start":
            self.bodiless = self.method == "HEAD" or message["status"] in (204, 304)
            self.length = int(message["headers"][0][1]) if message["headers"] else None
            self.trailers = message["trailers"] and TRAILERS.keys() <= self.extensions.keys()
            self.next = {"body"} | ({"pathsend"} if PATHSEND.keys() <= self.extensions.keys() else set())
        elif kind == "trailers":
            self.next = self.next if message["more_trailers"] else set()
        else:
            data: bytes = message.get("body", b"")
            last = kind == "pathsend" or not message["more_body"]
            if kind == "body" and self.length is not None and not self.bodiless:
                total = self.sent + len(data)
                if total > self.length or (last and total < self.length):
                    return None
            self.sent += len(data)
            self.next = {"body"} if not last else {"trailers"} if self.trailers else set()
            return b"" if self.bodiless else data
        return b""


@st.composite
def asgi_messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(["start", "body", "body", "body", "pathsend", "trailers", "unknown"]))
    message: Message = {"type": f"http.response.{kind}"}
    bad = draw(st.integers(0, 5)) == 0
    if kind == "start":
        lengths: list[list[tuple[bytes, bytes]]] = [[], [], [(b"content-length", b"0")], [(b"content-length", b"3")]]
        message |= {
            "status": 99 if bad else draw(st.sampled_from([200, 200, 200, 204])),
            "headers": draw(st.sampled_from(lengths)),
            "trailers": draw(st.booleans()),
        }
    elif kind == "body":
        message |= {"body": "text" if bad else draw(st.binary(max_size=3)), "more_body": draw(st.booleans())}
    elif kind == "pathsend":
        message |= {"path": "f" if bad else "/f"}
    elif kind == "trailers":
        message |= {"headers": [(b"a", "1" if bad else b"1")], "more_trailers": draw(st.booleans())}
    return message | {"bad": bad}


@settings(max_examples=ORDERS)
@given(
    st.sampled_from(["GET", "GET", "HEAD"]),
    st.sampled_from([{}, PATHSEND, TRAILERS, PATHSEND | TRAILERS]),
    st.builds(
        lambda first, rest: [*first, *rest],
        st.sampled_from(
            [[START | {"headers": [], "trailers": True}], [START | {"headers": [], "trailers": False}], []]
        ),
        st.lists(asgi_messages(), max_size=8),
    ),
)
def test_any_order_of_an_asgi_apps_messages(method: str, extensions: dict[str, Any], messages: list[Message]) -> None:
    """[A8]: a legal message adds what the model says, an illegal one raises and changes nothing."""
    response, unspoiled = AsgiResponse(method, extensions), AsgiResponse(method, extensions)
    model = AsgiModel(method, extensions)
    for message in messages:
        before = snapshot(response)
        expected = model.step(message)
        if expected is None:
            with pytest.raises(ProtocolError):
                response.send(message)
            assert snapshot(response) == before
        else:
            assert response.send(message) == expected
            assert unspoiled.send(message) == expected  # it never hears of the illegal messages
    assert (response.state is State.COMPLETE) == (not model.next)
    assert snapshot(response) == snapshot(unspoiled)


# -- AsgiWebsocket ---------------------------------------------------------------------------------------------------

ACCEPT: Message = {"type": "websocket.accept"}
CLOSE: Message = {"type": "websocket.close"}
TEXT: Message = {"type": "websocket.send", "text": "hé"}
DENY: Message = {"type": "websocket.http.response.start", "status": 401, "headers": [(b"X-Why", b"not you")]}
DENIAL: Message = {"type": "websocket.http.response.body", "body": b"no", "more_body": False}


def websocket(*messages: Message, subprotocols: Sequence[str] = ()) -> tuple[AsgiWebsocket, AsgiResponse]:
    denial = AsgiResponse("GET", {})
    machine = AsgiWebsocket(subprotocols, denial)
    for message in messages:
        say(machine, denial, message)
    return machine, denial


def say(machine: AsgiWebsocket, denial: AsgiResponse, message: Message) -> Accept | Data | Close | bytes:
    """Send a message, and give what it asks for; the blocks of a denial, which has to be sent on."""
    step = machine.send(message)
    return b"".join(map(denial.send, step.messages)) if isinstance(step, Denial) else step


def websocket_snapshot(machine: AsgiWebsocket, denial: AsgiResponse) -> object:
    return machine.state, snapshot(denial)


@pytest.mark.parametrize(
    ("before", "message", "step"),
    [
        ([], ACCEPT, Accept(None, [])),
        ([], ACCEPT | {"subprotocol": None, "headers": None}, Accept(None, [])),
        ([], ACCEPT | {"subprotocol": "b"}, Accept("b", [])),
        ([], ACCEPT | {"subprotocol": ""}, Accept(None, [])),
        ([], ACCEPT | {"headers": [(b"Content-Length", b"4"), (b"a", b"b")]}, Accept(None, [("a", "b")])),
        (
            [],
            ACCEPT | {"headers": [(b"Set-Cookie", b"a=\xe4"), (b"Upgrade", b"h2c")]},
            Accept(None, [("Set-Cookie", "a=\xe4")]),
        ),
        ([ACCEPT], TEXT, Data("hé".encode(), is_text=True)),
        ([ACCEPT], TEXT | {"bytes": None}, Data("hé".encode(), is_text=True)),
        ([ACCEPT], {"type": "websocket.send", "text": ""}, Data(b"", is_text=True)),
        ([ACCEPT], {"type": "websocket.send", "bytes": b"\xff", "text": None}, Data(b"\xff", is_text=False)),
        ([ACCEPT], {"type": "websocket.send", "bytes": bytearray(b"x")}, Data(b"x", is_text=False)),
        ([ACCEPT, TEXT], CLOSE, Close(1000, "")),
        ([ACCEPT], CLOSE | {"code": None, "reason": None}, Close(1000, "")),
        ([ACCEPT], CLOSE | {"code": 4999, "reason": "grün"}, Close(4999, "grün")),
        ([ACCEPT], CLOSE | {"reason": "ä" * 99}, Close(1000, "ä" * 61)),  # 123 bytes, no half of a letter
        ([], DENY, b""),
        ([DENY], DENIAL | {"more_body": True}, b"no"),
        ([DENY, DENIAL | {"more_body": True}], DENIAL, b"no"),
        ([], CLOSE | {"code": 3000}, b""),
    ],
)
def test_a_websockets_message_asks_for(before: list[Message], message: Message, step: object) -> None:
    """[A22]"""
    machine, denial = websocket(*before, subprotocols=["a", "b"])
    assert say(machine, denial, message) == step


@pytest.mark.parametrize(
    ("messages", "state"),
    [
        ([], WebsocketState.CONNECTING),
        ([ACCEPT], WebsocketState.OPEN),
        ([ACCEPT, TEXT], WebsocketState.OPEN),
        ([ACCEPT, CLOSE], WebsocketState.CLOSED),
        ([CLOSE], WebsocketState.CLOSED),
        ([DENY], WebsocketState.DENYING),
        ([DENY, DENIAL | {"more_body": True}], WebsocketState.DENYING),
        ([DENY, DENIAL], WebsocketState.CLOSED),
    ],
)
def test_how_far_an_app_has_gone_with_a_websocket(messages: list[Message], state: WebsocketState) -> None:
    """[A22]"""
    assert websocket(*messages)[0].state is state


def test_closing_a_websocket_instead_of_accepting_it_is_a_403() -> None:
    """[A22]"""
    _, denial = websocket(CLOSE)
    assert (denial.status, denial.headers, denial.state) == (
        "403 Forbidden",
        [("Content-Type", "text/plain"), ("Content-Length", "0")],
        State.COMPLETE,
    )


def test_a_denial_of_the_apps_own() -> None:
    """[A22]"""
    _, denial = websocket(DENY, DENIAL)
    assert (denial.status, denial.headers, denial.state) == (
        "401 Unauthorized",
        [("X-Why", "not you")],
        State.COMPLETE,
    )


@pytest.mark.parametrize(
    ("before", "message", "words"),
    [
        ([], TEXT, "expected 'websocket.accept', 'websocket.close' or 'websocket.http.response.start', got"),
        ([], DENIAL, "got 'websocket.http.response.body'"),
        ([], START, "got 'http.response.start'"),
        ([], {"type": ["websocket.accept"]}, "got"),
        ([], {"text": "x"}, "expected a message with a type"),
        ([], None, "expected a message with a type"),
        ([ACCEPT], ACCEPT, "expected 'websocket.send' or 'websocket.close', got 'websocket.accept'"),
        ([ACCEPT], DENY, "got 'websocket.http.response.start'"),
        ([ACCEPT, CLOSE], TEXT, "expected no message after the connection was closed, got 'websocket.send'"),
        ([ACCEPT, CLOSE], CLOSE, "got 'websocket.close'"),
        ([CLOSE], ACCEPT, "got 'websocket.accept'"),
        ([DENY], ACCEPT, "expected 'websocket.http.response.body', got 'websocket.accept'"),
        ([DENY], CLOSE, "got 'websocket.close'"),
        ([DENY], DENY, "got 'websocket.http.response.start'"),
        ([DENY, DENIAL], DENIAL, "expected no message after"),
        ([], ACCEPT | {"subprotocol": "c"}, "expected None as subprotocol, or one that the client offers"),
        ([], ACCEPT | {"subprotocol": b"a"}, "got b'a'"),
        ([], ACCEPT | {"headers": [(b"sec-websocket-protocol", b"a")]}, "which is the server's to send"),
        ([], ACCEPT | {"headers": [(b"Sec-WebSocket-Accept", b"a")]}, "which is the server's to send"),
        ([], ACCEPT | {"headers": [(b"a", b"b\r\nc: d")]}, "CR, LF or NUL"),
        ([], ACCEPT | {"headers": [("a", "b")]}, "bytes as header name"),
        ([], DENY | {"status": 101}, "from 200 to 999"),
        ([DENY], DENIAL | {"body": "no"}, "expected bytes as body"),
        ([ACCEPT], {"type": "websocket.send"}, "expected either bytes or text"),
        ([ACCEPT], TEXT | {"bytes": b"x"}, "expected either bytes or text"),
        ([ACCEPT], {"type": "websocket.send", "text": b"x"}, "expected a str as text, got b'x'"),
        ([ACCEPT], {"type": "websocket.send", "bytes": "x"}, "expected bytes as bytes, got 'x'"),
        ([ACCEPT], {"type": "websocket.send", "text": "\ud800"}, "a text that UTF-8 can say"),
        *(
            ([ACCEPT], CLOSE | {"code": code}, f"expected a code that may be sent (RFC 6455, 7.4), got {code!r}")
            for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, "1000", 1000.0)
        ),
        ([ACCEPT], CLOSE | {"reason": b"x"}, "expected a str as reason, got b'x'"),
    ],
)
def test_a_websockets_wrong_message_is_an_error_and_changes_nothing(
    before: list[Message], message: Any, words: str
) -> None:
    """[A22]"""
    machine, denial = websocket(*before, subprotocols=["a", "b"])
    state = websocket_snapshot(machine, denial)
    with pytest.raises(ProtocolError, match=re.escape(words)):
        say(machine, denial, message)
    assert websocket_snapshot(machine, denial) == state
