"""What type checkers accept in `typing_of_apps` is accepted at run time, too. `make lint` has the checkers read it."""

from __future__ import annotations

import pytest

from tests import typing_of_apps


def test_the_apps_that_type_checkers_accept_are_accepted() -> None:
    typing_of_apps.wsgi_apps(typing_of_apps.wsgi_app)
    typing_of_apps.asgi_apps()


def test_what_the_wrappers_give_is_what_their_types_say() -> None:
    typing_of_apps.what_they_give()


def test_what_type_checkers_refuse_is_refused() -> None:
    with pytest.raises(TypeError):
        typing_of_apps.mistakes(None)  # type: ignore[arg-type]
