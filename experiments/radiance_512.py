"""The published recipe of Chroma1-Radiance, stage by stage, from a latent model's trunk.

    radiance convert Chroma1-Base.safetensors chroma-grafted.safetensors --graft chroma1-radiance
    radiance train experiments/radiance_512.py:head data.path=FOLDER text.file=T5
    radiance train experiments/radiance_512.py:trunk data.path=FOLDER text.file=T5

FOLDER: images and captions; "is_tag_based": true in a metadata.jsonl marks captions that are
tags. T5: the encoder of T5 v1.1 XXL. For eight GPUs of 80 GB; for others change data.batch_size
or optimizer.gradient_accumulation_steps. `radiance_512.py:head:toy` is the variant `head` at toy
size. experiments/results/radiance_512.md has the variants, the sources of all constants and the
deliberate differences. Only the toys have been run, and not timed.
"""

from radiance import config as c

FROZEN = ("text_embed", "modulation", "head/embedder")  # in 2025
LATER = [  # in 2026
    "data.batch_size=256", "optimizer.gradient_accumulation_steps=4", "optimizer.clip_norm=1",
    "optimizer.mu_dtype=bfloat16", "optimizer.nu_dtype=bfloat16",
    "optimizer.frozen=modulation",
]  # fmt: skip
SCRATCH = ["init=", "optimizer.frozen=", "optimizer.learning_rate=1e-4", "train.steps=200000"]
TOY = [
    "init=", "model.patch=4", "model.hidden=64", "model.heads=4", "model.rope_axes=4,6,6",
    "model.double_blocks=2", "model.single_blocks=3",
    "model.text_dim=32", "model.approximator_hidden=64", "model.approximator_depth=2",
    "model.nerf_hidden=16", "model.nerf_mlp_ratio=2",
    "model.nerf_depth=2", "model.nerf_freqs=4", "compute.dtype=float32", "compute.remat=none",
    "text.encoder=hash", "text.max_length=10",
    "data.source=digits", "data.resolution=16", "data.extra_resolutions=8", "data.bucket_step=4",
    "data.batch_size=16", "data.num_threads=1",
    "optimizer.gradient_accumulation_steps=1", "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=10", "train.steps=40", "train.validate_every=40",
    "train.validation_images=16", "train.sample_every=40", "train.checkpoint_every=40",
    "sample.steps=10", "mesh.data=-1", "mesh.fsdp=1",
]  # fmt: skip
VARIANTS = {
    "head": [f"optimizer.frozen={','.join((*FROZEN, 'double', 'single'))}", "train.steps=5000"],
    "trunk": ["init=runs/radiance_512-head"],
    "x0": ["init=radiance-as-x0.safetensors", "model.prediction=x0"],
    "2026": [
        "init=x0-sequential.safetensors", "model.prediction=x0", "model.text_ids=sequential",
        *LATER,
    ],
    "rotation": [
        "optimizer.block_rotation=2,2", "optimizer.block_rotation_every=3",
        "optimizer.frozen=modulation",
    ],
    "scratch": SCRATCH,
    "256": [*SCRATCH, "data.resolution=256", "data.batch_size=512"],
    "512": [
        *SCRATCH, "init=runs/radiance_512-256", "data.batch_size=256",
        "optimizer.gradient_accumulation_steps=4",
    ],
    "1024": [
        *SCRATCH, "init=runs/radiance_512-512", "data.resolution=1024",
        "data.extra_resolutions=512,768,1152", "optimizer.gradient_accumulation_steps=16",
        "train.steps=20000",
    ],
    "toy": TOY,
}  # fmt: skip


def config() -> c.Config:
    return c.Config(
        name="radiance_512",
        init="chroma-grafted.safetensors",
        model=c.Model.from_name("chroma1-radiance"),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=512),
        data=c.Data(
            source="folder",
            resolution=512,
            bucket_step=64,
            max_aspect_ratio=2.0,
            batch_size=128,
            caption_dropout=0.1,
            shuffle_tags=True,
            tag_dropout=0.3,
            lowercase_probability=0.25,
            num_threads=16,
        ),
        flow=c.Flow(
            timestep_distribution="parabola",
            min_divisor=0.05,
            min_divisor_mode="add",
            coupling="optimal_transport",
        ),
        optimizer=c.Optimizer(
            learning_rate=1e-5,
            warmup_steps=50,
            beta1=0.9,
            beta2=0.999,
            clip_norm=1e9,
            gradient_accumulation_steps=2,
            frozen=FROZEN,
            ema_decays=(),
            weights_dtype="bfloat16",
        ),
        train=c.Train(
            steps=20_000, validate_every=500, sample_every=500, checkpoint_every=500, max_to_keep=2
        ),
        sample=c.Sample(
            steps=20, guidance_scale=3.0, schedule="shifted", shift=0.457, weights="params"
        ),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
