"""The FastAPI app beside the project: it uses the project's models."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request

__all__ = ["api", "lifespan"]


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
    yield {"pool": "made"}


api = FastAPI(lifespan=lifespan)


@api.get("/notes")
async def count_notes(request: Request) -> dict[str, Any]:
    from tests.hybrid.models import Note

    return {"count": await Note.objects.acount(), "pool": request.state.pool, "url": str(request.url)}
