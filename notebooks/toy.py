"""Toys for the notebooks: the smallest runs with something to look at.

    radiance train notebooks/toy.py                     digits of 16×16 pixels, with the NeRF head
    radiance train notebooks/toy.py:linear              the same with a linear head
    radiance train notebooks/toy.py:linear:per_block    with FLUX's modulation instead of Chroma's
    radiance train notebooks/toy.py:shapes              a shape on black, one padding token
    radiance train notebooks/toy.py:shapes:off          the same, attending to all padding

They show how to look, and decide nothing. Longer runs of the last two follow their captions:

    radiance train notebooks/toy.py:shapes:long name=shapes
    radiance train notebooks/toy.py:shapes:off:long name=shapes-off
"""

import fcntl
import subprocess
import sys
from pathlib import Path

from radiance import config as c
from radiance.data.sources.digits import DIGIT_NAMES

VARIANTS = {
    "linear": ["model.head=linear"],
    "per_block": ["model.modulation=per_block"],
    "shapes": [
        "model.patch=8", "model.head=linear", "text.encoder=random_t5", "text.max_length=24",
        "data.source=shapes", "data.shapes.caption_lengths=short", "data.shapes.max_tokens=24",
        "data.shapes.max_objects=1", "data.shapes.backgrounds=black", "data.resolution=32",
        "train.sample_prompts=", "sample.guidance_scale=1",
    ],
    "off": ["model.masking=off"],
    # The recipe of the suite `masking`, by which small networks learn to read captions.
    "long": [
        "model.rope_theta=10", "flow.timestep_distribution=logit_normal", "flow.logit_mean=1",
        "flow.logit_std=1.5", "optimizer.kind=muon", "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=50", "optimizer.ema_decays=0.99", "train.steps=1500",
    ],
}  # fmt: skip


def config() -> c.Config:
    """Return the experiment."""
    return c.Config(
        name="toy",
        model=c.Model(
            patch=4,
            hidden=64,
            heads=4,
            rope_axes=(4, 6, 6),
            double_blocks=1,
            single_blocks=2,
            mlp_ratio=2,
            text_dim=64,
            approximator_hidden=64,
            approximator_depth=2,
            nerf_hidden=8,
            nerf_mlp_ratio=2,
            nerf_depth=1,
            nerf_freqs=4,
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32", head_chunk_size=0),
        text=c.Text(encoder="hash", max_length=10, dtype="float32"),
        data=c.Data(
            source="digits", resolution=16, batch_size=32, caption_dropout=0.1, num_threads=1
        ),
        flow=c.Flow(timestep_distribution="parabola"),
        optimizer=c.Optimizer(learning_rate=4e-3, warmup_steps=20, ema_decays=(0.98,)),
        train=c.Train(
            steps=300,
            validate_every=300,
            sample_every=300,
            checkpoint_every=300,
            sample_prompts=tuple(f"a handwritten {name}" for name in DIGIT_NAMES),
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=2.0, batch_size=60),
    )


def choose_trained(run: str, toy: str) -> str:
    """Return a run directory that is trained, else that of a toy, which is trained if missing.

    Args:
        run: Run directory.
        toy: Run directory of a toy.
    """
    if (Path(run) / "report.html").is_file():
        return run
    train_missing(toy)
    return toy


def train_missing(*models: str) -> None:
    """Train those toys that are not trained yet.

    Args:
        models: Run directories. Toys are runs/toy and runs/toy-VARIANT; others are left alone.

    Raises:
        RuntimeError: A toy could not be trained.
    """
    for model in map(Path, models):
        name, *variants = model.name.split("-")
        if name != "toy":
            continue
        model.parent.mkdir(exist_ok=True)
        with model.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another notebook may be training it
            if (model / "report.html").is_file():  # the last file that training writes
                continue
            experiment = ":".join([__file__, *variants])
            command = [sys.executable, "-m", "radiance", "train", experiment]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"{model} could not be trained: {process.stderr.strip()}")
