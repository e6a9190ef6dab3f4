"""The blueprints in subgraphs/, as every version of the host lists them for its user interface."""

import asyncio
import importlib
import json

from tests.host.base_directory import PACK
from tests.host.boot import Host


def test_the_host_lists_them_and_knows_their_nodes(host: Host) -> None:
    manager = importlib.import_module("app.subgraph_manager").SubgraphManager()
    entries = asyncio.run(manager.get_custom_node_subgraphs(None)).values()
    ours = [entry for entry in entries if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"]
    assert len(ours) == 4
    for entry in ours:
        content = json.loads(asyncio.run(manager.load_entry_data(dict(entry)))["data"])
        (subgraph,) = content["definitions"]["subgraphs"]
        assert subgraph["name"] == entry["name"]
        assert {node["type"] for node in subgraph["nodes"]} <= host.nodes.keys()
