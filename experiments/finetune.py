"""Fine-tune Chroma1-Radiance on a folder of captioned images.

    radiance train experiments/finetune.py init=FILE data.path=FOLDER text.file=T5
    radiance convert runs/finetune out.safetensors --weights ema=0.9999 --dtype bf16
    radiance train experiments/finetune.py:rehearsal data.path=FOLDER   (a small model on a \\
        CPU: checks a folder)

FILE: published weights, such as chroma-radiance-x0.safetensors. FOLDER: images with captions in
NAME.txt beside them or in a metadata.jsonl. T5: the encoder of T5 v1.1 XXL as safetensors or
GGUF; set text.tokenizer=FILE if spiece.model or tokenizer.json is elsewhere. out.safetensors is
for ComfyUI and similar tools.

The recipe is that of the authors' trainer of the x0 model: AdamW with betas 0.9 and 0.95, weight
decay 1e-4, learning rate 1.732e-5 after 100 warm-up steps, gradients clipped to 1, caption
dropout 0.1, logistic timesteps shifted by resolution, minimum divisor 0.05 (added). Batch size
256 is that of its published configs; the EMA is ours. The approximator is frozen, as in every
trainer of Chroma (see OneTrainer's pull request 945): it computes the modulation of all 57 blocks.

Not run at full size. By count, weights, Adam's moments, one EMA and the gradient take 185 GB over
all devices, and a checkpoint 149 GB.
"""

from radiance import config as c

VARIANTS = {
    # A frozen approximator without trained weights would keep the gates of all blocks at 0.
    "rehearsal": [
        "model.hidden=128", "model.heads=4", "model.rope_axes=8,12,12", "model.double_blocks=1",
        "model.single_blocks=2", "model.text_dim=64",
        "model.approximator_hidden=64", "model.approximator_depth=2", "model.nerf_hidden=16",
        "model.nerf_mlp_ratio=2", "model.nerf_depth=2",
        "compute.dtype=float32", "text.encoder=hash", "text.max_length=64", "data.resolution=64",
        "data.batch_size=8", "optimizer.gradient_accumulation_steps=1",
        "optimizer.learning_rate=1e-3", "optimizer.frozen=", "train.steps=100",
        "train.validate_every=100", "train.sample_every=100", "train.checkpoint_every=100",
    ]
}  # fmt: skip


def config() -> c.Config:
    return c.Config(
        name="finetune",
        model=c.Model.from_name("chroma1-radiance-x0"),
        compute=c.Compute(dtype="bfloat16", remat="full"),
        text=c.Text(encoder="t5", max_length=512),
        data=c.Data(
            source="folder", resolution=512, batch_size=256, caption_dropout=0.1, num_threads=16
        ),
        flow=c.Flow(timestep_distribution="logistic", min_divisor=0.05, min_divisor_mode="add"),
        optimizer=c.Optimizer(
            learning_rate=1.732e-5,
            warmup_steps=100,
            beta1=0.9,
            beta2=0.95,
            weight_decay=1e-4,
            clip_norm=1.0,
            gradient_accumulation_steps=4,
            frozen=("modulation",),
            ema_decays=(0.9999,),
        ),
        train=c.Train(
            steps=10_000, validate_every=500, sample_every=500, checkpoint_every=500, max_to_keep=2
        ),
        sample=c.Sample(solver="euler", steps=28, schedule="shifted", guidance_scale=4.0),
        mesh=c.Mesh(data=1, fsdp=-1),
    )
