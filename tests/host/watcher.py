"""A custom node of the servers: notes every program and connection of the process, and holds a prompt where a test asks it to.

What it notes goes to a file beside the folder of custom nodes, one line each. A hold is told to the clients as the event
HELD; it ends with the interrupt of the host, or after a while.
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NOTES = Path(__file__).parents[1] / "watched.log"
HELD = "sana_test_held"
HOLD_SECONDS = 20
# Beginnings of audit events, https://docs.python.org/3/library/audit_events.html
PROGRAMS = (
    *("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn"),
    *("webbrowser.",),
)
CONNECTIONS = ("socket.", "urllib.", "http.client.", "ftplib.", "imaplib.", "poplib.", "smtplib.")
LOCAL = ("socket.__new__", "socket.gethostname")  # a loop of asyncio makes a pair of sockets for itself


@dataclass
class Hold:
    """Where to hold: when a file is opened whose path ends so, or in a call of a network's part, counted from 1."""

    file: str = ""
    part: str = ""  # name of its class
    call: int = 1


class Watcher:
    def __init__(self) -> None:
        self.hold = Hold()
        self.notes = os.open(NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hear(self, event: str, arguments: tuple) -> None:
        if event.startswith((*PROGRAMS, *CONNECTIONS)) and event not in LOCAL:
            os.write(self.notes, f"{event} {arguments}\n".encode())
        elif event == "open" and self.hold.file and str(arguments[0]).endswith(self.hold.file):
            if get_executing_context():  # a node opens it
                self.wait()

    def see(self, module: nn.Module, inputs: tuple) -> None:
        if type(module).__name__ == self.hold.part:
            self.hold.call -= 1
            if self.hold.call == 0:
                self.wait()

    def arm(self, hold: Hold) -> None:
        self.hold = hold
        if hold.part:
            self.seeing = register_module_forward_pre_hook(self.see)

    def wait(self) -> None:
        if self.hold.part:
            self.seeing.remove()
        self.hold = Hold()
        PromptServer.instance.send_sync(HELD, {})
        deadline = time.monotonic() + HOLD_SECONDS
        while not management.processing_interrupted() and time.monotonic() < deadline:
            time.sleep(0.005)


WATCHER = Watcher()
sys.addaudithook(WATCHER.hear)


@PromptServer.instance.routes.post("/sana_test/hold")
async def hold(request: web.Request) -> web.Response:
    WATCHER.arm(Hold(**await request.json()))
    return web.json_response({})


@PromptServer.instance.routes.post("/sana_test/misbehave")
async def misbehave(request: web.Request) -> web.Response:
    """Start a program and ask for an address, to see that both are noted."""
    subprocess.run([sys.executable, "--version"], check=True)
    socket.getaddrinfo("127.0.0.1", 80)
    return web.json_response({})
