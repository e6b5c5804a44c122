"""The environ of a scope: of those that the specification allows, and of those that servers really give."""

from __future__ import annotations

import io
import sys
from types import MappingProxyType
from typing import Any
from urllib.parse import quote
from wsgiref.validate import check_environ  # type: ignore[attr-defined]  # not in typeshed

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.environ import build_environ
from bridge.errors import BadRequest

Scope = dict[str, Any]
Environ = dict[str, Any]

REQUIRED: Scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": "/"}
OPTIONAL: Scope = {
    "scheme": "http",
    "raw_path": b"/",
    "query_string": b"a=1",
    "root_path": "/app",
    "headers": [(b"host", b"example.com"), (b"content-type", b"text/plain"), (b"content-length", b"0")],
    "client": ("10.0.0.1", 50000),
    "server": ("127.0.0.1", 8000),
    "state": {},
    "extensions": {},
}


def environ_of(**changes: Any) -> Environ:
    """The environ of the smallest scope but for the changes; it is always one that a WSGI app may get."""
    environ = build_environ(REQUIRED | changes, io.BytesIO())
    check_environ(environ)
    return environ


def paths(environ: Environ) -> tuple[str, str]:
    return environ["SCRIPT_NAME"], environ["PATH_INFO"]


# -- Which keys there are --------------------------------------------------------------------------------------------


def test_a_whole_request() -> None:
    """[W1], [W5], [W6]"""
    scope = REQUIRED | OPTIONAL | {"method": "POST", "scheme": "https", "path": "/app/x", "raw_path": b"/app/x"}
    stream = io.BytesIO()
    environ = build_environ(scope, stream)
    check_environ(environ)
    assert type(environ) is dict
    assert environ["wsgi.input"] is stream
    assert environ["asgi.scope"] is scope
    text = {key: value for key, value in environ.items() if "." not in key}
    assert text == {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "/app",
        "PATH_INFO": "/x",
        "QUERY_STRING": "a=1",
        "REQUEST_URI": "/app/x?a=1",
        "RAW_URI": "/app/x?a=1",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "10.0.0.1",
        "REMOTE_PORT": "50000",
        "HTTPS": "on",
        "HTTP_HOST": "example.com",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "0",
    }
    assert environ["wsgi.version"] == (1, 0)
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["wsgi.multithread"] is environ["wsgi.input_terminated"] is True
    assert environ["wsgi.run_once"] is False


@given(st.sets(st.sampled_from([*OPTIONAL, "http_version"])), st.sets(st.sampled_from([*OPTIONAL, "http_version"])))
def test_any_optional_key_may_be_missing_or_none(missing: set[str], none: set[str]) -> None:
    """[W1]"""
    scope = {key: value for key, value in (REQUIRED | OPTIONAL | dict.fromkeys(none)).items() if key not in missing}
    environ = build_environ(scope, io.BytesIO())
    check_environ(environ)
    gone = missing | none
    assert environ["SCRIPT_NAME"] == ("" if "root_path" in gone else "/app")
    assert environ["QUERY_STRING"] == ("" if "query_string" in gone else "a=1")
    assert environ.get("HTTP_HOST") == (None if "headers" in gone else "example.com")
    assert environ.get("REMOTE_ADDR") == (None if "client" in gone else "10.0.0.1")
    host = "localhost" if "headers" in gone else "example.com"
    assert environ["SERVER_NAME"] == (host if "server" in gone else "127.0.0.1")
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    assert environ["wsgi.url_scheme"] == "http"


def test_errors_go_to_the_stderr_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """[W6]"""
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    assert environ_of()["wsgi.errors"] is stderr


def test_the_scope_is_not_changed() -> None:
    """[W1]: granian shares one dict of extensions between all requests."""
    extensions: MappingProxyType[str, Any] = MappingProxyType({"http.response.pathsend": MappingProxyType({})})
    scope = MappingProxyType(REQUIRED | OPTIONAL | {"extensions": extensions})
    environ = build_environ(scope, io.BytesIO())
    assert environ["asgi.scope"] is scope


@pytest.mark.parametrize(
    ("version", "protocol"),
    [("1.0", "HTTP/1.0"), ("1", "HTTP/1.0"), ("1.1", "HTTP/1.1"), ("2", "HTTP/2"), ("3", "HTTP/3")],
)
def test_the_protocol(version: str, protocol: str) -> None:
    """[W5]"""
    assert environ_of(http_version=version)["SERVER_PROTOCOL"] == protocol


