"""draft"""

from radiance import config as c

TOY = [
    "init=", "model.patch=4", "model.hidden=64", "model.heads=4", "model.rope_axes=4,6,6", "model.double_blocks=2", "model.single_blocks=4",
    "model.text_dim=32", "model.approximator_hidden=64", "model.approximator_depth=3", "model.head=linear",
    "compute.dtype=float32", "compute.remat=none", "text.encoder=hash", "text.length=10",
    "data.source=digits", "data.side=16", "data.batch=32", "data.threads=1", "optimizer.accumulate=1", "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=20", "optimizer.ema=0.99", "train.steps=400", "train.validate_every=200", "train.sample_every=400",
    "train.checkpoint_every=400", "sample.steps=20", "sample.guidance=2", "mesh.data=-1", "mesh.fsdp=1",
]  # fmt: skip
ARMS = {
    "original": ["init=", "model.modulation=per_block"],
    "control": ["init=flux-grafted.safetensors", "model.modulation=per_block"],
    "toy": TOY,
}


def config() -> c.Config:
    return c.Config(
        name="distill_modulation",
        init="chroma-grafted.safetensors",
        model=c.override(c.Model.named("chroma1-radiance-x0"), ["masking=off"]),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", length=512),
        data=c.Data(source="folder", side=512, batch=128, caption_dropout=0.1, threads=16),
        flow=c.Flow(time_law="parabola", epsilon=0.05, bound="add"),
        optimizer=c.Optimizer(learning_rate=1e-5, warmup_steps=100, beta1=0.9, beta2=0.95, accumulate=2, ema=(0.9999,)),
        train=c.Train(steps=10_000, validate_every=500, sample_every=500, checkpoint_every=500, keep=2),
        sample=c.Sample(solver="euler", steps=28, schedule="shifted", guidance=4.0),
        mesh=c.Mesh(data=1, fsdp=-1),
    )  # fmt: skip
