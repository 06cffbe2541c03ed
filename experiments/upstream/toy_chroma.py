"""A toy Chroma of diffusers with random weights, and its sensitivity to hidden padding.

Needs torch and diffusers.
"""

import torch
from diffusers import ChromaTransformer2DModel

LENGTHS, NUM_TEXT, NUM_IMAGE = (3, 9), 16, 24


def make_toy() -> ChromaTransformer2DModel:
    """Return the toy model with fixed random weights."""
    torch.manual_seed(0)
    return ChromaTransformer2DModel(
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        axes_dims_rope=(4, 14, 14),
        in_channels=8,
        joint_attention_dim=32,
        approximator_num_channels=64,
        approximator_hidden_dim=40,
        approximator_layers=2,
    )


def predict(model: ChromaTransformer2DModel, mask: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Return the model's prediction for fixed random inputs.

    Args:
        model: The toy model.
        mask: Attention mask of text and image tokens.
        padding: 1 exchanges the text behind the one padding token that may be seen.
    """
    generator = torch.Generator().manual_seed(1)
    image, text, other_text = (
        torch.randn(len(LENGTHS), n, width, generator=generator)
        for n, width in ((NUM_IMAGE, 8), (NUM_TEXT, 32), (NUM_TEXT, 32))
    )
    is_hidden = torch.arange(NUM_TEXT) > torch.tensor(LENGTHS)[:, None]
    if padding:
        text = torch.where(is_hidden[..., None], other_text, text)
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(NUM_IMAGE / 4), torch.arange(4.0))
    return model(
        image,
        text,
        torch.full((len(LENGTHS),), 0.5),
        img_ids=positions,
        txt_ids=torch.zeros(NUM_TEXT, 3),
        attention_mask=mask,
        return_dict=False,
    )[0].detach()


def change_from_padding(model: ChromaTransformer2DModel, mask: torch.Tensor) -> float:
    """Return the relative change of the output when padding changes; 0 where it is hidden."""
    output, other_output = predict(model, mask), predict(model, mask, padding=1)
    return float((other_output - output).norm() / output.norm())
