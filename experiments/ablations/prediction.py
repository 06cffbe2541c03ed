"""Should the last layer predict velocity or x0, and does a NeRF head change the answer?

    radiance ablate prediction:p16   the smoke scale, an hour: decides nothing
    radiance ablate prediction:p16 --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/prediction.py:p16:nerf_x0 --device h200

One suite for each patch size, p4 to p32; heads and predictions are crossed in each. The trunk
always sees 64 tokens: images have 8 patches a side. The 3 · size² values of a patch cross the 256
channels of a token between patches of 8 and 16. All variants are validated with one measure, the x0
error over t + 0.05 with which x0 models are trained. `velocity` variants are trained without that
weight, linear_velocity_weighed with it.

Expected before the run: linear_velocity falls behind where a patch has more values than a token
has channels (arXiv 2511.13720), nerf_velocity does not, or later, because its head sees the noisy
pixels; no variant with another minimum divisor differs by 1 %. The control of p32 is
linear_velocity, which is known to fail there; elsewhere it is no_text. Results of the smoke scale:
README.md.
"""

import masking

from radiance import config as c
from radiance.ablation.suite import Scale, Suite

PATCHES = {
    f"p{size}": (f"model.patch={size}", f"data.resolution={8 * size}") for size in (4, 8, 16, 32)
}
TRAINED_AS_VELOCITY = ("model.prediction=velocity", "flow.loss_weighting=none")
CHANGES = {
    "linear_x0": (),
    "linear_velocity": TRAINED_AS_VELOCITY,
    "linear_velocity_weighed": ("model.prediction=velocity",),
    "nerf_x0": ("model.head=nerf_conv",),
    "nerf_velocity": ("model.head=nerf_conv", *TRAINED_AS_VELOCITY),
    "small_epsilon": ("flow.min_divisor=0.01",),
    "clamp": ("flow.min_divisor_mode=clamp",),
    "no_text": ("data.caption_dropout=1",),
}


def make_base(scale: str, *changes: str) -> c.Config:
    """Return the base at a scale, with changes."""
    return masking.make_base(
        "prediction",
        scale,
        "model.head=linear",
        "model.prediction=x0",
        "flow.loss_weighting=x0",
        *changes,
    )


def config() -> c.Config:
    """Return the base of the pod scale, at patch 16."""
    return make_base("pod", *PATCHES["p16"])


def make_suite(patch: str) -> Suite:
    """Return the suite of a patch size."""
    changes = PATCHES[patch]
    small = ("model.nerf_hidden=16", "model.nerf_mlp_ratio=2", "model.nerf_depth=1")
    return Suite(
        name=f"prediction_{patch}",
        question=f"Velocity or x0, from a linear or a NeRF head, at {patch}?",
        metric="validation_loss",
        base="linear_x0",
        controls=("linear_velocity" if patch == "p32" else "no_text",),
        margin=0.01,
        variants=CHANGES,
        scales={
            "smoke": Scale(
                make_base(
                    "smoke", "data.batch_size=8", "train.validation_images=32", *small, *changes
                ),
                num_images=512,
                num_seeds=3,
            ),
            "gpu": Scale(
                make_base("gpu", *changes),
                num_images=16384,
                num_seeds=8,
                learning_rate_factors=(0.5, 1.0, 2.0),
                num_samples=1024,
            ),
            "pod": Scale(make_base("pod", *changes), num_seeds=3),
        },
    )


SUITES = {patch: make_suite(patch) for patch in PATCHES}
VARIANTS = PATCHES | CHANGES
