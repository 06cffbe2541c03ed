"""Radiance with patches of 32 pixels, a quarter of the tokens: the published x0 model dilated, then fine-tuned (January 2026).

    radiance convert chroma-radiance-x0.safetensors x0-dilated.safetensors --dilate conv
    radiance train experiments/radiance_x0_patch32.py data.path=FOLDER text.file=T5

FOLDER, T5 and the hardware are those of experiments/radiance_512.py, whose settings of 2026 these are, with text ids of zero.

| arm | starts from | what it is |
|---|---|---|
| (none) | x0-dilated.safetensors | a convolution of 32×32: each weight on 2×2 pixels, divided by 4 |
| half | x0-halved.safetensors (`--dilate conv_half`) | the first kind: every second pixel is read, and the convolution stays |
| 1024 | runs/radiance_x0_patch32 | at 1024 pixels as many tokens as a patch of 16 has at 512; ours |
| toy | | digits on a CPU |

From the authors' trainer (lodestone-rock/flow, experimental branch): the dilation, which gives the same tokens on an image without detail,
and that all but the approximator is trained. The head's weights know no patch size and stay as they are; at the start it paints four times
the pixels from each token that it was trained for.

Only the toy has been run. There are no images and no numbers of the recipe itself.
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
