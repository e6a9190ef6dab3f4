"""Runs a host inside this process, so that its modules and objects can be used directly.

Everything in the host is global: one version in one process, and for good. `python3 tests` starts a process per version.
"""

import asyncio
import importlib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.host.base_directory import PACK, make_base_directory
from tests.host.hosts import host_folder

FLAGS = ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
ON_CPU = ["--cpu"]
ON_SECOND_DEVICE = ["--fp32-unet", "--fp32-vae", "--fp32-text-enc"]  # where results are compared with those of a CPU


@dataclass(frozen=True)
class Host:
    """A booted host."""

    version: str
    base: Path  # its base directory; models, inputs and outputs are below it
    nodes: dict[str, type]  # node classes by id, those of this pack included
    log: str  # warnings of the start, with the reason if the pack could not be imported

    def call(self, node_id: str, **inputs: object) -> tuple:
        """Runs one node with the given inputs, like the executor but without its checks; returns its outputs."""
        node = self.nodes[node_id]
        result = getattr(node(), node.FUNCTION)(**inputs)
        if isinstance(result, dict):  # of an output node of the older schema
            return result.get("result", ())
        return result if isinstance(result, tuple) else result.result

    def pack(self, name: str) -> ModuleType:
        """The module `name` of the pack as the host loaded it, such as "nodes.loaders" or "sana.networks.transformer".

        Its classes are not those of `import sana`: the host gives the pack a name of its own.
        """
        return importlib.import_module(f"{_module_name(self.base)}.{name}")


def boot(version: str, base: Path, *flags: str) -> Host:
    """Starts ComfyUI `version` with `base` as its base directory and loads all nodes, as main.py does."""
    make_base_directory(base)
    sys.path.insert(0, str(host_folder(version)))
    with _arguments([*FLAGS, *flags, "--base-directory", str(base)]):
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    importlib.import_module("utils.extra_config")  # before `nodes`, which can hide `utils` behind comfy/utils.py
    server, nodes = importlib.import_module("server"), importlib.import_module("nodes")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server.PromptServer(loop)
    loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
    logging.getLogger().removeHandler(handler)
    return Host(version, base, nodes.NODE_CLASS_MAPPINGS, log.getvalue())


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """The host reads the command line when it is imported."""
    kept, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        yield
    finally:
        sys.argv = kept


def _module_name(base: Path) -> str:
    """The name under which the host imports the pack: its path, without the dots."""
    return str(base / "custom_nodes" / PACK).replace(".", "_x_")
