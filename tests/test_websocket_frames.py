"""Frames, right and wrong, by the sections of the Autobahn test-suite [A22].

That suite needs Python 2, so its sections are written anew here, as tables: what a client sends, what it gets. A case
is named after the section whose behaviour it checks, and not after the numbers within it.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

import bridge.websocket
from bridge import AsgiToWsgi
from tests.drivers import LIMIT
from tests.raw_websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    RawWebSocket,
    close_data,
    deflated,
    frame,
)
from tests.test_websocket import Exchange, echo

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFLATE: dict[str, str | None] = {"Sec-WebSocket-Extensions": "permessage-deflate"}
RSV1, RSV2, RSV3 = 4, 2, 1

Case = tuple[bytes | list[bytes] | tuple[bytes, bytes], list[Frame], int | None]
"""What is sent, the frames that come back, and the code of the close frame behind them; None if the connection stays
open. A list is sent piece by piece; of a pair, the second when the answer to the first is there: a mistake ends the
connection, also for answers which the app has not given yet."""


def closes(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, close_data(code, reason))


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


# Section 1: framing

FRAMING: dict[str, Case] = {
    f"{'text' if opcode == TEXT else 'binary'} of {size}": (
        frame(opcode, b"*" * size),
        [Frame(opcode, b"*" * size)],
        None,
    )
    for opcode in (TEXT, BINARY)
    for size in (0, 1, 125, 126, 127, 128, 65535, 65536)
}
FRAMING |= {
    "byte by byte": (byte_by_byte(frame(TEXT, b"hello")), [Frame(TEXT, b"hello")], None),
    "many at once": (frame(TEXT, b"a") * 100, [Frame(TEXT, b"a")] * 100, None),
    "not masked": (frame(TEXT, b"hello", mask=None), [], 1002),
    "masked with zeros": (frame(TEXT, b"hello", mask=bytes(4)), [Frame(TEXT, b"hello")], None),
    "a length of 2**63": (b"\x82\xff" + b"\x80" + bytes(7) + b"1234", [], 1009),
}
# RFC 6455, 5.2: the shortest form MUST be used; the `websockets` package takes what it gets, as browsers do.
FRAMING["a length in more bytes than it needs"] = (
    b"\x82\xfe\x00\x05" + frame(BINARY, b"hello")[2:],
    [Frame(BINARY, b"hello")],
    None,
)

# Section 2: pings and pongs

PINGS: dict[str, Case] = {
    "a ping without data": (frame(PING), [Frame(PONG, b"")], None),
    "a ping with text": (frame(PING, b"hello"), [Frame(PONG, b"hello")], None),
    "a ping with what is no UTF-8": (frame(PING, b"\x00\xff\xfe\xfd"), [Frame(PONG, b"\x00\xff\xfe\xfd")], None),
    "a ping of 125 bytes": (frame(PING, b"\xfe" * 125), [Frame(PONG, b"\xfe" * 125)], None),
    "a ping of 126 bytes": (frame(PING, b"\xfe" * 126), [], 1002),
    "a ping of 125 bytes, byte by byte": (byte_by_byte(frame(PING, b"\xfe" * 125)), [Frame(PONG, b"\xfe" * 125)], None),
    "a pong that nobody asked for": (frame(PONG) + frame(PING, b"x"), [Frame(PONG, b"x")], None),
    "a pong with data that nobody asked for": (frame(PONG, b"lo") + frame(PING, b"x"), [Frame(PONG, b"x")], None),
    "ten pings": (
        b"".join(frame(PING, b"%d" % n) for n in range(10)),
        [Frame(PONG, b"%d" % n) for n in range(10)],
        None,
    ),
    "a ping in two frames": (frame(PING, b"a", fin=False), [], 1002),
    "a pong in two frames": (frame(PONG, b"a", fin=False), [], 1002),
}

# Section 3: reserved bits

RESERVED_BITS: dict[str, Case] = {
    f"bits {rsv:03b} of opcode {opcode}": (frame(opcode, b"", rsv=rsv), [], 1002)
    for rsv in range(1, 8)
    for opcode in (TEXT, BINARY, PING, CLOSE)
}
RESERVED_BITS["behind a message, which is answered"] = (
    (frame(TEXT, b"hello"), frame(TEXT, b"*", rsv=RSV3)),
    [Frame(TEXT, b"hello")],
    1002,
)

# Section 4: opcodes

OPCODES: dict[str, Case] = {
    f"opcode {opcode}{' behind a message' if before else ''}": (
        (before, frame(opcode, b"hello")) if before else frame(opcode, b"hello"),
        [Frame(TEXT, b"hello")] if before else [],
        1002,
    )
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    for before in (b"", frame(TEXT, b"hello"))
}

# Section 5: fragments

FRAGMENTS: dict[str, Case] = {
    "in two": (
        frame(TEXT, b"ab", fin=False) + frame(CONTINUATION, b"cd"),
        [Frame(TEXT, b"abcd")],
        None,
    ),
    "in two pieces": (
        [frame(TEXT, b"ab", fin=False), frame(CONTINUATION, b"cd")],
        [Frame(TEXT, b"abcd")],
        None,
    ),
    "in a hundred, binary": (
        frame(BINARY, b"ab", fin=False) + frame(CONTINUATION, b"\xff", fin=False) * 98 + frame(CONTINUATION),
        [Frame(BINARY, b"ab" + b"\xff" * 98)],
        None,
    ),
    "all empty": (
        frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) + frame(CONTINUATION),
        [Frame(TEXT, b"")],
        None,
    ),
    "a ping between": (
        frame(TEXT, b"ab", fin=False) + frame(PING, b"p") + frame(CONTINUATION, b"cd"),
        [Frame(PONG, b"p"), Frame(TEXT, b"abcd")],
        None,
    ),
    "byte by byte, pings between": (
        byte_by_byte(frame(TEXT, b"ab", fin=False) + frame(PING, b"p") * 2 + frame(CONTINUATION, b"cd")),
        [Frame(PONG, b"p")] * 2 + [Frame(TEXT, b"abcd")],
        None,
    ),
    "a continuation of nothing": (frame(CONTINUATION, b"x"), [], 1002),
    "a continuation of nothing, not the last": (frame(CONTINUATION, b"x", fin=False), [], 1002),
    "a continuation of what is whole": (
        (frame(TEXT, b"whole"), frame(CONTINUATION, b"x")),
        [Frame(TEXT, b"whole")],
        1002,
    ),
    "a new text between": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [], 1002),
    "a new binary between": (frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), [], 1002),
    "two messages": (
        (frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b")) * 2,
        [Frame(TEXT, b"ab")] * 2,
        None,
    ),
}

# Section 6: UTF-8

GOOD_TEXTS = (
    "κόσμε",
    "\x00",
    "\x7f",
    "\x80\u07ff\u0800\uffff",
    "\U00010000\U0010ffff",
    "\ud7ff\ue000\ufffd",
    "\ufeff behind a BOM",
    "\ufffe\uffff",
    "\U0001fffe",
)
BAD_TEXTS = {
    "a surrogate": b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80edited",
    "two surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "above U+10FFFF": b"\xf4\x90\x80\x80",
    "a lone continuation": b"\x80",
    "the last of them": b"\xbf",
    "a lone start of two": b"\xc3 ",
    "a lone start of three": b"\xe1\xbd ",
    "a lone start of four": b"\xf0\x90\x80 ",
    "cut off": b"abc\xce",
    "cut off in four": b"\xf0\x9f\x98",
    "too long a slash": b"\xc0\xaf",
    "too long in three": b"\xe0\x80\xaf",
    "too long in four": b"\xf0\x80\x80\xaf",
    "too long a NUL": b"\xc0\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "FE": b"\xfe",
    "FF": b"\xff",
}
UTF_8: dict[str, Case] = {}
for text in GOOD_TEXTS:
    data = text.encode()
    UTF_8[f"good: {text!a}"] = (frame(TEXT, data), [Frame(TEXT, data)], None)
    UTF_8[f"good, byte by byte in frames: {text!a}"] = (
        b"".join(frame(CONTINUATION if n else TEXT, data[n : n + 1], fin=n == len(data) - 1) for n in range(len(data))),
        [Frame(TEXT, data)],
        None,
    )
for name, data in BAD_TEXTS.items():
    UTF_8[f"bad: {name}"] = (frame(TEXT, data), [], 1007)
    UTF_8[f"bad, in two frames: {name}"] = (
        frame(TEXT, b"\xce\xba" + data[:1], fin=False) + frame(CONTINUATION, data[1:]),
        [],
        1007,
    )
UTF_8 |= {
    # Found in the frame in which it is, not at the end of the message: the last frame never comes.
    "bad, in a message that is not whole": (
        frame(TEXT, "κόσμε".encode(), fin=False) + frame(CONTINUATION, b"\xf4\x90\x80\x80", fin=False),
        [],
        1007,
    ),
    "behind a good one, which is answered": (
        (frame(TEXT, b"good"), frame(TEXT, b"\xff")),
        [Frame(TEXT, b"good")],
        1007,
    ),
    "no text": (frame(BINARY, b"\xff\xfe"), [Frame(BINARY, b"\xff\xfe")], None),
}

# Section 7: closing

CLOSING: dict[str, Case] = {
    "behind a message": ((frame(TEXT, b"x"), closes(1000)), [Frame(TEXT, b"x")], 1000),
    "twice": (closes(1000) + closes(1000), [], 1000),
    "before a ping": (closes(1000) + frame(PING), [], 1000),
    "before a message": (closes(1000) + frame(TEXT, b"x"), [], 1000),
    "in the middle of a message": (frame(TEXT, b"x", fin=False) + closes(1000), [], 1002),
    "without a code": (frame(CLOSE), [], 1005),
    "with one byte": (frame(CLOSE, b"a"), [], 1002),
    "with a reason": (closes(1000, "grün".encode()), [], 1000),
    "with a reason of 123 bytes": (closes(1000, b"*" * 123), [], 1000),
    "with a reason of 124 bytes": (closes(1000, b"*" * 124), [], 1002),
    "with a reason that is no UTF-8": (closes(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80"), [], 1007),
    "in two frames": (frame(CLOSE, close_data(1000), fin=False), [], 1002),
}
for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999):
    CLOSING[f"with {code}"] = (closes(code), [], code)
for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535):
    CLOSING[f"with {code}, which may not be sent"] = (closes(code), [], 1002)

SECTIONS = {
    "1 framing": FRAMING,
    "2 pings": PINGS,
    "3 reserved bits": RESERVED_BITS,
    "4 opcodes": OPCODES,
    "5 fragments": FRAGMENTS,
    "6 UTF-8": UTF_8,
    "7 closing": CLOSING,
}
CASES = [
    pytest.param(case, id=f"{section}: {name}") for section, cases in SECTIONS.items() for name, case in cases.items()
]


@pytest.fixture(scope="module")
def application() -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(echo, loop="shared", lifespan="off") as application:
        yield application


def check(ws: RawWebSocket, case: Case) -> None:
    pieces, frames, code = case
    if isinstance(pieces, tuple):
        ws.sock.sendall(pieces[0])
        assert ws.read() == frames[0]
        pieces, frames = pieces[1], frames[1:]
    with contextlib.suppress(ConnectionError):  # it may have heard enough
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            ws.sock.sendall(piece)
    for expected in frames:
        assert ws.read() == expected
    if code is None:
        ws.send(PING, b"open?")
        assert ws.read() == Frame(PONG, b"open?")
        ws.close()
        code = 1000
    assert ws.read_close() == code
    ws.read_end()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.leaves("threads")  # the loop's keeper, which may be started by any of them
def test_what_a_client_sends_is_answered(application: AsgiToWsgi, case: Case) -> None:
    """[A22]"""
    with Exchange(application) as ws:
        assert ws.read_answer() == 101
        check(ws, case)


# Sections 9 and 10: limits


@pytest.mark.leaves("threads")
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("pieces", [1, 64, 4096])
def test_big_messages_arrive_however_they_are_cut(application: AsgiToWsgi, opcode: int, pieces: int) -> None:
    """[A22]: 4 MiB, in frames and in writes of that size."""
    data = b"*" * (4 * 1024 * 1024)
    size = len(data) // pieces
    with Exchange(application) as ws:
        assert ws.read_answer() == 101
        for n in range(pieces):
            ws.send(opcode if n == 0 else CONTINUATION, data[n * size : (n + 1) * size], fin=n == pieces - 1)
        assert ws.read() == Frame(opcode, data)


@pytest.mark.leaves("threads")
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([frame(BINARY, bytes(1000))], None),
        ([frame(BINARY, bytes(1001))], 1009),
        ([frame(BINARY, length=1001)], 1009),  # its head is enough
        ([frame(BINARY, length=1 << 62)], 1009),
        ([frame(BINARY, bytes(600), fin=False), frame(CONTINUATION, bytes(400))], None),
        ([frame(BINARY, bytes(600), fin=False), frame(CONTINUATION, bytes(401))], 1009),
        ([frame(BINARY, bytes(500), fin=False)] + [frame(CONTINUATION, bytes(1), fin=False)] * 501, 1009),
    ],
)
def test_message_above_the_limit_is_1009(
    application: AsgiToWsgi, monkeypatch: pytest.MonkeyPatch, sent: list[bytes], code: int | None
) -> None:
    """[A22]"""
    monkeypatch.setattr(bridge.websocket, "MESSAGE_BYTES", 1000)
    with Exchange(application) as ws:
        assert ws.read_answer() == 101
        check(ws, (b"".join(sent), [Frame(BINARY, bytes(1000))] if code is None else [], code))


@pytest.mark.leaves("threads")
def test_message_that_unpacks_above_the_limit_is_1009(application: AsgiToWsgi, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A22]: a thousandth of it is sent."""
    monkeypatch.setattr(bridge.websocket, "MESSAGE_BYTES", 100_000)
    with Exchange(application, handshake=DEFLATE) as ws:
        assert ws.read_answer() == 101
        check(ws, (frame(BINARY, deflated(bytes(1_000_000)), rsv=RSV1), [], 1009))


