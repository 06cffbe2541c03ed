"""The recipe of MiniT2I (PeppaKing8/minit2i-jax): no time input, no adaLN, no text mask.

    radiance train experiments/minit2i_like.py data.path=FOLDER text.file=FLAN_T5
    radiance train experiments/minit2i_like.py:toy                  digits on a CPU, 20 seconds

FOLDER: images and captions. FLAN_T5: the encoder of FLAN-T5 Large (width 1024).
experiments/results/minit2i_like.md lists what is MiniT2I's and what differs. Only the toy has
been run.
"""

from radiance import config as c

VARIANTS = {
    "toy": [
        "model.patch=4", "model.bottleneck=16", "model.hidden=64", "model.heads=4",
        "model.rope_axes=4,6,6", "model.double_blocks=2",
        "model.text_dim=32", "compute.dtype=float32", "compute.remat=none", "text.encoder=hash",
        "text.max_length=10", "data.source=digits",
        "data.resolution=16", "data.batch_size=16", "data.num_threads=1", "flow.noise_scale=1",
        "optimizer.learning_rate=2e-3",
        "optimizer.warmup_steps=10", "optimizer.ema_decays=0.9", "train.steps=40",
        "train.validate_every=40", "train.validation_images=16",
        "train.sample_every=40", "train.checkpoint_every=40", "sample.steps=10",
        "sample.guidance_scale=2", "mesh.data=-1", "mesh.fsdp=1",
    ],
}  # fmt: skip


def config() -> c.Config:
    return c.Config(
        name="minit2i_like",
        model=c.Model(
            patch=16,
            patch_embed="bottleneck",
            bottleneck=128,
            hidden=768,
            heads=12,
            double_blocks=17,
            single_blocks=0,
            rope_axes=(16, 24, 24),
            text_dim=1024,
            text_ids="sequential",
            masking="off",
            padding="learned",
            text_refiner_blocks=2,
            modulation="none",
            head="linear",
            prediction="x0",
        ),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=256),
        data=c.Data(
            source="folder",
            resolution=512,
            batch_size=1024,
            caption_dropout=0.1,
            dropped_caption="masked",
            num_threads=16,
        ),
        flow=c.Flow(
            timestep_distribution="logit_normal",
            logit_mean=0.8,
            logit_std=0.8,
            noise_scale=2.0,
            min_divisor=0.01,
            min_divisor_mode="clamp",
        ),
        optimizer=c.Optimizer(
            learning_rate=4e-4, warmup_steps=5000, beta2=0.95, ema_decays=(0.99995,)
        ),
        train=c.Train(steps=250_000, validate_every=5000, sample_every=5000, checkpoint_every=5000),
        sample=c.Sample(
            solver="euler", steps=100, guidance_scale=6.0, min_divisor=0.05, unconditional="masked"
        ),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
