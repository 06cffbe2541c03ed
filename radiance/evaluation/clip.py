"""Compute the CLIP score (arXiv 2104.08718): the similarity of images and captions.

The user gives the CLIP model, which runs in PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from radiance.base.errors import CheckpointError, DataError
from radiance.base.hashing import hash_parts
from radiance.base.images import Images, to_image
from radiance.weights.opening import open_tensors


class ClipScorer:
    """A CLIP model from a local folder. Nothing is downloaded.

    Args:
        folder: Config, safetensors, tokenizer and image settings, as `save_pretrained` writes them.

    Raises:
        ImportError: transformers or torch is not installed.
        CheckpointError: The folder has no complete CLIP model.
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
            loaded: Any = CLIPModel.from_pretrained(
                folder,
                config=clip_config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises errors of every kind for damaged files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(
                f"{folder} has no complete CLIP model for transformers ({reason[:200]}): copy it "
                f"again."
            ) from None
        self.model, loading_info = loaded
        self.processor = processor
        if missing_keys := sorted(loading_info["missing_keys"]):  # transformers initializes them
            raise CheckpointError(
                f"{folder} has no complete CLIP model: its weights lack "
                f"{', '.join(missing_keys[:3])}."
            )
        self.identity = hash_parts("clip", file.fingerprint(), self.model.config.to_json_string())

    def __call__(self, images: Images, captions: Sequence[str]) -> Float32[np.ndarray, " b"]:
        """Return the score of every image with its caption.

        The score is 100 max(cos, 0) of the two embeddings; the paper multiplies by 2.5 instead of
        100. Captions are truncated to 77 tokens.

        Args:
            images: Images in [-1, 1].
            captions: One caption per image.

        Raises:
            DataError: The numbers of images and captions differ.
        """
        if len(images) != len(captions):
            raise DataError(
                f"There are {len(images)} images and {len(captions)} captions: every image needs "
                "one."
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
        # The model returns embeddings of length 1.
        cosines = (outputs.image_embeds * outputs.text_embeds).sum(dim=-1)
        return 100 * np.maximum(cosines.numpy(), 0)