def test_https_is_on_for_https_alone() -> None:
    """[W5]"""
    assert environ_of(scheme="https")["HTTPS"] == "on"
    assert "HTTPS" not in environ_of(scheme="http")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"5"), (b"content-length", b"6")],
        [(b"content-length", b"5, 5")],
        [(b"content-length", b"-1")],
    ],
)
def test_a_misleading_content_length_is_a_bad_request(headers: list[tuple[bytes, bytes]]) -> None:
    """[W4]"""
    with pytest.raises(BadRequest):
        environ_of(headers=headers)


# -- Where the server is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "host", "name", "port"),
    [
        (("127.0.0.1", 8000), b"example.com", "127.0.0.1", "8000"),
        (["127.0.0.1", "8000"], b"example.com", "127.0.0.1", "8000"),
        (("::1", 8000), b"example.com", "::1", "8000"),
        (("/run/app.sock", None), b"example.com:81", "example.com", "81"),
        (("/run/app.sock", "0"), b"example.com", "example.com", "80"),
        (("/", "t"), b"example.com", "example.com", "80"),
        (("h", 0), b"example.com", "example.com", "80"),
        (("h", -1), b"example.com", "example.com", "80"),
        (("h", 65536), b"example.com", "example.com", "80"),
        (("h", "99999999999999999999"), b"example.com", "example.com", "80"),
        (("h", "\u0663"), b"example.com", "example.com", "80"),
        (("h", True), b"example.com", "example.com", "80"),
        (("h", "8000 "), b"example.com", "example.com", "80"),
        (("", 8000), b"example.com", "example.com", "80"),
        ((None, None), b"example.com", "example.com", "80"),
        (None, b"[::1]:8443", "[::1]", "8443"),
        (None, b"[::1]", "[::1]", "80"),
        (None, b"[2001:db8::1]", "[2001:db8::1]", "80"),
        (None, b"example.com:", "example.com", "80"),
        (None, b"example.com:http", "example.com", "80"),
        (None, b"example.com:99999", "example.com", "80"),
        (None, b":8000", "localhost", "8000"),
        (None, b"", "localhost", "80"),
        (None, None, "localhost", "80"),
        (("/run/app.sock", None), None, "localhost", "80"),
    ],
)
def test_the_servers_name_and_port(server: Any, host: bytes | None, name: str, port: str) -> None:
    """[W5]"""
    environ = environ_of(server=server, headers=[] if host is None else [(b"host", host)])
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (name, port)


@pytest.mark.parametrize("host", [[], [(b"host", b"example.com")]])
def test_the_default_port_is_the_schemes(host: list[tuple[bytes, bytes]]) -> None:
    """[W5]"""
    assert environ_of(scheme="https", headers=host)["SERVER_PORT"] == "443"


@pytest.mark.parametrize(
    ("client", "known"),
    [
        (("10.0.0.1", 50000), {"REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": "50000"}),
        (["10.0.0.1", "50000"], {"REMOTE_ADDR": "10.0.0.1", "REMOTE_PORT": "50000"}),
        (("::1", 0), {"REMOTE_ADDR": "::1"}),
        (("10.0.0.1", None), {"REMOTE_ADDR": "10.0.0.1"}),
        (("10.0.0.1", "x"), {"REMOTE_ADDR": "10.0.0.1"}),
        (("", "0"), {}),
        ((None, None), {}),
        (None, {}),
    ],
)
def test_the_client(client: Any, known: dict[str, str]) -> None:
    """[W5]"""
    assert {key: value for key, value in environ_of(client=client).items() if key.startswith("REMOTE_")} == known


