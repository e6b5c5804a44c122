"""The tests of `bridge`. What several of them share lives in drivers.py and apps.py."""

from __future__ import annotations

import pytest

# Asserts in shared modules then say as much as those in the tests themselves.
pytest.register_assert_rewrite("tests.apps", "tests.drivers")
