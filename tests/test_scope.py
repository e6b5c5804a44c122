"""The scope of an environ: of those that PEP 3333 allows, and of those that servers really give."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.environ import build_environ
from bridge.scope import build_scope, build_websocket_scope, wants_websocket

if TYPE_CHECKING:
    from collections.abc import Iterator

Environ = dict[str, Any]
Scope = dict[str, Any]

# All that PEP 3333 demands of a server when nothing is empty.
REQUIRED: Environ = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/",
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.input": io.BytesIO(),
    "wsgi.errors": io.StringIO(),
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
}


def scope_of(**changes: Any) -> Scope:
    """The scope of the smallest environ but for the changes."""
    return cast("Scope", build_scope(REQUIRED | changes))


# -- Which keys there are --------------------------------------------------------------------------------------------


def test_a_whole_request() -> None:
    """[A1], [A2]"""
    environ = REQUIRED | {
        "REQUEST_METHOD": "post",
        "SCRIPT_NAME": "/app",
        "PATH_INFO": "/\xc3\xa9",
        "QUERY_STRING": "a=%20\xe9",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "5",
        "HTTP_X_A": "\xe9",
        "REMOTE_ADDR": "10.0.0.1",
        "REMOTE_PORT": "50000",
        "REQUEST_URI": "/app/%c3%a9?a=%20\xe9",
        "wsgi.url_scheme": "https",
    }
    scope = cast("Scope", build_scope(environ))
    assert scope["extensions"]["wsgi.environ"] is environ
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": "/app/\xe9",
        "raw_path": b"/app/%c3%a9",
        "query_string": b"a=%20\xe9",
        "root_path": "/app",
        "headers": [(b"content-type", b"text/plain"), (b"content-length", b"5"), (b"x-a", b"\xe9")],
        "client": ("10.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "extensions": {"wsgi.environ": environ},
    }


def test_the_keys_that_pep_3333_requires_are_enough() -> None:
    """[A1]"""
    empty_may_be_absent = {"SCRIPT_NAME", "PATH_INFO"}
    environ = {key: value for key, value in REQUIRED.items() if key not in empty_may_be_absent}
    scope = build_scope(environ)
    assert scope["path"] == "/"
    assert scope["raw_path"] == b"/"
    assert scope["root_path"] == ""
    assert scope["query_string"] == b""
    assert scope["headers"] == []
    assert scope["client"] is None
    assert scope["server"] == ("127.0.0.1", 8000)


def test_even_the_method_alone_is_enough() -> None:
    """[A1]"""
    scope = build_scope({"REQUEST_METHOD": "GET"})
    assert (scope["scheme"], scope["http_version"], scope["path"], scope["server"]) == ("http", "1.1", "/", None)


def dicts_and_lists(value: object) -> Iterator[object]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from dicts_and_lists(inner)


def test_no_dict_is_shared_between_two_scopes() -> None:
    """[A2]"""
    environ = REQUIRED | {"HTTP_X": "1"}
    seen: dict[int, object] = {}
    for build in (build_scope, build_scope, build_websocket_scope):
        scope = cast("Scope", build(environ))
        assert scope["extensions"].pop("wsgi.environ") is environ
        new = {id(thing): thing for thing in dicts_and_lists(scope)}
        assert len(new) >= 4  # the scope, asgi, headers, extensions
        assert not new.keys() & seen.keys()
        seen |= new


@pytest.mark.parametrize(
    ("protocol", "version"),
    [
        ("HTTP/1.0", "1.0"),
        ("HTTP/1.1", "1.1"),
        ("HTTP/2", "2"),
        ("HTTP/2.0", "2"),
        ("HTTP/3", "3"),
        ("", "1.1"),
        ("INCLUDED", "1.1"),
        ("HTTP/0.9", "1.1"),
    ],
)
def test_the_http_version(protocol: str, version: str) -> None:
    """[A1]"""
    assert scope_of(SERVER_PROTOCOL=protocol)["http_version"] == version


@pytest.mark.parametrize(
    ("name", "port", "scheme", "server"),
    [
        ("h", "8000", "http", ("h", 8000)),
        ("h", 8000, "http", ("h", 8000)),
        ("h", "", "http", ("h", 80)),
        ("h", "", "https", ("h", 443)),
        ("h", None, "http", ("h", 80)),
        ("h", "0", "http", ("h", 80)),
        ("h", "-1", "http", ("h", 80)),
        ("h", "65536", "http", ("h", 80)),
        ("h", "9" * 5000, "http", ("h", 80)),
        ("h", "http", "http", ("h", 80)),
        ("h", "\u0663", "http", ("h", 80)),
        ("h", "\xb2", "http", ("h", 80)),
        ("::1", "8000", "http", ("::1", 8000)),
        ("/run/app.sock", "", "http", ("/run/app.sock", None)),
        ("", "8000", "http", None),
        (None, "8000", "http", None),
    ],
)
def test_the_server(name: Any, port: Any, scheme: str, server: Any) -> None:
    """[A1]"""
    assert scope_of(SERVER_NAME=name, SERVER_PORT=port, **{"wsgi.url_scheme": scheme})["server"] == server


@pytest.mark.parametrize(
    ("address", "port", "client"),
    [
        ("10.0.0.1", "50000", ("10.0.0.1", 50000)),
        ("10.0.0.1", 50000, ("10.0.0.1", 50000)),
        ("10.0.0.1", None, ("10.0.0.1", 0)),
        ("10.0.0.1", "", ("10.0.0.1", 0)),
        ("10.0.0.1", "x", ("10.0.0.1", 0)),
        ("", "", None),
        ("", "50000", None),
        (None, None, None),
    ],
)
def test_the_client(address: Any, port: Any, client: Any) -> None:
    """[A1]"""
    assert scope_of(REMOTE_ADDR=address, REMOTE_PORT=port)["client"] == client


# -- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "path", "raw_path"),
    [
        ({"PATH_INFO": "/a b"}, "/a b", b"/a%20b"),
        ({"PATH_INFO": "/\xc3\xa9"}, "/\xe9", b"/%C3%A9"),
        ({"PATH_INFO": "/\xff"}, "/\ufffd", b"/%FF"),
        ({"PATH_INFO": "/a%2Fb"}, "/a%2Fb", b"/a%252Fb"),
        ({"PATH_INFO": "/:@!$&'()*+,;=~-._?#"}, "/:@!$&'()*+,;=~-._?#", b"/:@!$&'()*+,;=~-._%3F%23"),
        ({"PATH_INFO": "/\u20ac"}, "/\u20ac", b"/%E2%82%AC"),  # a server's mistake
        ({"SCRIPT_NAME": "/\xc3\xa9", "PATH_INFO": "/\u20ac"}, "/\xe9/\u20ac", b"/%C3%A9/%E2%82%AC"),
        ({"SCRIPT_NAME": "/app", "PATH_INFO": ""}, "/app", b"/app"),
        ({"SCRIPT_NAME": "", "PATH_INFO": ""}, "/", b"/"),
        ({"PATH_INFO": "*", "REQUEST_METHOD": "OPTIONS", "REQUEST_URI": "*"}, "*", b"*"),
        # The raw URI is believed,
        ({"PATH_INFO": "/a/b", "REQUEST_URI": "/a%2fb?x=/c"}, "/a/b", b"/a%2fb"),
        ({"PATH_INFO": "/a/b", "RAW_URI": "/a%2Fb"}, "/a/b", b"/a%2Fb"),
        ({"PATH_INFO": "/a/b", "REQUEST_URI": "", "RAW_URI": "/a%2Fb"}, "/a/b", b"/a%2Fb"),
        ({"PATH_INFO": "/a", "REQUEST_URI": "http://example.com/%61?x"}, "/a", b"/%61"),
        ({"PATH_INFO": "/\xff", "REQUEST_URI": "/\xff"}, "/\ufffd", b"/\xff"),
        ({"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "REQUEST_URI": "/%61pp/x"}, "/app/x", b"/%61pp/x"),
        # unless middleware has rewritten the path.
        ({"PATH_INFO": "/new", "REQUEST_URI": "/old"}, "/new", b"/new"),
        ({"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "REQUEST_URI": "/x"}, "/app/x", b"/app/x"),
        ({"PATH_INFO": "/new \xff", "REQUEST_URI": "/%ff"}, "/new \ufffd", b"/new%20%FF"),
    ],
)
def test_the_path_and_the_raw_path(changes: Environ, path: str, raw_path: bytes) -> None:
    """[A1]"""
    scope = scope_of(**changes)
    assert (scope["path"], scope["raw_path"]) == (path, raw_path)


any_text = st.text() | st.text("/%aé\xc3\xa9\xff", max_size=8)
TEXT_KEYS = (
    "REQUEST_METHOD SCRIPT_NAME PATH_INFO QUERY_STRING CONTENT_TYPE CONTENT_LENGTH SERVER_NAME SERVER_PORT "
    "SERVER_PROTOCOL REMOTE_ADDR REMOTE_PORT REQUEST_URI RAW_URI RAW_PATH_INFO HTTP_X_A "
    "HTTP_SEC_WEBSOCKET_PROTOCOL"
).split()


@given(st.dictionaries(st.sampled_from(TEXT_KEYS) | st.text().map("HTTP_{}".format), any_text))
def test_no_text_in_an_environ_is_refused(changes: dict[str, str]) -> None:
    """[A1]"""
    environ = REQUIRED | changes
    for scope in (cast("Scope", build_scope(environ)), cast("Scope", build_websocket_scope(environ))):
        assert scope["path"].encode()
        if environ["PATH_INFO"][:1] in ("", "/"):  # else SCRIPT_NAME may end in the middle of a character
            assert scope["path"].startswith(scope["root_path"])
        # Where PATH_INFO still has escapes, as cheroot's has, raw_path has them once and not twice.
        raw, path = (unquote_to_bytes(path).decode("utf-8", "replace") for path in (scope["raw_path"], scope["path"]))
        assert raw in (scope["path"], path)
        assert type(scope["query_string"]) is type(scope["raw_path"]) is bytes
        assert all(name == name.lower() and type(value) is bytes for name, value in scope["headers"])
        for address in (scope["client"], scope["server"]):
            assert address is None or (type(address[0]) is str and (address[1] is None or type(address[1]) is int))


# -- What servers really give ----------------------------------------------------------------------------------------


def callable_key(*args: object) -> None:
    """Stands for what servers put into an environ beside text."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {
                "SERVER_NAME": "waitress.invalid",
                "REQUEST_URI": "/a%2Fb?x=1",
                "PATH_INFO": "/a/b",
                "QUERY_STRING": "x=1",
                "REMOTE_ADDR": "10.0.0.1",
                "REMOTE_HOST": "10.0.0.1",
                "REMOTE_PORT": "50000",
                "wsgi.file_wrapper": callable_key,
                "wsgi.input_terminated": True,
                "waitress.client_disconnected": callable_key,
            },
            {
                "path": "/a/b",
                "raw_path": b"/a%2Fb",
                "query_string": b"x=1",
                "server": ("waitress.invalid", 8000),
                "client": ("10.0.0.1", 50000),
                "headers": [],
            },
            id="waitress",
        ),
        pytest.param(
            {
                "PATH_INFO": "/\xc3\xa9%2Fb",
                "REQUEST_URI": "/%C3%A9%2Fb",
                "ACTUAL_SERVER_PROTOCOL": "HTTP/1.1",
                "X_REMOTE_PID": "1",
                "wsgi.input_terminated": False,
            },
            {"path": "/\xe9%2Fb", "raw_path": b"/%C3%A9%2Fb", "headers": []},
            id="cheroot leaves %2F in PATH_INFO",
        ),
        pytest.param(
            {"SERVER_NAME": "/run/app.sock", "SERVER_PORT": "", "REMOTE_ADDR": "", "REMOTE_PORT": ""},
            {"server": ("/run/app.sock", None), "client": None},
            id="cheroot on a unix socket",
        ),
        pytest.param(
            {
                "PATH_INFO": "/a b\xff",
                "HOME": "/root",
                "PATH": "/bin",
                "HTTP_PROXY": "http://proxy:3128",
                "http_proxy": "http://proxy:3128",
                "LANG": "C.UTF-8",
                "GATEWAY_INTERFACE": "CGI/1.1",
                "REMOTE_HOST": "",
                "REMOTE_ADDR": "127.0.0.1",
                "CONTENT_TYPE": "text/plain",
                "CONTENT_LENGTH": "",
                "SERVER_PROTOCOL": "HTTP/1.0",
                "HTTP_HOST": "example.com",
                "wsgi.file_wrapper": callable_key,
            },
            {
                "http_version": "1.0",
                "path": "/a b\ufffd",
                "raw_path": b"/a%20b%FF",
                "client": ("127.0.0.1", 0),
                "headers": [(b"content-type", b"text/plain"), (b"host", b"example.com")],
            },
            id="wsgiref copies os.environ in",
        ),
        pytest.param(
            {
                "PATH_INFO": "/a/b\xff",
                "HTTP_COOKIE": "a=1; b=2",
                "REMOTE_ADDR": "10.0.0.1",
                "REMOTE_PORT": "50000",
                "GATEWAY_INTERFACE": "CGI/1.1",
                "SERVER_SOFTWARE": "gevent/26.9 Python/3.11",
                "wsgi.input_terminated": True,
            },
            {"raw_path": b"/a/b%FF", "headers": [(b"cookie", b"a=1; b=2")], "client": ("10.0.0.1", 50000)},
            id="gevent gives no raw URI",
        ),
        pytest.param(
            {"REMOTE_ADDR": "10.0.0.1", "HTTP_PROXY": "http://proxy:3128", "HTTP_COOKIE": "a=1;b=2", "HOME": "/root"},
            {"client": ("10.0.0.1", 0), "headers": [(b"cookie", b"a=1;b=2")]},
            id="granian gives no REMOTE_PORT and copies os.environ in",
        ),
        pytest.param(
            {
                "PATH_INFO": "/a/b",
                "REQUEST_URI": "/a%2Fb?x=1",
                "QUERY_STRING": "x=1",
                "CONTENT_TYPE": "",
                "CONTENT_LENGTH": "",
                "DOCUMENT_ROOT": "",
                "uwsgi.version": b"2.0.28",
                "uwsgi.core": 0,
                "uwsgi.node": b"host",
                "x-wsgiorg.fdevent.readable": callable_key,
                "wsgi.file_wrapper": callable_key,
            },
            {"raw_path": b"/a%2Fb", "query_string": b"x=1", "headers": []},
            id="uWSGI",
        ),
        pytest.param(
            {
                "SCRIPT_NAME": "/app",
                "PATH_INFO": "/x",
                "REQUEST_URI": "/app/x",
                "mod_wsgi.version": (6, 0),
                "apache.version": (2, 4, 62),
                "CONTEXT_PREFIX": "",
                "UNIQUE_ID": "x",
                "wsgi.input_terminated": True,
            },
            {"root_path": "/app", "path": "/app/x", "raw_path": b"/app/x", "headers": []},
            id="mod_wsgi",
        ),
        pytest.param(
            {
                "PATH_INFO": "/a/b\xff",
                "RAW_PATH_INFO": "/a%2Fb%ff",
                "headers_raw": (("X-A", "1"),),
                "HTTP_X_A": "1",
                "eventlet.posthooks": [],
                "eventlet.input": None,
            },
            {"path": "/a/b\ufffd", "raw_path": b"/a%2Fb%ff", "headers": [(b"x-a", b"1")]},
            id="eventlet gives RAW_PATH_INFO",
        ),
        pytest.param(
            {
                "PATH_INFO": "/a/b\xef\xbf\xbd",
                "REQUEST_URI": "/a/b%ff?x=1",
                "RAW_URI": "/a/b%ff?x=1",
                "werkzeug.socket": object(),
            },
            {"path": "/a/b\ufffd", "raw_path": b"/a/b%ff"},
            id="werkzeug has a lossy PATH_INFO",
        ),
        pytest.param(
            {
                "SERVER_NAME": "/run/app.sock",
                "SERVER_PORT": "",
                "REMOTE_ADDR": "",
                "RAW_URI": "/",
                "gunicorn.socket": object(),
                "wsgi.input_terminated": True,
            },
            {"server": ("/run/app.sock", None), "client": None, "raw_path": b"/"},
            id="gunicorn on a unix socket",
        ),
        pytest.param(
            {
                "SERVER_PROTOCOL": "HTTP/2",
                "RAW_URI": "/a%2Fb",
                "PATH_INFO": "/a/b",
                "gunicorn.http2.priority_weight": 16,
                "gunicorn.http2.send_trailers": callable_key,
            },
            {"http_version": "2", "raw_path": b"/a%2Fb"},
            id="gunicorn HTTP 2",
        ),
    ],
)
def test_what_servers_really_give(changes: Environ, expected: Scope) -> None:
    """[A1]"""
    scope = scope_of(**changes)
    assert {key: scope[key] for key in expected} == expected


