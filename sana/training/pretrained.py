"""Models of others for captions and scores, by the transformers library."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

CLIP = "openai/clip-vit-large-patch14"  # of NVlabs' scores
QUESTION = "Describe this picture in a few sentences, for somebody who will paint it."
# What transformers raises where a folder makes no sense.
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError, SafetensorError)


def load_model(kind: Any, model: Path | str, download: bool) -> Any:
    """A network, see `load_part`. Raises ValueError, too, for one of another kind, whose weights do not all belong."""
    found, report = load_part(kind, model, download, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model} lacks {len(missing)} tensors of a {kind.__name__}, first {missing[0]}; give such a model"
        )
    return found


def load_processor(model: Path | str, download: bool) -> Any:
    """What makes inputs of texts and pictures, see `load_part`. Raises ValueError, too, where its tokenizer knows no words:
    of a folder without the tokenizer's files `transformers` makes such a one, to which all texts are the same.
    """
    from transformers import AutoProcessor  # which takes seconds to import

    processor = load_part(AutoProcessor, model, download)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{model} lacks the files of its tokenizer, such as tokenizer.json; give the whole model")
    return processor


def load_part(kind: Any, model: Path | str, download: bool, **options: object) -> Any:
    """A part of a model. kind: a class of `transformers`. model: a folder, or a name on the Hugging Face hub.

    A name is looked for among what was downloaded before, and on the hub only with `download`. Code that comes with a model
    is not run. Raises ValueError where it is not found, and where `transformers` makes nothing of it.
    """
    try:
        return kind.from_pretrained(model, local_files_only=not download, trust_remote_code=False, **options)
    except DAMAGE as error:
        reason = str(error).strip().split("\n")[0]
        if os.path.isdir(model):
            advice = "give the folder of a model that transformers can load"
        else:
            advice = "give the folder of a model, or --download to fetch it"
        raise ValueError(f"{model} cannot be loaded ({reason}); {advice}") from error
