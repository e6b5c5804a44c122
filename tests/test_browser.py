"""The demo's page in a real browser: it does what it says, on both apps, side by side."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import bridge
from bridge.demo import APPS, Server
from tests.browser import CHROMIUM, Browser, Page

if TYPE_CHECKING:
    from collections.abc import Iterator

if CHROMIUM is None and os.environ.get("BRIDGE_REQUIRE_SERVERS") != "1":
    pytest.skip("there is no Chromium here", allow_module_level=True)


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    servers = [Server(app, "127.0.0.1", 0) for app in APPS]
    try:
        yield [server.wait_for_address() for server in servers]
    finally:
        for server in servers:
            server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(params=[0, 1], ids=["Flask", "FastAPI"])
def page(request: pytest.FixtureRequest, browser: Browser, addresses: list[str]) -> Iterator[Page]:
    with browser.open(addresses[request.param]) as page:
        yield page
        assert page.errors == []


SAID = "document.getElementById({id!r}).textContent"
RIGHT = "!document.getElementById({id!r}).classList.contains('wrong') && "


def said(page: Page, name: str, words: str) -> str:
    """What is shown where a button's result is, once it has these words and is not marked as wrong."""
    text = SAID.format(id=name)
    page.wait_for(f"{RIGHT.format(id=name)}{text}.includes({words!r})")
    return str(page.evaluate(text))


def number(page: Page, name: str) -> int:
    return int(page.evaluate(SAID.format(id=name)))


def test_events_tick(page: Page) -> None:
    """Server-sent events reach the page one by one, while the app sleeps in between."""
    page.wait_for(f"Number({SAID.format(id='number')}) >= 1")
    first = number(page, "number")
    page.wait_for(f"Number({SAID.format(id='number')}) > {first}")
    assert page.evaluate("document.getElementById('broken').hidden")


def test_an_upload_shows_its_progress_and_its_hash(page: Page) -> None:
    page.click("#made")
    text = said(page, "upload_said", "the same as computed here")
    assert re.search(r"^50\.0 MB in .*\n[0-9a-f]{64}\n", text)
    assert page.evaluate("document.getElementById('upload_progress').value") == 1


def test_a_download_is_checked(page: Page) -> None:
    page.click("#fetch")
    assert "21.0 MB in" in said(page, "download_said", "the hash it should have")


def test_a_stream_that_is_left_is_closed_early_and_counted(page: Page) -> None:
    page.wait_for(f"Number({SAID.format(id='number')}) >= 1")
    before = number(page, "closed_early")
    page.click("#leave")
    assert "noticed within" in said(page, "leave_said", "noticed")
    page.wait_for(f"Number({SAID.format(id='closed_early')}) > {before}")


def test_slow_requests_do_not_wait_for_each_other_and_a_form_is_answered(page: Page) -> None:
    page.click("#slow")
    said(page, "slow_said", "all five in")
    page.click("#form button")
    assert said(page, "form_said", "wrote") == "Zoë wrote 9 characters: ½ + ½ = 1"


def test_a_websocket_echoes_where_there_is_one(page: Page) -> None:
    """[A22] A WSGI app has none, and says so."""
    if page.evaluate("document.querySelector('h1').textContent.startsWith('Flask')"):
        assert "WSGI knows no WebSockets" in page.text()
        assert page.evaluate(SHOWN) == []
        return
    page.wait_for("socket.readyState === WebSocket.OPEN")
    assert page.evaluate(SHOWN) == ["echo"]
    page.click("#echo button")
    said(page, "echo_said", "10 of 10 came back")


# Of what the card of the WebSocket may show, what it shows.
SHOWN = "['unheard', 'hung_up', 'echo'].filter(id => document.getElementById(id).checkVisibility())"


def test_without_the_package_for_websockets_the_page_says_what_to_install(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """[A22]"""
    (tmp_path / "websockets.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(bridge.__file__).parent.parent)]))
    server = Server(APPS[1], "127.0.0.1", 0)
    try:
        with browser.open(server.wait_for_address()) as page:
            page.wait_for("socket.readyState === WebSocket.CLOSED")
            assert page.evaluate(SHOWN) == ["unheard"]
            assert 'pip install "wsgi-asgi-bridge[websocket]"' in page.text()
    finally:
        server.close()


# How many of the elements stand in each row, from the top.
ROWS = """(() => {
  const tops = Array.from(document.querySelectorAll(%r), element => element.getBoundingClientRect().top);
  return [...new Set(tops)].map(top => tops.filter(other => other === top).length);
})()"""


@pytest.mark.parametrize("width", [600, 1200])
def test_no_number_and_no_card_stands_alone_beside_a_hole(browser: Browser, addresses: list[str], width: int) -> None:
    """600 pixels are what each of the two has side by side, in a window of 1200."""
    for address in addresses:
        with browser.open(address, width=width) as page:
            assert page.evaluate(ROWS % ".numbers div") == [5]
            assert page.evaluate(ROWS % ".cards section") == ([1] * 7 if width == 600 else [1, 2, 2, 2])


def test_both_apps_stand_side_by_side(browser: Browser, addresses: list[str]) -> None:
    port = addresses[1].rpartition(":")[2]
    with browser.open(f"{addresses[0]}/both?port={port}", width=1500) as page:
        titles = "Array.from(document.querySelectorAll('iframe'), f => f.contentDocument?.title ?? f.src)"
        page.wait_for(f"{titles}[0] === 'Flask · bridge'")
        assert page.evaluate(titles) == ["Flask · bridge", f"{addresses[1]}/"]
        tops = "Array.from(document.querySelectorAll('iframe'), f => f.getBoundingClientRect().top)"
        assert page.evaluate(tops) == [0, 0]


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window(browser: Browser, addresses: list[str], width: int) -> None:
    with browser.open(addresses[1], width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
