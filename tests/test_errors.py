"""The kinds of errors, and how a value is shown in their messages."""

from __future__ import annotations

import inspect

import pytest

from bridge import errors
from bridge.errors import BridgeError, shown


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_every_exception_class_derives_from_bridge_error() -> None:
    """[S1]"""
    classes = [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, Exception)]
    assert len(classes) == 6
    assert all(issubclass(kind, BridgeError) and kind.__doc__ and kind.__name__ in errors.__all__ for kind in classes)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.ClientDisconnected, ConnectionError),  # Django makes an UnreadablePostError of it
        (errors.ClientDisconnected, OSError),  # the ASGI specification asks for it
        (errors.UnsupportedScope, ValueError),
        (errors.UnsupportedScope, errors.ProtocolError),
    ],
)
def test_an_error_is_what_frameworks_and_specifications_look_for(kind: type, base: type) -> None:
    """[W9], [W21], [A8]"""
    assert issubclass(kind, base)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\r\nb", r"'a\r\nb'"),
        (b"x" * 97, "b'" + "x" * 97 + "'"),  # the longest that is shown whole
        ("x" * 1_000_000, "'" + "x" * 96 + "..."),
        (Unshowable(), "<a Unshowable without repr>"),
        (None, "None"),
    ],
)
def test_a_value_is_shown_short_and_escaped(value: object, text: str) -> None:
    """[S1]"""
    assert shown(value) == text
