"""Under gradient checkpointing the single blocks are called without the mask. Needs torch and diffusers.

huggingface/diffusers, src/diffusers/models/transformers/transformer_chroma.py, `forward` (the
installed version is run): the call for the backward pass hands the mask to the double blocks and
not to the single ones. So a model is trained without what it is sampled with.
"""

import torch
from diffusers import __version__
from toy_chroma import IMAGE, LENGTHS, WORDS, moved, output, toy


def main():
    model = toy()
    mask = torch.arange(WORDS) <= torch.tensor(LENGTHS)[:, None]
    mask = torch.cat(
        [mask, torch.ones(len(LENGTHS), IMAGE, dtype=torch.bool)], dim=1
    )  # booleans, which are right
    plain, before = output(model, mask), moved(model, mask)
    model.enable_gradient_checkpointing()
    change = float((output(model, mask) - plain).norm() / plain.norm())
    print(
        f"diffusers {__version__}: checkpointing, which should change nothing, moves the output by {change:.4f} (relative);"
    )
    print(f"other padding moves it by {before:.1e} without checkpointing, and with it by")
    print(f"effect = {moved(model, mask):.4f}")


if __name__ == "__main__":
    main()