# -- WebSocket -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "scheme", "subprotocols"),
    [
        ({}, "ws", []),
        ({"wsgi.url_scheme": "https"}, "wss", []),
        ({"HTTP_SEC_WEBSOCKET_PROTOCOL": "chat"}, "ws", ["chat"]),
        ({"HTTP_SEC_WEBSOCKET_PROTOCOL": "chat, superchat ,,x"}, "ws", ["chat", "superchat", "x"]),
        ({"HTTP_SEC_WEBSOCKET_PROTOCOL": " ,"}, "ws", []),
    ],
)
def test_a_websocket_scope(changes: Environ, scheme: str, subprotocols: list[str]) -> None:
    """[A22]"""
    environ = REQUIRED | {"PATH_INFO": "/\xff", "HTTP_UPGRADE": "websocket"} | changes
    http, websocket = cast("Scope", build_scope(environ)), cast("Scope", build_websocket_scope(environ))
    assert http.pop("method") == "GET"
    assert websocket.pop("subprotocols") == subprotocols
    assert websocket == http | {"type": "websocket", "scheme": scheme}


UPGRADE: Environ = {"SERVER_PROTOCOL": "HTTP/1.1", "HTTP_UPGRADE": "websocket", "HTTP_CONNECTION": "Upgrade"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"HTTP_UPGRADE": "WebSocket"}, True),
        ({"HTTP_UPGRADE": "h2c, websocket"}, True),
        ({"HTTP_CONNECTION": "keep-alive, Upgrade"}, True),
        ({"HTTP_CONNECTION": "upgrade"}, True),
        ({"HTTP_UPGRADE": "h2c"}, False),
        ({"HTTP_UPGRADE": "websockets"}, False),
        ({"HTTP_UPGRADE": ""}, False),
        ({"HTTP_UPGRADE": None}, False),
        ({"HTTP_CONNECTION": "keep-alive"}, False),
        ({"HTTP_CONNECTION": None}, False),
        ({"SERVER_PROTOCOL": "HTTP/1.0"}, False),
        ({"SERVER_PROTOCOL": "HTTP/2.0"}, False),
        ({"REQUEST_METHOD": "POST"}, False),
        ({"REQUEST_METHOD": "CONNECT"}, False),
    ],
)
def test_what_asks_for_a_websocket(changes: Environ, wanted: bool) -> None:
    """[A22]"""
    assert wants_websocket(REQUIRED | UPGRADE | changes) is wanted


