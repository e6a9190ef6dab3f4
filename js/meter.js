/**
 * Shows on SANA prompt how many tokens its text has while one types, in red what of it will be cut off, and the words of its style.
 *
 * The nodes work without this file. The server counts (nodes/answers.py), with the tokenizer of the loader that the node is
 * connected to. Where it cannot, or where the text comes from another node, nothing is shown.
 */
import { follow, isConnected, valueOf } from "./changes.js";
import { answerTo } from "./server.js";
import { sourceOf } from "./source.js";
import { showText } from "./elements.js";

const NODE = "GemmaTextEncode";
const LOADERS = ["SanaCheckpointLoader", "SanaTextEncoderLoader"];
const MODELS = ["model", "text_encoder"];
const TEXTS = ["text", "instruction", "custom_instruction", "style"];
const PAUSE = 100; // ms without a question after the last key
const asked = new WeakMap(); // by node: the newest question, and whether one is under way

/** What the server is to be asked about a node, as JSON; empty: nothing. */
function questionOf(node) {
    if (TEXTS.some((name) => isConnected(node, name))) return "";
    const loader = sourceOf(node, "clip", LOADERS);
    if (!loader || MODELS.some((name) => isConnected(loader, name))) return "";
    const question = { loader: loader.type };
    for (const name of MODELS) question[name] = valueOf(loader, name) ?? "";
    for (const name of TEXTS) question[name] = valueOf(node, name) ?? "";
    return JSON.stringify(question);
}

function show(node, answer) {
    if (!node.graph) return; // taken out of it while the server counted
    let text = answer ? `${answer.used} of ${answer.limit} tokens` : "";
    if (answer?.lost) text += `, ${answer.lost} cut off: ${answer.cut}`;
    showText(node, "sana_style", "sana-style", answer?.style ?? "");
    const element = showText(node, "sana_meter", "sana-meter", text);
    element?.style.setProperty("color", answer.lost ? "var(--error-text, #f55)" : "var(--descrip-text, #999)");
}

/** Asks one question at a time for a node. What changes meanwhile is asked once, as it is in the end. */
async function ask(node, question) {
    const state = asked.get(node) ?? { busy: false };
    asked.set(node, state);
    state.question = question;
    if (state.busy) return;
    state.busy = true;
    for (let answered; answered !== state.question; ) {
        await new Promise((done) => setTimeout(done, PAUSE));
        answered = state.question;
        const answer = answered && (await answerTo("/sana/tokens", JSON.parse(answered)));
        if (answered === state.question) show(node, answer);
    }
    state.busy = false;
}

follow(NODE, questionOf, ask);
