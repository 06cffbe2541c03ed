"""Train the smallest model whose samples an exact reader can score: one shape an image.

    radiance train experiments/one_shape.py
    radiance evaluate runs/one_shape --images 256

A patch is one cell of the grid, so that a token holds one object or none, and rotary frequencies
are high enough to separate four positions. It is the teacher of few_steps.py:shapes. The variant
`three` has up to three objects, all counted and some described by the caption; it is the teacher
of few_steps.py:three. The variant `six` has all backgrounds, named in every caption: the noise of
an unnamed one drowns what the place of the object explains. It has not been run yet.

15 minutes of one CPU core (seed 0): F1 of the objects 0.957; on all six backgrounds 0.005. `three`
takes 22 minutes: experiments/results/one_shape.md.
"""

from radiance import config as c

VARIANTS = {
    "three": ["data.shapes.max_objects=3", "train.steps=3000"],
    "six": [
        "data.shapes.backgrounds=white,grey,black,beige,brown,navy",
        "data.shapes.named_backgrounds=1",
        "train.steps=3000",
    ],
}


def config() -> c.Config:
    return c.Config(
        name="one_shape",
        model=c.Model(
            patch=8,
            hidden=128,
            heads=4,
            rope_axes=(4, 14, 14),
            rope_theta=10.0,
            double_blocks=1,
            single_blocks=3,
            mlp_ratio=3,
            text_dim=128,
            approximator_hidden=64,
            approximator_depth=2,
            head="linear",
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32"),
        text=c.Text(encoder="hash", max_length=20),
        data=c.Data(
            source="shapes",
            shapes=c.Shapes(
                caption_lengths="short", max_tokens=20, max_objects=1, backgrounds=("black",)
            ),
            resolution=32,
            batch_size=64,
            caption_dropout=0.1,
            num_threads=1,
        ),
        flow=c.Flow(timestep_distribution="logit_normal", logit_mean=1.0, logit_std=1.5),
        optimizer=c.Optimizer(
            kind="muon",
            learning_rate=3e-3,
            warmup_steps=50,
            lr_schedule="cosine",
            ema_decays=(0.99,),
        ),
        train=c.Train(
            steps=1500, log_every=50, validate_every=250, sample_every=500, checkpoint_every=250
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=2.0, batch_size=64),
    )
