"""Answers to the user interface beside those of the host: POST with a JSON object, and a JSON object back."""

import asyncio
from collections.abc import Callable

from aiohttp import web
from server import PromptServer

from .breakdown import guarded

MOST_BYTES = 2**23  # of a question; a text of 100,000 characters has 0.4 MB

Answer = Callable[[dict[str, object]], dict[str, object]]


def serve(path: str, answer: Answer) -> None:
    """Have `answer` called in a thread for what is posted to a path, for one question after the other: ten at once would
    each read the same file. Where it raises ValueError, OSError or RuntimeError the answer is {"error": its sentence} with
    status 400.

    A path that is served already stays as it is: the host may load the pack again.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == path for route in server.routes):
        return
    turn = asyncio.Lock()

    async def handle(request: web.Request) -> web.Response:
        try:
            question = await request.clone(client_max_size=MOST_BYTES).json()
            if not isinstance(question, dict):
                raise ValueError(f"{path} takes a JSON object, not {type(question).__name__}")
            async with turn:
                return web.json_response(await asyncio.to_thread(guarded(answer), question))
        except web.HTTPRequestEntityTooLarge:
            return _refusal(f"{path} takes {MOST_BYTES:,} bytes at most; shorten the text", 413)
        except (ValueError, OSError, RuntimeError) as error:
            return _refusal(str(error), 400)

    server.routes.post(path)(handle)


def _refusal(sentence: str, status: int) -> web.Response:
    return web.json_response({"error": sentence}, status=status)
