"""Which padding tokens should the network see: one (Chroma), none, all (FLUX), or registers?

    radiance ablate masking   the smoke scale, an hour: shows that it runs, decides nothing
    radiance ablate masking --scale cpu --gate   an hour of two cores: can it be decided?
    radiance ablate masking --scale cpu --minutes 600   one to two hours a variant; resumes
    radiance ablate masking --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/masking.py:strict --device h200   a run of the pod scale

Captions have 10 to 20 tokens whatever the image shows, so that the number of padding tokens
carries no information. The encoder is a T5 with random weights: its padding depends on the prompt
and on the position, as that of a trained T5 does.

The cpu scale was fixed before its run, for networks that read their captions: images of one object
on black, so that objects are all that captions explain. high_noise_loss decides, the loss over
times above 0.3. Below, a network copies the image, and the loss is half of the mean and its
noisiest part. The base must place 80 % of the objects right with every seed. Verdicts are of seeds
from 200 on; the gate has others.

Expected before the run: strict within 1 % of one_pad; off slightly better at its own length, and
16 registers nearly as good; networks trained with a mask unchanged at other lengths, and off
worse by 10 to 100 %, which is the practical reason to mask; longest_of_4, the mask of the longest
of four captions, within 1 %; constant within 1 % of constant_one_pad. Results: README.md. Not
implemented: T5 run without its own mask, and padding exchanged after training.
"""

from radiance import config as c
from radiance.ablation.suite import SCALES, Gate, Precondition, Scale, Suite

CHANGES = {
    "one_pad": (),
    "strict": ("model.masking=strict",),
    "off": ("model.masking=off",),
    "registers": ("model.masking=strict", "model.registers=16"),
    "learned": ("model.masking=off", "model.padding=learned"),
    "longest_of_4": ("data.mask_group_size=4",),
    "no_text": ("data.caption_dropout=1",),
}
MORE_CHANGES = {  # not at the cpu scale
    "off_registers": ("model.masking=off", "model.registers=16"),
    "constant_one_pad": ("text.encoder=hash",),
    "constant": ("text.encoder=hash", "model.masking=off"),
}
SHAPES = c.Shapes(caption_lengths="short", max_tokens=20)
READS = Precondition("position@1", 0.8)
FIRST_SEED = 200  # of the cpu scale: seeds 0 to 7 have been looked at


def config() -> c.Config:
    """Return the base of the pod scale."""
    return c.Config(
        name="masking",
        model=c.MODELS["small"],
        compute=c.Compute(remat="dots"),
        text=c.Text(encoder="t5", max_length=256),
        data=c.Data(source="folder", resolution=256, batch_size=1024, num_threads=16),
        optimizer=c.Optimizer(learning_rate=3e-4, warmup_steps=1000, ema_decays=(0.9999,)),
        train=c.Train(steps=100_000, validate_every=5000, sample_every=5000, checkpoint_every=5000),
        mesh=c.Mesh(data=1, fsdp=-1),
    )


def gpu() -> c.Config:
    """Return the base of the gpu scale: about 10 M parameters, and 64 + 64 tokens."""
    model = c.override(
        c.Config(model=c.MODELS["nano"]),
        ["model.patch=8", "model.text_dim=64", "data.resolution=64"],
    ).model
    return c.Config(
        name="masking-gpu",
        model=model,
        compute=c.Compute(attention="xla"),  # fused kernels have no axis for seeds
        text=c.Text(encoder="random_t5", max_length=64),
        data=c.Data(source="shapes", shapes=SHAPES, resolution=64, batch_size=128),
        optimizer=c.Optimizer(
            learning_rate=1e-3, warmup_steps=200, ema_decays=(), ema_widths=(0.1, 0.05, 0.2)
        ),
        train=c.Train(steps=5000, validate_every=250, validation_images=4096, checkpoint_every=500),
        sample=c.Sample(steps=20, batch_size=128, weights="width=0.1"),
    )


def cpu() -> c.Config:
    """Return the base of the cpu scale: the smallest network found that reads its captions."""
    return c.override(
        smoke(),
        [
            "name=masking-cpu",
            "model.rope_theta=10",  # separates four positions
            "data.shapes.backgrounds=black",
            "data.shapes.max_objects=1",
            "data.batch_size=32",
            "flow.timestep_distribution=logit_normal",
            "flow.logit_mean=1.0",
            "flow.logit_std=1.5",
            "optimizer.kind=muon",
            "optimizer.learning_rate=3e-3",
            "optimizer.warmup_steps=50",
            "optimizer.ema_decays=0.99",
            "train.steps=2000",
            "train.validate_every=500",
            "train.validation_images=1024",
            "train.checkpoint_every=250",
            "sample.steps=20",
            "sample.guidance_scale=1",
            "sample.batch_size=64",
        ],
    )


