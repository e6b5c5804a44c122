"""How one world's request rides in the other's."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.nesting import ENVIRON, SCOPE, borrow_thread, inherit, outer_environ, outer_scope, server_keys

OUTER: dict[str, Any] = {"REQUEST_METHOD": "GET"}


@pytest.mark.parametrize(
    ("scope", "environ"),
    [
        ({}, None),
        ({"extensions": None}, None),
        ({"extensions": {}}, None),
        ({"extensions": {"http.response.pathsend": {}}}, None),
        ({"extensions": {ENVIRON: OUTER}}, OUTER),
    ],
)
def test_a_scope_tells_the_environ_that_it_comes_from(scope: dict[str, Any], environ: dict[str, Any] | None) -> None:
    """[A2], [C1]"""
    assert outer_environ(scope) is environ


@pytest.mark.parametrize(("environ", "scope"), [({}, None), ({SCOPE: OUTER}, OUTER)])
def test_an_environ_tells_the_scope_that_it_comes_from(environ: dict[str, Any], scope: dict[str, Any] | None) -> None:
    """[W6], [C2]"""
    assert outer_scope(environ) is scope


def test_the_servers_own_keys_are_all_but_the_request() -> None:
    """[C1]"""
    own = {
        "REMOTE_USER": "me",
        "SSL_CLIENT_CERT": "...",
        "mod_wsgi.version": (6, 0),
        "wsgi.errors": object(),
        "wsgi.multithread": False,
        "wsgi.file_wrapper": object,
        "gunicorn.socket": object(),
        "HOME": "/root",
    }
    request: dict[str, object] = dict.fromkeys(
        "CONTENT_LENGTH CONTENT_TYPE HTTPS HTTP_HOST HTTP_X_USER PATH_INFO QUERY_STRING RAW_URI REMOTE_ADDR "
        "REMOTE_PORT REQUEST_METHOD REQUEST_URI SCRIPT_NAME SERVER_NAME SERVER_PORT SERVER_PROTOCOL wsgi.input "
        "wsgi.input_terminated wsgi.url_scheme".split(),
        "x",
    )
    assert server_keys(request | own) == own


def test_what_was_noted_of_the_request_as_it_was_outside_is_not_handed_on() -> None:
    """[C1] What WSGI middleware has said to the app is."""
    said: dict[str, object] = {
        "webob.adhoc_attrs": {"user": "me"},
        "bottle.request.ext.user": "me",
        "wsgiorg.routing_args": ((), {}),
    }
    noted: dict[str, object] = dict.fromkeys(
        "webob.is_body_seekable webob._parsed_post_vars webob._body_file bottle.request bottle.request.body "
        "bottle.request.readonly werkzeug.request".split(),
        True,
    )
    assert server_keys(noted | said) == said


def test_a_scope_inherits_what_no_environ_tells() -> None:
    """[C2] The very objects; what the environ tells wins."""
    state, session = {"pool": 1}, {"user": 2}
    scope: dict[str, Any] = {"path": "/new", "client": None, "extensions": {}}
    inherit(scope, {"path": "/old", "client": ("x", 1), "state": state, "session": session})
    assert scope == {"path": "/new", "client": None, "extensions": {}, "state": state, "session": session}
    assert scope["session"] is session


def test_a_scope_does_not_inherit_what_a_router_says_of_itself() -> None:
    """[C2], [C3] Starlette's, Litestar's and Channels'."""
    said = {"path_params": {"tenant": "mine"}, "user": "me", "auth": "token", "session": {}, "state": {}}
    routing = dict.fromkeys(
        "app app_root_path endpoint litestar_app path_remaining path_template route route_handler router".split(), "x"
    )
    scope: dict[str, Any] = {"extensions": {}}
    inherit(scope, said | routing)
    assert scope == said | {"extensions": {}}


@pytest.mark.parametrize(
    ("own", "offered", "expected"),
    [
        ({}, None, set()),
        ({"http.response.pathsend"}, {}, set()),
        ({"http.response.pathsend"}, {"http.response.pathsend"}, {"http.response.pathsend"}),
        (set(), {"http.response.push", "http.response.pathsend", "websocket.http.response"}, set()),
        ({"wsgi.environ"}, {"tls", "wsgi.environ"}, {"wsgi.environ", "tls"}),
    ],
)
def test_extensions_are_those_that_both_sides_know(own: Any, offered: Any, expected: set[str]) -> None:
    """[C2]"""
    scope: dict[str, Any] = {"extensions": dict.fromkeys(own, "own")}
    outer = {"extensions": None if offered is None else dict.fromkeys(offered, "outer")}
    inherit(scope, outer)
    assert scope["extensions"].keys() == expected
    assert scope["extensions"].get("wsgi.environ") in (None, "own")
    assert outer == {"extensions": None if offered is None else dict.fromkeys(offered, "outer")}


@pytest.mark.parametrize("scope", [{}, {"extensions": None}, {"extensions": {}}])
def test_no_thread_is_lent_by_a_server(scope: dict[str, Any]) -> None:
    """[C1]"""
    assert borrow_thread(scope) is None
