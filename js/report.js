/**
 * Shows what a node of this pack found out, such as which model it loaded, as text on the node itself.
 *
 * The nodes work without this file. The text comes with the outputs of a node (nodes/host/report.py), which the host sends for
 * cached results, too. It is a widget that is saved in no workflow and no prompt, and that exists only while there is a text.
 */
import { app } from "../../scripts/app.js";

const KEY = "sana_report";
const MARGIN = 6, LINE = 15, LETTER = 6.5; // px: around the text, of a line, and of a letter on average

/** The height of a text that is broken into lines as wide as the node, in px. */
function height(node, text) {
    const letters = Math.max(1, Math.floor((node.size[0] - 4 * MARGIN) / LETTER));
    return Math.ceil(text.length / letters) * LINE + 2 * MARGIN;
}

function addWidget(node) {
    const element = document.createElement("div");
    element.className = "sana-report";
    element.style.cssText =
        `box-sizing: border-box; padding: 0 ${MARGIN}px; font-size: 12px; line-height: ${LINE}px; color: var(--descrip-text, #999); ` +
        "overflow: hidden auto; overflow-wrap: anywhere; white-space: pre-line; user-select: text;";
    const needed = () => height(node, element.textContent);
    const widget = node.addDOMWidget(KEY, KEY, element, {
        serialize: false, // into prompts
        hideOnZoom: false,
        margin: MARGIN,
        getValue: () => element.textContent,
        setValue: (text) => (element.textContent = text),
        getMinHeight: needed,
        getMaxHeight: needed,
    });
    widget.serialize = false; // into workflows
    return widget;
}

/** Shows the text in the output of a node. An output without one, which hosts send for nodes that say nothing, changes nothing. */
function show(node, output) {
    const texts = output?.[KEY];
    if (!node || !Array.isArray(texts)) return;
    const text = texts.join("\n");
    const widget = node.widgets?.find(({ name }) => name === KEY);
    if (text) (widget ?? addWidget(node)).value = text;
    else if (widget) node.removeWidget(widget);
    node.setDirtyCanvas(true, true);
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