@pytest.mark.parametrize("key", ["SERVER_PROTOCOL", "HTTP_UPGRADE", "HTTP_CONNECTION"])
def test_what_asks_for_no_websocket_for_lack_of_a_key(key: str) -> None:
    """[A22]"""
    environ = REQUIRED | UPGRADE
    del environ[key]
    assert not wants_websocket(environ)


# -- There and back --------------------------------------------------------------------------------------------------

latin_1 = st.characters(max_codepoint=255)
path_text = st.lists(st.text(latin_1, max_size=4) | st.text("/%2F\xc3\xa9\xff", max_size=4), max_size=3)
header_keys = st.text("ABC_019!", min_size=1).filter(lambda name: name not in ("CONTENT_TYPE", "CONTENT_LENGTH"))


@st.composite
def environs(draw: st.DrawFn) -> Environ:
    """Of well-behaved servers: SCRIPT_NAME is empty or begins with a slash and does not end in one."""
    script_name = "".join(f"/{part}" for part in draw(path_text)).strip("/")
    path = "".join(f"/{part}" for part in draw(path_text))
    environ = REQUIRED | {
        "REQUEST_METHOD": draw(st.sampled_from(["GET", "POST", "QUERY"])),
        "SCRIPT_NAME": script_name and f"/{script_name}",
        "PATH_INFO": path or ("" if script_name else "/"),
        "QUERY_STRING": draw(st.text(latin_1)),
        "SERVER_NAME": draw(st.sampled_from(["h", "127.0.0.1", "::1"])),
        "SERVER_PORT": str(draw(st.integers(1, 65535))),
        "SERVER_PROTOCOL": draw(st.sampled_from(["HTTP/1.0", "HTTP/1.1", "HTTP/2"])),
        "wsgi.url_scheme": draw(st.sampled_from(["http", "https"])),
        **{f"HTTP_{name}": draw(st.text(latin_1)) for name in draw(st.sets(header_keys, max_size=4))},
    }
    if draw(st.booleans()):
        environ |= {"REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": str(draw(st.integers(1, 65535)))}
    if draw(st.booleans()):
        environ |= {"CONTENT_TYPE": "text/plain", "CONTENT_LENGTH": str(draw(st.integers(0, 10**9)))}
    if draw(st.booleans()):
        sent = quote((environ["SCRIPT_NAME"] + environ["PATH_INFO"]).encode("latin-1"))
        environ["REQUEST_URI"] = f"{sent}?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else sent
    return environ


@given(environs())
def test_an_environ_comes_back_from_its_scope(environ: Environ) -> None:
    """[A1], [W1], [W2], [W3], [W4], [W5]: nothing of a request is lost on the way through both wrappers."""
    back = build_environ(build_scope(environ), cast("Any", environ["wsgi.input"]))
    assert {key: back.get(key) for key in environ} == environ


@given(environs())
def test_a_scope_comes_back_from_its_environ(environ: Environ) -> None:
    """[A1], [W1], [W2], [W3], [W4], [W5]"""
    scope = cast("Scope", build_scope(environ))
    scope["extensions"] = {}
    back = cast("Scope", build_scope(build_environ(scope, io.BytesIO())))
    back["extensions"] = {}
    scope["headers"].sort()
    back["headers"].sort()
    assert back == scope
