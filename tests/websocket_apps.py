"""ASGI apps with WebSockets, as their users write them, for the servers of tests/servers.py. Here is no test.

Frameworks are imported by those apps that use them; so FastAPI has to find its types where they stand, and there is no
`from __future__ import annotations` here.
"""

import asyncio
from typing import Any

from tests.apps import OnPurpose, board

__all__ = ["channels_chat", "fastapi_sockets", "starlette_sockets"]

PAGE = """<!doctype html><title>bridge</title><p id=state>loading</p>"""


def fastapi_sockets() -> Any:
    from contextlib import asynccontextmanager

    from fastapi import FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
    from fastapi.responses import HTMLResponse, PlainTextResponse

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        yield {"motto": "from startup"}
        board.put("shutdown")

    app = FastAPI(lifespan=lifespan)
    room: set[WebSocket] = set()

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/hello")
    def hello() -> PlainTextResponse:
        return PlainTextResponse("hello")

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        offered = websocket.scope["subprotocols"]
        await websocket.accept(subprotocol=offered[-1] if offered else None, headers=[(b"x-reply", b"yes")])
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await websocket.send({**message, "type": "websocket.send"})
        board.put(f"left-{websocket.query_params.get('key')}", str(message["code"]))

    @app.websocket("/naive")
    async def naive(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text(await websocket.receive_text())

    @app.websocket("/state")
    async def state(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json({"motto": websocket.state.motto, "url": str(websocket.url.path)})
        await websocket.close(4001, "that was all")

    @app.websocket("/room/{name}")
    async def meet(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        room.add(websocket)
        try:
            while True:
                text = await websocket.receive_text()
                await asyncio.gather(*(member.send_text(f"{name}: {text}") for member in room))
        except WebSocketDisconnect:
            room.discard(websocket)

    @app.websocket("/ticks")
    async def ticks(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(1_000_000):
            await websocket.send_text(str(number))
            await asyncio.sleep(0.005)

    @app.websocket("/flood")
    async def flood(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_bytes(b"x" * 10_000)
        except WebSocketDisconnect:  # which Starlette makes of an OSError
            board.put(f"flooded-{websocket.query_params.get('key')}")

    @app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close()

    @app.websocket("/deny")
    async def deny(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("not you", 401))

    @app.websocket("/policy")
    async def policy(websocket: WebSocket) -> None:
        await websocket.accept()
        raise WebSocketException(1008, "a rule")

    @app.websocket("/error")
    async def error(websocket: WebSocket) -> None:
        raise OnPurpose("before accept")

    @app.websocket("/broken")
    async def broken(websocket: WebSocket) -> None:
        await websocket.accept()
        raise OnPurpose("after accept")

    return app


def starlette_sockets() -> Any:
    from starlette.applications import Starlette
    from starlette.endpoints import WebSocketEndpoint
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route, WebSocketRoute

    class Echo(WebSocketEndpoint):
        encoding = "json"

        async def on_receive(self, websocket: Any, data: Any) -> None:
            await websocket.send_json({"got": data})

        async def on_disconnect(self, websocket: Any, close_code: int) -> None:
            board.put("starlette-left", str(close_code))

    return Starlette(
        routes=[
            Route("/hello", lambda _: PlainTextResponse("hello")),
            WebSocketRoute("/echo", Echo),
        ]
    )


def channels_chat() -> Any:
    """The chat of Channels' tutorial, with its layer in memory."""
    import django
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse
    from django.urls import path, re_path

    def hello(_: Any) -> HttpResponse:
        return HttpResponse("hello")

    class Urls:
        urlpatterns = (path("hello", hello),)

    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1"],
        INSTALLED_APPS=["channels"],
        ROOT_URLCONF=Urls,
        SECRET_KEY="of the tests",
        CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
    )
    django.setup()

    from asgiref.sync import async_to_sync
    from channels.generic.websocket import AsyncWebsocketConsumer, WebsocketConsumer
    from channels.routing import ProtocolTypeRouter, URLRouter
    from channels.security.websocket import AllowedHostsOriginValidator

    class ChatConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
        async def connect(self) -> None:
            self.group = f"chat_{self.scope['url_route']['kwargs']['room_name']}"
            await self.channel_layer.group_add(self.group, self.channel_name)
            await self.accept()

        async def disconnect(self, code: int) -> None:
            await self.channel_layer.group_discard(self.group, self.channel_name)
            board.put(f"left-{self.group}", str(code))

        async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
            await self.channel_layer.group_send(self.group, {"type": "chat.message", "message": text_data})

        async def chat_message(self, event: Any) -> None:
            await self.send(text_data=event["message"])

    class SyncConsumer(WebsocketConsumer):  # type: ignore[misc]
        """The tutorial's first one."""

        def connect(self) -> None:
            async_to_sync(self.channel_layer.group_add)("chat_sync", self.channel_name)
            self.accept()

        def disconnect(self, code: int) -> None:
            async_to_sync(self.channel_layer.group_discard)("chat_sync", self.channel_name)

        def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
            event = {"type": "chat.message", "message": text_data}
            async_to_sync(self.channel_layer.group_send)("chat_sync", event)

        def chat_message(self, event: Any) -> None:
            self.send(text_data=event["message"])

    return ProtocolTypeRouter(
        {
            "http": get_asgi_application(),
            "websocket": AllowedHostsOriginValidator(
                URLRouter(
                    [
                        re_path(r"ws/chat/(?P<room_name>\w+)/$", ChatConsumer.as_asgi()),
                        re_path(r"ws/sync/$", SyncConsumer.as_asgi()),
                    ]
                )
            ),
        }
    )
