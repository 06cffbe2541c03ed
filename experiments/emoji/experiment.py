"""Train on emoji of two styles, and draw concepts in the style in which they were not seen.

    python -m experiments.emoji.fetch
    radiance train experiments/emoji/experiment.py
    python -m experiments.emoji.rank runs/emoji

A twentieth of the drawings is held out; the model has seen nearly all of their concepts in the
other style. `rank` draws them and asks how many drawings of the style are closer to the sample than
the true one. Planned for 2 CPU cores; the complete run is not timed.
"""

from radiance import config as c

VARIANTS = {
    "toy": ["model.hidden=32", "model.heads=2", "model.rope_axes=(4, 6, 6)", "train.steps=4"],
}


def config() -> c.Config:
    return c.Config(
        name="emoji",
        model=c.Model(
            patch=4,
            hidden=192,
            heads=6,
            rope_axes=(4, 14, 14),
            rope_theta=100.0,
            double_blocks=2,
            single_blocks=4,
            mlp_ratio=3,
            text_dim=128,
            approximator_hidden=64,
            approximator_depth=2,
            head="linear",
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32"),
        text=c.Text(encoder="hash", max_length=16),
        data=c.Data(
            source="folder",
            path="runs/emoji/images",
            resolution=32,
            batch_size=64,
            caption_dropout=0.1,
            num_threads=1,
        ),
        flow=c.Flow(timestep_distribution="logit_normal", logit_mean=0.5, logit_std=1.2),
        optimizer=c.Optimizer(
            kind="muon",
            learning_rate=2e-3,
            warmup_steps=50,
            lr_schedule="cosine",
            ema_decays=(0.995,),
        ),
        train=c.Train(
            steps=4000,
            log_every=50,
            validate_every=500,
            sample_every=1000,
            checkpoint_every=500,
            sample_prompts=(
                "noto red apple",
                "twemoji red apple",
                "noto cat with tears of joy",
                "twemoji cat with tears of joy",
                "noto thunder cloud and rain",
                "twemoji thunder cloud and rain",
                "noto person surfing",
                "twemoji person surfing",
            ),
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=2.0, batch_size=64),
    )
