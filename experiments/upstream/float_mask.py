"""A float mask of 0 and 1 is added to the logits and hides nothing. Needs torch and diffusers.

huggingface/diffusers, src/diffusers/pipelines/chroma/pipeline_chroma.py, `_get_t5_prompt_embeds`
(the installed version is run): the mask is cast to the type of the weights, and
`scaled_dot_product_attention` adds masks that are not boolean: kept tokens get a bonus of 1.
Reported as issues 12116 and 13619. The script takes seconds.
"""

from types import SimpleNamespace

import torch
from diffusers import ChromaPipeline, __version__
from toy_chroma import LENGTHS, NUM_IMAGE, NUM_TEXT, change_from_padding, make_toy


def make_pipeline_mask() -> torch.Tensor:
    """Return the mask that the pipeline passes to the transformer for prompts of LENGTHS tokens."""
    is_token = (torch.arange(NUM_TEXT) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = SimpleNamespace(input_ids=is_token, attention_mask=is_token)
    pipeline = SimpleNamespace(
        tokenizer=lambda *_, **__: tokens,
        text_encoder=lambda ids, **_: (torch.zeros(*ids.shape, 32),),
    )
    prompts = ["a prompt"] * len(LENGTHS)
    _, mask = ChromaPipeline._get_t5_prompt_embeds(
        pipeline, prompts, max_sequence_length=NUM_TEXT, device="cpu", dtype=torch.float32
    )
    return ChromaPipeline._prepare_attention_mask(
        pipeline, len(LENGTHS), NUM_IMAGE, torch.float32, mask
    )


def main():
    with torch.no_grad():
        model, mask = make_toy(), make_pipeline_mask()
        values = sorted(mask.unique().tolist())
        print(f"diffusers {__version__}: the pipeline's mask is {mask.dtype} with values {values}")
        print("relative change of the output when the padding changes:")
        print(f"{change_from_padding(model, mask.bool()):.1e} with the same mask as booleans, and")
        print(f"effect = {change_from_padding(model, mask):.4f}")


if __name__ == "__main__":
    main()
