/**
 * Shows inputs of our nodes only where they count, and draws the size that is chosen from a list.
 *
 * The nodes work without this file, and nothing that it does is saved: an input that is out of sight keeps its value. The host
 * has lists of its own that bring inputs with them, but they rename those inputs, and saved workflows would lose them.
 */
import { app } from "../../scripts/app.js";
import { follow, isConnected, onRefresh, valueOf } from "./changes.js";
import { addElement } from "./elements.js";
import { answerTo } from "./server.js";
import { keepHeight, setHidden } from "./sight.js";

const SHAPE = "sana_shape"; // the widget with the drawing
const SHAPE_HEIGHT = 62, MARGIN = 6; // px
const asked = new Map(); // by model: the answer of the server that is awaited, or has come
const possible = new Map(); // by model: the sizes for which it may have been released

/** [width, height] in px that is chosen from the list of Empty SANA latent; null: what stands below counts. */
function chosenSize(node) {
    const found = /\((\d+) x (\d+)\)$/.exec(valueOf(node, "size") ?? "");
    return found && [Number(found[1]), Number(found[2])];
}

const INSTRUCTION_RULES = { custom_instruction: (node) => valueOf(node, "instruction") === "custom" };

/** By type of node: whether each of these inputs counts. */
const RULES = {
    GemmaTextEncode: INSTRUCTION_RULES,
    SanaPromptEnhancer: INSTRUCTION_RULES,
    EmptySanaLatentImage: { width: (node) => !chosenSize(node), height: (node) => !chosenSize(node) },
    SanaCheckpointLoader: {
        variant: (node) => valueOf(node, "variant") !== "auto" || (possible.get(valueOf(node, "model"))?.length ?? 2) > 1,
    },
};

function drawShape(node, size) {
    const widget = node.widgets.find(({ name }) => name === SHAPE);
    if (!size) {
        if (widget) node.removeWidget(widget);
        return;
    }
    const element = widget?.element ?? document.createElement("div");
    const [width, height] = size.map((side) => Math.round((side / Math.max(...size)) * (SHAPE_HEIGHT - 2 * MARGIN - 2)));
    element.className = "sana-shape";
    element.style.cssText = "display: flex; align-items: center; justify-content: center;";
    element.innerHTML = `<div style="box-sizing: border-box; width: ${width}px; height: ${height}px; border-radius: 2px; ` +
        'border: 1px solid var(--descrip-text, #999); background: var(--comfy-input-bg, #222);"></div>';
    if (!widget) addElement(node, SHAPE, element, () => SHAPE_HEIGHT);
}

/** type: of the node, which a new one does not have yet. */
function arrange(node, type = node.type) {
    const rules = Object.entries(RULES[type]);
    const hidden = rules.map(([name, counts]) => !counts(node) && !isConnected(node, name));
    const widgets = rules.map(([name]) => node.widgets?.find((widget) => widget.name === name));
    const size = type === "EmptySanaLatentImage" ? chosenSize(node) : null;
    keepHeight(node, () => {
        widgets.forEach((widget, i) => widget && setHidden(widget, hidden[i]));
        drawShape(node, size);
    });
    node.setDirtyCanvas(true, true);
}

/** All that `arrange` goes by, as a text. */
function look(node) {
    const connected = Object.keys(RULES[node.type]).map((name) => isConnected(node, name));
    return JSON.stringify([connected, ...["instruction", "size", "model", "variant"].map((name) => valueOf(node, name))]);
}

async function learn(node) {
    const model = valueOf(node, "model");
    if (!asked.has(model)) asked.set(model, answerTo("/sana/sizes", { model }));
    const answer = await asked.get(model); // which several loaders may await
    if (answer) possible.set(model, answer.sizes);
    else asked.delete(model); // the next one asks again
    arrange(node);
}

onRefresh(() => asked.clear());
for (const type of Object.keys(RULES)) follow(type, look, type === "SanaCheckpointLoader" ? learn : (node) => arrange(node));

app.registerExtension({
    name: "comfyui-sana.rows",
    nodeCreated(node) {
        const type = node.constructor.nodeData?.name;
        if (!RULES[type]) return;
        arrange(node, type); // before it is seen
        const { onConfigure } = node;
        node.onConfigure = function () {
            onConfigure?.apply(this, arguments);
            arrange(this);
        };
    },
});