# -- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root_path", "path", "script_name", "path_info"),
    [
        ("", "/", "", "/"),
        ("", "/a/b", "", "/a/b"),
        ("/app", "/app/x", "/app", "/x"),
        ("/app", "/app/", "/app", "/"),
        ("/app", "/app", "/app", ""),
        ("/app", "/apple", "/app", "/apple"),
        ("/app", "/ap", "/app", "/ap"),
        ("/app", "/x/app", "/app", "/x/app"),
        ("/app", "/app/app/x", "/app", "/app/x"),
        ("/app", "/app//x", "/app", "//x"),
        ("/app", "/App/x", "/app", "/App/x"),
        ("/a/b", "/a/b/c", "/a/b", "/c"),
        ("/a/b", "/a/bc", "/a/b", "/a/bc"),
        ("/app/", "/app/x", "/app", "/x"),
        ("app", "/app/x", "/app", "/x"),
        ("/", "/x", "", "/x"),
        ("", "//x//y", "", "//x//y"),
        ("", "", "", "/"),
        ("/app", "", "/app", "/"),
        ("", "*", "", "/*"),
        ("", "http://example.com/x", "", "/x"),
        ("", "http://example.com", "", "/"),
        ("/app", "http://example.com/app/x", "/app", "/x"),
        ("/\xe9", "/\xe9/x", "/\xc3\xa9", "/x"),
        ("/\xe9", "/\xe9x", "/\xc3\xa9", "/\xc3\xa9x"),
        ("/\xe9", "/x", "/\xc3\xa9", "/x"),
        ("", "/\u20ac", "", "/\xe2\x82\xac"),
        ("", "/\udcff", "", "/\xff"),
        ("", "/a%2Fb", "", "/a%2Fb"),
    ],
)
def test_the_path_is_split_at_a_segments_end(root_path: str, path: str, script_name: str, path_info: str) -> None:
    """[W2]"""
    assert paths(environ_of(root_path=root_path, path=path)) == (script_name, path_info)


segments = st.lists(st.text("ab\xe9\u20ac\ufffd%. ", max_size=3), max_size=4)


@given(segments, segments, st.booleans())
def test_no_byte_of_a_path_is_lost_nor_a_segment_cut(root: list[str], rest: list[str], prefixed: bool) -> None:
    """[W2]"""
    root_path = "".join(f"/{segment}" for segment in root).strip("/")
    root_path = root_path and f"/{root_path}"
    path = "".join(f"/{segment}" for segment in rest)
    path = (root_path + path if prefixed else path) or "/"
    script_name, path_info = paths(environ_of(root_path=root_path, path=path))
    assert script_name.encode("latin-1").decode() == root_path
    if path == root_path or path.startswith(f"{root_path}/"):
        assert (script_name + path_info).encode("latin-1") == path.encode()
        assert path_info == "" or path_info.startswith("/")
    else:
        assert path_info.encode("latin-1") == path.encode()


byte_segments = st.lists(st.binary(max_size=3) | st.sampled_from([b"\xff", b"\xc3\xa9", b"\xef\xbf\xbd"]), max_size=4)


@given(byte_segments, byte_segments)
def test_raw_path_gives_the_exact_bytes(root: list[bytes], rest: list[bytes]) -> None:
    """[W2]"""
    root_path = b"".join(b"/" + segment for segment in root).strip(b"/")
    root_path = root_path and b"/" + root_path
    path = root_path + b"".join(b"/" + segment for segment in rest) or b"/"
    environ = environ_of(
        root_path=root_path.decode("utf-8", "replace"),
        path=path.decode("utf-8", "replace"),
        raw_path=quote(path).encode(),
    )
    script_name, path_info = (part.encode("latin-1") for part in paths(environ))
    if (root_path and path[len(root_path) :].startswith(b"/")) or path == root_path:
        assert (script_name, path_info) == (root_path, path[len(root_path) :])
    else:
        assert path_info == path


@pytest.mark.parametrize(
    ("path", "raw_path", "path_info"),
    [
        ("/\ufffd", b"/%ff", "/\xff"),
        ("/\ufffd", b"/\xff", "/\xff"),
        ("/a/b\ufffd", b"/a%2Fb%FF", "/a/b\xff"),
        ("/\ufffd", b"/%EF%BF%BD", "/\xef\xbf\xbd"),
        ("/\ufffd", None, "/\xef\xbf\xbd"),
        ("/\ufffd", b"", "/\xef\xbf\xbd"),
        ("/rewritten", b"/%ff", "/rewritten"),
        ("/rewritten/\ufffd", b"/%ff", "/rewritten/\xef\xbf\xbd"),
        ("/\xe9", b"/%ff", "/\xc3\xa9"),
    ],
)
def test_raw_path_is_believed_where_it_agrees_with_the_path(path: str, raw_path: bytes | None, path_info: str) -> None:
    """[W2]"""
    assert environ_of(path=path, raw_path=raw_path)["PATH_INFO"] == path_info


