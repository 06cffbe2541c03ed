"""Chroma1-Radiance in few steps and without guidance: students of its own trajectories, and the other ways there are.

    radiance train experiments/few_steps.py init=FILE data.path=FOLDER text.file=T5 distill.path=TRAJECTORIES
    radiance convert runs/few_steps flash.safetensors --extract FILE --rank 64 --to native
    radiance sample FILE --text-encoder T5 --lora flash.safetensors:1.0 --prompt "…" steps=4 guidance=1

FILE: the published weights, such as chroma-radiance-x0.safetensors. FOLDER: pictures and captions, of which trajectories read the captions alone.
T5: the encoder of T5 v1.1 XXL. TRAJECTORIES: a folder for them, which all arms that use them may share: 65,536 in four segments are 412 GB at
512 pixels. They are painted first, and painting goes on where it was stopped.

| arm | what is learned |
|---|---|
| (none) | the teacher's guided way in four segments, each made straight: as in the first of Chroma's own trainers for few steps, and PeRFlow (arXiv 2405.07510) |
| reflow | the whole way made straight (arXiv 2209.03003), as Chroma's next trainer |
| one_step | the picture from the noise alone, as its third |
| guidance | the guided velocity in one evaluation: the teacher's predictions are extrapolated |
| guidance_picture | the same by Chroma's rule: the velocity of each picture is, away from the student's own unconditional prediction |
| mean_flow | the mean velocity of any step, whose length the network reads in place of the guidance number (arXiv 2505.13447) |
| teacher | nothing: pictures as usual, for toys |
| toy | `shapes` on a CPU; before another arm (`few_steps.py:toy:reflow`) it makes that one small |

Chroma's trainers learn from pictures at the ends of the segments; here segments lie on the teacher's own way, where a student is asked.
The learning rate is a guess. Nothing has been run at full size.
"""

from radiance import config as c

TOY = [
    "init=runs/few_steps-toy-teacher", "model.patch=8", "model.hidden=128", "model.heads=4", "model.rope_axes=8,12,12", "model.double_blocks=2",
    "model.single_blocks=4", "model.mlp_ratio=3", "model.text_dim=64", "model.approximator_hidden=64", "model.approximator_depth=2",
    "model.head=linear", "compute.dtype=float32", "compute.remat=none", "text.encoder=random_t5", "text.length=20", "text.dtype=float32",
    "data.source=shapes", "data.shapes.law=short", "data.shapes.limit=20", "data.side=32", "data.batch=64", "data.threads=1",
    "optimizer.accumulate=1", "optimizer.frozen=", "optimizer.learning_rate=5e-4", "optimizer.warmup_steps=20", "optimizer.decay=cosine", "optimizer.ema=0.99",
    "distill.sample.steps=8", "distill.sample.guidance=2", "distill.sample.batch=64", "distill.trajectories=4096", "train.steps=500",
    "train.log_every=50", "train.validate_every=100", "train.sample_every=500", "train.checkpoint_every=100", "sample.batch=64",
    "mesh.data=-1", "mesh.fsdp=1",
]  # fmt: skip
NO_TRAJECTORIES = ["distill.segments=1", "distill.path="]
ARMS = {
    "reflow": ["distill.segments=1", "flow.time_law=uniform"],
    "one_step": ["distill.segments=1", "flow.time_law=noise", "sample.steps=1"],
    "guidance": [*NO_TRAJECTORIES, "distill.kind=guidance", "flow.time_law=logistic", "sample.steps=28"],
    "guidance_picture": [*NO_TRAJECTORIES, "distill.kind=guidance", "distill.rule=picture", "flow.time_law=logistic", "sample.steps=28"],
    "mean_flow": [*NO_TRAJECTORIES, "distill.kind=mean_flow", "optimizer.frozen=text_embed", "compute.attention=pieces", "sample.solver=mean_flow"],
    "teacher": [
        *NO_TRAJECTORIES, "init=", "distill.kind=none", "flow.time_law=parabola", "data.caption_dropout=0.1", "sample.steps=30", "sample.guidance=2",
        "optimizer.learning_rate=1.5e-3", "optimizer.warmup_steps=100", "optimizer.ema=0.999", "train.steps=4000", "train.validate_every=500",
    ],
    "toy": TOY,
}  # fmt: skip


def config() -> c.Config:
    return c.Config(
        name="few_steps",
        init="chroma-radiance-x0.safetensors",
        model=c.Model.named("chroma1-radiance-x0"),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", length=512),
        data=c.Data(source="folder", side=512, batch=128, caption_dropout=0.0, threads=16),
        flow=c.Flow(time_law="uniform", epsilon=0.05, bound="add"),
        optimizer=c.Optimizer(
            learning_rate=1e-5, warmup_steps=100, beta1=0.9, beta2=0.95, accumulate=2, frozen=("text_embed", "modulation"), ema=(0.999,)
        ),
        distill=c.Distill(
            kind="trajectories", segments=4, trajectories=65_536, sample=c.Sample(solver="heun", steps=12, guidance=3.5, batch=16)
        ),
        train=c.Train(steps=5_000, validate_every=250, sample_every=250, checkpoint_every=250, keep=2),
        sample=c.Sample(solver="euler", steps=4, guidance=1.0),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
