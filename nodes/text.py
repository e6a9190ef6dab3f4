"""Prompts to CONDITIONING."""

from comfy_api.latest import io

from ..sana.config import TEXT_TOKENS
from ..sana.text.styles import NO_STYLE
from . import inputs
from .host.clip import check_clip
from .host.report import reported
from .styles import style_names, style_text, styled

CATEGORY = "SANA/conditioning"


class GemmaTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GemmaTextEncode",
            display_name="SANA prompt",
            category=CATEGORY,
            search_aliases=[
                "text encode",
                "clip text encode",
                "prompt",
                "chi",
                "complex human instruction",
                "gemma",
                "style",
                "negative prompt",
            ],
            description="Encodes a prompt the way SANA was trained: after an instruction that asks for details. "
            "For a negative prompt choose no instruction, or use CLIP Text Encode.",
            inputs=[
                inputs.clip(),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Up to 299 tokens; what is longer is cut at the end, and the node says so.",
                ),
                inputs.instruction(
                    "official: NVIDIA's, for prompts. none: for negative prompts. custom: the text below."
                ),
                inputs.custom_instruction(),
                io.Combo.Input(
                    "style",
                    options=style_names(),
                    optional=True,
                    tooltip="Words put around the text, which say how the picture is made; the node shows them. The entries "
                    "with (negative) are for the negative prompt. More come from styles.json in the user folder.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, style: str | None = NO_STYLE, **unused: object) -> str:
        """A style whose words a person has changed is another. style: None where another node gives it."""
        try:
            return style_text(style or NO_STYLE)
        except ValueError:  # which `execute` tells
            return ""

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        text: str,
        instruction: str,
        custom_instruction: str = "",
        style: str = NO_STYLE,
    ) -> io.NodeOutput:
        check_clip(clip)
        before = inputs.instruction_text(instruction, custom_instruction)
        text = styled(text, style)
        (count,) = clip.cond_stage_model.encoder.count([text], before)
        lost = f", {count.lost} cut off" if count.lost else ""
        used = f"{count.used - 1} of {TEXT_TOKENS - 1} tokens"  # without the first, which begins every text
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text, instruction=before))
        return reported(conditioning, text=f"encoded {used}{lost}")


NODES = (GemmaTextEncode,)
