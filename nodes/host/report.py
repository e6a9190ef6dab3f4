"""A line of text on a node, for what a person would want to know and no output carries."""

import logging

from comfy_api.latest import io
from server import PromptServer

log = logging.getLogger(__name__)


def report(node: type[io.ComfyNode], text: str) -> None:
    """Show text on the node that is being executed, and in the log."""
    log.info(text)
    node_id = getattr(node.hidden, "unique_id", None)  # none when a program calls the node outside a graph
    if node_id is not None:
        server = PromptServer.instance
        server.send_progress_text(text, node_id, server.client_id)
