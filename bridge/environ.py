"""The environ of a scope (PEP 3333, "environ Variables"; ASGI, "HTTP Connection Scope"). Pure."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

from bridge.errors import BadRequest, shown
from bridge.headers import to_cgi
from bridge.nesting import SCOPE, outer_environ, server_keys

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

__all__ = ["build_environ"]

_PATH_SAFE = "/:@!$&'()*+,;=~"  # RFC 3986, 3.3: pchar and the slash

_strip_authority = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^/?#]*").sub


def build_environ(scope: Mapping[str, Any], stream: BinaryIO) -> dict[str, Any]:
    """Translate an HTTP connection scope into a WSGI environ.

    Args:
        scope: Of type ``http``. Every key that the specification calls optional may be missing; of the others the
            method and the path are needed.
        stream: The request's body, as ``wsgi.input``. It must end by itself: ``wsgi.input_terminated`` is set.

    Raises:
        BadRequest: The Content-Length headers contradict each other, or the path cannot be encoded.
    """
    scheme = scope.get("scheme") or "http"
    script_name, path_info = _split_path(scope)
    query = scope.get("query_string") or b""
    request_uri = _request_uri(scope, query)
    version = scope.get("http_version") or "1.1"

    environ = to_cgi(scope.get("headers") or ())
    server_name, server_port = _server(scope.get("server"), environ.get("HTTP_HOST"), scheme)
    environ["REQUEST_METHOD"] = scope["method"]
    environ["SCRIPT_NAME"] = script_name
    environ["PATH_INFO"] = path_info
    environ["QUERY_STRING"] = query.decode("latin-1")
    environ["REQUEST_URI"] = environ["RAW_URI"] = request_uri
    environ["SERVER_NAME"] = server_name
    environ["SERVER_PORT"] = server_port
    # granian says "1" for HTTP/1.0; HTTP/2 and HTTP/3 have no minor version.
    environ["SERVER_PROTOCOL"] = "HTTP/1.0" if version == "1" else f"HTTP/{version}"
    client = scope.get("client")
    if client and client[0]:
        environ["REMOTE_ADDR"] = str(client[0])
        port = _port(client[1] if len(client) > 1 else None)
        if port:
            environ["REMOTE_PORT"] = port
    if scheme == "https":
        environ["HTTPS"] = "on"

    whole: dict[str, Any] = environ  # from here on not only text
    whole["wsgi.version"] = (1, 0)
    whole["wsgi.url_scheme"] = scheme
    whole["wsgi.input"] = stream
    whole["wsgi.input_terminated"] = True
    whole["wsgi.errors"] = sys.stderr
    whole["wsgi.multithread"] = True
    whole["wsgi.multiprocess"] = True
    whole["wsgi.run_once"] = False
    outer = outer_environ(scope)
    if outer is not None:
        whole |= server_keys(outer)
    whole[SCOPE] = scope
    return whole


def _split_path(scope: Mapping[str, Any]) -> tuple[str, str]:
    """SCRIPT_NAME and PATH_INFO.

    uvicorn puts root_path before the path, the others leave the path as it was sent: so it is cut off where it is
    there, at a segment's end, and a path that does not begin with it stays whole.
    """
    root = (scope.get("root_path") or "").strip("/")
    if root:
        root = f"/{root}"
    path = scope["path"]
    if not path.startswith("/"):
        # An absolute-form target, `*`, or nothing at all (RFC 9112, 3.2): an environ knows only paths.
        path = "/" + _strip_authority("", path, count=1).removeprefix("/")
    if path.isascii():
        exact = path
    else:
        exact = _exact_bytes(path, scope.get("raw_path")).decode("latin-1")
    if not root:
        return "", exact
    if path == root or path.startswith(f"{root}/"):
        if not root.isascii():
            # As many segments of the exact bytes: U+FFFD may stand for others in the root too.
            slashes = root.count("/")
            root = "/".join(exact.split("/", slashes + 1)[: slashes + 1])
        return root, exact[len(root) :]
    return _encode(root).decode("latin-1"), exact


def _exact_bytes(path: str, raw_path: bytes | None) -> bytes:
    """The bytes of a decoded path.

    Servers decode what is no UTF-8 to U+FFFD; only raw_path has the bytes then. It is believed where it says the same
    as the path, which middleware may have rewritten.
    """
    if "\ufffd" in path and raw_path:
        exact = unquote_to_bytes(raw_path)
        if exact.decode("utf-8", "replace") == path:
            return exact
    return _encode(path)


def _encode(path: str) -> bytes:
    try:
        return path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BadRequest(f"expected a path that can be encoded, got {shown(path)}") from None


def _request_uri(scope: Mapping[str, Any], query: bytes) -> str:
    raw_path = scope.get("raw_path")
    target = raw_path.decode("latin-1") if raw_path else quote(_encode(scope["path"]), _PATH_SAFE)
    return f"{target}?{query.decode('latin-1')}" if query else target


def _server(server: Any, host: str | None, scheme: str) -> tuple[str, str]:
    """SERVER_NAME and SERVER_PORT.

    A server on a unix socket gives a path and no port; gunicorn's worker gives the first two letters of that path, and
    granian gives its ports as strings.
    """
    if server and server[0]:
        port = _port(server[1] if len(server) > 1 else None)
        if port:
            return str(server[0]), port
    default = "443" if scheme == "https" else "80"
    if host:
        name, colon, port = host.rpartition(":")
        if colon and not port.endswith("]"):
            return name or "localhost", _port(port) or default
        return host, default
    return "localhost", default


def _port(port: Any) -> str:
    """A port as the environ has it, the empty string if it is none."""
    if type(port) is int:
        return str(port) if 0 < port < 65536 else ""
    return _port(int(port)) if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) < 6 else ""
