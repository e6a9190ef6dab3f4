/** Finds the node that a connection begins at, through nodes that hand on what they are given and out of subgraphs. */
import { app } from "../../scripts/app.js";

const MOST_NODES = 200; // on the way; a circle has no end

/** The connection to an input of a node, by its place. */
function linkTo(node, slot) {
    return [...node.graph.links.values()].find((link) => link.target_id === node.id && link.target_slot === slot);
}

/** The node that contains a graph: null for the outermost graph. */
function containerOf(graph) {
    const graphs = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
    for (const { nodes } of graphs) {
        const found = nodes.find((node) => node.subgraph === graph);
        if (found) return found;
    }
    return null;
}

/** The first node of one of the types above an input of a node: upwards along inputs of the same type as that input. */
export function sourceOf(node, name, types) {
    const slot = node.findInputSlot(name);
    if (slot < 0) return null;
    const { type } = node.inputs[slot];
    let { graph } = node;
    let link = linkTo(node, slot);
    for (let i = 0; link && i < MOST_NODES; i++) {
        if (link.origin_id === graph.inputNode?.id) { // out of a subgraph
            const container = containerOf(graph);
            graph = container?.graph;
            link = container && linkTo(container, link.origin_slot);
            continue;
        }
        const origin = graph.getNodeById(link.origin_id);
        if (!origin) return null;
        if (origin.subgraph) { // into a subgraph
            graph = origin.subgraph;
            link = graph.getLink(graph.outputs[link.origin_slot]?.linkIds?.[0]);
            continue;
        }
        if (types.includes(origin.type)) return origin;
        const input = origin.inputs?.findIndex((found) => found.type === type || found.type === "*") ?? -1;
        link = input >= 0 && linkTo(origin, input);
    }
    return null;
}
