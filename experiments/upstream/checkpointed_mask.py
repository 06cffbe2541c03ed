"""Under gradient checkpointing, single blocks run without the mask. Needs torch and diffusers.

huggingface/diffusers, src/diffusers/models/transformers/transformer_chroma.py, `forward` (the
installed version is run): with gradient checkpointing the mask is passed to the double blocks and
not to the single ones. A model is then trained without the mask that it is sampled with.
The script takes seconds.
"""

import torch
from diffusers import __version__
from toy_chroma import LENGTHS, NUM_IMAGE, NUM_TEXT, change_from_padding, make_toy, predict


def main():
    model = make_toy()
    text_mask = torch.arange(NUM_TEXT) <= torch.tensor(LENGTHS)[:, None]
    image_mask = torch.ones(len(LENGTHS), NUM_IMAGE, dtype=torch.bool)
    mask = torch.cat([text_mask, image_mask], dim=1)  # booleans, which are correct
    plain, plain_change = predict(model, mask), change_from_padding(model, mask)
    model.enable_gradient_checkpointing()
    change = float((predict(model, mask) - plain).norm() / plain.norm())
    print(f"diffusers {__version__}: relative change of the output by checkpointing: {change:.4f}")
    print("relative change of the output when the padding changes:")
    print(f"{plain_change:.1e} without checkpointing, and with it")
    print(f"effect = {change_from_padding(model, mask):.4f}")


if __name__ == "__main__":
    main()
