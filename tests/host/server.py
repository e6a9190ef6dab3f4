"""Real ComfyUI servers as subprocesses, one for each version and set of flags, kept until the tests end."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.host import newest_packages
from tests.host.base_directory import make_base_directory
from tests.host.client import Client
from tests.host.hosts import NEWEST, host_folder

FLAGS = ("--cpu", "--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:")
START_SECONDS = 180
LOG_BYTES = 20_000  # of the end of a log that is shown
WATCHER = Path(__file__).with_name("watcher.py")


class Server(Client):
    """A running server with this pack installed. `base` is its base directory; models, inputs and outputs are below it."""

    def __init__(self, version: str, flags: tuple[str, ...], base: Path, variables: dict[str, str]) -> None:
        if not host_folder(version).exists():
            raise FileNotFoundError(f"ComfyUI {version} has not been downloaded; run `python3 tests` once.")
        self.port = _free_port()
        super().__init__(f"127.0.0.1:{self.port}")
        self.title = " ".join(("ComfyUI", version, *flags))
        self.base = base
        make_base_directory(base)
        shutil.copy(WATCHER, base / "custom_nodes")
        place = ("--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base))
        command = [sys.executable, "-u", "main.py", *FLAGS, *place, *flags]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=host_folder(version), env=_variables() | variables, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        """The end of what the server printed."""
        return self.log_file.read_bytes()[-LOG_BYTES:].decode(errors="replace")

    def watched(self) -> list[str]:
        """The programs that the server started and the connections that it made, beside listening at its own address."""
        lines = (self.base / "watched.log").read_text(encoding="utf-8").splitlines()
        address = f"('127.0.0.1', {self.port}))"
        return [line for line in lines if not (line.startswith("socket.bind") and line.endswith(address))]

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the log if the server stops, or does not answer in time."""
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.title} did not start; its log ends with:\n{self.log()}")
            time.sleep(0.1)

    def close(self) -> None:
        """Stops the process, by force if it does not end by itself."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/system_stats", timeout=5).ok
        except requests.RequestException:
            return False


class Servers:
    """Starts servers when they are first asked for. Call it: servers("0.24.1", "--cache-none", MALLOC_ARENA_MAX="1")."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[tuple[object, ...], Server] = {}

    def __call__(self, version: str = NEWEST, *flags: str, **variables: str) -> Server:
        """variables: added to the environment of the server."""
        key = (version, *flags, *variables.items())
        if key not in self.running:
            server = Server(version, flags, self.folder / f"server{len(self.running)}", variables)
            self.running[key] = server
            server.wait_until_ready()
        return self.running[key]

    def logs(self) -> list[tuple[str, str]]:
        """Title and end of the log of each server."""
        return [(server.title, server.log()) for server in self.running.values()]

    def close(self) -> None:
        for server in self.running.values():
            server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _variables() -> dict[str, str]:
    """The variables of this process, less those that would let the server import from this project; no downloads."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**kept, **newest_packages.for_servers(), "HF_HUB_OFFLINE": "1"}
