"""Does a pixel model learn faster from a latent model's samples, with most blocks frozen?

    radiance sample Chroma1-HD.safetensors --text-encoder T5 --autoencoder AE --size 1024x1024 \\
        --prompts CAPTIONS --folder generated
    radiance convert Chroma1-HD.safetensors hd-grafted.safetensors --graft chroma1-radiance-x0
    radiance encode experiments/latent_to_pixel.py data.path=generated text.file=T5 text.cache=cache
    radiance train experiments/latent_to_pixel.py data.path=generated text.cache=cache

After arXiv 2605.12013 (abstract and two reimplementations): generated images only, patches of 16,
all blocks frozen but the first and last three, AdamW at 5e-5, 100,000 steps of 64 images on 8
GPUs. Ours: Chroma1-HD as the source, Radiance's NeRF head, x0 prediction, timesteps, dropout and
EMA of radiance_512.py and finetune.py, no optimal transport, frozen text projection and
approximator. The variants `shapes`, `real` and `scratch` are the toy, eight minutes of a CPU core
each (3 seeds: by loss no, by F1 of generated objects yes): experiments/results/latent_to_pixel.md
has its commands and results. Not run at full size.
"""

import one_shape
import radiance_512 as published

from radiance import config as c
from radiance.base.settings import differences


def config() -> c.Config:
    return c.override(
        published.config(),
        [
            "name=latent_to_pixel", "init=hd-grafted.safetensors", "model=chroma1-radiance-x0",
            "data.resolution=1024", "data.batch_size=64",
            "data.shuffle_tags=false", "data.tag_dropout=0", "data.lowercase_probability=0",
            "flow.coupling=independent", "optimizer.learning_rate=5e-5",
            "optimizer.clip_norm=1", "optimizer.frozen=text_embed,modulation",
            "optimizer.edge_blocks=3,3", "optimizer.gradient_accumulation_steps=8",
            "optimizer.ema_decays=0.9999", "train.steps=100000", "train.validate_every=5000",
            "train.sample_every=5000", "train.checkpoint_every=5000",
            "sample=radiance-x0",
        ],
    )  # fmt: skip


SMALL = [
    f"{key}={value}"
    for key, (_, value) in differences(config(), one_shape.config()).items()
    if "." in key
]
VARIANTS = {
    "shell": ["optimizer.edge_blocks=0,0", "optimizer.frozen=text_embed,modulation,double,single"],
    "toy": [*published.TOY, "data.path=", "optimizer.edge_blocks=1,1", "optimizer.ema_decays=0.9"],
    "shapes": [
        *SMALL, "data.source=folder", "data.path=generated", "data.batch_size=32",
        "optimizer.frozen=text_embed,modulation", "optimizer.edge_blocks=1,1",
        "optimizer.lr_schedule=constant", "train.steps=500", "train.validate_every=100",
        "train.sample_every=500", "train.checkpoint_every=100",
    ],
    "real": [
        "data.source=shapes", "data.path=", "optimizer.frozen=", "optimizer.edge_blocks=0,0",
        "train.steps=1000",
    ],
    "scratch": ["init=", "train.steps=1500"],
}  # fmt: skip
