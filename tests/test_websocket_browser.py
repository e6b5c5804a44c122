"""A page in a real browser talks to a FastAPI app's WebSockets under gunicorn [A22]."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import CHROMIUM, Browser, Page
from tests.test_websocket_servers import Site, complaints

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, which takes a third of a second to start."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("BRIDGE_REQUIRE_SERVERS") == "1" else pytest.skip)("there is no Chromium here")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def run(page: Page, script: str, **values: Any) -> Any:
    """Run the body of an async function in the page, and give what it returns; it sees the values by their names."""
    names, arguments = ", ".join(values), ", ".join(json.dumps(value) for value in values.values())
    return json.loads(
        page.evaluate(f"(async ({names}) => {{ {script} }})({arguments}).then((it) => JSON.stringify(it ?? null))")
    )


TALK = """
const ws = new WebSocket(`ws://${location.host}/echo?key=page`, ["old", "new"]);
ws.binaryType = "arraybuffer";
const next = (kind) => new Promise((resolve, reject) => {
    ws.addEventListener(kind, resolve, {once: true});
    ws.addEventListener("error", () => reject(new Error("the connection failed")), {once: true});
});
await next("open");
const seen = {protocol: ws.protocol, extensions: ws.extensions, texts: []};
for (const text of texts) {
    ws.send(text);
    seen.texts.push((await next("message")).data);
}
const bytes = crypto.getRandomValues(new Uint8Array(65536));
ws.send(bytes);
const back = new Uint8Array((await next("message")).data);
seen.binary = back.length === bytes.length && back.every((byte, index) => byte === bytes[index]);
ws.close(3001, "grün");
const end = await next("close");
seen.close = [end.code, end.reason, end.wasClean];
return seen;
"""

LISTEN = """
const ws = new WebSocket(`ws://${location.host}/${path}`);
const texts = [];
ws.addEventListener("message", (event) => texts.push(event.data));
const end = await new Promise((resolve) => ws.addEventListener("close", resolve));
return [texts, end.code, end.reason, end.wasClean];
"""

JOIN = """
window.heard = [];
window.ws = new WebSocket(`ws://${location.host}/room/${name}`);
ws.addEventListener("message", (event) => heard.push(event.data));
await new Promise((resolve) => ws.addEventListener("open", resolve));
"""

HEAR = """
while (heard.length < count) await new Promise((resolve) => ws.addEventListener("message", resolve, {once: true}));
return heard;
"""


def test_page_talks_to_a_fastapi_websocket_under_gthread(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """[A22]"""
    site = Site("gunicorn-gthread", "fastapi_sockets", tmp_path_factory.mktemp("site"))
    try:
        with browser.open(site.url("/", "http")) as page:
            texts = ["grüße", "", "☃" * 100_000]
            assert run(page, TALK, texts=texts) == {
                "protocol": "new",
                "extensions": "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
                "texts": texts,
                "binary": True,
                "close": [3001, "grün", True],
            }
            motto = '{"motto":"from startup","url":"/state"}'
            assert run(page, LISTEN, path="state") == [[motto], 4001, "that was all", True]
            assert run(page, LISTEN, path="policy") == [[], 1008, "a rule", True]
            assert run(page, LISTEN, path="refuse") == [[], 1006, "", False]
            assert run(page, "return (await fetch('/hello')).text()") == "hello"
            with browser.open(site.url("/", "http")) as other:
                run(page, JOIN, name="anna")
                run(other, JOIN, name="ben")
                run(page, "ws.send('hello')")
                assert run(page, HEAR, count=1) == run(other, HEAR, count=1) == ["anna: hello"]
                run(other, "ws.send('good morning')")
                assert run(page, HEAR, count=2)[1:] == run(other, HEAR, count=2)[1:] == ["ben: good morning"]
    finally:
        browser.close()  # it keeps connections open, for which gunicorn would wait
        site.running.stop()
    assert complaints(site.running.log()) == []
