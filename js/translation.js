/** Saved workflows of other SANA packs in our nodes, by the table of old_nodes.js. Knows no user interface. */

import { MADE, NODES, PACKS, release } from "./old_nodes.js";
import { SavedGraph } from "./saved_graph.js";

const LOADER = "SanaCheckpointLoader";
const KEPT = ["flags", "order", "mode", "color", "bgcolor", "shape"]; // of a node
const NARROWEST = 300, GAP = 40, NOTE = [620, 330], MARGIN = [120, 160]; // px; the last of the note in view
const MOST_NODES = 200; // on the way upwards; a circle has no end

/** Translates a workflow in place. Returns false, and changes nothing, if no node of it is of another pack.
 *
 * options(list): the entries of a list of Load SANA: model, text_encoder, or vae.
 * isFree(type): false for a type that the host has from a third pack.
 */
export function translate(workflow, options, isFree) {
    if (!Array.isArray(workflow.nodes)) return false;
    const graphs = [workflow, ...(workflow.definitions?.subgraphs ?? [])].filter(({ nodes }) => Array.isArray(nodes));
    const work = new Translation(workflow, graphs.map((data) => new SavedGraph(data)), options);
    return work.run(isFree);
}

/** The values of a node by the names that the table has for them. */
function valuesOf(node, { widgets }) {
    const values = node.widgets_values ?? [];
    return Array.isArray(values) ? Object.fromEntries(widgets.map((name, i) => [name, values[i]])) : values;
}

/** What the table has for a node, if it is of one of those packs. */
function rowOf(node, isFree) {
    const row = Object.hasOwn(NODES, node.type) && NODES[node.type];
    const pack = node.properties?.cnr_id ?? node.properties?.aux_id;
    if (!row || (pack && !PACKS.test(pack)) || !isFree(node.type)) return undefined;
    return !row.isOld || row.isOld(valuesOf(node, row), node) ? row : undefined;
}

/** The last part of the name of a file or folder, without what tells its format. */
function stem(name) {
    const last = String(name).split(/[\\/]/).pop().toLowerCase();
    return last.replace(/\.(pth|pt|ckpt|bin|sft|safetensors)$/, "").replace(/[-_]diffusers$/, "");
}

/** The entry of a list that a name means. Models of Hugging Face may be in folders that are called like models--owner--name. */
function entryOf(entries, name) {
    const wanted = stem(name);
    const fits = (entry) => stem(entry) === wanted || stem(entry).endsWith(`--${wanted}`);
    return entries.find((entry) => entry === name) ?? entries.find(fits);
}

class Translation {
    told = new Map(); // by type of an old node: what a person is told about it
    made = new Set(); // nodes
    sought = []; // {list, name, entry}: the files that old loaders named, and what our lists have for them

    constructor(workflow, graphs, options) {
        Object.assign(this, { workflow, graphs, options });
        const highest = (ids) => ids.map(Number).filter(Number.isFinite).reduce((most, id) => Math.max(most, id), 0);
        const used = (own, all) => highest(graphs.flatMap((graph) => [...own(graph), ...all(graph.data)]));
        this.lastNode = used(({ nodes }) => nodes.map(({ id }) => id), (data) => [data.last_node_id, data.state?.lastNodeId]);
        this.lastLink = used(({ links }) => [...links.keys()], (data) => [data.last_link_id, data.state?.lastLinkId]);
    }

    run(isFree) {
        const found = this.graphs.flatMap((graph) => graph.nodes.map((node) => ({ graph, node, row: rowOf(node, isFree) })));
        const old = found.filter(({ row }) => row);
        if (!old.length) return false;
        for (const item of old) { // while all of them are there to be asked
            this.told.set(item.node.type, item.row.now);
            item.parts = item.row.becomes?.(valuesOf(item.node, item.row), this.#near(item));
        }
        for (const item of old) if (item.parts && !item.row.joins) this.#replace(item);
        for (const item of old) if (item.row.joins) this.#join(item);
        for (const item of old) if (item.row.through) this.#bypass(item);
        for (const graph of this.graphs) {
            graph.retype("GEMMA", "CLIP");
            graph.makeRoom(this.made);
            graph.finish();
        }
        this.#offer();
        this.#tell();
        this.#count();
        return true;
    }

    #near({ graph, node }) {
        return {
            file: (list, name) => {
                const entry = entryOf(this.options(list), name);
                this.sought.push({ list, name, entry });
                return entry ?? (list === "model" ? release(name)?.name ?? name : name);
            },
            has: (type) => this.graphs.some(({ nodes }) => nodes.some((other) => other.type === type)),
            above: (type) => this.#above(graph, node, type),
        };
    }

