"""A pixel model from a latent one, without real pictures: it learns from what the latent model paints, and most of the trunk stays.

    radiance sample Chroma1-HD.safetensors --text-encoder T5 --autoencoder AE --size 1024x1024 --prompts CAPTIONS --folder painted
    radiance convert Chroma1-HD.safetensors hd-grafted.safetensors --graft chroma1-radiance-x0
    radiance encode experiments/latent_to_pixel.py data.path=painted text.file=T5 text.cache=cache
    radiance train experiments/latent_to_pixel.py data.path=painted text.cache=cache

CAPTIONS: a file with one caption a line. T5: the encoder of T5 v1.1 XXL; AE: FLUX's autoencoder. The first command goes on where it was
stopped, and more of it with other sizes, into folders within painted, makes other proportions. Eight GPUs of 80 GB are meant.

After L2P (Chen et al., arXiv 2605.12013), from its abstract and from what two reimplementations say of it, for we have not read its tables:
pictures of the source model alone, patches of 16 pixels, the source's blocks frozen but for the first three and the last three, AdamW at
5e-5, 100,000 steps of 64 pictures on 8 GPUs. It reports 93 % of the source's GenEval.

Ours: the source is Chroma1-HD, theirs Z-Image; the head is Radiance's NeRF, theirs a small U-Net; the picture is predicted, as in
Radiance's last models; the time law, dropout and average are those of experiments/radiance_512.py and finetune.py, without optimal transport.
The text projection and the approximator are frozen too.

| arm | what it is |
|---|---|
| shell | no block is trained: the patch embedding and the head alone |
| toy | digits on a CPU, with the first and the last block |
| shapes | the first stage at the size of experiments/one_shape.py, from what experiments/latent_source.py paints |
| real | behind shapes: the second stage, all of it trained on real pictures |
| scratch | behind real: beside that, the same model from scratch |

Only the toy has been run, and the four commands on toys. There are no pictures and no numbers of the recipe itself.
"""

import one_shape
import radiance_512 as published

from radiance import config as c
from radiance.sections import differences


def config() -> c.Config:
    return c.override(
        published.config(),
        [
            "name=latent_to_pixel", "init=hd-grafted.safetensors", "model=chroma1-radiance-x0", "data.side=1024", "data.batch=64",
            "data.tag_shuffle=false", "data.tag_drop=0", "data.lower=0", "flow.coupling=independent", "optimizer.learning_rate=5e-5",
            "optimizer.clip_norm=1", "optimizer.frozen=text_embed,modulation", "optimizer.edges=3,3", "optimizer.accumulate=8",
            "optimizer.ema=0.9999", "train.steps=100000", "train.validate_every=5000", "train.sample_every=5000", "train.checkpoint_every=5000",
            "sample=radiance-x0",
        ],
    )  # fmt: skip


SMALL = [f"{key}={there}" for key, (_, there) in differences(config(), one_shape.config()).items() if "." in key]
ARMS = {
    "shell": ["optimizer.edges=0,0", "optimizer.frozen=text_embed,modulation,double,single"],
    "toy": [*published.TOY, "data.path=", "optimizer.edges=1,1", "optimizer.ema=0.9"],
    "shapes": [
        *SMALL, "data.source=folder", "data.path=painted", "data.batch=32", "optimizer.frozen=text_embed,modulation", "optimizer.edges=1,1",
        "optimizer.decay=constant", "train.steps=500", "train.validate_every=100", "train.sample_every=500", "train.checkpoint_every=100",
    ],
    "real": ["data.source=shapes", "data.path=", "optimizer.frozen=", "optimizer.edges=0,0", "train.steps=1000"],
    "scratch": ["init=", "train.steps=1500"],
}  # fmt: skip
