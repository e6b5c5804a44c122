"""The request's body: as a file against `io.BytesIO`, as messages against what the specification says."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.body import PIECE, BodyReader, InputStream, WsgiInput
from bridge.errors import BadRequest, ClientDisconnected

if TYPE_CHECKING:
    from collections.abc import Callable

# -- InputStream -----------------------------------------------------------------------------------------------------


class Chunks:
    """Gives one chunk after the other, then the end or an error, again and again."""

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.left = list(chunks)
        self.pulled = 0
        self._error = error

    def __call__(self) -> bytes:
        self.pulled += 1
        if self.left:
            return self.left.pop(0)
        if self._error is not None:
            raise self._error
        return b""


def stream_of(*chunks: bytes, error: Exception | None = None, buffer_size: int = 8192) -> io.BufferedReader:
    return io.BufferedReader(InputStream(Chunks(*chunks, error=error)), buffer_size)


def readinto(stream: Any, size: int) -> bytes:
    buffer = bytearray(size)
    count = stream.readinto(buffer)
    return bytes(buffer[:count])


sizes = st.integers(0, 12) | st.sampled_from([100, 9000])
any_sizes = sizes | st.sampled_from([-1, None])
steps = st.one_of(
    st.just(("read",)),
    st.tuples(st.sampled_from(["read", "readline", "readlines"]), any_sizes),
    st.just(("readline",)),
    st.just(("readlines",)),
    st.just(("iterate",)),
    st.tuples(st.just("read1"), sizes),
    st.tuples(st.just("readinto"), sizes),
)
chunk_lists = st.lists(st.text("ab\n", min_size=1, max_size=12).map(str.encode) | st.just(b"x" * 9000), max_size=8)


@given(chunk_lists, st.sampled_from([1, 3, 8192]), st.lists(steps, max_size=8))
def test_any_sequence_of_reads_is_as_from_a_file(
    chunks: list[bytes], buffer_size: int, steps: list[tuple[Any, ...]]
) -> None:
    """[W8]"""
    stream, oracle = stream_of(*chunks, buffer_size=buffer_size), io.BytesIO(b"".join(chunks))
    for name, *arguments in [*steps, ("read",), ("read", 5), ("readline",), ("readlines",), ("iterate",)]:
        if name == "iterate":
            assert next(iter(stream), None) == next(iter(oracle), None)
        elif name == "readinto":
            assert readinto(stream, *arguments) == readinto(oracle, *arguments)
        elif name == "readlines":
            # BytesIO's own stops a line earlier where the lines are exactly as long as the hint; files do not.
            assert stream.readlines(*arguments) == io.IOBase.readlines(oracle, *arguments)
        elif name == "read1":
            # It may give less, but nothing only at the end.
            data = stream.read1(*arguments)
            assert data == oracle.read(len(data))
            assert data or not arguments[0] or not oracle.read(1)
        else:
            assert getattr(stream, name)(*arguments) == getattr(oracle, name)(*arguments)


@pytest.mark.parametrize(
    ("steps", "results"),
    [
        ([("read",), ("read",)], [b"ab\ncd\nef", b""]),
        ([("read", -1), ("read", 1)], [b"ab\ncd\nef", b""]),
        ([("read", 0), ("read", 4), ("read", 100), ("read", 100)], [b"", b"ab\nc", b"d\nef", b""]),
        ([("readline",), ("readline", 1), ("readline", 0), ("readline", 9)], [b"ab\n", b"c", b"", b"d\n"]),
        ([("readline", -1), ("readline",), ("readline",), ("readline",)], [b"ab\n", b"cd\n", b"ef", b""]),
        ([("readlines",), ("readlines",)], [[b"ab\n", b"cd\n", b"ef"], []]),
        ([("readlines", 1), ("read",)], [[b"ab\n"], b"cd\nef"]),
        ([("readlines", 4), ("readlines", 0)], [[b"ab\n", b"cd\n"], [b"ef"]]),
    ],
)
def test_reads(steps: list[tuple[Any, ...]], results: list[Any]) -> None:
    """[W8]"""
    stream = stream_of(b"a", b"b\nc", b"d\n", b"ef")
    assert [getattr(stream, name)(*arguments) for name, *arguments in steps] == results


def test_a_buffer_is_let_go_when_it_is_filled() -> None:
    """[W8] Also where the frame that has filled it lives on: CPython 3.15 takes the bytes out of it."""
    frames = []

    def next_chunk() -> bytes:
        frames.append(sys._getframe(1))
        return b"abc"

    buffer = bytearray(8)
    assert InputStream(next_chunk).readinto(buffer) == 3
    buffer.clear()  # a BufferError where there is a view of it
    assert frames


def test_an_empty_body_has_no_lines() -> None:
    """[W8]"""
    assert stream_of().readlines() == list(stream_of()) == []
    assert stream_of().readline() == stream_of().read() == stream_of().read(5) == b""


def test_nothing_is_pulled_ahead_of_the_reads() -> None:
    """[W7]: what the app does not need yet stays with the client."""
    chunks = Chunks(b"0123456789", b"abc", b"def")
    stream = io.BufferedReader(InputStream(chunks))
    assert chunks.pulled == 0
    assert stream.read(0) == b""
    assert chunks.pulled == 0
    assert stream.read(7) == b"0123456"
    assert stream.read(3) == b"789"
    assert chunks.pulled == 1
    assert stream.read1(100) == b"abc"
    assert chunks.pulled == 2


def test_a_chunk_bigger_than_the_buffer_is_given_in_parts() -> None:
    """[W7], [W8]"""
    chunk = bytes(range(256)) * 1000
    chunks = Chunks(chunk)
    stream = io.BufferedReader(InputStream(chunks))
    parts = [stream.read(1000) for _ in range(256)]
    assert chunks.pulled == 1
    assert b"".join(parts) == chunk


READS: list[Callable[[io.BufferedReader], object]] = [
    lambda stream: stream.read(),
    lambda stream: stream.read(100),
    lambda stream: stream.readlines(),
    lambda stream: [*stream],
    lambda stream: [stream.readline(), stream.readline()],
    lambda stream: stream.readinto(bytearray(100)),
    lambda stream: [stream.read1(), stream.read1(), stream.read1()],
]


@pytest.mark.parametrize("read", READS)
def test_an_error_is_raised_by_each_read_and_never_looks_like_the_end(read: Callable[[Any], object]) -> None:
    """[W9]"""
    error = ClientDisconnected("gone")
    stream = stream_of(b"ab\n", b"c", error=error)
    for _ in range(3):
        with pytest.raises(ConnectionError) as caught:
            read(stream)
        assert caught.value is error


def test_what_was_there_before_the_error_can_be_read() -> None:
    """[W9]"""
    stream = stream_of(b"ab\n", b"cd", error=ClientDisconnected("gone"))
    assert stream.readline() == b"ab\n"
    assert stream.read(2) == b"cd"
    with pytest.raises(ClientDisconnected):
        stream.read(1)


def test_the_stream_is_a_plain_readable_file() -> None:
    """[W8]: werkzeug, Django and multipart parsers ask for these."""
    stream = stream_of(b"a")
    assert stream.readable()
    assert not stream.writable()
    assert not stream.seekable()
    assert io.TextIOWrapper(stream, "ascii").read() == "a"


# -- BodyReader ------------------------------------------------------------------------------------------------------

DISCONNECT = {"type": "http.disconnect"}


def request(body: bytes, more_body: bool = False) -> dict[str, object]:
    return {"type": "http.request", "body": body, "more_body": more_body}


class StrictInput:
    """A server's ``wsgi.input`` of which only ``read(n)`` with n > 0 works. It notes each n, and ends in an error."""

    def __init__(self, body: bytes = b"", most: int = PIECE, error: Exception | None = None) -> None:
        self._body = io.BytesIO(body)
        self._most = most
        self._error = error
        self.asked: list[int] = []
        self.reach = 0  # how far into the body a read could have gone

    def read(self, size: int) -> bytes:
        assert type(size) is int
        assert 0 < size <= PIECE
        self.asked.append(size)
        self.reach = self._body.tell() + size
        data = self._body.read(min(size, self._most))
        if not data and self._error:
            raise self._error
        return data


