/** Asks the server of this pack (nodes/answers.py). */
import { api } from "../../scripts/api.js";

/** The answer to a question at a path, or null where there is none. */
export async function answerTo(path, question) {
    try {
        const response = await api.fetchApi(path, {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify(question),
        });
        return response.ok ? await response.json() : null;
    } catch {
        return null;
    }
}
