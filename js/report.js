/**
 * Shows what a node of this pack found out, such as which model it loaded, as text on the node itself.
 *
 * The nodes work without this file. The host sends the text for cached results, too.
 */
import { showText } from "./elements.js";
import { onOutput } from "./outputs.js";

const KEY = "sana_report";

onOutput(KEY, (node, texts) => showText(node, KEY, "sana-report", texts.join("\n")));
