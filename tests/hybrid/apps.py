"""The project's one app: it counts what its process does."""

from __future__ import annotations

import threading
from typing import Any

from django.apps import AppConfig

__all__ = ["HybridConfig", "facts"]

facts: dict[str, Any] = {"started": 0, "finished": 0, "connections": 0, "left open": 0, "threads": []}


class HybridConfig(AppConfig):
    name = "tests.hybrid"
    label = "hybrid"

    def ready(self) -> None:
        from django.core.signals import request_finished, request_started
        from django.db.backends.signals import connection_created

        request_started.connect(_on_started, weak=False)
        request_finished.connect(_on_finished, weak=False)  # behind Django's own, which closes old connections
        connection_created.connect(_on_connection, weak=False)


def _on_started(**_: Any) -> None:
    facts["started"] += 1


def _on_finished(**_: Any) -> None:
    from django.db import connection

    facts["finished"] += 1
    facts["left open"] += connection.connection is not None
    if threading.current_thread().name not in facts["threads"]:
        facts["threads"].append(threading.current_thread().name)


def _on_connection(**_: Any) -> None:
    facts["connections"] += 1
