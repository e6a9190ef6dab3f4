/** Finds the node that a connection begins at, through nodes that hand on what they are given and out of subgraphs. */
import { app } from "../../scripts/app.js";

const MOST_NODES = 200; // on the way; a circle has no end

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
    let input = node.inputs?.find((found) => found.name === name);
    const { type } = input ?? {};
    let graph = node.graph;
    let link = input && graph?.getLink(input.link);
    for (let i = 0; link && i < MOST_NODES; i++) {
        if (link.origin_id === graph.inputNode?.id) { // out of a subgraph
            const container = containerOf(graph);
            const slot = link.origin_slot;
            graph = container?.graph;
            link = graph?.getLink(container.inputs[slot]?.link);
            continue;
        }
        const origin = graph.getNodeById(link.origin_id);
        if (!origin) return null;
        if (origin.subgraph) { // into a subgraph
            const slot = link.origin_slot;
            graph = origin.subgraph;
            link = graph.getLink(graph.outputs[slot]?.linkIds?.[0]);
            continue;
        }
        if (types.includes(origin.type)) return origin;
        input = origin.inputs?.find((found) => found.type === type || found.type === "*");
        link = input && graph.getLink(input.link);
    }
    return null;
}
