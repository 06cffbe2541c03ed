"""Chroma's approximator in place of FLUX's layers of modulation: fitted to them first, then trained with all else; and a control that keeps them.

    radiance convert flux1-schnell.safetensors chroma-grafted.safetensors --modulation approximator --graft chroma1-radiance-x0
    radiance convert flux1-schnell.safetensors flux-grafted.safetensors --pooled zero --graft chroma1-radiance-x0
    radiance train experiments/distill_modulation.py data.path=FOLDER text.file=T5
    radiance train experiments/distill_modulation.py:control data.path=FOLDER text.file=T5

FOLDER: images and captions; T5: the encoder of T5 v1.1 XXL. Eight GPUs of 80 GB are meant. FLUX paints latents and pixels are trained
here, so both arms have a fresh pixel head. Neither reads the pooled text vector, which is held at zero: the two files differ in nothing but
the modulation. FLUX attends to all padding (model.masking=off), and so do they. The learning rate is a guess, for want of a source.

| arm | starts from | what it is |
|---|---|---|
| (none) | chroma-grafted.safetensors | the approximator, trained with all else |
| control | flux-grafted.safetensors | FLUX's layers, trained as long |
| original | | FLUX's layers from scratch: what the toys replace |
| toy | | digits on a CPU; behind another arm (`distill_modulation.py:control:toy`) it makes that one small |

Nothing has been run at full size. The toy, for each SEED:

    radiance train experiments/distill_modulation.py:original:toy train.steps=1000 train.seed=SEED name=original-SEED
    radiance convert runs/original-SEED replaced-SEED.safetensors --modulation approximator
    radiance train experiments/distill_modulation.py:toy init=replaced-SEED.safetensors train.seed=1SEED name=finetune-SEED
    radiance train experiments/distill_modulation.py:control:toy init=runs/original-SEED train.seed=1SEED name=control-SEED

Made on 2 CPU cores, shared with other work (2026-11-27, JAX 0.10.2). 178,688 parameters of modulation become 33,472, of 0.6 M in all; the
conversion takes 85 seconds of CPU. Error: RMS of the difference over RMS of the vector, in the mean over 38 vectors and in the worst.

| SEED | error | worst | validation loss of the original | replaced | |
|---|---|---|---|---|---|
| 0 | 4.03 % | 6.32 % | 0.10163 | 0.10191 | +0.28 % |
| 1 | 3.77 % | 5.80 % | 0.09890 | 0.09912 | +0.22 % |
| 2 | 4.50 % | 6.35 % | 0.10223 | 0.10216 | −0.07 % |
| 3 | 4.04 % | 5.63 % | 0.09962 | 0.09959 | −0.02 % |
| 4 | 4.09 % | 6.24 % | 0.10414 | 0.10382 | −0.30 % |

So replacing costs far less than 2 %. Trained further, both arms with seed 10 + SEED (validation loss, and how much the control is missed by):

| SEED | arm | 100 steps | 200 | 300 |
|---|---|---|---|---|
| 0 | finetune | 0.10032 (+0.6 %) | 0.09618 (0.0 %) | 0.09391 (+0.9 %) |
| 0 | control | 0.09971 | 0.09619 | 0.09310 |
| 1 | finetune | 0.10108 (+0.6 %) | 0.09631 (+1.0 %) | 0.09425 (+2.4 %) |
| 1 | control | 0.10049 | 0.09536 | 0.09207 |
| 2 | finetune | 0.10723 (+1.8 %) | 0.10004 (+1.0 %) | 0.09628 (+0.8 %) |
| 2 | control | 0.10536 | 0.09908 | 0.09548 |
| 3 | finetune | 0.10145 (+1.5 %) | 0.09640 (+1.4 %) | 0.09278 (+0.9 %) |
| 3 | control | 0.09994 | 0.09510 | 0.09197 |
| 4 | finetune | 0.10645 (−1.1 %) | 0.09963 (+1.2 %) | 0.09690 (+1.0 %) |
| 4 | control | 0.10764 | 0.09844 | 0.09599 |

Within 1 % of the control after 300 steps with four seeds, and not with the fifth: 1.2 % in the mean (95 % interval 0.4 to 2.0). So a small network learns a
little slower here, while both go on learning fast, at the rate of the original's training; most of the gap lies at times below 0.1 (seeds 0 and 1).
Seeds 2 to 4 are of another machine.

The replaced model's loss is that of step 0 of its further training. Where an error lies decides, not its size alone: with uniform times errors
of 5 % cost 5 % and more, nearly all of it at times below 0.1, where an x0 model divides by the time; with times that are squares of uniform
ones the same error costs a fifth of that. What chose the constants of radiance/training/modulation_fit.py, fits of 1,000 steps of SEED 0, one
each; `--modulation-steps 1000` makes the last row, and the others need those lines of the file changed:

| loss relative to | times | rate | error | validation loss |
|---|---|---|---|---|
| nothing | uniform | 0.002 | 9.2 % | +50.5 % |
| mean square | uniform | 0.002 | 8.7 % | +42.9 % |
| variance | uniform | 0.002 | 8.6 % | +27.9 % |
| mean square | uniform | 0.006 | 6.8 % | +15.4 % |
| variance | uniform | 0.01 | 5.8 % | +9.5 % |
| variance | uniform | 0.02 | 5.0 % | +4.9 % |
| variance | squared | 0.02 | 5.2 % | +0.9 % |
"""

from radiance import config as c

TOY = [
    "init=", "model.patch=4", "model.hidden=64", "model.heads=4", "model.rope_axes=4,6,6", "model.double_blocks=2", "model.single_blocks=4",
    "model.text_dim=32", "model.approximator_hidden=64", "model.approximator_depth=3", "model.head=linear", "compute.dtype=float32",
    "compute.remat=none", "text.encoder=hash", "text.max_length=10", "data.source=digits", "data.resolution=16", "data.batch_size=32", "data.num_threads=1",
    "optimizer.gradient_accumulation_steps=1", "optimizer.learning_rate=2e-3", "optimizer.warmup_steps=20", "optimizer.ema_decays=0.99", "train.steps=300",
    "train.validate_every=100", "train.sample_every=300", "train.checkpoint_every=300", "sample.steps=20", "sample.guidance_scale=2",
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
        data=c.Data(source="folder", resolution=512, batch_size=128, caption_dropout=0.1, num_threads=16),
        flow=c.Flow(timestep_distribution="parabola", min_divisor=0.05, min_divisor_mode="add"),
        optimizer=c.Optimizer(learning_rate=1e-5, warmup_steps=100, beta1=0.9, beta2=0.95, gradient_accumulation_steps=2, ema_decays=(0.9999,)),
        train=c.Train(steps=10_000, validate_every=500, sample_every=500, checkpoint_every=500, max_to_keep=2),
        sample=c.Sample(solver="euler", steps=28, schedule="shifted", guidance_scale=4.0),
        mesh=c.Mesh(data=1, fsdp=-1),
    )  # fmt: skip
