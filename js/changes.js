/**
 * Notices what changes on the nodes in view.
 *
 * User interfaces tell some changes by callbacks of widgets, some by events, and some, such as an undo or a widget that a
 * subgraph shows outside, not at all, each version in its own way. So the nodes are looked at a few times a second.
 */
import { app } from "../../scripts/app.js";

const PERIOD = 150; // ms
const refreshed = []; // what is called after a refresh

/** Calls act() when the user interface has read all lists anew, as by the key R: files and styles may be others by the same names. */
export function onRefresh(act) {
    refreshed.push(act);
}

/** Calls act(node, seen) for each node of a type in view, whenever what look(node) returns, a text, has become another, and after
 * a refresh. */
export function follow(type, look, act) {
    let seen = new WeakMap();
    onRefresh(() => (seen = new WeakMap()));
    setInterval(() => {
        for (const node of app.canvas?.graph?.nodes ?? []) {
            if (node.type !== type) continue;
            const found = look(node);
            if (seen.get(node) === found) continue;
            seen.set(node, found);
            act(node, found);
        }
    }, PERIOD);
}

/** The value of a widget of a node, by name. */
export function valueOf(node, name) {
    return node.widgets?.find((widget) => widget.name === name)?.value;
}

/** Whether something is connected to an input of a node, by name. */
export function isConnected(node, name) {
    const slot = node.findInputSlot(name);
    return slot >= 0 && node.isInputConnected(slot);
}

app.registerExtension({
    name: "comfyui-sana.changes",
    refreshComboInNodes() {
        for (const act of refreshed) act();
    },
});
