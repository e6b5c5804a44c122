"""How one world's request rides in the other's, so that a wrapper inside a wrapper finds what lies outside of both.

WsgiToAsgi puts the scope into ``environ["asgi.scope"]``; AsgiToWsgi puts the environ into
``scope["extensions"]["wsgi.environ"]``. Beside them lies what the wrapper outside can lend to one inside: AsgiToWsgi
the server's thread, which waits for this request and has nothing else to do; WsgiToAsgi the server's event loop, which
the thread of this request can wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ENVIRON",
    "LOOP",
    "SCOPE",
    "THREAD",
    "LentThread",
    "WholeAnswer",
    "borrow_thread",
    "inherit",
    "outer_environ",
    "outer_scope",
    "server_keys",
]

SCOPE = "asgi.scope"
ENVIRON = "wsgi.environ"
THREAD = "bridge.thread"
LOOP = "bridge.loop"

_MESSAGES = ("http.response.pathsend", "http.response.early_hint", "http.response.trailers")
"""The extensions that both kinds of server have messages for."""

_REQUEST_KEYS = frozenset(
    "CONTENT_LENGTH CONTENT_TYPE HTTPS PATH_INFO QUERY_STRING RAW_URI REMOTE_ADDR REMOTE_PORT REQUEST_METHOD "
    "REQUEST_URI SCRIPT_NAME SERVER_NAME SERVER_PORT SERVER_PROTOCOL wsgi.input wsgi.input_terminated "
    "wsgi.url_scheme".split()
)
"""What a scope tells: middleware between the wrappers may have changed it, so the scope is asked and not the server."""

_PARSED_KEYS = frozenset(
    "bottle.get bottle.request bottle.request.body bottle.request.cookies bottle.request.files bottle.request.forms "
    "bottle.request.headers bottle.request.json bottle.request.params bottle.request.post bottle.request.query "
    "bottle.request.readonly bottle.request.urlparts paste.parsed_dict_querystring paste.parsed_formvars "
    "paste.parsed_querystring webob._body_file webob._cache_control webob._parsed_cookies webob._parsed_post_vars "
    "webob._parsed_query_vars webob.is_body_readable webob.is_body_seekable werkzeug.request".split()
)
"""What WSGI middleware outside has noted of the request as it was there: WebOb, whether its ``wsgi.input`` can be
rewound; Bottle, the parsed body. The app has another ``wsgi.input``, and maybe another path and other headers."""

_ROUTING_KEYS = frozenset(
    "app app_root_path endpoint litestar_app path_remaining path_template route route_handler router".split()
)
"""What routers outside have said of themselves: Starlette's, Litestar's, Channels'. They know the way to a WSGI app,
and nothing of the routes in the app behind it, which would ask them for its URLs. What they have found in the path
(``path_params``, ``url_route``) is the request's."""

_NOT_HANDED_ON = _REQUEST_KEYS | _PARSED_KEYS


def outer_environ(scope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The environ of the WSGI server that this scope comes from, None if it comes from an ASGI server."""
    extensions = scope.get("extensions")
    return extensions.get(ENVIRON) if extensions else None


def outer_scope(environ: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scope of the ASGI server that this environ comes from, None if it comes from a WSGI server."""
    return environ.get(SCOPE)


def inherit(scope: dict[str, Any], outer: Mapping[str, Any]) -> None:
    """Complete the scope of an environ by what no environ tells of the outer scope.

    That is what the ASGI server and middleware before us said beside the request (``state``, ``session``, ``user``),
    the very objects; and of the extensions those that tell an app something, but no messages that the server does not
    take.
    """
    for key, value in outer.items():
        if key not in scope and key not in _ROUTING_KEYS:
            scope[key] = value
    extensions = scope["extensions"]
    offered: Mapping[str, Any] = outer.get("extensions") or {}
    for name in _MESSAGES:
        if name in extensions and name not in offered:
            del extensions[name]
    for name, value in offered.items():
        if name not in extensions and not name.startswith(("http.", "websocket.")):
            extensions[name] = value


def server_keys(environ: Mapping[str, Any]) -> dict[str, Any]:
    """What a WSGI server and the middleware before us said beside the request: REMOTE_USER, SSL_*, mod_wsgi.*."""
    return {key: value for key, value in environ.items() if key not in _NOT_HANDED_ON and key[:5] != "HTTP_"}


class LentThread(Protocol):
    """A server's thread, as it is lent to run a WSGI app step by step. "In the loop", "in a step": who may call."""

    def begin(self, finish: Callable[[], None]) -> bool:
        """Take the thread. In the loop.

        Args:
            finish: Run by the thread when it leaves the request, unless it was given back before.

        Returns:
            False if the thread has left already.
        """
        ...

    def ask(self, step: Callable[[], Callable[[], object]]) -> None:
        """Have the thread run a step, and the loop what the step returns. In the loop."""
        ...

    def serve(self, until: Callable[[], bool], callback: Callable[[], object] | None, reads: bool) -> None:
        """Do meanwhile what the request asks its thread for, until something is so. In a step, or in any other thread.

        Args:
            callback: Run in the loop first.
            reads: It is a piece of the body that is waited for.

        Raises:
            RuntimeError: The loop has ended, or ends.
        """
        ...

    def wake(self) -> None:
        """Have all who serve look again whether it is so. In the loop."""
        ...

    def post(self, callback: Callable[[], object]) -> None:
        """Run a callback in the loop. From any thread."""
        ...

    def give_back(self) -> None:
        """Need the thread no more. In a step."""
        ...

    def leave_loop(self) -> None:
        """Have the loop run at once by someone else, as long as the step is busy. In a step."""
        ...

    def has_left(self) -> bool:
        """Whether the client has. From any thread."""
        ...

    @property
    def writes(self) -> bool:
        """Whether blocks reach the server while a step is under way. In a step."""
        ...

    @property
    def given(self) -> int:
        """How much of its response the server was given so far. In the loop."""
        ...

    @property
    def loop_is_busy(self) -> bool:
        """Whether something is ready to be run; True as well where the loop does not let it be seen. In the loop."""
        ...


class WholeAnswer(list[bytes]):
    """A whole body in one block, as an inner wrapper gives it to an outer one, which then wakes its loop but once."""

    def close(self) -> None:
        """Nothing is left to be done."""


def borrow_thread(scope: Mapping[str, Any]) -> LentThread | None:
    """The server's thread of this request, None if there is none, if somebody else has it, or in another loop."""
    extensions = scope.get("extensions")
    lend: Callable[[], LentThread | None] | None = extensions.get(THREAD) if extensions else None
    return lend() if lend is not None else None
