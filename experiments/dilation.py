"""Patches twice as large: does dilating a trained model and training it on save steps, beside one of the larger patches from scratch?

    radiance train experiments/quickstart.py train.seed=SEED name=small-SEED
    radiance convert runs/small-SEED dilated-SEED.safetensors --dilate conv --dtype fp32
    radiance train experiments/dilation.py init=dilated-SEED.safetensors train.seed=SEED name=dilation-SEED
    radiance train experiments/dilation.py:scratch train.seed=SEED name=dilation-scratch-SEED

The quickstart's model reads patches of 4 pixels in pictures of 16. Here the same digits have 32 pixels a side and patches of 8: as many tokens, as 1024
pixels and patches of 32 have beside 512 and 16 (experiments/radiance_x0_patch32.py, the published step, which is too large to be measured
here). The rule is the published one: each weight of the patch embedding on 2×2 pixels, divided by 4, and all else as it is. Steps cost the same in
both arms, and the small model's come on top.

It has not been run to its end: there are no numbers yet.
"""

import quickstart

from radiance import config as c

ARMS = {"scratch": ["init="]}


def config() -> c.Config:
    return c.override(
        quickstart.config(),
        [
            "name=dilation", "init=dilated.safetensors", "model.patch=8", "data.side=32", "data.enlarge=4", "data.batch=32", "train.steps=400",
            "train.validate_every=25", "train.sample_every=200", "train.checkpoint_every=100",
        ],
    )  # fmt: skip
