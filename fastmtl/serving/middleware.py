"""ASGI middleware of the server: counts, the limit of a body, and clients that have gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GONE = 499  # nginx's status for a client that closed its connection before the answer


class Measured:
    """Middleware that reports each request.

    observe: called with the path, the status and the seconds after the last byte of the answer.
    The status is `GONE` if there is no answer, and 500 after an error.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[str, int, float], None]) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        begun, status = clock(), GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            self._observe(scope["path"], status, clock() - begun)


class WholeBody:
    """Middleware that reads the body first, and cancels the work for a client that has gone.

    most: bytes of a body; a larger one is refused, also without a length.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lengths = [value for key, value in scope["headers"] if key == b"content-length"]
        too_large = bool(lengths) and lengths[0].isdigit() and int(lengths[0]) > self._most
        body, more = bytearray(), not too_large
        while more and not too_large:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self._most
        if too_large:
            problem = {"error": f"the body has more than {self._most} bytes: send fewer texts"}
            await JSONResponse(problem, 413)(scope, receive, send)
            return
        await self._while_connected(scope, bytes(body), receive, send)

    async def _while_connected(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        end = asyncio.ensure_future(receive())  # after the body, the only message is the disconnect
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def given() -> Message:
            return whole.pop() if whole else await asyncio.shield(end)

        work = asyncio.ensure_future(self._app(scope, given, send))
        try:
            await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, end):
                task.cancel()
