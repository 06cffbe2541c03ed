"""Train a LoRA for Chroma1-Radiance on a folder of captioned images, on one GPU.

    radiance encode experiments/lora.py data.path=FOLDER text.file=T5 text.cache=CACHE
    radiance train experiments/lora.py init=FILE data.path=FOLDER text.cache=CACHE
    radiance convert runs/lora style.safetensors --to peft
    radiance sample FILE --text-encoder T5 --lora style.safetensors:0.8 --prompt "…"
    radiance train experiments/lora.py:rehearsal init=runs/finetune-rehearsal data.path=FOLDER \\
          (on a CPU)

FILE: published weights, such as chroma-radiance-x0.safetensors. FOLDER: images and captions. T5:
the encoder of T5 v1.1 XXL; with cached captions it takes no memory during training.

Rank 32 on all matrices of the blocks: 0.12 B parameters are trained beside 9.5 B frozen ones,
here stored as int8 with one scale per output (10 GB; `lora.weight_format=none` keeps them in
bfloat16, 19 GB). The learning rate 1e-4 is usual for LoRAs of FLUX; we have not tuned it. The
approximator, the head and the text projection are not adapted. experiments/plans.md has the
compiler's memory count. Not run at full size.
"""

from dataclasses import replace

from radiance import config as c

SMALL = [
    "model.hidden=128", "model.heads=4", "model.rope_axes=8,12,12", "model.double_blocks=1",
    "model.single_blocks=2", "model.text_dim=64",
    "model.approximator_hidden=64", "model.approximator_depth=2", "model.nerf_hidden=16",
    "model.nerf_mlp_ratio=2", "model.nerf_depth=2",
    "compute.dtype=float32", "text.encoder=hash", "text.max_length=64", "data.resolution=64",
    "data.batch_size=8", "lora.rank=8", "lora.dtype=float32",
    "optimizer.learning_rate=1e-3", "train.steps=100", "train.validate_every=100",
    "train.sample_every=100", "train.checkpoint_every=100",
]  # fmt: skip
VARIANTS = {"rehearsal": SMALL}


def config() -> c.Config:
    run = c.Config(
        name="lora",
        init="chroma-radiance-x0.safetensors",
        model=c.Model.from_name("chroma1-radiance-x0"),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=512),
        data=c.Data(
            source="folder", resolution=512, batch_size=4, caption_dropout=0.1, num_threads=8
        ),
        flow=c.Flow(timestep_distribution="logistic", min_divisor=0.05, min_divisor_mode="add"),
        optimizer=c.Optimizer(
            learning_rate=1e-4,
            warmup_steps=100,
            beta1=0.9,
            beta2=0.95,
            clip_norm=1.0,
            ema_decays=(0.99,),
        ),
        lora=c.Lora(rank=32, weight_format="int8"),
        train=c.Train(
            steps=3_000,
            validate_every=250,
            validation_images=32,
            sample_every=250,
            checkpoint_every=250,
            max_to_keep=4,
        ),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
    return replace(run, sample=replace(c.Sample.from_name("radiance-x0"), batch_size=1))
