"""Questions of the user interface come one after the other to what answers them, whatever that raises."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from server import PromptServer

from tests.host.boot import Host

Answer = Callable[[dict], dict]
Ask = Callable[[TestClient], Awaitable[object]]
PATH = "/sana_test/answers"
pytestmark = pytest.mark.newest


class PanicException(BaseException):
    """As of a library in Rust."""


@pytest.fixture
def served(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer, Ask], object]:
    """Serve an answer at PATH, and return what a function does with a client of that server."""

    def call(answer: Answer, ask: Ask) -> object:
        routes = web.RouteTableDef()
        monkeypatch.setattr(PromptServer, "instance", SimpleNamespace(routes=routes))
        serve = host.pack("nodes.host.routes").serve
        serve(PATH, answer), serve(PATH, lambda question: {"second": True})

        async def run() -> object:
            application = web.Application()
            application.add_routes(routes)
            async with TestClient(TestServer(application)) as client:
                return await ask(client)

        return asyncio.run(run())

    return call


async def told(client: TestClient) -> tuple[int, dict]:
    response = await client.post(PATH, json={"a": 1})
    return response.status, await response.json()


def raises(error: BaseException) -> Answer:
    def answer(question: dict) -> dict:
        raise error

    return answer


def test_a_path_that_is_served_stays_as_it_is(served: Callable[[Answer, Ask], object]) -> None:
    assert served(lambda question: {"got": question}, told) == (200, {"got": {"a": 1}})


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("so"), "so"),
        (OSError("gone"), "gone"),
        (PanicException("at line 3"), "a library broke down (PanicException: at line 3); "),
        (SystemExit(3), "a library broke down (SystemExit: 3); "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_raised_becomes_a_sentence(
    served: Callable[[Answer, Ask], object], error: BaseException, sentence: str
) -> None:
    status, answer = served(raises(error), told)
    assert status == 400 and answer["error"].startswith(sentence)


def test_one_question_is_answered_at_a_time(served: Callable[[Answer, Ask], object]) -> None:
    under_way, most = threading.Semaphore(1), []

    def answer(question: dict) -> dict:
        alone = under_way.acquire(blocking=False)
        most.append(alone)
        threading.Event().wait(0.02)
        if alone:
            under_way.release()
        return question

    async def ask(client: TestClient) -> list[tuple[int, dict]]:
        return await asyncio.gather(*(told(client) for _ in range(10)))

    assert served(answer, ask) == [(200, {"a": 1})] * 10
    assert most == [True] * 10