def smoke() -> c.Config:
    """Return the base of the smoke scale."""
    return c.Config(
        name="masking-smoke",
        model=c.Model(
            patch=8,
            hidden=64,
            heads=4,
            double_blocks=1,
            single_blocks=1,
            rope_axes=(4, 6, 6),
            text_dim=64,
            approximator_hidden=64,
            approximator_depth=2,
            head="linear",
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32"),
        text=c.Text(encoder="random_t5", max_length=24, dtype="float32"),
        data=c.Data(source="shapes", shapes=SHAPES, resolution=32, batch_size=16),
        optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=20, ema_decays=(0.95,)),
        train=c.Train(steps=200, validate_every=50, validation_images=128, checkpoint_every=100),
    )


def make_base(name: str, scale: str, *changes: str) -> c.Config:
    """Return the base at a scale for the suite `name`, with changes."""
    run = {"smoke": smoke, "cpu": cpu, "gpu": gpu, "pod": config}[scale]()
    return c.override(run, [f"name={run.name.replace('masking', name)}", *changes])


def make_scales(
    name: str,
    *changes: str,
    num_seeds: int = 3,
    gate: Gate | None = None,
    **variants: dict[str, tuple[str, ...]],
) -> dict[str, Scale]:
    """Return the scales that most suites use.

    Args:
        name: Name of the suite.
        changes: Changes to the base at every scale.
        num_seeds: Number of seeds at the smoke scale.
        gate: Gate of the cpu scale.
        variants: Additional variants by scale.
    """
    extra_variants = {scale: variants.get(scale, {}) for scale in SCALES}
    return {
        "smoke": Scale(
            make_base(name, "smoke", *changes),
            num_images=2048,
            num_seeds=num_seeds,
            variants=extra_variants["smoke"],
        ),
        "cpu": Scale(
            make_base(name, "cpu", *changes),
            num_images=16384,
            num_seeds=16,
            first_seed=FIRST_SEED,
            num_samples=512,
            precondition=READS,
            gate=gate,
            variants=extra_variants["cpu"],
        ),
        "gpu": Scale(
            make_base(name, "gpu", *changes),
            num_images=65536,
            num_seeds=8,
            learning_rate_factors=(0.5, 1.0, 2.0),
            num_samples=1024,
            variants=extra_variants["gpu"],
        ),
        "pod": Scale(make_base(name, "pod", *changes), num_seeds=3, variants=extra_variants["pod"]),
    }


def mask_conditions(*lengths: int) -> dict[str, tuple[str, ...]]:
    """Return evaluation conditions: every mask at every text length."""
    masks = ("one_pad", "strict", "off")
    return {
        f"{mask} {length}": (f"model.masking={mask}", f"text.max_length={length}")
        for mask in masks
        for length in lengths
    }


SUITE = Suite(
    name="masking",
    question="Which padding tokens should the network see?",
    metric="high_noise_loss",
    base="one_pad",
    controls=("no_text",),
    margin=0.01,
    variants=CHANGES,
    scales={
        "smoke": Scale(
            smoke(),
            num_images=2048,
            num_seeds=3,
            variants=MORE_CHANGES,
            conditions=mask_conditions(24, 64),
        ),
        "cpu": Scale(
            cpu(),
            num_images=16384,
            num_seeds=16,
            first_seed=FIRST_SEED,
            num_samples=512,
            precondition=READS,
            gate=Gate(("strict", "off"), max_half_width=0.02),
            conditions=mask_conditions(24, 64),
        ),
        "gpu": Scale(
            gpu(),
            num_images=65536,
            num_seeds=8,
            learning_rate_factors=(0.5, 1.0, 2.0),
            num_samples=1024,
            variants={**MORE_CHANGES, "off_256": ("model.masking=off", "text.max_length=256")},
            conditions=mask_conditions(24, 64, 256),
        ),
        "pod": Scale(config(), num_seeds=3, variants=MORE_CHANGES),
    },
)
VARIANTS = SUITE.variants_at("pod")
