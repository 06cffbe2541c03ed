"""The recipe of JiT (arXiv 2511.13720), x0 prediction on large patches, with captions.

    radiance train experiments/jit_like.py data.path=FOLDER text.file=T5   256 pixels, patches \\
        of 16
    radiance train experiments/jit_like.py:512 data.path=FOLDER text.file=T5   512 pixels, \\
        patches of 32: as many tokens
    radiance train experiments/jit_like.py:toy   digits on a CPU, 20 seconds

FOLDER: images and captions. T5: the encoder of T5 v1.1 XXL, or another size with
model.text_dim=WIDTH. experiments/results/jit_like.md lists what is JiT's, what is ours, and why.
Only the toy has been run.
"""

from radiance import config as c

VARIANTS = {
    "512": ["model.patch=32", "data.resolution=512", "flow.noise_scale=2"],
    "toy": [
        "model.patch=4", "model.bottleneck=16", "model.hidden=64", "model.heads=4",
        "model.rope_axes=0,8,8", "model.single_blocks=2",
        "model.text_dim=32", "compute.dtype=float32", "compute.remat=none", "text.encoder=hash",
        "text.max_length=10", "data.source=digits",
        "data.resolution=16", "data.batch_size=16", "data.num_threads=1",
        "optimizer.learning_rate=2e-3", "optimizer.warmup_steps=10",
        "optimizer.ema_decays=0.9", "train.steps=40", "train.validate_every=40",
        "train.validation_images=16", "train.sample_every=40",
        "train.checkpoint_every=40", "sample.steps=10", "mesh.data=-1", "mesh.fsdp=1",
    ],
}  # fmt: skip


def config() -> c.Config:
    return c.Config(
        name="jit_like",
        model=c.Model(
            patch=16,
            patch_embed="bottleneck",
            bottleneck=128,
            hidden=768,
            heads=12,
            double_blocks=0,
            single_blocks=12,
            rope_axes=(0, 32, 32),
            modulation="per_block",
            head="linear",
            prediction="x0",
        ),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=64),
        data=c.Data(
            source="folder", resolution=256, batch_size=1024, caption_dropout=0.1, num_threads=16
        ),
        flow=c.Flow(
            timestep_distribution="logit_normal",
            logit_mean=0.8,
            logit_std=0.8,
            noise_scale=1.0,
            min_divisor=0.05,
            min_divisor_mode="clamp",
        ),
        optimizer=c.Optimizer(
            learning_rate=2e-4,
            warmup_steps=6255,
            beta1=0.9,
            beta2=0.95,
            ema_decays=(0.9999, 0.9996),
        ),
        train=c.Train(steps=250_000, validate_every=5000, sample_every=5000, checkpoint_every=5000),
        sample=c.Sample(
            solver="heun",
            steps=50,
            guidance_scale=2.9,
            guidance_interval=(0.0, 0.9),
            min_divisor=0.05,
        ),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
