/**
 * Opens workflows of other SANA packs with the nodes of this one (translation.js), and says where such a pack is installed.
 *
 * ComfyUI_ExtraModels, the first home of SANA, has three ids of ours for nodes with other inputs, and a host has one node of
 * each id. Hosts have replacements of nodes, too, but for ids that they do not know, one node for one, and after a click.
 */
import { app } from "../../scripts/app.js";
import { showText } from "./elements.js";
import { NODES } from "./old_nodes.js";
import { translate } from "./translation.js";

const SHARED = ["SanaCheckpointLoader", "EmptySanaLatentImage", "GemmaTextEncode"];
const OTHERS = /extramodels|comfyui-lightning/i;
const CORE = /^(nodes|comfy_extras)\b/;
const ADVICE = "Disable one of the two packs and restart ComfyUI.";
const TITLE = "Two packs have the same nodes";

const definition = (type) => LiteGraph.registered_node_types[type]?.nodeData;
const moduleOf = (type) => definition(type)?.python_module ?? "";
const packOf = (type) => moduleOf(type).split(".").pop();
const isOurs = (type) => definition(type)?.category?.startsWith("SANA") ?? false;

/** Whether nothing but the packs of the table, or the host itself, has a node of this type. */
const isFree = (type) => !definition(type) || isOurs(type) || CORE.test(moduleOf(type)) || OTHERS.test(moduleOf(type));

/** The entries of a list of Load SANA. */
function entries(list) {
    const { values } = LiteGraph.createNode("SanaCheckpointLoader").widgets.find(({ name }) => name === list).options;
    return typeof values === "function" ? values() : values;
}

/** A warning about nodes of ours that another pack has in their place; "" if there are none. */
function taken(type) {
    if (!definition(type) || isOurs(type)) return "";
    return `This node is that of ${packOf(type)}, which has the same id as one of ComfyUI-Sana. ${ADVICE}`;
}

app.registerExtension({
    name: "comfyui-sana.old-graphs",
    beforeConfigureGraph(workflow) {
        if (!SHARED.every(isOurs)) return;
        const copy = structuredClone(workflow); // one that makes no sense stays as it was
        if (translate(copy, entries, isFree)) Object.assign(workflow, copy);
    },
    nodeCreated(node) {
        const type = node.constructor.nodeData?.name;
        if (SHARED.includes(type) && taken(type)) showText(node, "sana_other_pack", "sana-other-pack", taken(type));
    },
    setup() {
        const { toast } = app.extensionManager;
        const lost = SHARED.find(taken), other = Object.keys(NODES).find((type) => !isOurs(type) && OTHERS.test(moduleOf(type)));
        if (lost)
            toast.add({
                severity: "warn",
                summary: TITLE,
                detail: `${packOf(lost)} has taken the place of ${SHARED.filter(taken).join(", ")} of ComfyUI-Sana, whose ` +
                    `workflows do not run. ${ADVICE}`,
            });
        else if (other)
            toast.add({
                severity: "info",
                summary: TITLE,
                detail: `Those of ComfyUI-Sana are in use, not those of ${packOf(other)}: its workflows of SANA are opened with ` +
                    "our nodes.",
                life: 10_000,
            });
    },
});
