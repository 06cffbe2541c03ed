"""A pixel model from a latent one, without real images: it learns from what the latent model paints, and most of the trunk stays.

    radiance sample Chroma1-HD.safetensors --text-encoder T5 --autoencoder AE --size 1024x1024 --prompts CAPTIONS --folder painted
    radiance convert Chroma1-HD.safetensors hd-grafted.safetensors --graft chroma1-radiance-x0
    radiance encode experiments/latent_to_pixel.py data.path=painted text.file=T5 text.cache=cache
    radiance train experiments/latent_to_pixel.py data.path=painted text.cache=cache

CAPTIONS: a file with one caption a line. T5: the encoder of T5 v1.1 XXL; AE: FLUX's autoencoder. The first command goes on where it was
stopped, and more of it with other sizes, into folders within painted, makes other proportions. Eight GPUs of 80 GB are meant.

After L2P (Chen et al., arXiv 2605.12013), from its abstract and from what two reimplementations say of it, for we have not read its tables:
images of the source model alone, patches of 16 pixels, the source's blocks frozen but for the first three and the last three, AdamW at
5e-5, 100,000 steps of 64 images on 8 GPUs. It reports 93 % of the source's GenEval.

Ours: the source is Chroma1-HD, theirs Z-Image; the head is Radiance's NeRF, theirs a small U-Net; the image is predicted, as in
Radiance's last models; the time law, dropout and average are those of experiments/radiance_512.py and finetune.py, without optimal transport.
The text projection and the approximator are frozen too.

| arm | what it is |
|---|---|
| shell | no block is trained: the patch embedding and the head alone |
| toy | digits on a CPU, with the first and the last block |
| shapes | the first stage at the size of experiments/one_shape.py, from what experiments/latent_source.py paints |
| real | behind shapes: the second stage, all of it trained on real images |
| scratch | behind real: beside that, the same model from scratch |

There are no images and no numbers of the recipe itself. Its small model, for each SEED, and beside it the same pixel model from scratch:

    mkdir -p runs/latent-SEED && cp runs/latent-0/autoencoder.safetensors runs/latent-0/captions.txt runs/latent-SEED      but for seed 0
    python experiments/latent_source.py train.seed=SEED name=latent-SEED
    radiance sample runs/latent-SEED steps=12 batch=64 --autoencoder runs/latent-SEED/autoencoder.safetensors \\
        --prompts runs/latent-SEED/captions.txt --folder painted-SEED
    radiance convert runs/latent-SEED grafted-SEED.safetensors --graft experiments/one_shape.py --dtype fp32
    radiance train experiments/latent_to_pixel.py:shapes init=grafted-SEED.safetensors data.path=painted-SEED train.seed=SEED name=painted-SEED
    radiance train experiments/latent_to_pixel.py:shapes:real init=runs/painted-SEED train.seed=1SEED name=real-SEED
    radiance train experiments/latent_to_pixel.py:shapes:real:scratch train.seed=SEED name=scratch-SEED

All seeds share one autoencoder, as published models do. It takes six minutes, and all of 128 held-out images are read as told through it. A latent model
takes seven.

Run for seeds 0 to 2 (one of 2 CPU cores, 2026-11-27, JAX 0.10.2; from scratch seed 0 on another machine of two): the first stage 500 steps, the second
1,000, and from scratch 1,500, all of 32 images, eight minutes either way. By all steps of a pixel model the validation loss on real images, and F1 of
the objects (`radiance evaluate runs/real-SEED --images 256`, on the way with a smaller train.steps); the mean of the seeds:

| steps | 100 | 300 | 500 | 700 | 750 | 1,000 | 1,300 | 1,500 |
|---|---|---|---|---|---|---|---|---|
| loss, grafted: 500 on painted images, then real ones | | | 0.0290 | 0.0230 | | 0.0176 | 0.0135 | 0.0121 |
| loss, from scratch | 0.1286 | 0.0413 | 0.0292 | 0.0204 | | 0.0147 | 0.0117 | 0.0104 |
| F1, grafted | | | | | 0.917 | 0.941 | | 0.990 |
| F1, from scratch | | | | | | | | 0.945 |

**By the loss it saves nothing here**: 500 steps on painted images bring what 500 on real ones do, and from there on learning is slower, in each of
the seeds. **By what it paints it ends ahead**: F1 0.992, 0.990 and 0.988, from scratch 0.937, 0.928 and 0.969. What that has after 1,500 steps the
grafted one has after about 1,000 (halfway 0.900, 0.968 and 0.883), which is more than the half that was asked for, and the latent model's own training
is not counted. With an autoencoder through which 63 % of the images were read (CROPPED, WHOLE = 1400, 400; one seed) both were worse: 0.0392 after the first stage, and at the end
0.0141 and F1 0.934. Of so small a model the trunk is learned in minutes, so this says little of one that took months.
"""

import one_shape
import radiance_512 as published

from radiance import config as c
from radiance.base.settings import differences


def config() -> c.Config:
    return c.override(
        published.config(),
        [
            "name=latent_to_pixel", "init=hd-grafted.safetensors", "model=chroma1-radiance-x0", "data.resolution=1024", "data.batch_size=64",
            "data.shuffle_tags=false", "data.tag_dropout=0", "data.lowercase_probability=0", "flow.coupling=independent", "optimizer.learning_rate=5e-5",
            "optimizer.clip_norm=1", "optimizer.frozen=text_embed,modulation", "optimizer.edge_blocks=3,3", "optimizer.gradient_accumulation_steps=8",
            "optimizer.ema_decays=0.9999", "train.steps=100000", "train.validate_every=5000", "train.sample_every=5000", "train.checkpoint_every=5000",
            "sample=radiance-x0",
        ],
    )  # fmt: skip


SMALL = [
    f"{key}={there}"
    for key, (_, there) in differences(config(), one_shape.config()).items()
    if "." in key
]
VARIANTS = {
    "shell": ["optimizer.edge_blocks=0,0", "optimizer.frozen=text_embed,modulation,double,single"],
    "toy": [*published.TOY, "data.path=", "optimizer.edge_blocks=1,1", "optimizer.ema_decays=0.9"],
    "shapes": [
        *SMALL, "data.source=folder", "data.path=painted", "data.batch_size=32", "optimizer.frozen=text_embed,modulation", "optimizer.edge_blocks=1,1",
        "optimizer.lr_schedule=constant", "train.steps=500", "train.validate_every=100", "train.sample_every=500", "train.checkpoint_every=100",
    ],
    "real": ["data.source=shapes", "data.path=", "optimizer.frozen=", "optimizer.edge_blocks=0,0", "train.steps=1000"],
    "scratch": ["init=", "train.steps=1500"],
}  # fmt: skip