def reader_of(stream: object, length: str | None = None, terminated: bool | None = None) -> BodyReader:
    environ = {"wsgi.input": stream, "CONTENT_LENGTH": length, "wsgi.input_terminated": terminated}
    return BodyReader({key: value for key, value in environ.items() if value is not None})


@given(
    st.binary(max_size=20),
    st.integers(0, 20).map(str) | st.sampled_from([None, ""]),
    st.sampled_from([None, False, True]),
    st.integers(1, 21),
)
def test_a_body_as_messages(body: bytes, length: str | None, terminated: bool | None, most: int) -> None:
    """[A3], [A4]"""
    stream = StrictInput(body, most)
    reader = reader_of(stream, length, terminated)
    expected = int(length) if length else len(body) if terminated else 0
    got = b""
    while True:
        message: Any = reader.next_message()
        got += message.get("body", b"")
        if not message.get("more_body"):
            break
        assert message["body"]  # an empty one in between says nothing
        assert not reader.complete
    assert got == body[:expected]
    if len(body) < expected:
        assert message == DISCONNECT
        assert not reader.complete
    else:
        assert message["type"] == "http.request"
        assert reader.complete
    asked = len(stream.asked)
    assert [reader.next_message() for _ in range(3)] == [DISCONNECT] * 3
    assert len(stream.asked) == asked  # nothing is read after the end
    if length or not terminated:
        assert stream.reach <= expected  # never past CONTENT_LENGTH


