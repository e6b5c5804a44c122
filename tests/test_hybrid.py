"""One Django project, and what is of the other world beside, inside and around it, on real servers (C1 to C3)."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import ROOT, SERVERS, Running, Server, gunicorn

UVICORN = SERVERS["uvicorn-h11"]
SYNC = gunicorn("--workers 1")
GTHREAD = gunicorn("--threads 4")

BEGIN = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.hybrid.settings"
os.environ["CONN_MAX_AGE"] = "{age}"
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from bridge import AsgiToWsgi, WsgiToAsgi
"""

BESIDE_UNDER_ASGI = """
from starlette.applications import Starlette
from starlette.routing import Mount
from tests.hybrid.api import api, lifespan
site = WsgiToAsgi(get_wsgi_application())
application = Starlette(routes=[Mount("/api", api), Mount("/", site)], lifespan=lifespan)
"""

BESIDE_UNDER_WSGI = """
from werkzeug.middleware.dispatcher import DispatcherMiddleware
site = get_wsgi_application()
from tests.hybrid.api import api
application = DispatcherMiddleware(site, {"/api": AsgiToWsgi(api)})
"""

ASGI_MIDDLEWARE_AROUND_WSGI = """
from starlette.middleware.cors import CORSMiddleware
site = WsgiToAsgi(get_wsgi_application())
application = AsgiToWsgi(CORSMiddleware(site, allow_origins=["https://example.com"]))
"""

WSGI_MIDDLEWARE_AROUND_ASGI = """
from werkzeug.middleware.proxy_fix import ProxyFix
site = AsgiToWsgi(get_asgi_application())
application = WsgiToAsgi(ProxyFix(site, x_host=1))
"""


@dataclass(frozen=True)
class Deployment:
    source: str
    server: Server
    age: str
    """CONN_MAX_AGE: "0" closes each connection behind its request, "None" keeps one for each thread."""


DEPLOYMENTS = {
    "beside-uvicorn": Deployment(BESIDE_UNDER_ASGI, UVICORN, "None"),
    "beside-sync": Deployment(BESIDE_UNDER_WSGI, SYNC, "None"),
    "beside-gthread": Deployment(BESIDE_UNDER_WSGI, GTHREAD, "0"),
    "inside-sync": Deployment(ASGI_MIDDLEWARE_AROUND_WSGI, SYNC, "None"),
    "inside-gthread": Deployment(ASGI_MIDDLEWARE_AROUND_WSGI, GTHREAD, "0"),
    # Django's ASGI handler has a thread for each request, and so a connection: there is nothing that could be kept.
    "around-uvicorn": Deployment(WSGI_MIDDLEWARE_AROUND_ASGI, UVICORN, "0"),
}

