"""The README's examples run as they stand."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import flask
import httpx
import pytest

import bridge
from bridge import AsgiToWsgi, WsgiToAsgi
from bridge.__main__ import main
from tests.drivers import AsgiServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


# Whose code changes the whole process.
DJANGO = [block for block in BLOCKS if "django" in block]


@pytest.fixture(autouse=True)
def sites(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules that the examples import: a Flask site and a FastAPI one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
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


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in DJANGO])
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


FASTAPI_SITE = """
from fastapi import FastAPI

app = FastAPI()

@app.get("/")
async def index():
    return "a FastAPI site"
"""

DJANGO_SITE = """
from django.http import HttpResponse
from django.urls import path

ALLOWED_HOSTS, ROOT_URLCONF, SECRET_KEY = ["*"], __name__, "of the tests"
urlpatterns = [path("", lambda request: HttpResponse("a Django site"))]
"""

ASK = """
import anyio, httpx

async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://testserver") as client:
        print(*[(await client.get(path)).text for path in {paths}])

anyio.run(main)
{wrapper}.close()
"""


ASK_MCP = """
import httpx

hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "tests", "version": "1"}}
headers = {"accept": "application/json, text/event-stream"}

with tools, httpx.Client(transport=httpx.WSGITransport(application), base_url="http://localhost:8000") as client:

    def ask(method, **message):
        answer = client.post("/tools/mcp", json={"jsonrpc": "2.0", "method": method, **message}, headers=headers)
        headers["mcp-session-id"] = answer.headers["mcp-session-id"]
        return answer.text

    ask("initialize", id=1, params=hello)
    ask("notifications/initialized")
    answer = ask("tools/call", id=2, params={"name": "add", "arguments": {"a": 1, "b": 2}})
    print(client.get("/").text, '"structuredContent":{"result":3}' in answer or answer)
"""


@pytest.mark.parametrize(
    ("block", "ask", "answer"),
    [
        (DJANGO[0], ASK.format(paths=["/"], wrapper="application"), "a Django site\n"),
        (DJANGO[1], ASK_MCP, "a Django site True\n"),  # [C3]
        (
            DJANGO[2],
            ASK.format(paths=["/", "/api/"], wrapper="django_site"),
            'a Django site "a FastAPI site"\n',  # [C3]
        ),
    ],
    ids=["django", "mcp below django", "django beside fastapi"],
)
def test_the_django_examples_answer(block: str, ask: str, answer: str, tmp_path: Path) -> None:
    assert len(DJANGO) == 3
    (tmp_path / "django_site.py").write_text(DJANGO_SITE)
    (tmp_path / "fastapi_site.py").write_text(FASTAPI_SITE)
    (tmp_path / "example.py").write_text(block + ask)
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "DJANGO_SETTINGS_MODULE": "django_site",
    }
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == (answer, 0), done.stderr


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


def test_asgi_middleware_around_a_wsgi_app_under_a_wsgi_server() -> None:
    """[C1]"""
    application = run(block_with("CorrelationIdMiddleware"))["application"]
    with application, httpx.Client(transport=httpx.WSGITransport(application)) as client:
        answer = client.get("http://testserver/")
    assert answer.text == "a Flask site"
    assert answer.headers["x-request-id"]


async def test_wsgi_middleware_around_an_asgi_app_under_an_asgi_server() -> None:
    """[C2]"""
    application = run(block_with("WsgiToAsgi(ProxyFix"))["application"]
    async with AsgiServer().lifespan(application):
        answer = await answer_of(application, **{"x-forwarded-host": "example.com"})
    assert answer.json() == "a FastAPI site"


async def test_asgi_middleware_around_a_wsgi_app() -> None:
    application = run(block_with("CORSMiddleware"))["application"]
    answer = await answer_of(application, origin="https://example.com")
    assert answer.text == "a Flask site"
    assert answer.headers["access-control-allow-origin"] == "https://example.com"


def test_an_asgi_app_below_a_prefix_of_a_wsgi_site() -> None:
    """[C3]"""
    application = run(block_with("DispatcherMiddleware(site"))["application"]
    with application.mounts["/api"], httpx.Client(transport=httpx.WSGITransport(application)) as client:
        assert client.get("http://testserver/api/").json() == "a FastAPI site"
        assert client.get("http://testserver/").text == "a Flask site"


async def test_a_wsgi_app_below_a_prefix_of_an_asgi_app() -> None:
    """[C3]"""
    application = run(block_with("mount"))["app"]
    assert (await answer_of(application, "/site/")).text == "a Flask site"
    assert (await answer_of(application)).json() == "a FastAPI site"


def test_wsgi_middleware_around_an_asgi_app() -> None:
    application = run(block_with("application = ProxyFix"))["application"]
    with application.app, httpx.Client(transport=httpx.WSGITransport(application)) as client:
        assert client.get("http://testserver/").json() == "a FastAPI site"


def test_an_asgi_app_finds_the_environ_of_its_server() -> None:
    """[A2]"""
    application = run(block_with("REMOTE_USER"))["application"]
    transport = httpx.WSGITransport(application)
    with application, httpx.Client(transport=transport) as client:
        assert client.get("http://testserver/").text == "nobody"


def test_the_errors_of_the_table_are_there_all_and_as_they_are_told() -> None:
    """[S1]"""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`(\w+)` )?\|$", README, re.MULTILINE)
    told = {name: base for name, base in rows if hasattr(bridge, name)}
    errors = {name for name in bridge.__all__ if isinstance(getattr(bridge, name), type(Exception))}
    errors = {name for name in errors if issubclass(getattr(bridge, name), bridge.BridgeError)}
    assert told.keys() == errors - {"BridgeError"}
    for name, base in told.items():
        assert not base or issubclass(getattr(bridge, name), getattr(builtins, base))


def test_what_to_write_instead_of_another_library_can_be_written() -> None:
    lines = re.findall(r"^\| `[\w.]+\(.*\| `(bridge\..*)` \|$", README, re.MULTILINE)
    apps = {"WsgiToAsgi": sys.modules["flask_site"], "AsgiToWsgi": sys.modules["fastapi_site"]}
    assert len(lines) == 4
    for line in lines:
        (wrapper,) = re.findall(r"^bridge\.(\w+)\(", line)
        made = eval(line, {"bridge": bridge, "app": apps[wrapper].__dict__["app"]})
        assert isinstance(made, getattr(bridge, wrapper))


def test_statistics_are_numbers_by_name() -> None:
    names = run(block_with("statistics"))
    comment = re.search(r"# (threads.*)", block_with("statistics"))
    assert comment is not None
    assert ", ".join(names["gauges"]) == comment[1]
    assert set(names["gauges"].values()) == {0}


SHOP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
    return [b"hello"]
"""


def test_the_report_of_a_check_reads_as_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = re.findall(r"^\$ python -m bridge check shop:app\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check", "shop:app"]) == 1
    sys.modules.pop("shop")
    said = " ".join(capsys.readouterr().out.split())
    for part in shown.split("..."):  # what is left out
        assert " ".join(part.split()).strip('"') in said


def test_what_make_is_told_to_do_can_be_done() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE)
    assert len(targets) >= 5
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_what_is_linked_to_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    files = [first or second for first, second in links if "://" not in first + second]
    assert len(files) >= 4
    assert [file for file in files if not (ROOT / file).is_file()] == []
