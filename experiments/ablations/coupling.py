"""Which noise should be paired with which image: independent, or optimal transport of the batch?

    python experiments/ablations/coupling.py   bias of the noise, without training
    radiance ablate coupling   the smoke scale, 4 minutes: decides nothing
    radiance ablate coupling --scale gpu   one GPU: planned, not run
    radiance plan experiments/ablations/coupling.py:global --device h200   a run of the pod scale

Optimal transport makes paths straighter, and the noise then contains information about the image:
a model learns the noise that goes with a caption, and samples from any. Validation with
independent noise would judge a variant by pairs it was not trained on; so generated images decide,
scored by an exact reader. Noise exchanged between images of one caption only (within_caption)
contains nothing that the caption does not. C²OT (arXiv 2503.10636) adds the distance of captions
to the cost.

Expected before the run: global and local 2 to 10 points worse than independent in `background`,
c2ot by less; none better in `exact`; within_caption equal to independent. Results: README.md. Not
implemented: images of 1, 2, 4 and 8 steps, the curvature of paths, and transport over more than a
batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import masking
import numpy as np

from radiance import config as c
from radiance.ablation.data import (
    ImageSet,
    TextSet,
    encode_captions,
    load_image_set,
    sample_indices,
)
from radiance.ablation.suite import Scale, Suite
from radiance.base.images import to_signed
from radiance.evaluation.statistics import student_interval
from radiance.flow.coupling import couple_noise
from radiance.shapes.scenes import BACKGROUNDS

CHANGES = {
    "independent": (),
    "global": ("flow.coupling=optimal_transport",),
    "c2ot": ("flow.coupling=optimal_transport", "flow.coupling_caption_weight=0.03"),
    "within_caption": ("flow.coupling=within_caption",),
    "no_text": ("data.caption_dropout=1",),
}


def config() -> c.Config:
    """Return the base of the pod scale."""
    return masking.make_base("coupling", "pod")


def smoke() -> c.Config:
    """Return the base of the smoke scale: enough to see that the suite runs."""
    return masking.make_base(
        "coupling",
        "smoke",
        "train.steps=20",
        "train.validate_every=20",
        "sample.steps=4",
        "sample.batch_size=16",
    )


def make_local_variant(group_size: int) -> dict[str, tuple[str, ...]]:
    """Return the variant that couples within groups of images."""
    changes = ("flow.coupling=optimal_transport", f"flow.coupling_group_size={group_size}")
    return {"local": changes}


SUITE = Suite(
    name="coupling",
    question="Which noise should be paired with which image?",
    metric="f1@1",
    base="independent",
    controls=("no_text",),
    margin=0.02,
    variants=CHANGES,
    scales={
        "smoke": Scale(
            smoke(), num_images=256, num_seeds=2, num_samples=16, variants=make_local_variant(4)
        ),
        "cpu": Scale(
            masking.make_base("coupling", "cpu"),
            num_images=16384,
            num_seeds=8,
            first_seed=masking.FIRST_SEED,
            num_samples=512,
            precondition=masking.READS,
            variants=make_local_variant(8),
        ),
        "gpu": Scale(
            masking.make_base("coupling", "gpu"),
            num_images=65536,
            num_seeds=8,
            learning_rate_factors=(0.5, 1.0, 2.0),
            num_samples=1024,
            variants=make_local_variant(32),
        ),
        "pod": Scale(config(), num_seeds=3, variants=make_local_variant(32)),
    },
)
VARIANTS = SUITE.variants_at("pod")


# --- The bias of the noise, without training. ---

PALETTE = np.array(list(BACKGROUNDS.values())) / 127.5 - 1


class NoiseBias(NamedTuple):
    """Bias of the noise under a coupling, over the batches of a seed.

    Attributes:
        bias: Shift of the noise's mean towards the background color named in its caption, in
            standard deviations of that mean.
        saved: Fraction of the squared distance between images and their noise that is saved.
    """

    bias: float
    saved: float


def measure_bias(
    run: c.Config, images: ImageSet, texts: TextSet, seed: int, num_batches: int
) -> NoiseBias:
    """Measure the coupling of a run on some batches; nothing is trained."""
    couple = jax.jit(lambda *batch: couple_noise(run.flow, *batch))
    biases, independent, coupled = [], 0.0, 0.0
    for step in range(num_batches):
        image_indices, text_indices = sample_indices(seed, step, len(images.image), run.data)
        image = to_signed(images.image[image_indices])
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), image.shape)
        embeddings, lengths = texts.embeddings[text_indices], texts.lengths[text_indices]
        paired = noise[couple(image, noise, embeddings, lengths)]
        independent += float(jnp.square(image - noise).sum())
        coupled += float(jnp.square(image - paired).sum())
        means = np.asarray(paired.mean(axis=(1, 2))) * run.data.resolution
        for row, text in enumerate(text_indices):
            if text >= len(images.descriptions):  # a dropped caption
                continue
            if background := images.descriptions[text].background:
                direction = PALETTE[list(BACKGROUNDS).index(background)] - PALETTE.mean(axis=0)
                biases.append(means[row] @ direction / np.linalg.norm(direction))
    return NoiseBias(float(np.mean(biases)), 1 - coupled / independent)


def print_table(
    run: c.Config, variants: dict[str, tuple[str, ...]], num_seeds: int = 3, num_batches: int = 8
) -> None:
    """Print the bias of each variant, with 95 % intervals over seeds."""
    images = load_image_set(run.data, "train", 2048)
    texts = encode_captions(images.captions, run.text, run.model.text_dim)
    print("| coupling | bias, σ | saved |\n| --- | --- | --- |")
    for variant, changes in variants.items():
        variant_run = c.override(run, changes)
        measured = [
            measure_bias(variant_run, images, texts, seed, num_batches) for seed in range(num_seeds)
        ]
        bias, saved = (student_interval(values) for values in zip(*measured))
        print(f"| {variant} | {bias} | {saved.mean:.2%} |", flush=True)


if __name__ == "__main__":
    c2ot_variants = {
        f"c2ot, {weight:g}": (*CHANGES["global"], f"flow.coupling_caption_weight={weight:g}")
        for weight in (0.01, 0.02, 0.03, 0.05, 0.1)
    }
    suite_variants = {
        variant: SUITE.variants_at("gpu")[variant]
        for variant in ("independent", "local", "global", "within_caption")
    }
    print_table(masking.make_base("coupling", "gpu"), suite_variants | c2ot_variants)
