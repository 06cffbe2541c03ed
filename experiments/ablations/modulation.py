"""Does one small network for all shifts, scales and gates (Chroma) cost anything against a layer in every block (FLUX)? And is a time input needed?

    radiance ablate experiments/ablations/modulation.py                     the cpu scale: too small to decide anything
    radiance ablate experiments/ablations/modulation.py --scale gpu         one GPU; the same command goes on until all is done
    radiance plan experiments/ablations/modulation.py:none --device h200    a run of the pod scale

Arms are compared in two ways, and both belong in a report. With the same trunk they do the same work, for modulation costs nothing a token. The arms
`deep_…` have as many parameters as the base instead, spent on depth, and more work: see the table's FLOP.

All arms start with gates of zero, and with the same weights in what they share. The control learns its modulation so slowly that the trunk, which
waits for the gates to open, must be behind.

Expected, before the run: at equal work all within 1 % of per_block; at equal parameters the deeper ones 2 to 5 % better.

Run: the cpu scale, seeds 0 to 7, on 2 CPU cores shared with other work (its seconds say nothing): results/modulation/cpu/. It was run with three
seeds first, which did not tell the control from the base. Now it is told (+46.5 %, +34.9 … +58.1). A time is needed: none +35.5 % (+29.7 …
+41.2), and with as many parameters as the base +28.5 % (+23.8 … +33.1); the loss is three times the base's at t = 0.8 to 0.9, and
a fifth higher below 0.1. What MiniT2I does without, these 200 steps do not. The approximator is undecided, +4.9 % (−0.4 … +10.2), and so is one
layer for all blocks, −0.3 % (−3.0 … +2.4).

Compared after the run, in notebooks/04_ablation_report.ipynb, without a correction: ten times the approximator's learning rate is far worse than
its own (+120 %, +78 … +162, of its loss), and a tenth is not told from it (+2.7 %, −3.5 … +8.8). The depth that the layers pay for helps a
network without a time (deep_none against none −5.2 %, −8.0 … −2.4) and is not told with the approximator (+2.0 %, −3.6 … +7.6).
The other scales have not been run.

Missing, because the code cannot say it yet: a pooled text vector beside the time, a spline of the time in each vector (`table`), and the time as a
token. What a trained model loses when its layers are replaced stands in ../distill_modulation.py.
"""

import masking

from radiance import config as c
from radiance.ablation.suite import Suite

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
    """The pod's."""
    return masking.sized("modulation", "pod", BASE)


def deep(**singles: int) -> dict[str, tuple[str, ...]]:
    """Arms with so many single blocks."""
    return {
        f"deep_{kind}": (f"model.modulation={kind}", f"model.single_blocks={count}")
        for kind, count in singles.items()
    }


SUITE = Suite(
    name="modulation",
    question="Does modulation from one small network, or without a time, cost anything against a layer in every block?",
    metric="validation_loss",
    base="per_block",
    control="slow",
    margin=0.01,
    arms=CHANGES,
    scales=masking.scales(
        "modulation",
        BASE,
        seeds=8,
        cpu=deep(approximator=2, none=3),
        gpu=deep(approximator=6, none=7, shared=6),
        pod=deep(approximator=12, none=13, shared=11),
    ),
)
VARIANTS = SUITE.arms_at("pod")