# Sections 12 and 13: compression

OFFERS: dict[str, str | None] = {
    "permessage-deflate": "permessage-deflate",
    "permessage-deflate; client_max_window_bits": "permessage-deflate",
    "permessage-deflate; client_no_context_takeover": "permessage-deflate",
    "permessage-deflate; server_no_context_takeover": "permessage-deflate",
    "permessage-deflate; server_max_window_bits=9": "permessage-deflate",
    "permessage-deflate; server_no_context_takeover; client_max_window_bits=10, permessage-deflate": (
        "permessage-deflate"
    ),
    "permessage-deflate; unknown": None,
    "permessage-deflate; server_max_window_bits=7": None,
    "permessage-deflate; unknown, permessage-deflate": "permessage-deflate",
    "x-webkit-deflate-frame": None,
}


@pytest.mark.leaves("threads")
@pytest.mark.parametrize(("offer", "answer"), OFFERS.items())
@pytest.mark.parametrize("size", [0, 1, 16, 1024, 100_000])
def test_compressed_messages_go_both_ways(application: AsgiToWsgi, offer: str, answer: str | None, size: int) -> None:
    """[A22]"""
    data = (b'{"name": "value", "number": 12345}, ' * (size // 36 + 1))[:size]
    with Exchange(application, handshake={"Sec-WebSocket-Extensions": offer}) as ws:
        assert ws.read_answer() == 101
        extensions = ws.header("Sec-WebSocket-Extensions")
        assert (extensions and extensions.partition(";")[0]) == answer
        for _ in range(3):  # the third may stand on what the first has said
            ws.send(TEXT, data if answer is None else deflated(data), rsv=0 if answer is None else RSV1)
            assert _read_with(ws, extensions) == Frame(TEXT, data)


def _read_with(ws: RawWebSocket, extensions: str | None) -> Frame:
    if extensions and "server_no_context_takeover" in extensions:
        import zlib

        ws._inflate = zlib.decompressobj(-15)
    return ws.read()


@pytest.mark.leaves("threads")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            (
                frame(TEXT, deflated(b"hello")[:3], fin=False, rsv=RSV1) + frame(CONTINUATION, deflated(b"hello")[3:]),
                [Frame(TEXT, b"hello")],
                None,
            ),
            id="in two frames",
        ),
        pytest.param((frame(TEXT, b"not compressed"), [Frame(TEXT, b"not compressed")], None), id="a plain message"),
        pytest.param((frame(TEXT, b"\xff\xff\xff\xff", rsv=RSV1), [], 1002), id="what does not unpack"),
        pytest.param((frame(PING, b"", rsv=RSV1), [], 1002), id="a ping with the bit"),
        pytest.param((frame(TEXT, b"x", rsv=RSV2), [], 1002), id="another bit"),
        pytest.param((frame(TEXT, deflated(b"\xff"), rsv=RSV1), [], 1007), id="what is no UTF-8"),
        pytest.param(
            (
                frame(TEXT, deflated(b"hello")[:3], fin=False, rsv=RSV1)
                + frame(CONTINUATION, deflated(b"hello")[3:], rsv=RSV1),
                [],
                1002,
            ),
            id="the bit on a continuation",
        ),
    ],
)
def test_compression_right_and_wrong(application: AsgiToWsgi, case: Case) -> None:
    """[A22]"""
    with Exchange(application, handshake=DEFLATE) as ws:
        assert ws.read_answer() == 101
        check(ws, case)


@pytest.mark.leaves("threads")
def test_any_bytes_end_in_a_close_or_in_nothing(application: AsgiToWsgi, caplog: pytest.LogCaptureFixture) -> None:
    """[A22]: noise never ends in an error of the app or a hung connection."""
    import random

    source = random.Random(5)
    for _ in range(50):
        exchange: Any = Exchange(application, handshake=DEFLATE)
        with exchange as ws:
            assert ws.read_answer() == 101
            with contextlib.suppress(ConnectionError):
                ws.sock.sendall(source.randbytes(source.randrange(1, 2000)))
                ws.sock.shutdown(socket.SHUT_WR)
            ws.read_close()
        exchange.result(LIMIT)
    assert caplog.records == []