@pytest.mark.parametrize(
    "changes", [{"path": "/\ud800"}, {"path": "/\ud800", "raw_path": b"/x"}, {"root_path": "/\ud800"}]
)
def test_a_path_without_bytes_is_a_bad_request(changes: Scope) -> None:
    """[W4], [S1]"""
    with pytest.raises(BadRequest, match="expected a path that can be encoded, got "):
        environ_of(**changes)


@pytest.mark.parametrize(
    ("changes", "uri"),
    [
        ({"raw_path": b"/a%2Fb"}, "/a%2Fb"),
        ({"raw_path": b"/a%2fb", "query_string": b"x=%2F&y"}, "/a%2fb?x=%2F&y"),
        ({"raw_path": b"/\xe9", "query_string": b"\xe9"}, "/\xe9?\xe9"),
        ({"raw_path": b"/sent", "path": "/rewritten", "root_path": "/app"}, "/sent"),
        ({"raw_path": b"/app/x", "path": "/app/x", "root_path": "/app"}, "/app/x"),
        ({"path": "/a b/\xe9%?#;=:@!$&'()*+,~", "query_string": b"q"}, "/a%20b/%C3%A9%25%3F%23;=:@!$&'()*+,~?q"),
        ({"raw_path": b"http://example.com/x", "path": "http://example.com/x"}, "http://example.com/x"),
        ({"path": "*", "raw_path": b"*", "method": "OPTIONS"}, "*"),
        ({"path": "/\udcff"}, "/%FF"),
    ],
)
def test_the_request_uri_is_what_was_sent(changes: Scope, uri: str) -> None:
    """[W3]"""
    environ = environ_of(**changes)
    assert environ["REQUEST_URI"] == environ["RAW_URI"] == uri


@given(st.binary())
def test_any_bytes_may_be_a_query(query: bytes) -> None:
    """[W3]"""
    environ = environ_of(query_string=query)
    assert environ["QUERY_STRING"].encode("latin-1") == query
    assert environ["REQUEST_URI"].encode("latin-1") == b"/" + (b"?" + query if query else b"")


anything = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(
    ["*", "//a", "/\ufffd", "h://a/b"]
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "path": anything,
            "root_path": anything,
            "raw_path": st.binary(max_size=6),
            "query_string": st.binary(max_size=6),
            "headers": st.lists(
                st.tuples(st.sampled_from([b"host", b"Content-Length", b"\xe9"]) | st.binary(), st.binary(max_size=6))
            ),
        },
    )
)
def test_what_a_client_sends_is_translated_or_a_bad_request(sent: Scope) -> None:
    """[W1], [W2], [W4]: in native strings; refused is only a path without bytes, or an odd length."""
    try:
        environ = environ_of(**sent)
    except BadRequest:
        names = [name.lower() for name, _ in sent.get("headers", ())]
        surrogates = set(sent.get("path", "") + sent.get("root_path", "")) & set(map(chr, range(0xD800, 0xE000)))
        assert surrogates or b"content-length" in names
        return
    for value in environ.values():
        if type(value) is str:
            value.encode("latin-1")  # PEP 3333, "Unicode Issues"


# -- What servers really give ----------------------------------------------------------------------------------------

