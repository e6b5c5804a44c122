"""Header lists: CGI key <-> header name, joining, hop-by-hop, CR/LF/NUL, Content-Length.

What is known about a single header, or about a list of them, stands here; no scope is looked at, and of an environ
only its header keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from bridge.errors import BadRequest, ProtocolError, shown

__all__ = [
    "content_length",
    "declared_length",
    "decode_headers",
    "encode_headers",
    "from_cgi",
    "is_bodiless",
    "is_self_delimited",
    "to_cgi",
    "wire_bytes",
]

Text = TypeVar("Text", str, bytes)

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailers transfer-encoding upgrade".split()
)
"""The headers that PEP 3333 ("Other HTTP Features") forbids to apps, in the words of ``wsgiref.util``."""

_CACHE_LIMIT = 1024
"""Names, or headers, in one cache. Sites use some dozens; a client that sends random names makes it start over."""

_CACHED_NAME_LIMIT = 64
"""Longer names and headers are translated anew each time: a cache holds at most 64 KiB of somebody else's bytes."""

_WHITESPACE = " \t"
"""Around a value it does not belong to it (RFC 9110, 5.5). Django's cookies begin with a space, which h11 refuses."""

_LENGTH_DIGITS = 18
"""No body is longer; ``int()`` refuses 4,301 digits, and is slow before that."""

_is_token = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch  # RFC 9110, 5.6.2
_has_forbidden = re.compile("[\x00\r\n]").search  # RFC 9110, 5.5

# Names seen before and what they translate to, and whole headers of responses, most of which are the same for every
# request; None is for what must not pass.
_environ_keys: dict[bytes, str | None] = {}
_header_names: dict[str, bytes | None] = {}
_encoded_names: dict[str, bytes | None] = {}
_decoded_names: dict[bytes, str | None] = {}
_encoded_headers: dict[tuple[str, str], tuple[bytes, bytes] | None] = {}
_decoded_headers: dict[tuple[bytes, bytes], tuple[str, str] | None] = {}


def _remember(cache: dict[Any, Any], name: str | bytes, translation: Any) -> Any:
    """Keep a translation in its bounded cache. Two threads that do so at once keep the same."""
    if len(name) <= _CACHED_NAME_LIMIT:
        _keep(cache, name, translation)
    return translation


def _remember_header(cache: dict[Any, Any], header: Any, size: int, translation: Any) -> None:
    """Keep the translation of a whole header, if it is short. A Set-Cookie is for one client, and never kept."""
    if isinstance(header, tuple) and size <= _CACHED_NAME_LIMIT:
        _keep(cache, header, translation)


def _keep(cache: dict[Any, Any], key: Any, translation: Any) -> None:
    if len(cache) >= _CACHE_LIMIT:
        cache.clear()
    cache[key] = translation


# -- Requests --------------------------------------------------------------------------------------------------------


