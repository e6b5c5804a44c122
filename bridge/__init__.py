"""Run a WSGI app under ASGI, and an ASGI app under WSGI.

In asgi.py, ``application = WsgiToAsgi(flask_app)``; in wsgi.py, ``application = AsgiToWsgi(fastapi_app)``.
"""

from bridge.asgi_to_wsgi import AsgiToWsgi, AsgiToWsgiStatistics
from bridge.errors import (
    BadRequest,
    BridgeError,
    ClientDisconnected,
    LifespanFailure,
    ProtocolError,
    UnsupportedScope,
)
from bridge.wsgi_to_asgi import WsgiToAsgi, WsgiToAsgiStatistics

__all__ = [
    "AsgiToWsgi",
    "AsgiToWsgiStatistics",
    "BadRequest",
    "BridgeError",
    "ClientDisconnected",
    "LifespanFailure",
    "ProtocolError",
    "UnsupportedScope",
    "WsgiToAsgi",
    "WsgiToAsgiStatistics",
]

__version__ = "0.1.0"
