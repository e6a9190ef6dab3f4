"""ComfyUI-Sana: NVIDIA SANA text to image for ComfyUI. The host imports this file; everything else lives in nodes/ and sana/."""

if __package__:  # set when the host imports the pack; empty when pytest imports this file alone
    from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
