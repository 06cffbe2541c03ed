"""Does Chroma's small modulation network cost anything against a layer in every block (FLUX)?

    radiance ablate modulation   the smoke scale, half an hour: shows that it runs
    radiance ablate modulation --scale cpu --gate   chooses the approximator's learning rate too
    radiance ablate modulation --scale cpu --minutes 600   hours of two cores; resumes
    radiance ablate modulation --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/modulation.py:none --device h200   a run of the pod scale

And is a time input needed? Variants are compared in two ways. With the same trunk they do the same
work, because modulation costs nothing per token. The variants `deep_…` have the base's number of
parameters instead, spent on depth, and do more work: see FLOP in the table.

All variants start with gates of zero and share the weights they have in common. The control trains
its modulation so slowly that the trunk, which waits for the gates to open, must be behind.
Expected before the run: at equal work all within 1 % of per_block; at equal parameters the deeper
ones 2 to 5 % better. The gate of the cpu scale also chooses the approximator's learning rate, on
its own seeds. Results: README.md. Not implemented: a pooled text vector beside the time, a spline
of time per vector, and time as a token.
"""

import masking

from radiance import config as c
from radiance.ablation.suite import Gate, Suite

BASE = "model.modulation=per_block"
CHANGES = {
    "per_block": (),
    "approximator": ("model.modulation=approximator",),
    "approximator_slow": (
        "model.modulation=approximator",
        "optimizer.lr_multipliers=modulation=0.1",
    ),
    "approximator_fast": (
        "model.modulation=approximator",
        "optimizer.lr_multipliers=modulation=10",
    ),
    "shared": ("model.modulation=shared",),
    "none": ("model.modulation=none",),
    "slow": ("optimizer.lr_multipliers=modulation=0.03",),
}


def config() -> c.Config:
    """Return the base of the pod scale."""
    return masking.make_base("modulation", "pod", BASE)


def make_deep_variants(**single_blocks: int) -> dict[str, tuple[str, ...]]:
    """Return variants of each modulation with the given number of single blocks."""
    return {
        f"deep_{kind}": (f"model.modulation={kind}", f"model.single_blocks={count}")
        for kind, count in single_blocks.items()
    }


SUITE = Suite(
    name="modulation",
    question="What do a small modulation network, or no time input, cost against per-block layers?",
    metric="high_noise_loss",
    base="per_block",
    controls=("slow",),
    margin=0.01,
    variants=CHANGES,
    scales=masking.make_scales(
        "modulation",
        BASE,
        num_seeds=8,
        gate=Gate(("approximator", "approximator_slow", "approximator_fast", "shared"), 0.02),
        smoke=make_deep_variants(approximator=2, none=3),
        cpu=make_deep_variants(approximator=2, none=3),
        gpu=make_deep_variants(approximator=6, none=7, shared=6),
        pod=make_deep_variants(approximator=12, none=13, shared=11),
    ),
)
VARIANTS = SUITE.variants_at("pod")
