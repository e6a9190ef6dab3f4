"""The ControlNet loader. The host's own ControlNetApply nodes do the rest."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .host.control import load_control


class SanaControlNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaControlNetLoader",
            display_name="Load SANA ControlNet",
            category="SANA/loaders",
            search_aliases=["load controlnet model", "controlnet loader", "hed"],
            description="Loads a ControlNet for SANA. Connect it to Apply ControlNet, together with a DC-AE.",
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=folder_paths.get_filename_list("controlnet"),
                    tooltip="A file in models/controlnet. Official files hold their SANA model too, which is not used here.",
                )
            ],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def execute(cls, control_net: str) -> io.NodeOutput:
        return io.NodeOutput(load_control(Path(folder_paths.get_full_path_or_raise("controlnet", control_net))))


NODES = (SanaControlNetLoader,)
