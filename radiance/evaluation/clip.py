"""CLIP score (arXiv 2104.08718): how well pictures fit their captions, by a user's CLIP in PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from radiance.data.datasets import DataError
from radiance.evaluation.features import Pictures, digest
from radiance.pictures import to_picture
from radiance.weights.files import CheckpointError, open_tensors


class Clip:
    """A CLIP of transformers from a local folder: config.json, safetensors, tokenizer and picture settings, as `save_pretrained` writes them.

    Nothing is downloaded. Raises ImportError without transformers and torch, and CheckpointError for a folder that holds no CLIP.
    """

    def __init__(self, folder: str | Path):
        try:
            from transformers import CLIPConfig, CLIPModel, CLIPProcessor
        except ImportError:
            raise ImportError("The CLIP score needs PyTorch and transformers: install torch and 'radiance[reference]'.") from None
        folder = Path(folder).expanduser()
        file = open_tensors(folder)
        try:
            settings = CLIPConfig.from_pretrained(folder, local_files_only=True)
            self.model, told = CLIPModel.from_pretrained(
                folder, config=settings, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder} holds no whole CLIP of transformers ({str(error).splitlines()[0]}): copy it again.") from None
        if told["missing_keys"]:  # which transformers would draw at random
            raise CheckpointError(f"{folder} holds no whole CLIP: its weights lack {', '.join(sorted(told['missing_keys'])[:3])}.")
        self.identity = digest("clip", file.fingerprint(), self.model.config.to_json_string())

    def __call__(self, pictures: Pictures, captions: Sequence[str]) -> Float32[np.ndarray, " b"]:
        """The score of every picture in [-1, 1] with its caption: 100 max(cos, 0) of their embeddings. What is over 77 tokens is cut off.

        (The paper multiplies by 2.5 in place of 100.) Raises DataError for another number of captions than pictures.
        """
        if len(pictures) != len(captions):
            raise DataError(f"There are {len(pictures)} pictures and {len(captions)} captions: every picture needs its own.")
        import torch

        inputs = self.processor(
            text=list(captions), images=[to_picture(pixels) for pixels in pictures], return_tensors="pt", padding=True, truncation=True
        )
        with torch.inference_mode():
            found = self.model(**inputs)
        cosines = (found.image_embeds * found.text_embeds).sum(dim=-1)  # the model has made them of length 1
        return 100 * np.maximum(cosines.numpy(), 0)
