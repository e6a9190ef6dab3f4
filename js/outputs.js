/** What nodes of this pack told when they ran, which comes with their outputs (nodes/host/report.py). */
import { app } from "../../scripts/app.js";

/** Calls act(node, texts) with the texts under a key of a node's output: when it has run, after an undo, and after a change of
 * workflows. An output without that key, which hosts send for nodes that say nothing, changes nothing. */
export function onOutput(key, act) {
    function told(node, output) {
        if (node && Array.isArray(output?.[key])) act(node, output[key]);
    }

    /** Of the outputs that the user interface kept, by "node id" or "id of a subgraph:node id". */
    function toldBefore(outputs) {
        for (const [place, output] of Object.entries(outputs ?? {})) {
            const [node, subgraph] = place.split(":").reverse();
            const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
            told(graph?.getNodeById(node), output);
        }
    }

    app.registerExtension({
        name: `comfyui-sana.${key}`,
        nodeCreated(node) {
            if (!node.constructor.nodeData?.category?.startsWith("SANA")) return;
            const { onExecuted } = node;
            node.onExecuted = function (output) {
                onExecuted?.apply(this, arguments);
                told(this, output);
            };
        },
        afterConfigureGraph() { // after undo
            toldBefore(app.nodeOutputs);
        },
        onNodeOutputsUpdated(outputs) { // after a change of workflows
            toldBefore(outputs);
        },
    });
}
