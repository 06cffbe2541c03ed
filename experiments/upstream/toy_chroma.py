"""A Chroma of diffusers at toy size with random weights, and what changing the hidden padding does to its output. Needs torch and diffusers."""

import torch
from diffusers import ChromaTransformer2DModel

LENGTHS, WORDS, IMAGE = (3, 9), 16, 24


def toy() -> ChromaTransformer2DModel:
    torch.manual_seed(0)
    sizes = dict(
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        axes_dims_rope=(4, 14, 14),
    )
    sizes |= dict(
        in_channels=8,
        joint_attention_dim=32,
        approximator_num_channels=64,
        approximator_hidden_dim=40,
        approximator_layers=2,
    )
    return ChromaTransformer2DModel(**sizes)


def output(model: ChromaTransformer2DModel, mask: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The prediction. padding: another seed for the text behind the token of padding that may be seen."""
    draw = torch.Generator().manual_seed(1)
    image, text, other = (
        torch.randn(len(LENGTHS), n, width, generator=draw)
        for n, width in ((IMAGE, 8), (WORDS, 32), (WORDS, 32))
    )
    hidden = torch.arange(WORDS) > torch.tensor(LENGTHS)[:, None]
    if padding:
        text = torch.where(hidden[..., None], other, text)
    at = torch.cartesian_prod(torch.zeros(1), torch.arange(IMAGE / 4), torch.arange(4.0))
    time = torch.full((len(LENGTHS),), 0.5)
    return model(
        image,
        text,
        time,
        img_ids=at,
        txt_ids=torch.zeros(WORDS, 3),
        attention_mask=mask,
        return_dict=False,
    )[0].detach()


def moved(model: ChromaTransformer2DModel, mask: torch.Tensor) -> float:
    """How far other padding moves the output, relative to its norm: 0 where padding is hidden."""
    one, two = output(model, mask), output(model, mask, padding=1)
    return float((two - one).norm() / one.norm())
