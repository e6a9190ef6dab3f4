"""Prompts to better prompts."""

from comfy_api.latest import io

from ..sana.text.enhancement import one_line
from ..sana.text.generation import Sampling
from . import inputs
from .host.clip import check_clip
from .host.report import reported


class SanaPromptEnhancer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SanaPromptEnhancer",
            display_name="SANA prompt enhancer",
            category="SANA/conditioning",
            search_aliases=["llm", "gemma", "generate text", "better prompt", "prompt expansion", "rewrite prompt"],
            description="Writes a longer prompt with more to see, by the text encoder that is loaded anyway: Gemma-2-2b-it. "
            "Connect its text to SANA prompt.",
            inputs=[
                inputs.clip(),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the picture is to show, in a few words.",
                ),
                inputs.instruction(
                    "What Gemma is told before the text. official: NVIDIA's. none: the text is all it is told. custom: the "
                    "text below."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same text.",
                ),
                io.Float.Input(
                    "temperature",
                    default=Sampling.temperature,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How freely words are chosen. 0: always the likeliest.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=Sampling.max_tokens,
                    min=1,
                    max=2048,
                    tooltip="To write at most, in tokens. SANA reads 299 of a prompt.",
                ),
                inputs.custom_instruction(),
                io.String.Input(
                    "edited",
                    multiline=True,
                    optional=True,
                    tooltip="Given on as it stands, and nothing is written, unless it is empty. For a written text that is to "
                    "stay, or to be changed by hand.",
                ),
            ],
            outputs=[io.String.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        clip: io.Clip.Type,
        text: str,
        instruction: str,
        seed: int,
        temperature: float,
        max_tokens: int,
        custom_instruction: str = "",
        edited: str = "",
    ) -> io.NodeOutput:
        if edited.strip():
            return reported(edited, text="the edited text, as it stands")
        check_clip(clip)
        before = inputs.instruction_text(instruction, custom_instruction)
        ids = clip.generate(
            clip.tokenize(text, instruction=before, skip_template=False),
            do_sample=temperature != 0,
            max_length=max_tokens,
            temperature=temperature,
            top_k=Sampling.top_k,
            top_p=Sampling.top_p,
            seed=seed,
        )
        written = "".join(one_line([clip.decode(ids)]))
        note = "" if written else "Nothing was written, so the text stays as it is:\n"
        note = note if text.strip() else "Written from nothing, since the text is empty:\n"
        return reported(written or text, text=note + (written or text), private=True, written=written)


NODES = (SanaPromptEnhancer,)
