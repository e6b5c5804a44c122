"""What the cases of a table are called in a test's name."""

from __future__ import annotations

import re

__all__ = ["lasting"]


def lasting(value: object) -> str:
    """A name that is the same in each process: without addresses, and sets in order."""
    if isinstance(value, set):
        return f"{{{', '.join(sorted(map(str, value)))}}}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