def to_cgi(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of a scope as the keys of an environ: CONTENT_TYPE, CONTENT_LENGTH and HTTP_*.

    Equal names are joined in linear time by ``,``, Cookie by ``; `` (RFC 9110, 5.3; RFC 9113, 8.2.3). A name with ``_``
    is dropped, because it would be taken for the one with ``-`` (CVE-2026-3902), and so is ``Proxy``, which would
    become the HTTP_PROXY of CGI programs (CVE-2016-5385). Beside a Transfer-Encoding a Content-Length means nothing,
    and is dropped too (RFC 9112, 6.3).

    Raises:
        BadRequest: Two Content-Length values differ, or one is no plain decimal.
    """
    environ: dict[str, str] = {}
    repeated: dict[str, list[str]] = {}
    for name, value in headers:
        try:
            key = _environ_keys[name]
        except KeyError:
            key = _environ_key(name)
        if key is None:
            continue
        if key in environ:
            repeated.setdefault(key, []).append(value.decode("latin-1"))
        else:
            environ[key] = value.decode("latin-1")
    if "CONTENT_LENGTH" in environ:
        lengths = {content_length(value) for value in (environ["CONTENT_LENGTH"], *repeated.pop("CONTENT_LENGTH", ()))}
        if len(lengths) > 1:
            raise BadRequest(f"expected one Content-Length, got {' and '.join(map(str, sorted(lengths)))}")
        if "HTTP_TRANSFER_ENCODING" in environ:
            del environ["CONTENT_LENGTH"]
    for key, values in repeated.items():
        environ[key] = ("; " if key == "HTTP_COOKIE" else ",").join((environ[key], *values))
    return environ


def from_cgi(environ: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """The headers in an environ as a scope has them: lower-case names, bytes.

    HTTP_PROXY is none: servers that copy ``os.environ`` bring it in, and no client may. HTTP_CONTENT_TYPE and
    HTTP_CONTENT_LENGTH are none either: some servers set them beside the true ones. An empty CONTENT_TYPE or
    CONTENT_LENGTH says that there is none (PEP 3333, "environ Variables").
    """
    headers: list[tuple[bytes, bytes]] = []
    names = _header_names
    for key, value in environ.items():
        try:
            name = names[key]
        except KeyError:
            name = _header_name(key)
        if name is not None and type(value) is str:
            try:
                encoded = value.encode("latin-1")
            except UnicodeEncodeError:
                encoded = wire_bytes(value)
            if encoded or key[:5] == "HTTP_":
                headers.append((name, encoded))
    if is_self_delimited(environ):
        headers = [header for header in headers if header[0] != b"content-length"]
    return headers


def is_self_delimited(environ: Mapping[str, Any]) -> bool:
    """Whether the server takes a request's body out of its chunks: a length beside them says nothing (RFC 9112, 6.3).

    Where the server does not say that its stream ends by itself, the length is all that it can go by.
    """
    return bool(environ.get("HTTP_TRANSFER_ENCODING") and environ.get("wsgi.input_terminated"))


def content_length(value: str | bytes) -> int:
    """The number of bytes that a request's Content-Length gives.

    Raises:
        BadRequest: It is no plain decimal: ASCII digits, with no sign, space, comma or underscore.
    """
    if not (isinstance(value, (str, bytes)) and value.isascii() and value.isdigit() and len(value) <= _LENGTH_DIGITS):
        raise BadRequest(f"expected a plain decimal as Content-Length, got {shown(value)}")
    return int(value)


def wire_bytes(text: str) -> bytes:
    """The bytes that a WSGI native string stands for (PEP 3333, "Unicode Issues").

    A string with other than latin-1 characters is a server's mistake; it was most likely decoded as UTF-8.
    """
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def _environ_key(name: bytes) -> str | None:
    lowered = name.lower()
    if b"_" in name or lowered == b"proxy" or not name.isascii():
        return _remember(_environ_keys, name, None)  # type: ignore[no-any-return]
    key = name.decode("ascii").upper().replace("-", "_")
    if lowered not in (b"content-type", b"content-length"):
        key = f"HTTP_{key}"
    return _remember(_environ_keys, name, key)  # type: ignore[no-any-return]


def _header_name(key: str) -> bytes | None:
    name: bytes | None = None
    if key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        name = key.replace("_", "-").lower().encode("ascii")
    elif key.startswith("HTTP_") and key.isascii():
        name = key[5:].replace("_", "-").lower().encode("ascii")
        if name in (b"", b"proxy", b"content-type", b"content-length"):
            name = None
    return _remember(_header_names, key, name)  # type: ignore[no-any-return]


# -- Responses -------------------------------------------------------------------------------------------------------


def is_bodiless(method: str, status: int) -> bool:
    """Whether a response has no body, whatever its headers say (RFC 9110, 6.4.1)."""
    return method == "HEAD" or status == 204 or status == 304


def encode_headers(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """The headers of a WSGI response as ASGI has them: lower-case names, bytes, in order, no hop-by-hop ones.

    Raises:
        ProtocolError: They are no list of (name, value), or a name or value cannot stand in a response.
    """
    if not isinstance(headers, list):
        raise ProtocolError(f"start_response() expected a list of headers, got {shown(headers)}")
    encoded: list[tuple[bytes, bytes]] = []
    for header in headers:
        try:
            pair = _encoded_headers[header]
        except (KeyError, TypeError):
            pair = _encode_header(header)
        if pair is not None:
            encoded.append(pair)
    return encoded


def decode_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """The headers of an ASGI response as WSGI has them: native strings, in order, no hop-by-hop ones.

    Raises:
        ProtocolError: They are no (name, value), or a name or value cannot stand in a response.
    """
    decoded: list[tuple[str, str]] = []
    try:
        headers = list(headers)
    except TypeError:
        raise ProtocolError(f"send() expected an iterable of headers, got {shown(headers)}") from None
    for header in headers:
        try:
            # A memoryview would be found as well: it is equal to the bytes, and hashed alike.
            known = type(header[0]) is type(header[1]) is bytes
            pair = _decoded_headers[header] if known else _decode_header(header)
        except (LookupError, TypeError):
            pair = _decode_header(header)
        if pair is not None:
            decoded.append(pair)
    return decoded


def declared_length(headers: list[tuple[Text, Text]], name: Text) -> int | None:
    """The number of bytes that the headers of a response declare, or None.

    Of equal declarations the first is left in the list: a recipient may refuse two (RFC 9110, 8.6).

    Args:
        name: ``content-length``, of the type that the headers are of.

    Raises:
        ProtocolError: A Content-Length is no plain decimal, or two of them differ.
    """
    length = None
    repeated = False
    for header, value in headers:
        # The length comes first: it spares most headers the lowering.
        if len(header) == 14 and header.lower() == name:
            try:
                number = content_length(value)
            except BadRequest as error:
                raise ProtocolError(f"in a response: {error}") from None
            if length is not None and length != number:
                raise ProtocolError(f"expected one Content-Length in a response, got {length} and {number}")
            repeated = length is not None
            length = number
    if repeated:
        places = [place for place, (header, _) in enumerate(headers) if header.lower() == name]
        for place in places[:0:-1]:
            del headers[place]
    return length


def _encode_header(header: Any) -> tuple[bytes, bytes] | None:
    try:
        name, value = header
    except (TypeError, ValueError):
        raise ProtocolError(f"start_response() expected (name, value) of str, got {shown(header)}") from None
    try:
        encoded_name = _encoded_names[name]
    except (KeyError, TypeError):
        encoded_name = _encode_name(name)
    if not isinstance(value, str):
        raise ProtocolError(f"start_response() expected a str as value of {name!r}, got {shown(value)}")
    if not (value.isascii() and value.isprintable()):  # quick, and nearly always so
        _check_value(name, value)
    pair = None if encoded_name is None else (encoded_name, value.strip(_WHITESPACE).encode("latin-1"))
    if encoded_name != b"set-cookie":
        _remember_header(_encoded_headers, header, len(name) + len(value), pair)
    return pair


def _decode_header(header: Any) -> tuple[str, str] | None:
    try:
        name, value = header
    except (TypeError, ValueError):
        raise ProtocolError(f"send() expected (name, value) of bytes, got {shown(header)}") from None
    try:
        decoded_name = _decoded_names[name]
    except (KeyError, TypeError):
        decoded_name = _decode_name(name)
    if not isinstance(value, bytes):
        raise ProtocolError(f"send() expected bytes as value of {name!r}, got {shown(value)}")
    text = value.decode("latin-1")
    if not (text.isascii() and text.isprintable()):
        _check_value(name, text)
    pair = None if decoded_name is None else (decoded_name, text.strip(_WHITESPACE))
    if name.lower() != b"set-cookie":
        _remember_header(_decoded_headers, header, len(name) + len(value), pair)
    return pair


def _encode_name(name: object) -> bytes | None:
    if not isinstance(name, str):
        raise ProtocolError(f"start_response() expected a str as header name, got {shown(name)}")
    encoded = name.encode("utf-8", "replace").lower()  # as bytes: the str "\u212a" (Kelvin) would become a plain "k"
    if not _is_token(encoded):
        raise ProtocolError(f"start_response() expected a token as header name, got {shown(name)}")
    return _remember(_encoded_names, name, None if encoded in HOP_BY_HOP else encoded)  # type: ignore[no-any-return]


def _decode_name(name: object) -> str | None:
    if not isinstance(name, bytes):
        raise ProtocolError(f"send() expected bytes as header name, got {shown(name)}")
    if not _is_token(name):
        raise ProtocolError(f"send() expected a token as header name, got {shown(name)}")
    decoded = None if name.lower() in HOP_BY_HOP else name.decode("ascii")
    return _remember(_decoded_names, name, decoded)  # type: ignore[no-any-return]


def _check_value(name: object, value: str) -> None:
    if _has_forbidden(value):
        raise ProtocolError(f"the value of response header {name!r} has a CR, LF or NUL: {shown(value)}")
    try:
        value.encode("latin-1")
    except UnicodeEncodeError:
        raise ProtocolError(f"the value of response header {name!r} is not latin-1: {shown(value)}") from None