HOST = {"headers": [(b"host", b"example.com")]}
EXACT: tuple[Scope, Environ] = (
    {"path": "/a/b\ufffd", "raw_path": b"/a%2Fb%ff", "query_string": b""},
    {"PATH_INFO": "/a/b\xff", "REQUEST_URI": "/a%2Fb%ff"},
)
AS_SENT: tuple[Scope, Environ] = (
    {"root_path": "/app", "path": "/x", "raw_path": b"/x"},
    {"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "REQUEST_URI": "/x"},
)
UNKNOWN_CLIENT = {"REMOTE_ADDR": None, "REMOTE_PORT": None}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param(
            {"root_path": "/app", "path": "/app/app/x", "raw_path": b"/app/app/x", "state": {}},
            {"SCRIPT_NAME": "/app", "PATH_INFO": "/app/x", "REQUEST_URI": "/app/app/x"},
            id="uvicorn prefixes path and raw_path by root_path",
        ),
        pytest.param(
            {"server": ("/run/app.sock", None), "client": None, **HOST},
            {"SERVER_NAME": "example.com", "SERVER_PORT": "80", **UNKNOWN_CLIENT},
            id="uvicorn on a unix socket",
        ),
        pytest.param(*AS_SENT, id="hypercorn leaves the path as sent"),
        pytest.param(
            {"server": None, "client": None, **HOST},
            {"SERVER_NAME": "example.com", "SERVER_PORT": "80", **UNKNOWN_CLIENT},
            id="hypercorn on a unix socket",
        ),
        pytest.param({"http_version": "1.0"}, {"SERVER_PROTOCOL": "HTTP/1.0"}, id="hypercorn HTTP 1.0"),
        pytest.param({"http_version": "2"}, {"SERVER_PROTOCOL": "HTTP/2"}, id="hypercorn HTTP 2"),
        pytest.param(
            {"server": ("127.0.0.1", "18814"), "client": ("127.0.0.1", "50000")},
            {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "18814", "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "50000"},
            id="granian gives ports as strings",
        ),
        pytest.param(
            {"server": ("/run/app.sock", "0"), "client": ("", "0"), **HOST},
            {"SERVER_NAME": "example.com", "SERVER_PORT": "80", **UNKNOWN_CLIENT},
            id="granian on a unix socket",
        ),
        pytest.param({"http_version": "1"}, {"SERVER_PROTOCOL": "HTTP/1.0"}, id="granian HTTP 1.0"),
        pytest.param(*AS_SENT, id="granian leaves the path as sent"),
        pytest.param(
            {"server": ("/", "t"), "client": None, **HOST},
            {"SERVER_NAME": "example.com", "SERVER_PORT": "80", **UNKNOWN_CLIENT},
            id="gunicorn on a unix socket",
        ),
        pytest.param(*AS_SENT, id="gunicorn leaves the path as sent"),
        pytest.param(
            {"server": ["127.0.0.1", 8000], "client": ["127.0.0.1", 50000]},
            {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "50000"},
            id="daphne gives lists",
        ),
        pytest.param(
            {"root_path": "/app", "path": "/x", "raw_path": b"/x", "headers": [(b"daphne-root-path", b"/app")]},
            {"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "HTTP_DAPHNE_ROOT_PATH": "/app"},
            id="daphne takes root_path from a header",
        ),
        *(
            pytest.param(*EXACT, id=f"{server} has a lossy path")
            for server in ("uvicorn", "hypercorn", "granian", "gunicorn", "daphne")
        ),
        pytest.param(
            {"root_path": "/\ufffd", "path": "/\ufffd/x", "raw_path": b"/%ff/x", "app_root_path": ""},
            {"SCRIPT_NAME": "/\xff", "PATH_INFO": "/x"},
            id="starlette mounts at a lossy segment",
        ),
    ],
)
def test_what_servers_really_give(scope: Scope, expected: Environ) -> None:
    """[W1], [W2], [W3], [W5]"""
    environ = environ_of(**scope)
    assert {key: environ.get(key) for key in expected} == expected


# -- Inside of a WSGI server -----------------------------------------------------------------------------------------


def test_the_outer_servers_own_keys_are_seen() -> None:
    """[C1]"""
    errors = io.StringIO()
    outer = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/outer",
        "HTTP_X_DROPPED": "by middleware",
        "CONTENT_LENGTH": "5",
        "REMOTE_ADDR": "10.9.9.9",
        "HTTPS": "on",
        "REMOTE_USER": "me",
        "mod_wsgi.version": (6, 0),
        "wsgi.errors": errors,
        "wsgi.multithread": False,
        "wsgi.input": io.BytesIO(b"outer"),
        "wsgi.input_terminated": False,
        "wsgi.url_scheme": "https",
        "asgi.scope": {"type": "outer"},
    }
    before = dict(outer)
    scope = REQUIRED | {"path": "/inner", "extensions": {"wsgi.environ": outer}, "headers": [(b"x-kept", b"1")]}
    stream = io.BytesIO()
    environ = build_environ(scope, stream)
    check_environ(environ)
    assert outer == before
    assert environ["REMOTE_USER"] == "me"
    assert environ["mod_wsgi.version"] == (6, 0)
    assert environ["wsgi.errors"] is errors
    assert environ["wsgi.multithread"] is False
    # The request itself is what the scope says.
    assert environ["asgi.scope"] is scope
    assert environ["REQUEST_METHOD"] == "GET"
    assert environ["PATH_INFO"] == "/inner"
    assert environ["HTTP_X_KEPT"] == "1"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["wsgi.input"] is stream
    assert environ["wsgi.input_terminated"] is True
    assert not {"HTTP_X_DROPPED", "CONTENT_LENGTH", "REMOTE_ADDR", "HTTPS"} & environ.keys()
