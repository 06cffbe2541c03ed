"""The published recipe of Chroma1-Radiance, stage by stage: a latent model's trunk under a pixel head, and what came of it until 2026.

    radiance convert Chroma1-Base.safetensors chroma-grafted.safetensors --graft chroma1-radiance
    radiance train experiments/radiance_512.py:head data.path=FOLDER text.file=T5
    radiance train experiments/radiance_512.py:trunk data.path=FOLDER text.file=T5

FOLDER: images and captions; "is_tag_based": true in a metadata.jsonl says which captions are tags (radiance/data/sources/folder.py). T5: the
encoder of T5 v1.1 XXL. Eight GPUs of 80 GB are meant; another number wants another data.batch_size or optimizer.gradient_accumulation_steps.

| arm | starts from | what it is |
|---|---|---|
| (none) | chroma-grafted.safetensors | head and trunk at once |
| head | chroma-grafted.safetensors | August 2025: the patch embedding and the head alone |
| trunk | runs/radiance_512-head | then the trunk too |
| x0 | radiance-as-x0.safetensors | December 2025: the network predicts the image |
| 2026 | x0-sequential.safetensors | larger batch, clipped, all but the approximator trained; text ids that count (May 2026) |
| rotation | chroma-grafted.safetensors | two double and two single blocks at a time, the next after 3 steps |
| scratch | | nothing is given |
| 256, 512, 1024 | scratch, then the arm before | resolutions that grow; the last mixes 512, 768, 1024 and 1152 |
| toy | | digits on a CPU; behind another arm (`radiance_512.py:head:toy`) it makes that one small |

    radiance convert runs/radiance_512-trunk velocity.safetensors
    radiance convert velocity.safetensors radiance-as-x0.safetensors --prediction x0
    radiance convert chroma-radiance-x0.safetensors x0-sequential.safetensors --text-ids sequential

Weights are told to be of another kind by the last two, and are not changed: the loss before the first step is far off, as the run
then says, and training mends it.

From the authors' trainer (lodestone-rock/flow, its branch experimental) and its configs: AdamW with betas 0.9 and 0.999 and no decay,
1e-5 after 50 steps of warm-up, weights in bfloat16 rounded at random, no average; times from the parabola without a shift, noise assigned
to images by optimal transport, 0.05 added to the divisor of x0; buckets of about 512² in steps of 64 up to 2:1, a tenth of the
captions dropped, a quarter in lower case, tags shuffled and up to 0.3 of them left out; previews of 20 steps at guidance 3, their
schedule shifted by 0.457. Until 2025 two steps shared a batch of 252 (128 a step here), without a clip; in 2026 256, a clip at 1 and
moments in bfloat16; text ids that count are known from the checkpoints alone. The numbers of the rotation are those of its readme, for the
latent model; the sides of the arm 1024 are Chroma1-HD's.

On purpose otherwise: each image's text is masked by its own length, where theirs was by the longest of its group; gradients are averaged
and then clipped, where theirs were summed over the GPUs; noise is assigned over the whole batch, not each GPU's; every epoch an image
draws its resolution anew, and none is enlarged. The head is a convolution from the start (theirs was linear for the first weeks).
Ours, for want of a source: how long each arm runs, and all that is from scratch: 1e-4, an approximator that is trained (a frozen one
would be noise), and the order 256, 512, 1024.

The toy starts from scratch, where a frozen approximator keeps the gates of all blocks at 0: they learn once init= names other weights.
It alone has been run, of every arm. There are no images and no numbers of the recipe itself.
"""

from radiance import config as c

FROZEN = ("text_embed", "modulation", "head/embedder")  # in 2025
LATER = [  # in 2026
    "data.batch_size=256", "optimizer.gradient_accumulation_steps=4", "optimizer.clip_norm=1", "optimizer.mu_dtype=bfloat16", "optimizer.nu_dtype=bfloat16",
    "optimizer.frozen=modulation",
]  # fmt: skip
SCRATCH = ["init=", "optimizer.frozen=", "optimizer.learning_rate=1e-4", "train.steps=200000"]
TOY = [
    "init=", "model.patch=4", "model.hidden=64", "model.heads=4", "model.rope_axes=4,6,6", "model.double_blocks=2", "model.single_blocks=3",
    "model.text_dim=32", "model.approximator_hidden=64", "model.approximator_depth=2", "model.nerf_hidden=16", "model.nerf_mlp_ratio=2",
    "model.nerf_depth=2", "model.nerf_freqs=4", "compute.dtype=float32", "compute.remat=none", "text.encoder=hash", "text.max_length=10",
    "data.source=digits", "data.resolution=16", "data.extra_resolutions=8", "data.bucket_step=4", "data.batch_size=16", "data.num_threads=1",
    "optimizer.gradient_accumulation_steps=1", "optimizer.learning_rate=2e-3", "optimizer.warmup_steps=10", "train.steps=40", "train.validate_every=40",
    "train.validation_images=16", "train.sample_every=40", "train.checkpoint_every=40", "sample.steps=10", "mesh.data=-1", "mesh.fsdp=1",
]  # fmt: skip
VARIANTS = {
    "head": [f"optimizer.frozen={','.join((*FROZEN, 'double', 'single'))}", "train.steps=5000"],
    "trunk": ["init=runs/radiance_512-head"],
    "x0": ["init=radiance-as-x0.safetensors", "model.prediction=x0"],
    "2026": ["init=x0-sequential.safetensors", "model.prediction=x0", "model.text_ids=sequential", *LATER],
    "rotation": ["optimizer.block_rotation=2,2", "optimizer.block_rotation_every=3", "optimizer.frozen=modulation"],
    "scratch": SCRATCH,
    "256": [*SCRATCH, "data.resolution=256", "data.batch_size=512"],
    "512": [*SCRATCH, "init=runs/radiance_512-256", "data.batch_size=256", "optimizer.gradient_accumulation_steps=4"],
    "1024": [
        *SCRATCH, "init=runs/radiance_512-512", "data.resolution=1024", "data.extra_resolutions=512,768,1152", "optimizer.gradient_accumulation_steps=16",
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
            source="folder", resolution=512, bucket_step=64, max_aspect_ratio=2.0, batch_size=128, caption_dropout=0.1, shuffle_tags=True, tag_dropout=0.3,
            lowercase_probability=0.25, num_threads=16,
        ),
        flow=c.Flow(timestep_distribution="parabola", min_divisor=0.05, min_divisor_mode="add", coupling="optimal_transport"),
        optimizer=c.Optimizer(
            learning_rate=1e-5, warmup_steps=50, beta1=0.9, beta2=0.999, clip_norm=1e9, gradient_accumulation_steps=2, frozen=FROZEN, ema_decays=(),
            weights_dtype="bfloat16",
        ),
        train=c.Train(steps=20_000, validate_every=500, sample_every=500, checkpoint_every=500, max_to_keep=2),
        sample=c.Sample(steps=20, guidance_scale=3.0, schedule="shifted", shift=0.457, weights="params"),
        mesh=c.Mesh(data=1, fsdp=-1),
    )  # fmt: skip
