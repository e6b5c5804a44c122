"""Header lists: translation there and back, what must not pass, and what it costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import is_hop_by_hop

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import headers as module
from bridge.errors import BadRequest, ProtocolError
from bridge.headers import (
    content_length,
    declared_length,
    decode_headers,
    encode_headers,
    from_cgi,
    is_bodiless,
    to_cgi,
    wire_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
HOP_BY_HOP = (
    "Connection Keep-Alive Proxy-Authenticate Proxy-Authorization TE Trailers Transfer-Encoding Upgrade".split()
)

# Far above what linear work takes (tens of milliseconds), far below what quadratic work would (many seconds).
LINEAR_SECONDS = 2.0

header_names = st.sampled_from("cookie Cookie content-type x-a X-A x_a proxy Proxy host".split()) | st.text(
    TOKEN, min_size=1
)
header_values = st.text(st.characters(max_codepoint=255), max_size=8).map(lambda text: text.encode("latin-1"))


# -- Requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (b"content-type", "CONTENT_TYPE"),
        (b"CONTENT-TYPE", "CONTENT_TYPE"),
        (b"content-length", "CONTENT_LENGTH"),
        (b"host", "HTTP_HOST"),
        (b"X-Forwarded-For", "HTTP_X_FORWARDED_FOR"),
        (b"x--y", "HTTP_X__Y"),
        (b"!#$%&'*+.^`|~", "HTTP_!#$%&'*+.^`|~"),
        (b"content", "HTTP_CONTENT"),
        (b"http-host", "HTTP_HTTP_HOST"),
        (b"proxy-authorization", "HTTP_PROXY_AUTHORIZATION"),
    ],
)
def test_a_header_gets_its_cgi_key(name: bytes, key: str) -> None:
    """[W4]"""
    assert to_cgi([(name, b"1")]) == {key: "1"}


@pytest.mark.parametrize(
    "name", [b"x_user", b"X_Forwarded-For", b"content_length", b"content_type", b"_", b"proxy", b"PROXY", b"x-\xe9"]
)
def test_a_name_that_could_be_taken_for_another_is_dropped(name: bytes) -> None:
    """[W4]"""
    assert to_cgi([(name, b"5"), (b"x-user", b"me")]) == {"HTTP_X_USER": "me"}


@pytest.mark.parametrize(
    ("headers", "environ"),
    [
        ([(b"x-a", b"1"), (b"X-A", b"2"), (b"x-a", b"1")], {"HTTP_X_A": "1,2,1"}),
        ([(b"x-a", b""), (b"x-a", b"")], {"HTTP_X_A": ","}),
        ([(b"cookie", b"a=1"), (b"host", b"h"), (b"cookie", b"b=2")], {"HTTP_COOKIE": "a=1; b=2", "HTTP_HOST": "h"}),
        ([(b"content-type", b"a/b"), (b"content-type", b"c/d")], {"CONTENT_TYPE": "a/b,c/d"}),
        ([[b"x-a", b"\xff"]], {"HTTP_X_A": "\xff"}),  # a server may give lists
        ([], {}),
    ],
)
def test_equal_names_are_joined(headers: list[tuple[bytes, bytes]], environ: dict[str, str]) -> None:
    """[W4]"""
    assert to_cgi(headers) == environ
    assert to_cgi(iter(headers)) == environ


@given(st.lists(st.tuples(header_names.map(str.encode), header_values)))
def test_headers_come_back_joined_and_in_order(headers: list[tuple[bytes, bytes]]) -> None:
    """[W4], [A1]"""
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        name = name.lower()
        if b"_" in name or name in (b"proxy", b"content-length"):
            continue
        joined[name] = joined[name] + (b"; " if name == b"cookie" else b",") + value if name in joined else value
    if not joined.get(b"content-type", b"?"):
        del joined[b"content-type"]
    kept = [header for header in headers if header[0].lower() != b"content-length"]
    assert from_cgi(to_cgi(kept)) == list(joined.items())


@given(st.dictionaries(st.text(TOKEN.upper().replace("-", ""), min_size=1).map("HTTP_{}".format), st.text("aé\xff, ;")))
def test_an_environs_headers_come_back_as_they_were(environ: dict[str, str]) -> None:
    """[A1], [W4]"""
    for key in ("HTTP_PROXY", "HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"):
        environ.pop(key, None)
    assert to_cgi(from_cgi(environ)) == environ


@pytest.mark.parametrize(
    ("environ", "headers"),
    [
        (
            {"HTTP_X_A": "1", "CONTENT_TYPE": "a/b", "CONTENT_LENGTH": "5"},
            "x-a: 1, content-type: a/b, content-length: 5",
        ),
        (
            {"CONTENT_LENGTH": "5", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True},
            "transfer-encoding: chunked",
        ),
        (
            {"CONTENT_LENGTH": "5", "HTTP_TRANSFER_ENCODING": "chunked"},
            "content-length: 5, transfer-encoding: chunked",
        ),
        ({"CONTENT_TYPE": "", "CONTENT_LENGTH": ""}, ""),
        ({"HTTP_X_A": ""}, "x-a: "),
        ({"HTTP_PROXY": "http://evil", "http_proxy": "http://evil"}, ""),
        ({"HTTP_CONTENT_TYPE": "a/b", "HTTP_CONTENT_LENGTH": "5"}, ""),
        ({"HTTP_": "x", "HTTP_\xe9": "x", "HTTPS": "on", "http_x": "x", "SERVER_NAME": "h", "PATH": "/bin"}, ""),
        ({"HTTP_X_A": None, "HTTP_X_B": 5, "HTTP_X_C": b"b", "CONTENT_LENGTH": 5}, ""),
        ({"HTTP_X_A": "\xff"}, "x-a: \xff"),
    ],
)
def test_an_environs_headers(environ: dict[str, Any], headers: str) -> None:
    """[A1]"""
    pairs = [tuple(header.encode("latin-1").split(b": ")) for header in headers.split(", ") if header]
    assert from_cgi(environ) == pairs


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("", b""),
        ("a\xff", b"a\xff"),
        ("\u20ac", b"\xe2\x82\xac"),
        ("\ud800", b"?"),
        ("\xe9\u20ac", b"\xc3\xa9\xe2\x82\xac"),
    ],
)
def test_any_text_has_bytes(text: str, wire: bytes) -> None:
    """[A1]"""
    assert wire_bytes(text) == wire


# -- Content-Length --------------------------------------------------------------------------------------------------

BAD_LENGTHS = [
    pytest.param("", id="empty"),
    pytest.param(" ", id="space"),
    pytest.param(" 5", id="space before"),
    pytest.param("5 ", id="space after"),
    pytest.param("5\n", id="newline"),
    pytest.param("+5", id="plus"),
    pytest.param("-5", id="minus"),
    pytest.param("5,5", id="comma"),
    pytest.param("5, 5", id="comma and space"),
    pytest.param("5_0", id="underscore"),
    pytest.param("0x5", id="hexadecimal"),
    pytest.param("5.0", id="point"),
    pytest.param("1e3", id="exponent"),
    pytest.param("\xb2", id="superscript"),
    pytest.param("\u0663", id="arabic digit"),
    pytest.param("\uff15", id="wide digit"),
    pytest.param("five", id="word"),
    pytest.param("5\x00", id="nul"),
    pytest.param("9" * 19, id="19 digits"),
    pytest.param("9" * 5000, id="5000 digits"),
]


@pytest.mark.parametrize("value", BAD_LENGTHS)
def test_a_content_length_that_is_no_plain_decimal_is_refused(value: str) -> None:
    """[W4], [A3], [W14]"""
    with pytest.raises(BadRequest, match=r"expected a plain decimal as Content-Length, got "):
        content_length(value)
    with pytest.raises(BadRequest):
        content_length(value.encode())
    with pytest.raises(BadRequest):
        to_cgi([(b"content-length", value.encode())])
    with pytest.raises(BadRequest):
        to_cgi([(b"content-length", b"5"), (b"Content-Length", value.encode())])
    with pytest.raises(ProtocolError, match="in a response: "):
        declared_length([("Content-Length", value)], "content-length")


@pytest.mark.parametrize(("value", "number"), [("0", 0), ("5", 5), ("0005", 5), ("9" * 18, 10**18 - 1)])
def test_a_content_length(value: str, number: int) -> None:
    """[W4]"""
    assert content_length(value) == content_length(value.encode()) == number
    assert to_cgi([(b"content-length", value.encode())]) == {"CONTENT_LENGTH": value}
    assert declared_length([("Content-Length", value)], "content-length") == number


def test_equal_content_lengths_are_one() -> None:
    """[W4]"""
    assert to_cgi([(b"content-length", b"5"), (b"content-length", b"05")]) == {"CONTENT_LENGTH": "5"}


@pytest.mark.parametrize(
    "headers", [(), ((b"transfer-encoding", b"chunked"),)], ids=["alone", "with Transfer-Encoding"]
)
def test_differing_content_lengths_are_a_bad_request(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    """[W4]"""
    with pytest.raises(BadRequest, match="expected one Content-Length, got 5 and 6"):
        to_cgi([(b"content-length", b"6"), (b"Content-Length", b"5"), (b"content-length", b"5"), *headers])


def test_a_transfer_encoding_overrides_the_content_length() -> None:
    """[W4], RFC 9112, 6.3"""
    headers = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    assert to_cgi(headers) == to_cgi(headers[::-1]) == {"HTTP_TRANSFER_ENCODING": "chunked"}


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([], None),
        ([("Content-Lengths", "5"), ("X", "5"), ("Content_Length", "5")], None),
        ([("x-same-length", "x"), ("CONTENT-LENGTH", "5")], 5),
        ([("content-length", "7")], 7),
        ([("content-length", "5"), ("Content-Length", "05")], 5),
    ],
)
def test_the_length_that_a_response_declares(headers: list[tuple[str, str]], length: int | None) -> None:
    """[W14]"""
    assert declared_length(headers, "content-length") == length
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    assert declared_length(encoded, b"content-length") == length


def test_of_equal_content_lengths_in_a_response_one_is_left() -> None:
    """[W14], [A8]: a proxy may refuse two."""
    headers = [("X-A", "1"), ("Content-Length", "5"), ("X-B", "2"), ("content-length", "5"), ("content-length", "05")]
    assert declared_length(headers, "content-length") == 5
    assert headers == [("X-A", "1"), ("Content-Length", "5"), ("X-B", "2")]


def test_differing_content_lengths_in_a_response_are_an_error() -> None:
    """[W14], [A8]"""
    with pytest.raises(ProtocolError, match="expected one Content-Length in a response, got 5 and 6"):
        declared_length([("content-length", "5"), ("content-length", "6")], "content-length")


# -- Responses -------------------------------------------------------------------------------------------------------


def test_response_headers_keep_their_order_and_repetitions() -> None:
    """[W11], [A6]"""
    native = [("Set-Cookie", "a"), ("X-A", ""), ("set-cookie", "\xe9"), ("X-TAB", "a\tb")]
    assert encode_headers(native) == [
        (b"set-cookie", b"a"),
        (b"x-a", b""),
        (b"set-cookie", b"\xe9"),
        (b"x-tab", b"a\tb"),
    ]
    wire = [(name.encode(), value.encode("latin-1")) for name, value in native]
    assert decode_headers(wire) == native
    assert decode_headers(iter([[b"x", b"y"]])) == [("x", "y")]  # type: ignore[arg-type]  # apps give lists, too


@pytest.mark.parametrize("name", HOP_BY_HOP)
@pytest.mark.parametrize("case", [str.lower, str.upper, str])
def test_hop_by_hop_headers_are_dropped_both_ways(name: str, case: Callable[[str], str]) -> None:
    """[W11]"""
    assert is_hop_by_hop(name)
    name = case(name)
    for _ in range(2):  # the second time from the cache
        assert encode_headers([("X", "1"), (name, "2"), ("Trailer", "3")]) == [(b"x", b"1"), (b"trailer", b"3")]
        assert decode_headers([(b"x", b"1"), (name.encode(), b"2")]) == [("x", "1")]


BAD_NAMES = [
    "",
    " ",
    "a b",
    "a:",
    "a\r\nb: c",
    "a\n",
    "a\x00",
    "\xe9",
    "a\u20ac",
    "(",
    "\x7f",
    "a,b",
    "\u212aeep-alive",
]
BAD_VALUES = ["a\r\nb: c", "\r", "\n", "a\n", "\x00", "\xe9\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_token_is_refused(name: str) -> None:
    """[W10], [A8]"""
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"start_response\(\) expected a token as header name, got "):
            encode_headers([(name, "x")])
        with pytest.raises(ProtocolError, match=r"send\(\) expected a token as header name, got "):
            decode_headers([(name.encode(), b"x")])


@pytest.mark.parametrize("name", ["X-A", "Connection"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_value_with_cr_lf_or_nul_is_refused(name: str, value: str) -> None:
    """[W10], [A8]"""
    with pytest.raises(ProtocolError, match=f"the value of response header '{name}' has a CR, LF or NUL: "):
        encode_headers([(name, value)])
    with pytest.raises(ProtocolError, match=f"the value of response header b'{name}' has a CR, LF or NUL: "):
        decode_headers([(name.encode(), value.encode("latin-1"))])


@pytest.mark.parametrize("value", ["\u20ac", "a\ud800", "\u0100"])
def test_a_value_that_is_not_latin_1_is_refused(value: str) -> None:
    """[W10]"""
    with pytest.raises(ProtocolError, match="is not latin-1"):
        encode_headers([("X-A", value)])


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (None, "expected a list of headers, got None"),
        ((("A", "b"),), "expected a list of headers, got "),
        ({"A": "b"}, "expected a list of headers, got "),
        (iter([("A", "b")]), "expected a list of headers, got "),
        ([None], r"expected \(name, value\) of str, got None"),
        ([("A",)], r"expected \(name, value\) of str, got \('A',\)"),
        ([("A", "b", "c")], r"expected \(name, value\) of str, got "),
        ([([], "b")], r"expected a str as header name, got \[\]"),
        (["A: b"], r"expected \(name, value\) of str, got 'A: b'"),
        ([(b"A", "b")], "expected a str as header name, got b'A'"),
        ([(1, "b")], "expected a str as header name, got 1"),
        ([("A", b"b")], "expected a str as value of 'A', got b'b'"),
        ([("A", 1)], "expected a str as value of 'A', got 1"),
        ([("Content-Length", 1)], "expected a str as value of 'Content-Length', got 1"),
        ([("A", None)], "expected a str as value of 'A', got None"),
    ],
)
def test_wrong_types_in_a_wsgi_response_are_refused(headers: Any, message: str) -> None:
    """[W10], [S1]"""
    encode_headers([("A", "b")])  # a name from the cache is checked like others
    with pytest.raises(ProtocolError, match=rf"start_response\(\) {message}"):
        encode_headers(headers)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (None, "expected an iterable of headers, got None"),
        (5, "expected an iterable of headers, got 5"),
        ([None], r"expected \(name, value\) of bytes, got None"),
        ([(b"a",)], r"expected \(name, value\) of bytes, got "),
        ([(b"a", b"b", b"c")], r"expected \(name, value\) of bytes, got "),
        ([(bytearray(b"a"), b"b")], "expected bytes as header name, got "),
        ([b"a: b"], r"expected \(name, value\) of bytes, got b'a: b'"),
        ([b"ab"], "expected bytes as header name, got 97"),
        ({"a": "b"}, r"expected \(name, value\) of bytes, got 'a'"),
        ([("a", b"b")], "expected bytes as header name, got 'a'"),
        ([(b"a", "b")], "expected bytes as value of b'a', got 'b'"),
        ([(b"a", 1)], "expected bytes as value of b'a', got 1"),
        ([(b"a", memoryview(b"b"))], "expected bytes as value of b'a', got <memory"),
    ],
)
def test_wrong_types_in_an_asgi_response_are_refused(headers: Any, message: str) -> None:
    """[A8], [S1]"""
    decode_headers([(b"a", b"b")])
    with pytest.raises(ProtocolError, match=rf"send\(\) {message}"):
        decode_headers(headers)


@given(st.lists(st.tuples(header_names | st.text(max_size=3), st.text(max_size=5))))
def test_nothing_can_be_injected_by_a_response_header(headers: list[tuple[str, str]]) -> None:
    """[W10], [A8]: what passes is the same text, of harmless characters, less the whitespace around it."""

    def harmless(name: str, value: str) -> bool:
        return (
            name != ""
            and set(name) <= set(TOKEN)
            and not set("\r\n\0") & set(value)
            and max(value, default="") < "\u0100"
        )

    try:
        encoded = encode_headers(headers)
    except ProtocolError:
        assert not all(harmless(*header) for header in headers)
        return
    assert all(harmless(*header) for header in headers)
    kept = [(name, value.strip(" \t")) for name, value in headers if not is_hop_by_hop(name)]
    assert encoded == [(name.lower().encode(), value.encode("latin-1")) for name, value in kept]
    assert decode_headers(encoded) == [(name.lower(), value) for name, value in kept]
    assert decode_headers([(name.encode(), value.encode("latin-1")) for name, value in headers]) == kept


@pytest.mark.parametrize(
    ("method", "status", "bodiless"),
    [("GET", 200, False), ("HEAD", 200, True), ("GET", 204, True), ("POST", 304, True), ("GET", 404, False)],
)
def test_which_responses_have_no_body(method: str, status: int, bodiless: bool) -> None:
    assert is_bodiless(method, status) is bodiless


# -- Cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"x-a", b"cookie", b"content-type", b"content-length", b"x_a", b"proxy"])
def test_many_equal_headers_take_linear_time(name: bytes) -> None:
    """[W4]: CVE-2025-14550 was about this."""
    headers = [(name, b"12345678901234567")] * 100_000
    began = time.process_time()
    environ = to_cgi(headers)
    assert time.process_time() - began < LINEAR_SECONDS
    assert len("".join(environ.values())) in (0, 17, 18 * 100_000 - 1, 19 * 100_000 - 2)


CACHES: list[tuple[dict[Any, Any], Callable[[str], object]]] = [
    (module._environ_keys, lambda name: to_cgi([(name.encode(), b"")])),
    (module._header_names, lambda name: from_cgi({f"HTTP_{name}": ""})),
    (module._encoded_names, lambda name: encode_headers([(name, "")])),
    (module._decoded_names, lambda name: decode_headers([(name.encode(), b"")])),
    (module._encoded_headers, lambda value: encode_headers([("X-A", value)])),
    (module._decoded_headers, lambda value: decode_headers([(b"X-A", value.encode())])),
]


@pytest.mark.parametrize(
    ("cache", "translate"), CACHES, ids=["to_cgi", "from_cgi", "encode", "decode", "encode-value", "decode-value"]
)
def test_a_client_that_sends_random_names_fills_no_memory(
    cache: dict[Any, Any], translate: Callable[[str], object]
) -> None:
    """[W4], [A13]"""
    expected = translate("X-A")
    for number in range(3000):
        translate(f"X-{number}")
    assert 0 < len(cache) <= 1024
    before = dict(cache)
    translate("X" * 1000)
    assert cache == before
    assert translate("X-A") == expected


def test_cookies_that_a_response_sets_are_not_kept() -> None:
    """They are for one client; a header that was seen before gives the same again."""
    for _ in range(2):
        headers = [("Set-Cookie", "id=1"), ("X-Kept", "1"), ("Connection", "close")]
        assert encode_headers(headers) == [(b"set-cookie", b"id=1"), (b"x-kept", b"1")]
        wire = [(b"Set-Cookie", b"id=1"), (b"X-Kept", b"1"), (b"Connection", b"close")]
        assert decode_headers(wire) == [("Set-Cookie", "id=1"), ("X-Kept", "1")]
    for cache in (module._encoded_headers, module._decoded_headers):
        assert ("X-Kept", "1") in cache or (b"X-Kept", b"1") in cache
        assert not [name for name, _ in cache if name in ("Set-Cookie", b"Set-Cookie")]


def test_whitespace_around_a_value_does_not_belong_to_it() -> None:
    """[W11] [A6]: Django's WSGI handler begins each cookie with a space; h11, and so uvicorn, refuses it."""
    for _ in range(2):
        assert encode_headers([("Set-Cookie", " id=1"), ("X-A", "\ta b \t")]) == [
            (b"set-cookie", b"id=1"),
            (b"x-a", b"a b"),
        ]
        assert decode_headers([(b"Set-Cookie", b" id=1"), (b"X-A", b"\ta b \t")]) == [
            ("Set-Cookie", "id=1"),
            ("X-A", "a b"),
        ]


def test_a_header_of_a_megabyte_passes() -> None:
    """[W4], [W11]"""
    name, value = "x" * 1_000_000, "v" * 1_000_000
    wire = [(name.encode(), value.encode())]
    assert to_cgi(wire) == {f"HTTP_{name.upper()}": value}
    assert from_cgi({f"HTTP_{name.upper()}": value}) == wire
    assert encode_headers([(name, value)]) == wire
    assert decode_headers(wire) == [(name, value)]


def test_a_message_about_a_megabyte_is_short() -> None:
    """[S1]"""
    with pytest.raises(ProtocolError) as caught:
        encode_headers([("X-A", "\n" * 1_000_000)])
    assert len(str(caught.value)) < 200