@pytest.mark.parametrize("length", ["0", "2", "9"])
def test_a_length_beside_a_transfer_encoding_is_not_believed(length: str) -> None:
    """[A3] RFC 9112, 6.3: werkzeug and cheroot take the body out of its chunks, and pass the length on as it came."""
    environ = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": length, "wsgi.input_terminated": True}
    reader = BodyReader(environ | {"wsgi.input": StrictInput(b"12345")})
    assert [reader.next_message(), reader.next_message()] == [request(b"12345", more_body=True), request(b"")]
    with pytest.raises(BadRequest):
        BodyReader(environ | {"wsgi.input": StrictInput(b"12345"), "CONTENT_LENGTH": "+5"})


@pytest.mark.parametrize("length", [None, "", "0", "5"])
@pytest.mark.parametrize("terminated", [None, True])
@pytest.mark.parametrize("missing", [True, False])
def test_no_stream_is_an_empty_body(length: str | None, terminated: bool | None, missing: bool) -> None:
    """[A3]"""
    environ: dict[str, object] = {} if missing else {"wsgi.input": None}
    if length is not None:
        environ["CONTENT_LENGTH"] = length
    reader = BodyReader(environ | {"wsgi.input_terminated": terminated})
    assert reader.complete
    assert [reader.next_message() for _ in range(3)] == [request(b""), DISCONNECT, DISCONNECT]


@pytest.mark.parametrize("length", [None, "", "0"])
def test_a_body_without_a_length_is_not_read_where_the_stream_does_not_end(length: str | None) -> None:
    """[A3]: such a read would wait for ever."""
    stream = StrictInput(b"the next request")
    reader = reader_of(stream, length)
    assert reader.complete
    assert [reader.next_message(), reader.next_message()] == [request(b""), DISCONNECT]
    assert stream.asked == []


def test_the_pieces_are_bounded() -> None:
    """[A3], [A13]"""
    size = 3 * PIECE + 5
    for length, asked in ((str(size), [PIECE, PIECE, PIECE, 5]), (None, [PIECE] * 5)):
        stream = StrictInput(b"x" * size)
        reader = reader_of(stream, length, terminated=True)
        while not reader.complete:
            reader.next_message()
        assert stream.asked == asked


def test_the_last_piece_says_so() -> None:
    """[A3]: no further read and no empty message is needed where the length is known."""
    reader = reader_of(StrictInput(b"abcde", most=3), "5")
    assert not reader.complete
    assert [reader.next_message() for _ in range(3)] == [request(b"abc", True), request(b"de"), DISCONNECT]


def test_a_short_body_is_a_disconnect() -> None:
    """[A4]"""
    reader = reader_of(StrictInput(b"abc"), "5")
    assert [reader.next_message() for _ in range(3)] == [request(b"abc", True), DISCONNECT, DISCONNECT]
    assert not reader.complete


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError("gunicorn's NoMoreData, werkzeug's and gevent's malformed chunk"),
        ValueError("cheroot's and eventlet's malformed chunk"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(("length", "terminated"), [("5", None), ("5", True), (None, True)])
def test_a_body_that_cannot_be_read_is_a_disconnect(
    error: Exception, length: str | None, terminated: bool | None
) -> None:
    """[A4]"""
    stream = StrictInput(b"abc", error=error)
    reader = reader_of(stream, length, terminated)
    assert [reader.next_message() for _ in range(3)] == [request(b"abc", True), DISCONNECT, DISCONNECT]
    assert not reader.complete
    assert len(stream.asked) == 2


def test_another_error_of_the_stream_is_its_own() -> None:
    """[A9]"""
    with pytest.raises(KeyError, match="bug"):
        reader_of(StrictInput(error=KeyError("bug")), "5").next_message()


def test_a_stream_that_gives_more_than_was_asked_for_is_cut() -> None:
    """[A3]"""

    class Generous:
        def read(self, size: int) -> bytes:
            assert size > 0
            return b"0123456789"

    reader = reader_of(Generous(), "5")
    assert [reader.next_message() for _ in range(2)] == [request(b"01234"), DISCONNECT]


@pytest.mark.parametrize("length", ["-1", "+5", " 5", "5 ", "5,5", "five", "1e3", "\xb2", "9" * 5000, " "])
@pytest.mark.parametrize("stream", [StrictInput(b"abcde"), None])
def test_a_content_length_that_is_no_plain_decimal_is_a_bad_request(length: str, stream: object) -> None:
    """[A3]"""
    with pytest.raises(BadRequest, match="expected a plain decimal as Content-Length, got "):
        reader_of(stream, length, terminated=True)


def test_the_input_costs_no_buffer_until_it_is_read() -> None:
    chunks = iter([b"one\ntwo\n", b"three"])
    stream = WsgiInput(lambda: next(chunks, b""))
    assert stream._reader is None
    assert stream.readline() == b"one\n"
    assert stream.read(2) == b"tw"
    assert list(stream) == [b"o\n", b"three"]
    assert stream.read() == stream.read(5) == b""
    with pytest.raises(AttributeError):
        stream.nothing_that_a_file_has  # noqa: B018