PREPARE = """
import django
django.setup()
from django.core.management import call_command
call_command("migrate", run_syncdb=True, verbosity=0)
from django.contrib.auth.models import User
User.objects.create_superuser("ada", password="lovelace")
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables and one user, to be copied."""
    directory = tmp_path_factory.mktemp("database")
    environment = {"DJANGO_SETTINGS_MODULE": "tests.hybrid.settings", "BOARD": str(directory)}
    subprocess.run([sys.executable, "-c", PREPARE], env=environment, cwd=ROOT, check=True, timeout=50)
    return directory / "db.sqlite3"


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def site(request: pytest.FixtureRequest, database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    deployment = DEPLOYMENTS[request.param]
    directory = tmp_path_factory.mktemp("site")
    with Running(deployment.server, BEGIN.format(age=deployment.age) + deployment.source, directory) as running:
        shutil.copy(database, running.board)
        yield deployment, running


@pytest.fixture
def client(site: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site[1].url, timeout=20) as client:
        yield client


def log_in(client: httpx.Client) -> httpx.Response:
    client.get("/admin/login/")
    form = {
        "username": "ada",
        "password": "lovelace",
        "csrfmiddlewaretoken": client.cookies["csrftoken"],
        "next": "/admin/",
    }
    return client.post("/admin/login/", data=form)


def save(client: httpx.Client, text: str, **query: str) -> httpx.Response:
    token = client.get("/notes/").json()["token"]
    return client.post("/notes/", params=query, data={"text": text, "csrfmiddlewaretoken": token})


def test_the_admin_lets_in_who_has_logged_in(client: httpx.Client) -> None:
    assert client.get("/admin/").headers["location"] == "/admin/login/?next=/admin/"
    assert log_in(client).headers["location"] == "/admin/"
    page = client.get("/admin/")
    assert page.status_code == 200
    assert "Log out" in page.text
    assert client.get("/admin/hybrid/note/").status_code == 200


def test_a_form_needs_its_token(client: httpx.Client) -> None:
    assert client.post("/notes/", data={"text": "forged"}).status_code == 403
    assert "forged" not in client.get("/notes/").json()["notes"]


def test_a_message_is_shown_once_to_who_is_logged_in(client: httpx.Client) -> None:
    log_in(client)
    assert save(client, "kept").headers["location"] == "/notes/"
    page = client.get("/notes/").json()
    assert "kept" in page["notes"]
    assert page["messages"] == ["ada saved kept"]
    assert client.get("/notes/").json()["messages"] == []


def test_a_transaction_that_fails_leaves_nothing(client: httpx.Client) -> None:
    assert save(client, "lost", fail="yes").status_code == 500
    assert "lost" not in client.get("/notes/").json()["notes"]


def test_static_files(client: httpx.Client) -> None:
    style = client.get("/static/admin/css/base.css")
    assert style.headers["content-type"].startswith("text/css")
    assert int(style.headers["content-length"]) == len(style.content) > 10_000


def test_an_upload(client: httpx.Client) -> None:
    content = bytes(range(256)) * 20_000  # beyond what Django keeps in memory
    answer = client.post("/upload/", files={"file": ("name.bin", content)})
    assert answer.text == hashlib.sha256(content).hexdigest()


def test_a_stream_with_queries(client: httpx.Client) -> None:
    lines = client.get("/stream/").text.splitlines()
    assert len(lines) == 200


def ask_for_facts(client: httpx.Client) -> tuple[Any, int]:
    """What is known when all requests but the asking one have finished, which they do behind their last block.

    Returns:
        The facts, and how often they were asked for.
    """
    deadline = time.monotonic() + 10
    for asked in itertools.count(1):
        facts = client.get("/facts/").json()
        if facts["started"] == facts["finished"] + 1:
            return facts, asked
        assert time.monotonic() < deadline, facts
    raise AssertionError


def test_each_request_finishes_and_its_connection_is_closed_or_kept(site: Any, client: httpx.Client) -> None:
    """request_finished is sent for each, in a thread of its connection; CONN_MAX_AGE is kept to."""
    deployment, _ = site
    before, _ = ask_for_facts(client)
    for number in range(10):
        client.get("/notes/" if number % 2 else "/stream/")
    after, asked = ask_for_facts(client)
    assert after["finished"] - before["finished"] == 10 + asked  # the last of them has not, but the first's last has
    if deployment.age == "0":
        assert after["left open"] == 0
    else:
        # One for each thread that has served so far; FastAPI's own query is Django's async code, with another thread.
        assert after["connections"] <= len(after["threads"]) + 1
    if deployment.source == ASGI_MIDDLEWARE_AROUND_WSGI:
        assert not [name for name in after["threads"] if name.startswith("bridge")]


def test_what_is_beside_or_around_works(site: Any, client: httpx.Client) -> None:
    deployment, running = site
    if deployment.source in (BESIDE_UNDER_ASGI, BESIDE_UNDER_WSGI):
        answer = client.get("/api/notes").json()
        assert answer["pool"] == "made"
        assert answer["url"] == f"{running.url}/api/notes"
        assert answer["count"] == len(client.get("/notes/").json()["notes"])
    elif deployment.source == ASGI_MIDDLEWARE_AROUND_WSGI:
        answer = client.get("/notes/", headers={"Origin": "https://example.com"})
        assert answer.headers["access-control-allow-origin"] == "https://example.com"
    else:
        answer = client.get("/notes/", headers={"X-Forwarded-Host": "example.com"}).json()
        assert answer["url"] == "http://example.com/notes/"
