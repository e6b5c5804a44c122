"""What can go wrong, as classes, and how a value is shown in a message. No handling lives here."""

from __future__ import annotations

from collections.abc import Collection

__all__ = [
    "BadRequest",
    "BridgeError",
    "ClientDisconnected",
    "LifespanFailure",
    "ProtocolError",
    "UnsupportedScope",
    "shown",
    "shown_requests",
    "words_of",
]

SHOWN_REQUESTS = 5
"""How many are named in one line."""


class BridgeError(Exception):
    """The base of every exception class that this package defines."""


class ProtocolError(BridgeError):
    """Raised when an app or a server breaks PEP 3333 or the ASGI specification."""


class UnsupportedScope(ProtocolError, ValueError):
    """Raised when a server calls an ASGI app with a scope of a type nobody knows."""


class BadRequest(BridgeError):
    """Raised when a client's request cannot be translated; it is answered 400 and the app is not called."""


class ClientDisconnected(BridgeError, ConnectionAbortedError):
    """Raised in an app that reads from or writes to a client which is gone.

    It is an ``OSError``, as the ASGI specification asks of ``send()`` (HTTP, "Disconnected Client"), and a
    ``ConnectionError``, so that frameworks treat it like a broken socket; of its kinds the one that servers do not take
    for anybody's mistake.
    """


class LifespanFailure(BridgeError):
    """Raised when an app refuses to start or to stop, with the message that it gave."""


def shown(value: object) -> str:
    """A value as a message shows it: hostile input may be a megabyte long, or refuse to be shown at all."""
    try:
        text = repr(value)
    except Exception:
        return f"<a {type(value).__name__} without repr>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def words_of(error: BaseException) -> str:
    """What an error says; one of an app's own class may refuse to say it."""
    try:
        return str(error)
    except Exception:
        return "<exception str() failed>"  # as a traceback has it


def shown_requests(requests: Collection[str]) -> str:
    """Requests, each as method and path, as a line of a log shows them; a query may hold secrets, and stays out."""
    few = [shown(request) for request in list(requests)[:SHOWN_REQUESTS]]
    if len(requests) > len(few):
        few.append(f"{len(requests) - len(few)} more")
    return f"{len(requests)} request{'s' * (len(requests) != 1)} in the app: {', '.join(few)}"
