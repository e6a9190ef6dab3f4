"""A client of a running ComfyUI: queues prompts as the frontend does and keeps everything the server says about them."""

import io
import json
import struct
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import requests
import websocket
from PIL import Image

# A type of binary messages: four bytes of type, four of a size, and that many of metadata (JSON), then a picture
PREVIEW_WITH_METADATA = 4
HELD = "sana_test_held"  # the event of watcher.py
Event = dict[str, object]
WHITE_PICTURE = {
    "white": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0xFFFFFF}},
    "show": {"class_type": "PreviewImage", "inputs": {"images": ["white", 0]}},
}


@dataclass(frozen=True)
class Failure:
    """Why a prompt failed. The exception type of a prompt that was refused before it ran is the type of that error."""

    node_id: str
    node_type: str
    exception_type: str
    message: str
    traceback: str = ""


@dataclass
class Run:
    """What the server said about one prompt."""

    prompt_id: str = ""
    events: list[tuple[str, Event]] = field(default_factory=list)  # type and data, in order of arrival
    previews: list[Image.Image] = field(default_factory=list)
    failure: Failure | None = None
    outputs: dict[str, dict] = field(default_factory=dict)  # by node id, as in the history
    seconds: float = 0.0

    def data(self, kind: str) -> list[Event]:
        """The data of all events of one type, such as "progress", "executed", "execution_cached"."""
        return [data for name, data in self.events if name == kind]

    def texts(self) -> dict[str, str]:
        """The text that each node of this pack sent for itself, by node id; nodes that sent none are left out."""
        sent = {data["node"]: (data["output"] or {}).get("sana_report") for data in self.data("executed")}
        return {name: "\n".join(texts) for name, texts in sent.items() if texts is not None}

    @property
    def interrupted(self) -> bool:
        return bool(self.data("execution_interrupted"))


class Client:
    """Talks to the server at `address`, "127.0.0.1:8188"."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.url = f"http://{address}"

    def get(self, path: str, **parameters: str) -> dict:
        """The JSON at `path`, such as "system_stats" or "workflow_templates"."""
        response = requests.get(f"{self.url}/{path}", params=parameters, timeout=60)
        response.raise_for_status()
        return response.json()

    def object_info(self) -> dict[str, dict]:
        """Every node the server has, by id."""
        return self.get("object_info")

    def upload(self, name: str, content: bytes) -> str:
        """Puts a file among the inputs and returns the name that LoadImage takes."""
        files, form = {"image": (name, content)}, {"overwrite": "true"}
        response = requests.post(f"{self.url}/upload/image", files=files, data=form, timeout=60)
        response.raise_for_status()
        return response.json()["name"]

    def images(self, run: Run, node_id: str | None = None) -> list[Image.Image]:
        """The pictures that the output nodes of `run` wrote, or one of them."""
        chosen = [run.outputs[node_id]] if node_id else run.outputs.values()
        references = [reference for output in chosen for reference in output.get("images", [])]
        return [Image.open(io.BytesIO(self._view(reference))) for reference in references]

    def interrupt(self) -> None:
        """Asks the running prompt to stop. From inside a prompt: call it from `on_event` of queue()."""
        requests.post(f"{self.url}/interrupt", json={}, timeout=60).raise_for_status()

    def interrupt_at(self, prompt: dict[str, dict], **place: object) -> "Run":
        """Runs `prompt`, which is held at a place by `watcher.py` and interrupted there. place: the fields of its `Hold`.

        Raises RuntimeError if the prompt does not come there.
        """
        requests.post(f"{self.url}/sana_test/hold", json=place, timeout=60).raise_for_status()

        def interrupt_when_held(name: str, data: Event) -> None:
            if name == HELD:
                self.interrupt()

        run = self.queue(prompt, on_event=interrupt_when_held)
        if not run.data(HELD):
            raise RuntimeError(f"the prompt was not held at {place}")
        return run

    def free(self) -> None:
        """Has the server unload all models and forget cached results before the next prompt."""
        body = {"unload_models": True, "free_memory": True}
        requests.post(f"{self.url}/free", json=body, timeout=60).raise_for_status()
        self.queue(WHITE_PICTURE)  # an idle server may take the next prompt first, and acts on the request after that

    def queue(
        self,
        prompt: dict[str, dict],  # API format: {node id: {"class_type": ..., "inputs": ...}}
        *,
        on_event: Callable[[str, Event], None] | None = None,  # called with each event's type and data as it arrives
        preview_method: str = "latent2rgb",
        timeout_seconds: float = 300,  # between two messages
    ) -> Run:
        """Runs `prompt` and returns when the server is done with it, whether it succeeded, failed or was interrupted."""
        client_id = uuid.uuid4().hex
        body = {"prompt": prompt, "client_id": client_id, "extra_data": {"preview_method": preview_method}}
        url = f"ws://{self.address}/ws?clientId={client_id}"
        with closing(websocket.create_connection(url, timeout=timeout_seconds)) as socket:
            socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            start = time.perf_counter()
            response = requests.post(f"{self.url}/prompt", json=body, timeout=timeout_seconds)
            if response.status_code == 400:
                return Run(failure=_refusal(response.json()))
            response.raise_for_status()
            run = Run(response.json()["prompt_id"])
            while not _is_over(run):
                _receive(socket.recv(), run, on_event)
            run.seconds = time.perf_counter() - start
        run.outputs = self.get(f"history/{run.prompt_id}")[run.prompt_id]["outputs"]
        return run

    def _view(self, reference: dict[str, str]) -> bytes:
        response = requests.get(f"{self.url}/view", params=reference, timeout=60)
        response.raise_for_status()
        return response.content


def _receive(message: str | bytes, run: Run, on_event: Callable[[str, Event], None] | None) -> None:
    """Files one message of the websocket under `run`; messages about other prompts are dropped."""
    if isinstance(message, bytes):
        kind, size = struct.unpack(">II", message[:8])
        if kind == PREVIEW_WITH_METADATA:
            run.previews.append(Image.open(io.BytesIO(message[8 + size :])))
        return
    event = json.loads(message)
    name, data = event["type"], event["data"]
    if data.get("prompt_id", run.prompt_id) != run.prompt_id:
        return
    run.events.append((name, data))
    if name == "execution_error":
        fields = [data[key] for key in ("node_id", "node_type", "exception_type", "exception_message")]
        run.failure = Failure(*fields, "".join(data["traceback"]))
    if on_event:
        on_event(name, data)


def _is_over(run: Run) -> bool:
    """The last message of a prompt, sent when its history is written: nothing is executing any more."""
    return bool(run.events) and run.events[-1][0] == "executing" and run.events[-1][1]["node"] is None


def _refusal(answer: dict) -> Failure:
    """The first error of a prompt that failed validation, or the error of the prompt as a whole."""
    for node_id, node in answer.get("node_errors", {}).items():
        error = node["errors"][0]
        return Failure(node_id, node["class_type"], error["type"], f"{error['message']}: {error['details']}")
    error = answer["error"]
    return Failure("", "", error["type"], error["message"])
