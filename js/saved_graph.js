/** One graph of a saved workflow, outermost or subgraph, in which nodes and links are exchanged. Knows no user interface. */

const FIELDS = ["id", "origin_id", "origin_slot", "target_id", "target_slot", "type"]; // of a link that is saved as an array
const INPUTS = -10; // what links from the inputs of a subgraph have for a node

const GAP = 50; // px, between nodes, with a title

const same = (one, other) => String(one) === String(other);

function remove(list, item) {
    const place = list?.indexOf(item) ?? -1;
    if (place >= 0) list.splice(place, 1);
}

const box = ({ pos, size }) => [pos?.[0] ?? 0, pos?.[1] ?? 0, size?.[0] ?? 0, size?.[1] ?? 0]; // left, top, width, height
const left = (node) => box(node)[0];
const top = (node) => box(node)[1];
const right = (node) => box(node)[0] + box(node)[2];
const bottom = (node) => box(node)[1] + box(node)[3];
const overlap = (one, other) => left(one) < right(other) && left(other) < right(one);
const lies = (node, [x, y, width, height]) =>
    left(node) >= x && left(node) < x + width && top(node) >= y && top(node) < y + height;

export class SavedGraph {
    /** data: as in a workflow of version 0.4 or 1, with `nodes`; it is changed, and complete again after `finish`. */
    constructor(data) {
        this.data = data;
        const links = (data.links ?? []).filter(Boolean);
        this.hasArrays = links.length ? links.some(Array.isArray) : data.version === 0.4;
        const read = (link) => (Array.isArray(link) ? Object.fromEntries(FIELDS.map((name, i) => [name, link[i]])) : link);
        this.links = new Map(links.map(read).map((link) => [link.id, link]));
    }

    get nodes() {
        return this.data.nodes;
    }

    node(id) {
        return this.nodes.find((node) => same(node.id, id));
    }

    /** The link into an input of a node, by the name of the input. */
    into(node, name) {
        return this.links.get(node.inputs?.find((input) => input.name === name)?.link);
    }

    /** The links out of a node. */
    from(node) {
        return [...this.links.values()].filter((link) => same(link.origin_id, node.id));
    }

    /** The place where it is noted which links begin at an output. */
    #noted(id, slot) {
        if (same(id, INPUTS)) return this.data.inputs?.[slot]?.linkIds;
        return this.node(id)?.outputs?.[slot]?.links;
    }

    add(link) {
        this.links.set(link.id, link);
    }

    /** Has a link begin at another output. */
    begin(link, id, slot) {
        remove(this.#noted(link.origin_id, link.origin_slot), link.id);
        Object.assign(link, { origin_id: id, origin_slot: slot });
        const output = this.node(id)?.outputs?.[slot];
        if (output) output.links ??= [];
        const noted = this.#noted(id, slot);
        if (noted && !noted.includes(link.id)) noted.push(link.id);
    }

    /** Has a link end at a new input of a node. */
    end(link, node, name) {
        node.inputs.push({ name, type: link.type, link: link.id });
        Object.assign(link, { target_id: node.id, target_slot: node.inputs.length - 1 });
    }

    drop(link) {
        remove(this.#noted(link.origin_id, link.origin_slot), link.id);
        for (const input of this.node(link.target_id)?.inputs ?? []) if (input.link === link.id) input.link = null;
        for (const output of this.data.outputs ?? []) remove(output.linkIds, link.id);
        this.links.delete(link.id);
    }

    /** Takes a node out of the graph, and the links at it that are left. */
    remove(node) {
        for (const link of [...this.links.values()])
            if (same(link.origin_id, node.id) || same(link.target_id, node.id)) this.drop(link);
        remove(this.nodes, node);
    }

    /** Puts nodes in the place of one, whose links are at other nodes by now. */
    exchange(node, others) {
        this.nodes.splice(this.nodes.indexOf(node), 1, ...others);
    }

    /** Has all that is of a type be of another. */
    retype(from, to) {
        const slots = [this.data, ...this.nodes].flatMap(({ inputs, outputs }) => [...(inputs ?? []), ...(outputs ?? [])]);
        for (const found of [...slots, ...this.links.values()]) if (found.type === from) found.type = to;
    }

    /** Moves down what lies in the way of some nodes, column by column, and has groups go on around their nodes. */
    makeRoom(some) {
        const members = (this.data.groups ?? []).map((group) => [group, this.nodes.filter((node) => lies(node, group.bounding))]);
        const downwards = (one, other) => top(one) - top(other);
        for (const node of this.nodes.filter((found) => some.has(found)).sort(downwards)) {
            const below = this.nodes.filter((other) => other !== node && top(other) >= top(node) && overlap(node, other));
            let free = bottom(node) + GAP;
            for (const other of below.sort(downwards)) {
                if (top(other) >= free) break;
                other.pos = [left(other), free];
                free = bottom(other) + GAP;
            }
        }
        for (const [{ bounding }, inside] of members)
            bounding[3] = Math.max(bounding[3], ...inside.map((node) => bottom(node) + GAP / 2 - bounding[1]));
    }

    /** Gives the links back to the workflow, and takes away the bends of those that are gone. */
    finish() {
        this.data.links = [...this.links.values()].map((link) => (this.hasArrays ? FIELDS.map((name) => link[name]) : link));
        const place = this.hasArrays ? this.data.extra : this.data; // of the bends
        if (!place?.reroutes) return;
        for (const bend of place.reroutes) bend.linkIds = bend.linkIds?.filter((id) => this.links.has(id));
        place.reroutes = place.reroutes.filter((bend) => bend.floating || !bend.linkIds || bend.linkIds.length);
        if (place.linkExtensions) place.linkExtensions = place.linkExtensions.filter(({ id }) => this.links.has(id));
    }
}
