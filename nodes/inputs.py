"""Inputs that several nodes have."""

from comfy_api.latest import io

from ..sana.text.prompt import INSTRUCTION

OFFICIAL, NONE, CUSTOM = "official", "none", "custom"


def clip() -> io.Clip.Input:
    return io.Clip.Input("clip", tooltip="The text encoder of a SANA loader.")


def instruction(tooltip: str) -> io.Combo.Input:
    """Which instruction; `instruction_text` is its text."""
    return io.Combo.Input("instruction", options=[OFFICIAL, NONE, CUSTOM], tooltip=tooltip)


def custom_instruction() -> io.String.Input:
    return io.String.Input(
        "custom_instruction",
        multiline=True,
        optional=True,
        tooltip="Put before the text when instruction is custom. End it with a space.",
    )


def instruction_text(choice: str, custom: str) -> str | None:
    """What is put before a prompt. None: nothing."""
    return {OFFICIAL: INSTRUCTION, NONE: None, CUSTOM: custom or None}[choice]
