"""A text on a node, for what a person would want to know and no output carries."""

import logging

from comfy_api.latest import io

log = logging.getLogger(__name__)

KEY = "sana_report"  # among the things that the host tells the user interface; js/report.js shows it


def reported(*outputs: object, text: str = "", private: bool = False) -> io.NodeOutput:
    """The outputs of a node, with a text for the node itself and for the log. An empty text takes an older one away.

    private: not for the log, which people show when they ask for help.

    The schema of the node needs `has_intermediate_output`, so that the host repeats the text when the result was cached.
    """
    if text and not private:
        log.info(text)
    return io.NodeOutput(*outputs, ui={KEY: [text] if text else []})
