/** Texts and drawings on a node, below its other widgets, that no workflow and no prompt saves. */

const MARGIN = 6, LINE = 15, LETTER = 6.5; // px: around the text, of a line, and of a letter on average

/** The height of a text that is broken into lines as wide as the node, in px. */
function height(node, text) {
    const letters = Math.max(1, Math.floor((node.size[0] - 4 * MARGIN) / LETTER));
    const lines = text.split("\n").map((line) => Math.max(1, Math.ceil(line.length / letters)));
    return lines.reduce((sum, count) => sum + count, 0) * LINE + 2 * MARGIN;
}

/** Adds an element as a widget. needed: its height in px, as a function. */
export function addElement(node, name, element, needed) {
    const widget = node.addDOMWidget(name, name, element, {
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

function addText(node, name, className) {
    const element = document.createElement("div");
    element.className = className;
    element.style.cssText =
        `box-sizing: border-box; padding: 0 ${MARGIN}px; font-size: 12px; line-height: ${LINE}px; color: var(--descrip-text, #999); ` +
        "overflow: hidden auto; overflow-wrap: anywhere; white-space: pre-line; user-select: text;";
    return addElement(node, name, element, () => height(node, element.textContent));
}

/** Shows a text in the widget of this name, which is made if need be; an empty text takes the widget away. Returns its element. */
export function showText(node, name, className, text) {
    let widget = node.widgets?.find((found) => found.name === name);
    if (text) {
        widget ??= addText(node, name, className);
        widget.value = text;
    } else if (widget) node.removeWidget(widget);
    node.setDirtyCanvas(true, true);
    return text ? widget.element : undefined;
}
