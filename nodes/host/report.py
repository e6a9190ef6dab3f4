"""A text on a node, for what a person would want to know and no output carries."""

import logging

from comfy_api.latest import io

log = logging.getLogger(__name__)

# Among the things that the host tells the user interface.
REPORT = "sana_report"  # js/report.js shows it
WRITTEN = "sana_written"  # js/freeze.js offers to keep it


def reported(*outputs: object, text: str = "", private: bool = False, written: str | None = None) -> io.NodeOutput:
    """The outputs of a node, with a text for the node itself and for the log. An empty text takes an older one away.

    private: not for the log, which people show when they ask for help. written: what the node wrote and a person may keep,
    nothing in place of an older one if it is empty; None: it did not write.

    The schema of the node needs `has_intermediate_output`, so that the host repeats the text when the result was cached.
    """
    if text and not private:
        log.info(text)
    told = {REPORT: text} if written is None else {REPORT: text, WRITTEN: written}
    return io.NodeOutput(*outputs, ui={key: [value] if value else [] for key, value in told.items()})
