/** What of a node is in sight, and how high that makes the node. */

export function setHidden(widget, hidden) {
    // For nodes that are elements. Some versions notice a change through their state alone, and only if it comes first.
    for (const options of [widget._state?.options, widget.options]) if (options) options.hidden = hidden;
    widget.hidden = hidden; // for nodes on the canvas
}

/** A node that was as low as it could be before a change stays so; any other keeps its height, or grows by what it lacks. */
export function keepHeight(node, change) {
    if (LiteGraph.vueNodesMode) return change(); // there an element has the height that it needs
    const tight = node.size[1] <= node.computeSize()[1] + 1;
    change();
    const needed = node.computeSize()[1];
    node.setSize([node.size[0], tight ? needed : Math.max(node.size[1], needed)]);
}
