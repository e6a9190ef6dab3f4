/**
 * A button on SANA prompt enhancer that keeps the text it wrote last, by putting it into `edited`, or empties that to write anew.
 *
 * The node works without this file, and neither workflows nor prompts save the button.
 */
import { app } from "../../scripts/app.js";
import { follow, isConnected, valueOf } from "./changes.js";
import { onOutput } from "./outputs.js";
import { keepHeight, setHidden } from "./sight.js";

const NODE = "SanaPromptEnhancer", BUTTON = "sana_freeze", EDITED = "edited";
const KEEP = "keep this text", ANEW = "write anew";
const last = new WeakMap(); // by node: the text that was written last, or taken out of `edited`

/** What the button is to say; empty: there is nothing that it could do. */
function labelOf(node) {
    if (isConnected(node, EDITED)) return "";
    if (valueOf(node, EDITED)?.trim()) return ANEW;
    return last.get(node) ? KEEP : "";
}

function press(node) {
    const edited = node.widgets.find(({ name }) => name === EDITED);
    const kept = edited.value.trim() ? edited.value : "";
    const text = kept ? "" : last.get(node) ?? "";
    if (kept) last.set(node, kept); // so that the next press brings it back
    app.canvas.emitBeforeChange(); // for an undo
    edited.value = text;
    edited.callback?.(text);
    app.canvas.emitAfterChange();
}

function arrange(node, label) {
    const button = node.widgets.find(({ name }) => name === BUTTON);
    keepHeight(node, () => {
        if (label) button.label = label;
        setHidden(button, !label);
    });
    node.setDirtyCanvas(true, true);
}

onOutput("sana_written", (node, [text]) => last.set(node, text ?? ""));
follow(NODE, labelOf, arrange);

app.registerExtension({
    name: "comfyui-sana.freeze",
    nodeCreated(node) {
        if (node.constructor.nodeData?.name !== NODE) return;
        const button = node.addWidget("button", BUTTON, null, () => press(node), { serialize: false }); // into prompts
        button.serialize = false; // into workflows
        setHidden(button, true);
    },
});
