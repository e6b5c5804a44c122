"""How one world's request rides in the other's, so that a wrapper inside a wrapper finds what lies outside of both.

WsgiToAsgi puts the scope into ``environ["asgi.scope"]``; AsgiToWsgi puts the environ into
``scope["extensions"]["wsgi.environ"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ENVIRON", "SCOPE", "outer_environ", "outer_scope", "server_keys"]

SCOPE = "asgi.scope"
ENVIRON = "wsgi.environ"

_REQUEST_KEYS = frozenset(
    "CONTENT_LENGTH CONTENT_TYPE HTTPS PATH_INFO QUERY_STRING RAW_URI REMOTE_ADDR REMOTE_PORT REQUEST_METHOD "
    "REQUEST_URI SCRIPT_NAME SERVER_NAME SERVER_PORT SERVER_PROTOCOL wsgi.input wsgi.input_terminated "
    "wsgi.url_scheme".split()
)
"""What a scope tells: middleware between the wrappers may have changed it, so the scope is asked and not the server."""


def outer_environ(scope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The environ of the WSGI server that this scope comes from, None if it comes from an ASGI server."""
    extensions = scope.get("extensions")
    return extensions.get(ENVIRON) if extensions else None


def outer_scope(environ: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scope of the ASGI server that this environ comes from, None if it comes from a WSGI server."""
    return environ.get(SCOPE)


def server_keys(environ: Mapping[str, Any]) -> dict[str, Any]:
    """What a WSGI server and the middleware before us said beside the request: REMOTE_USER, SSL_*, mod_wsgi.*."""
    return {key: value for key, value in environ.items() if key not in _REQUEST_KEYS and key[:5] != "HTTP_"}
