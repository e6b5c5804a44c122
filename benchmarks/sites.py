"""The sites that end_to_end.py serves, each a factory: nothing is imported that the one asked for does not need."""

from __future__ import annotations

from typing import Any

from . import apps


def bare_wsgi() -> Any:
    return apps.hello


def bare_asgi() -> Any:
    return apps.async_hello


def flask() -> Any:
    from flask import Flask

    site = Flask(__name__)

    @site.get("/")
    def hello() -> str:
        return apps.HELLO.decode()

    return site


def flask_bridge() -> Any:
    from bridge import WsgiToAsgi

    return WsgiToAsgi(flask())


def flask_a2wsgi() -> Any:
    from a2wsgi import WSGIMiddleware

    return WSGIMiddleware(flask())


def fastapi() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    site = FastAPI()

    @site.get("/", response_class=PlainTextResponse)
    async def hello() -> str:
        return apps.HELLO.decode()

    return site


def fastapi_bridge() -> Any:
    from bridge import AsgiToWsgi

    return AsgiToWsgi(fastapi())


def fastapi_a2wsgi() -> Any:
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(fastapi())