    /** The values of the nearest node of a type above the input `model`, or else of the first in the workflow. */
    #above(graph, node, type) {
        let found = node;
        for (let i = 0; found && found.type !== type && i < MOST_NODES; i++) {
            const link = graph.into(found, "model") ?? graph.into(found, ""); // that of Reroute
            found = link && graph.node(link.origin_id);
        }
        if (found?.type !== type) found = this.graphs.flatMap(({ nodes }) => nodes).find((other) => other.type === type);
        return found && valuesOf(found, NODES[type]);
    }

    #made(part, old, k) {
        const { type, values, title = old.title } = part;
        const [x, y, width, height] = [old.pos?.[0] ?? 0, old.pos?.[1] ?? 0, old.size?.[0] ?? 0, old.size?.[1] ?? 0];
        return {
            id: k ? ++this.lastNode : old.id,
            type,
            pos: [x, y + k], // makeRoom has them one below the other
            size: [Math.max(width, NARROWEST), type === old.type ? Math.max(height, MADE[type].height) : MADE[type].height],
            ...Object.fromEntries(KEPT.filter((name) => name in old).map((name) => [name, old[name]])),
            ...(title && title !== old.type ? { title } : {}),
            inputs: [],
            outputs: MADE[type].outputs.map((name) => ({ name, type: name, links: [] })),
            properties: { cnr_id: type.startsWith("Primitive") ? "comfy-core" : "comfyui-sana", "Node name for S&R": type },
            widgets_values: values,
        };
    }

    /** Puts the nodes of the table in the place of an old one. Links that none of them has a use for are gone. */
    #replace({ graph, node, parts }) {
        const made = parts.map((part, k) => this.#made(part, node, k));
        made.forEach((found) => this.made.add(found));
        const outputs = graph.from(node);
        for (const { name, link: id } of node.inputs ?? []) {
            const link = graph.links.get(id), k = parts.findIndex(({ inputs }) => inputs?.[name]);
            if (!link) continue;
            if (k < 0) graph.drop(link);
            else graph.end(link, made[k], parts[k].inputs[name]);
        }
        graph.exchange(node, made);
        for (const link of outputs) {
            const k = parts.findIndex(({ outputs }) => outputs?.[link.origin_slot] !== undefined);
            if (k < 0) graph.drop(link);
            else graph.begin(link, made[k].id, parts[k].outputs[link.origin_slot]);
        }
        parts.forEach(({ feeds }, k) => {
            if (!feeds) return;
            const link = { id: ++this.lastLink, origin_id: made[k].id, origin_slot: 0, type: feeds.toUpperCase() };
            graph.add(link);
            graph.end(link, made[0], feeds);
            graph.begin(link, made[k].id, 0);
        });
    }

    /** Has the SANA loader of the graph do the work of an old loader of a part, which it loads as well. */
    #join({ graph, node, row, parts }) {
        const loader = graph.nodes.find(({ type }) => type === LOADER);
        if (!loader) return this.#replace({ graph, node, parts });
        const [file] = parts[0].values, list = MADE[LOADER].outputs[row.joins] === "CLIP" ? "text_encoder" : "vae";
        if (this.options(list).includes(file)) loader.widgets_values[row.joins] = file;
        for (const link of graph.from(node)) graph.begin(link, loader.id, row.joins);
        graph.remove(node);
    }

    /** Has what an old node gave out come from where it came to it. */
    #bypass({ graph, node, row }) {
        const source = graph.into(node, row.through);
        for (const link of source ? graph.from(node) : []) graph.begin(link, source.origin_id, source.origin_slot);
        graph.remove(node);
    }

    /** Gives loaders the addresses of models that are not there, for the user interface to offer. */
    #offer() {
        for (const { list, name, entry } of this.sought) {
            const source = list === "model" && !entry && release(name);
            for (const { properties, widgets_values: values } of source ? this.made : [])
                if (values[0] === source.name) properties.models = [source];
        }
    }

    /** Adds a note above the outermost graph, where a person sees it. */
    #tell() {
        const became = [...this.told].map(([type, now]) => `- \`${type}\`: ${now}`);
        const files = this.sought.map((file) => `- ${this.#fileText(file)}`);
        const text = [
            "This graph was made with the nodes of another SANA pack. They have become those of ComfyUI-Sana:",
            became.join("\n"),
            "**Files**",
            [...new Set(files)].join("\n") || "- as they were",
            "The file of the workflow is as it was until you save. Delete this note when you have read it.",
        ].join("\n\n");
        const { nodes } = this.graphs[0];
        const least = (axis) => (nodes.length ? Math.min(...nodes.map(({ pos }) => pos?.[axis] ?? 0)) : 0);
        const pos = [least(0), least(1) - NOTE[1] - 2 * GAP];
        this.workflow.extra = { ...this.workflow.extra, ds: { scale: 0.8, offset: [MARGIN[0] - pos[0], MARGIN[1] - pos[1]] } };
        nodes.push({
            id: ++this.lastNode,
            type: "MarkdownNote",
            pos,
            size: NOTE,
            flags: {},
            order: nodes.length,
            mode: 0,
            inputs: [],
            outputs: [],
            title: "Translated to ComfyUI-Sana",
            properties: {},
            widgets_values: [text],
            color: "#222",
            bgcolor: "#000",
        });
    }

    #fileText({ list, name, entry }) {
        if (entry) return entry === name ? `${list}: \`${entry}\`` : `${list}: \`${entry}\`, for \`${name}\``;
        const missing = `none of your files is called \`${stem(name)}\`.`;
        if (list !== "model") return `${list}: ${missing} *auto* takes the first that fits.`;
        const source = release(name);
        const get = source
            ? `Download [${source.name}](${source.url}) into \`models/${source.directory}\` and press R`
            : "Choose another";
        return `**choose a model in Load SANA**: ${missing} ${get}, or take \`demo\`, with *auto* below it, for a try.`;
    }

    #count() {
        for (const { data } of this.graphs) {
            if ("last_node_id" in data) data.last_node_id = this.lastNode;
            if ("last_link_id" in data) data.last_link_id = this.lastLink;
            if (data.state) Object.assign(data.state, { lastNodeId: this.lastNode, lastLinkId: this.lastLink });
        }
    }
}
