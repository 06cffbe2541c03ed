"""A mask of 0 and 1 as floats is added to the logits: padding is not hidden, kept tokens get a bonus of 1. Needs torch and diffusers.

huggingface/diffusers, src/diffusers/pipelines/chroma/pipeline_chroma.py, `_get_t5_prompt_embeds`
(the installed version is run): the mask is cast to the type of the weights, and
`scaled_dot_product_attention` adds masks that are not boolean. Reported there as #12116, #13619.
"""

from types import SimpleNamespace

import torch
from diffusers import ChromaPipeline, __version__
from toy_chroma import IMAGE, LENGTHS, WORDS, moved, toy


def mask_of_the_pipeline() -> torch.Tensor:
    """What their pipeline hands to the transformer, for prompts of LENGTHS tokens."""
    real = (torch.arange(WORDS) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = SimpleNamespace(input_ids=real, attention_mask=real)
    parts = SimpleNamespace(
        tokenizer=lambda *_, **__: tokens,
        text_encoder=lambda ids, **_: (torch.zeros(*ids.shape, 32),),
    )
    prompts = ["a prompt"] * len(LENGTHS)
    _, mask = ChromaPipeline._get_t5_prompt_embeds(
        parts, prompts, max_sequence_length=WORDS, device="cpu", dtype=torch.float32
    )
    return ChromaPipeline._prepare_attention_mask(parts, len(LENGTHS), IMAGE, torch.float32, mask)


def main():
    with torch.no_grad():
        model, mask = toy(), mask_of_the_pipeline()
        print(
            f"diffusers {__version__}: the pipeline's mask is {mask.dtype}, with the values {sorted(mask.unique().tolist())}"
        )
        print(
            f"other padding moves the output by {moved(model, mask.bool()):.1e} with the same mask as booleans, and as it is by"
        )
        print(f"effect = {moved(model, mask):.4f}")


if __name__ == "__main__":
    main()
