"""What does it cost to replace FLUX's modulation layers by Chroma's approximator?

    radiance convert flux1-schnell.safetensors chroma-grafted.safetensors --modulation \\
        approximator --graft chroma1-radiance-x0
    radiance convert flux1-schnell.safetensors flux-grafted.safetensors --pooled zero --graft \\
        chroma1-radiance-x0
    radiance train experiments/distill_modulation.py data.path=FOLDER text.file=T5
    radiance train experiments/distill_modulation.py:control data.path=FOLDER text.file=T5   \\
        (keeps FLUX's layers)

FOLDER: images and captions; T5: the encoder of T5 v1.1 XXL; for eight GPUs of 80 GB. Both
variants get a new pixel head and a pooled text vector of zero, attend to all padding as FLUX
does, and differ in the modulation only. The learning rate is a guess. The toy, for each SEED:

    radiance train experiments/distill_modulation.py:original:toy train.steps=1000 \\
        train.seed=SEED name=original-SEED
    radiance convert runs/original-SEED replaced-SEED.safetensors --modulation approximator
    radiance train experiments/distill_modulation.py:toy init=replaced-SEED.safetensors \\
        train.seed=1SEED name=finetune-SEED
    radiance train experiments/distill_modulation.py:control:toy init=runs/original-SEED \\
        train.seed=1SEED name=control-SEED

Toy, five seeds, minutes on 2 CPU cores: replacing changes the loss by −0.3 to +0.3 %; after 300
more steps it is 1.2 % (0.4 … 2.0) behind the control: experiments/results/distill_modulation.md.
Not run at full size.
"""

from radiance import config as c

TOY = [
    "init=", "model.patch=4", "model.hidden=64", "model.heads=4", "model.rope_axes=4,6,6",
    "model.double_blocks=2", "model.single_blocks=4",
    "model.text_dim=32", "model.approximator_hidden=64", "model.approximator_depth=3",
    "model.head=linear", "compute.dtype=float32",
    "compute.remat=none", "text.encoder=hash", "text.max_length=10", "data.source=digits",
    "data.resolution=16", "data.batch_size=32", "data.num_threads=1",
    "optimizer.gradient_accumulation_steps=1", "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=20", "optimizer.ema_decays=0.99", "train.steps=300",
    "train.validate_every=100", "train.sample_every=300", "train.checkpoint_every=300",
    "sample.steps=20", "sample.guidance_scale=2",
    "mesh.data=-1", "mesh.fsdp=1",
]  # fmt: skip
VARIANTS = {
    "original": ["init=", "model.modulation=per_block"],
    "control": ["init=flux-grafted.safetensors", "model.modulation=per_block"],
    "toy": TOY,
}


def config() -> c.Config:
    return c.Config(
        name="distill_modulation",
        init="chroma-grafted.safetensors",
        model=c.override(c.Model.from_name("chroma1-radiance-x0"), ["masking=off"]),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=512),
        data=c.Data(
            source="folder", resolution=512, batch_size=128, caption_dropout=0.1, num_threads=16
        ),
        flow=c.Flow(timestep_distribution="parabola", min_divisor=0.05, min_divisor_mode="add"),
        optimizer=c.Optimizer(
            learning_rate=1e-5,
            warmup_steps=100,
            beta1=0.9,
            beta2=0.95,
            gradient_accumulation_steps=2,
            ema_decays=(0.9999,),
        ),
        train=c.Train(
            steps=10_000, validate_every=500, sample_every=500, checkpoint_every=500, max_to_keep=2
        ),
        sample=c.Sample(solver="euler", steps=28, schedule="shifted", guidance_scale=4.0),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
