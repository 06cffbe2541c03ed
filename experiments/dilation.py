"""Does dilating a trained model to larger patches save steps, compared with training from scratch?

    radiance train experiments/quickstart.py train.seed=SEED name=small-SEED
    radiance convert runs/small-SEED dilated-SEED.safetensors --dilate conv --dtype fp32
    radiance train experiments/dilation.py init=dilated-SEED.safetensors train.seed=SEED \\
        name=dilation-SEED
    radiance train experiments/dilation.py:scratch train.seed=SEED name=dilation-scratch-SEED

The quickstart's model reads patches of 4 pixels in images of 16. Here the same digits have 32
pixels and patches of 8: as many tokens, as with 1024 pixels and patches of 32 instead of 512 and
16 (radiance_x0_patch32.py, which is too large to be measured here). The rule is the published
one: each weight of the patch embedding is used for 2×2 pixels, divided by 4, and all other
weights stay.

Three seeds, four to five minutes each on a CPU core: 39 to 48 steps reach the loss of 400 from
scratch, not counting the small model's training: experiments/results/dilation.md.
"""

import quickstart

from radiance import config as c

VARIANTS = {"scratch": ["init="]}


def config() -> c.Config:
    return c.override(
        quickstart.config(),
        [
            "name=dilation", "init=dilated.safetensors", "model.patch=8", "data.resolution=32",
            "data.max_upscale=4", "data.batch_size=32", "train.steps=400",
            "train.validate_every=25", "train.sample_every=200", "train.checkpoint_every=100",
        ],
    )  # fmt: skip
