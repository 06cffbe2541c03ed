"""Radiance with patches of 32 pixels: the published x0 model dilated and fine-tuned.

    radiance convert chroma-radiance-x0.safetensors x0-dilated.safetensors --dilate conv
    radiance train experiments/radiance_x0_patch32.py data.path=FOLDER text.file=T5

FOLDER, T5 and hardware are those of radiance_512.py, whose settings of 2026 these are, with text
ids of zero. Variants: `half` starts from x0-halved.safetensors (`--dilate conv_half`), the first
kind of January 2026, which reads every second pixel; `1024` continues at 1024 pixels, with as
many tokens as patches of 16 have at 512 (ours); `toy`.

From the authors' trainer (lodestone-rock/flow, experimental branch): the dilation, which gives
the same tokens for an image without detail, and that all but the approximator is trained. The
head's weights do not depend on the patch size; at the start it predicts four times the pixels per
token that it was trained for. Only the toy has been run, and not timed.
"""

import radiance_512 as published

from radiance import config as c

VARIANTS = {
    "half": ["init=x0-halved.safetensors", "model.patch_embed=conv_half"],
    "1024": ["init=runs/radiance_x0_patch32", "data.resolution=1024"],
    "toy": [
        *published.TOY,
        "model.patch=8",
        "data.extra_resolutions=24",
        "data.max_upscale=2",
        "data.bucket_step=8",
    ],
}


def config() -> c.Config:
    changes = [
        "name=radiance_x0_patch32",
        "init=x0-dilated.safetensors",
        "model.prediction=x0",
        "model.patch=32",
        *published.LATER,
    ]
    return c.override(published.config(), changes)
