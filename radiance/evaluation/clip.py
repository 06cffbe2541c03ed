"""CLIP score (arXiv 2104.08718): how well images fit their captions, by a user's CLIP in PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from radiance.base.errors import CheckpointError
from radiance.base.hashing import hash_parts
from radiance.base.images import to_image
from radiance.data.datasets import DataError
from radiance.evaluation.features import Images
from radiance.weights.opening import open_tensors


class ClipScorer:
    """A CLIP of transformers from a local folder: config.json, safetensors, tokenizer and image settings, as `save_pretrained` writes them.

    Nothing is downloaded. Raises ImportError without transformers and torch, and CheckpointError
    for a folder that holds no CLIP.
    """

    def __init__(self, folder: str | Path):
        try:
            from transformers import CLIPConfig, CLIPModel, CLIPProcessor
        except ImportError:
            raise ImportError(
                "The CLIP score needs PyTorch and transformers: install torch and "
                "'radiance[reference]'."
            ) from None
        folder = Path(folder).expanduser()
        file = open_tensors(folder)
        try:
            clip_config = CLIPConfig.from_pretrained(folder, local_files_only=True)
            self.model, loading_info = CLIPModel.from_pretrained(
                folder,
                config=clip_config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} holds no whole CLIP of transformers ({str(error).splitlines()[0]}): "
                "copy it again."
            ) from None
        if loading_info["missing_keys"]:  # which transformers would draw at random
            raise CheckpointError(
                f"{folder} holds no whole CLIP: its weights lack "
                f"{', '.join(sorted(loading_info['missing_keys'])[:3])}."
            )
        self.identity = hash_parts("clip", file.fingerprint(), self.model.config.to_json_string())

    def __call__(self, images: Images, captions: Sequence[str]) -> Float32[np.ndarray, " b"]:
        """The score of every image in [-1, 1] with its caption: 100 max(cos, 0) of their embeddings. What is over 77 tokens is cut off.

        (The paper multiplies by 2.5 in place of 100.) Raises DataError for another number of
        captions than images.
        """
        if len(images) != len(captions):
            raise DataError(
                f"There are {len(images)} images and {len(captions)} captions: every image needs "
                "its own."
            )
        import torch

        inputs = self.processor(
            text=list(captions),
            images=[to_image(pixels) for pixels in images],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.inference_mode():
            outputs = self.model(**inputs)
        cosines = (outputs.image_embeds * outputs.text_embeds).sum(
            dim=-1
        )  # the model has made them of length 1
        return 100 * np.maximum(cosines.numpy(), 0)
