/**
 * Shows what a node of this pack found out, such as which model it loaded, as text on the node itself.
 *
 * The nodes work without this file. The text comes with the outputs of a node (nodes/host/report.py), which the host sends for
 * cached results, too.
 */
import { app } from "../../scripts/app.js";
import { showText } from "./elements.js";

const KEY = "sana_report";

/** Shows the text in the output of a node. An output without one, which hosts send for nodes that say nothing, changes nothing. */
function show(node, output) {
    const texts = output?.[KEY];
    if (!node || !Array.isArray(texts)) return;
    showText(node, KEY, "sana-report", texts.join("\n"));
}

/** Shows the texts among the outputs that the user interface kept, by "node id" or "id of a subgraph:node id". */
function showKept(outputs) {
    for (const [place, output] of Object.entries(outputs ?? {})) {
        const [node, subgraph] = place.split(":").reverse();
        const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
        show(graph?.getNodeById(node), output);
    }
}

app.registerExtension({
    name: "comfyui-sana.report",
    nodeCreated(node) {
        if (!node.constructor.nodeData?.category?.startsWith("SANA")) return;
        const { onExecuted } = node;
        node.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            show(this, output);
        };
    },
    afterConfigureGraph() { // after undo
        showKept(app.nodeOutputs);
    },
    onNodeOutputsUpdated(outputs) { // after a change of workflows
        showKept(outputs);
    },
});
