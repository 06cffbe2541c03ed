"""Quickstart: train on handwritten digits with captions, on two CPU cores.

    python experiments/quickstart.py          (`make quickstart` installs the requirements first)

This trains the model, or resumes training, samples every digit into runs/quickstart/digits.png,
and classifies 200 samples with a classifier of real digits. `radiance train
experiments/quickstart.py` only trains. Five to ten minutes on 2 CPU cores; the classifier agrees
with all 200 captions: experiments/results/quickstart.md.
"""

import sys

import numpy as np

from radiance import config as c
from radiance.base.images import make_contact_sheet, save_png, to_array
from radiance.cli import main as radiance
from radiance.data.datasets import open_source
from radiance.data.sources.digits import DIGIT_NAMES
from radiance.loading import load


def config() -> c.Config:
    return c.Config(
        name="quickstart",
        model=c.Model(
            patch=4,
            hidden=128,
            heads=4,
            rope_axes=(8, 12, 12),
            double_blocks=2,
            single_blocks=4,
            mlp_ratio=3,
            text_dim=64,
            approximator_hidden=64,
            approximator_depth=2,
            nerf_hidden=16,
            nerf_mlp_ratio=2,
            nerf_depth=2,
            nerf_freqs=4,
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32", head_chunk_size=0),
        text=c.Text(encoder="hash", max_length=10),
        data=c.Data(
            source="digits", resolution=16, batch_size=64, caption_dropout=0.1, num_threads=1
        ),
        flow=c.Flow(timestep_distribution="parabola"),
        optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=50, ema_decays=(0.99,)),
        train=c.Train(
            steps=700,
            log_every=10,
            validate_every=350,
            sample_every=350,
            checkpoint_every=100,
            sample_prompts=tuple(f"a handwritten {name}" for name in DIGIT_NAMES),
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=2.0, batch_size=50),
    )


def load_digits(run: c.Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels [n, pixels] of all digits of a split, and their labels [n]."""
    source, resolution = open_source(run.data, split), run.data.resolution
    pixels = [
        to_array(source.load_image(i), resolution, resolution).mean(axis=-1).ravel()
        for i in range(len(source))
    ]
    return np.stack(pixels), np.array([source.attributes(i)["digit"] for i in range(len(source))])


def train_classifier(run: c.Config):
    """Train a support vector classifier on real digits."""
    from sklearn.svm import SVC

    return SVC().fit(*load_digits(run, "train"))


def classify_samples(run: c.Config, num_images: int = 200) -> tuple[float, float]:
    """Sample digits and classify them.

    Returns:
        The fraction of samples classified as the requested digit, and the classifier's accuracy on
        held-out real digits.
    """
    classifier = train_classifier(run)
    requested = np.arange(num_images) % 10
    samples = load(run.run_dir)([f"a handwritten {DIGIT_NAMES[digit]}" for digit in requested])
    sheet = make_contact_sheet([x.image for x in samples[:100]], columns=10)
    save_png(run.run_dir / "digits.png", sheet, samples[0].metadata)
    resolution = run.data.resolution
    pixels = np.stack(
        [to_array(x.image, resolution, resolution).mean(axis=-1).ravel() for x in samples]
    )
    accuracy = classifier.score(*load_digits(run, "validation"))
    return float((classifier.predict(pixels) == requested).mean()), accuracy


def main(changes: list[str]) -> int:
    """Train, sample and classify; return the exit code."""
    code = radiance(["train", __file__, *changes])
    if code == 0:
        run = c.override(config(), changes)
        agreement, accuracy = classify_samples(run)
        print(
            f"The classifier agrees with the caption for {agreement:.1%} of 200 samples; "
            f"its accuracy on held-out real digits is {accuracy:.1%}."
        )
        print(f"The samples are in {run.run_dir / 'digits.png'}.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
