"""Which timesteps should be sampled in training: Chroma's parabola, or what it replaced?

    radiance ablate timestep_distribution   the smoke scale, 9 minutes: decides nothing
    radiance ablate timestep_distribution --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/timestep_distribution.py:uniform --device h200

A distribution weights times against each other, and it makes the gradient noisy where it rarely
samples. The variants `…_as_…` sample from one distribution and weight as the other would, so that
the expected gradient is the other's and its noise is not. The logistic distribution is FLUX's, with
a mean by resolution: 0.47 at 64 tokens. Validation uses the same times in all variants, as many in
every tenth. The control samples late times (logit-normal with mean and scale 0.8): one in ten
thousand is below 0.1, where the details of an image are decided.

Expected before the run: all reach the base's loss in 0.9 to 1.2 times its steps and differ two-
to fivefold in the first and the last tenth; each `…_as_…` is closer to the distribution it is
weighted as. Result of the smoke scale: undecided, and against the last expectation (README.md).
"""

import masking

from radiance import config as c
from radiance.ablation.suite import Suite

CHANGES = {
    "parabola": (),
    "uniform": ("flow.timestep_distribution=uniform",),
    "logit_normal": ("flow.timestep_distribution=logit_normal",),
    "logistic": ("flow.timestep_distribution=logistic",),
    "parabola_as_uniform": ("flow.timestep_weighting=uniform",),
    "uniform_as_parabola": (
        "flow.timestep_distribution=uniform",
        "flow.timestep_weighting=parabola",
    ),
    "late": (
        "flow.timestep_distribution=logit_normal",
        "flow.logit_mean=0.8",
        "flow.logit_std=0.8",
    ),
}


def config() -> c.Config:
    """Return the base of the pod scale."""
    return masking.make_base("timestep_distribution", "pod")


# The cpu scale reads captions by its own distribution of times, which this suite replaces.
SCALES = masking.make_scales("timestep_distribution")
del SCALES["cpu"]
SUITE = Suite(
    name="timestep_distribution",
    question="Which timesteps should be sampled in training?",
    metric="validation_loss",
    base="parabola",
    controls=("late",),
    margin=0.01,
    variants=CHANGES,
    scales=SCALES,
)
VARIANTS = SUITE.variants_at("pod")
