"""Does one small network for all shifts, scales and gates (Chroma) cost anything against a layer in every block (FLUX)? And is a time input needed?

    radiance ablate experiments/ablations/modulation.py                     the cpu scale: too small to decide anything
    radiance ablate experiments/ablations/modulation.py --scale gpu         one GPU; the same command goes on until all is done
    radiance plan experiments/ablations/modulation.py:none --device h200    a run of the pod scale

Arms are compared in two ways, and both belong in a report. With the same trunk they do the same work, for modulation costs nothing a token. The arms
`deep_…` have as many parameters as the base instead, spent on depth, and more work: see the table's FLOP.

All arms start with gates of zero, and with the same weights in what they share. The control learns its modulation so slowly that the trunk, which
waits for the gates to open, must be behind.

Expected, before the run: at equal work all within 1 % of per_block; at equal parameters the deeper ones 2 to 5 % better.

There are no numbers: no scale has been run to its end yet.

Missing, because the code cannot say it yet: a pooled text vector beside the time, a spline of the time in each vector (`table`), the time as a
token, and what a trained model loses when its layers are replaced.
"""

from radiance import config as c
from radiance.ablation.suite import Scale, Suite

CHANGES = {
    "per_block": (),
    "approximator": ("model.modulation=approximator",),
    "approximator_slow": ("model.modulation=approximator", "optimizer.rates=modulation=0.1"),
    "approximator_fast": ("model.modulation=approximator", "optimizer.rates=modulation=10"),
    "shared": ("model.modulation=shared",),
    "none": ("model.modulation=none",),
    "slow": ("optimizer.rates=modulation=0.03",),
}


def config() -> c.Config:
    """The pod's."""
    return c.Config(
        name="modulation",
        model=c.override(c.Config(model=c.MODELS["small"]), ["model.modulation=per_block"]).model,
        compute=c.Compute(remat="dots"),
        text=c.Text(encoder="t5", length=256),
        data=c.Data(source="folder", side=256, batch=1024, threads=16),
        optimizer=c.Optimizer(learning_rate=3e-4, warmup_steps=1000, ema=(0.9999,)),
        train=c.Train(steps=100_000, validate_every=5000, sample_every=5000, checkpoint_every=5000),
        mesh=c.Mesh(data=1, fsdp=-1),
    )


def gpu() -> c.Config:
    """About 10 M parameters, and 64 + 64 tokens."""
    changes = ["model.modulation=per_block", "model.patch=8", "model.text_dim=64", "data.side=64"]
    return c.Config(
        name="modulation-gpu",
        model=c.override(c.Config(model=c.MODELS["nano"]), changes).model,
        compute=c.Compute(attention="xla"),  # seeds are one more axis, for which the fused kernels are not made
        text=c.Text(encoder="random_t5", length=64),
        data=c.Data(side=64, batch=128),
        optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=200, ema=(), ema_widths=(0.1, 0.05, 0.2)),
        train=c.Train(steps=5000, validate_every=250, validate_pictures=4096, checkpoint_every=500),
        sample=c.Sample(steps=20, batch=128, weights="width=0.1"),
    )


def cpu() -> c.Config:
    return c.Config(
        name="modulation-cpu",
        model=c.Model(
            patch=8, hidden=64, heads=4, double_blocks=1, single_blocks=1, rope_axes=(4, 6, 6), text_dim=64, modulation="per_block",
            approximator_hidden=64, approximator_depth=2, head="linear", prediction="x0",
        ),
        compute=c.Compute(dtype="float32"),
        text=c.Text(encoder="random_t5", length=24, dtype="float32"),
        data=c.Data(side=32, batch=16),
        optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=20, ema=(0.95,)),
        train=c.Train(steps=200, validate_every=50, validate_pictures=128, checkpoint_every=100),
    )  # fmt: skip


def deep(**singles: int) -> dict[str, tuple[str, ...]]:
    """Arms with so many single blocks."""
    return {f"deep_{kind}": (f"model.modulation={kind}", f"model.single_blocks={count}") for kind, count in singles.items()}


SUITE = Suite(
    name="modulation",
    question="Does modulation from one small network, or without a time, cost anything against a layer in every block?",
    metric="validation_loss",
    base="per_block",
    control="slow",
    margin=0.01,
    arms=CHANGES,
    scales={
        "cpu": Scale(cpu(), pictures=2048, seeds=3, arms=deep(approximator=2, none=3)),
        "gpu": Scale(gpu(), pictures=65536, seeds=8, rates=(0.5, 1.0, 2.0), painted=1024, arms=deep(approximator=6, none=7, shared=6)),
        "pod": Scale(config(), seeds=3, arms=deep(approximator=12, none=13, shared=11)),
    },
)
ARMS = SUITE.arms_at("pod")
