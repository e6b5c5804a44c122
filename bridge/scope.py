"""The scope of an environ (ASGI, "HTTP Connection Scope" and "Websocket Connection Scope"; PEP 3333). Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote_from_bytes, unquote_to_bytes

from bridge.headers import from_cgi, wire_bytes
from bridge.nesting import ENVIRON

if TYPE_CHECKING:
    from asgiref.typing import HTTPScope, WebSocketScope

__all__ = ["build_scope", "build_websocket_scope", "wants_websocket"]

SPEC_VERSION = "2.5"
"""Of the HTTP and WebSocket specification. 2.4 promises that send() raises OSError once the client is gone: it does."""

_PATH_SAFE = "/:@!$&'()*+,;=~"  # RFC 3986, 3.3: pchar and the slash

_strip_authority = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^/?#]*").sub

_HTTP_VERSIONS = {"HTTP/1.1": "1.1", "HTTP/1.0": "1.0", "HTTP/2": "2", "HTTP/2.0": "2", "HTTP/3": "3", "HTTP/3.0": "3"}


def build_scope(environ: dict[str, Any]) -> HTTPScope:
    """Translate a WSGI environ into an HTTP connection scope.

    Args:
        environ: Needs no key beyond those that PEP 3333 requires. Bytes that are no UTF-8, odd ports and addresses are
            taken as far as they make sense, never refused.

    Returns:
        A scope that shares no dict with any other, but for the environ itself, which lies in
        ``scope["extensions"]["wsgi.environ"]``. It has no ``state``: the lifespan knows that.
    """
    scheme = environ.get("wsgi.url_scheme") or "http"
    script_name = environ.get("SCRIPT_NAME")
    root = wire_bytes(script_name) if script_name else b""
    path_bytes = root + wire_bytes(environ.get("PATH_INFO") or "") or b"/"  # RFC 9110, 4.2.3: no path is the path "/"
    path = path_bytes.decode("utf-8", "replace")
    client = environ.get("REMOTE_ADDR")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": SPEC_VERSION},
        "http_version": _HTTP_VERSIONS.get(environ.get("SERVER_PROTOCOL", ""), "1.1"),
        "method": environ["REQUEST_METHOD"].upper(),
        "scheme": scheme,
        "path": path,
        "raw_path": _raw_path(environ, path, path_bytes),
        "query_string": wire_bytes(environ.get("QUERY_STRING") or ""),
        "root_path": root.decode("utf-8", "replace") if root else "",
        "headers": from_cgi(environ),
        "client": (client, _port(environ.get("REMOTE_PORT")) or 0) if client else None,
        "server": _server(environ, scheme),
        "extensions": {ENVIRON: cast("dict[object, object]", environ)},
    }


def wants_websocket(environ: dict[str, Any]) -> bool:
    """Whether a request asks to go on as a WebSocket (RFC 6455, 4.2.1; RFC 9110, 7.8: HTTP/1.0 cannot)."""
    return (
        environ["REQUEST_METHOD"] == "GET"
        and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        and _names("websocket", environ.get("HTTP_UPGRADE"))
        and _names("upgrade", environ.get("HTTP_CONNECTION"))
    )


def _names(token: str, header: Any) -> bool:
    return isinstance(header, str) and any(part.strip().lower() == token for part in header.split(","))


def build_websocket_scope(environ: dict[str, Any]) -> WebSocketScope:
    """Translate the environ of an Upgrade request into a WebSocket connection scope; see `build_scope`."""
    http = build_scope(environ)
    offered = environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", "")
    return {
        "type": "websocket",
        "asgi": http["asgi"],
        "http_version": http["http_version"],
        "scheme": "wss" if http["scheme"] == "https" else "ws",
        "path": http["path"],
        "raw_path": http["raw_path"],
        "query_string": http["query_string"],
        "root_path": http["root_path"],
        "headers": http["headers"],
        "client": http["client"],
        "server": http["server"],
        "subprotocols": [name for part in offered.split(",") if (name := part.strip())],
        "extensions": http["extensions"],
    }


def _raw_path(environ: dict[str, Any], path: str, path_bytes: bytes) -> bytes:
    """The path as it was sent, where the server tells and no middleware has rewritten it since; else quoted anew."""
    target: str = environ.get("REQUEST_URI") or environ.get("RAW_URI") or environ.get("RAW_PATH_INFO") or ""
    if target and isinstance(target, str):
        target = target.partition("?")[0]
        if target == path and path.isascii():  # the common case, and quick
            return path_bytes
        if not target.startswith("/"):
            target = _strip_authority("", target, count=1)  # absolute-form (RFC 9112, 3.2.2)
        raw_path = wire_bytes(target)
        # werkzeug's PATH_INFO has U+FFFD for what is no UTF-8, cheroot's still has its %2F.
        decoded = unquote_to_bytes(raw_path).decode("utf-8", "replace")
        if decoded == path or decoded == unquote_to_bytes(path_bytes).decode("utf-8", "replace"):
            return raw_path
    return quote_from_bytes(path_bytes, _PATH_SAFE).encode("ascii")


def _server(environ: dict[str, Any], scheme: str) -> tuple[str, int | None] | None:
    name = environ.get("SERVER_NAME")
    if not name:
        return None
    port = _port(environ.get("SERVER_PORT"))
    if port is None and not name.startswith("/"):  # a unix socket has no port
        port = 443 if scheme == "https" else 80
    return name, port


def _port(port: Any) -> int | None:
    """A port as the scope has it, None if it is none. cheroot gives the empty string on a unix socket."""
    if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) < 6:
        port = int(port)
    return port if type(port) is int and 0 < port < 65536 else None
