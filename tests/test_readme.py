"""The README's examples run as they stand."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import flask
import httpx
import pytest

from bridge import AsgiToWsgi, WsgiToAsgi

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def sites() -> Iterator[None]:
    """The modules that the examples import: a Flask site and a FastAPI one."""
    site = flask.Flask("flask_site")
    site.add_url_rule("/", view_func=lambda: "a Flask site")
    api = fastapi.FastAPI()
    api.add_api_route("/", lambda: "a FastAPI site")
    for name, app in ("flask_site", site), ("fastapi_site", api):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__["app"] = app
    yield
    del sys.modules["flask_site"], sys.modules["fastapi_site"]


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_the_block_runs(block: str) -> None:
    names = run(block)
    if isinstance(names.get("application"), AsgiToWsgi):
        names["application"].close()


def test_there_are_examples_of_both() -> None:
    assert len(BLOCKS) >= 7
    assert "WsgiToAsgi(app)" in BLOCKS[0]
    assert "AsgiToWsgi(app)" in BLOCKS[1]


async def answer_of(application: Any, path: str = "/", **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers) as client:
        return await client.get(path)


async def test_the_wsgi_example_answers() -> None:
    application = run(BLOCKS[0])["application"]
    assert isinstance(application, WsgiToAsgi)
    assert (await answer_of(application)).text == "a Flask site"


def test_the_asgi_example_answers() -> None:
    with (
        run(BLOCKS[1])["application"] as application,
        httpx.Client(transport=httpx.WSGITransport(application)) as client,
    ):
        assert client.get("http://testserver/").json() == "a FastAPI site"


def block_with(word: str) -> str:
    blocks: list[str] = [block for block in BLOCKS if word in block]
    assert len(blocks) == 1
    return blocks[0]


async def test_asgi_middleware_around_a_wsgi_app() -> None:
    application = run(block_with("CORSMiddleware"))["application"]
    answer = await answer_of(application, origin="https://example.com")
    assert answer.text == "a Flask site"
    assert answer.headers["access-control-allow-origin"] == "https://example.com"


def test_an_asgi_app_below_a_prefix_of_a_wsgi_site() -> None:
    """[C3]"""
    application = run(block_with("DispatcherMiddleware"))["application"]
    with application.mounts["/api"], httpx.Client(transport=httpx.WSGITransport(application)) as client:
        assert client.get("http://testserver/api/").json() == "a FastAPI site"
        assert client.get("http://testserver/").text == "a Flask site"


async def test_a_wsgi_app_below_a_prefix_of_an_asgi_app() -> None:
    """[C3]"""
    application = run(block_with("mount"))["app"]
    assert (await answer_of(application, "/site/")).text == "a Flask site"
    assert (await answer_of(application)).json() == "a FastAPI site"
