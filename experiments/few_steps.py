"""How well do students of Chroma1-Radiance sample in few steps and without guidance?

    radiance train experiments/few_steps.py init=FILE data.path=FOLDER text.file=T5 \\
        distill.trajectory_dir=DIR
    radiance convert runs/few_steps flash.safetensors --extract FILE --rank 64 --to peft
    radiance sample FILE --text-encoder T5 --lora flash.safetensors:1.0 --prompt "…" steps=4 \\
        schedule=uniform guidance_scale=1

FILE: published weights. FOLDER: captions (trajectories use no images). DIR: the teacher's
trajectories, generated first, resumable, shared by variants; 65,536 in four segments take 412 GB
at 512 pixels. Only blocks are trained (mean_flow also trains the approximator and both ends), so
that the difference fits into a LoRA. `few_steps.py:tdm` trains a LoRA without trajectories: export
it with `radiance convert runs/few_steps flash.safetensors --to peft`, and sample with
schedule=shifted. `few_steps.py:toy`, `:shapes` and `:three` are toys that take minutes on a CPU
core. On up to three shapes, reflow students keep the teacher's F1 and 92 % of its fully correct
images in 4 steps. experiments/results/few_steps.md has all variants, commands and tables. Not run
at full size; the learning rate is a guess.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import finetune
import numpy as np
import one_shape
import quickstart
from jaxtyping import Float32

from radiance import config as c
from radiance.base.images import make_contact_sheet, save_png, to_array, to_image
from radiance.base.settings import differences
from radiance.config.experiments import load_experiment
from radiance.data.datasets import open_source
from radiance.evaluation.features import RandomNetworkExtractor
from radiance.evaluation.metrics import compute_moments, frechet_distance
from radiance.loading import load
from radiance.shapes import scoring


def scale_down(run: c.Config, learning_rate: float) -> list[str]:
    """Return changes that make this experiment train a student of a small model on a CPU.

    Args:
        run: The small model's experiment.
        learning_rate: Learning rate of the student.
    """
    changes = [
        f"{key}={value}"
        for key, (_, value) in differences(finetune.config(), run).items()
        if key.split(".")[0] in ("model", "compute", "text", "data")
    ]
    return [
        *changes, f"init={run.run_dir}", "data.caption_dropout=0", "data.batch_size=64",
        "optimizer.gradient_accumulation_steps=1", f"optimizer.learning_rate={learning_rate}",
        "optimizer.warmup_steps=20", "optimizer.lr_schedule=cosine", "optimizer.ema_decays=0.99",
        "distill.sample.steps=8", "distill.sample.guidance_scale=2", "distill.sample.batch_size=64",
        "distill.num_trajectories=2048", "train.steps=300", "train.log_every=50",
        "train.validate_every=100", "train.sample_every=300", "train.checkpoint_every=100",
        "sample.batch_size=50", "mesh.data=-1", "mesh.fsdp=1",
    ]  # fmt: skip


NO_TRAJECTORIES = ["distill.segments=1", "distill.trajectory_dir="]
# As in the authors' trainer: rates, betas, guidance scale 4 and shifted times.
TDM = [
    *NO_TRAJECTORIES, "distill.kind=distribution_matching", "distill.segments=4",
    "distill.sample.steps=4", "distill.sample.guidance_scale=4",
    "distill.sample.schedule=shifted", "sample.schedule=shifted", "lora.rank=64",
    "lora.weight_format=int8", "optimizer.frozen=", "optimizer.learning_rate=2e-5",
    "optimizer.beta1=0", "optimizer.beta2=0.95", "optimizer.weight_decay=1e-4",
    "data.batch_size=32", "optimizer.gradient_accumulation_steps=8", "train.steps=2000",
]  # fmt: skip
VARIANTS = {
    "reflow": ["distill.segments=1", "flow.timestep_distribution=uniform"],
    "one_step": ["distill.segments=1", "flow.timestep_distribution=pure_noise", "sample.steps=1"],
    "guidance": [
        *NO_TRAJECTORIES, "distill.kind=guidance", "flow.timestep_distribution=logistic",
        "sample.steps=28",
    ],
    "guidance_image": [
        *NO_TRAJECTORIES, "distill.kind=guidance", "distill.guidance_target=image",
        "data.caption_dropout=0.1", "flow.timestep_distribution=logistic", "sample.steps=28",
    ],
    "mean_flow": [
        *NO_TRAJECTORIES, "distill.kind=mean_flow", "optimizer.frozen=text_embed",
        "sample.solver=mean_flow",
    ],
    "tdm": TDM,
    # After a toy, whose schedule, rate, batches and steps it keeps.
    "tdm_toy": [
        *TDM, "distill.sample.guidance_scale=2", "distill.sample.schedule=uniform",
        "sample.schedule=uniform", "lora.weight_format=none", "lora.dtype=float32",
        "optimizer.learning_rate=5e-4", "data.batch_size=64",
        "optimizer.gradient_accumulation_steps=1", "train.steps=300",
    ],
    "toy": scale_down(quickstart.config(), 5e-4),
    "shapes": scale_down(one_shape.config(), 5e-4),
    "three": scale_down(load_experiment(f"{one_shape.__file__}:three"), 5e-4),
}  # fmt: skip
STEPS = (1, 2, 4, 8, 30)
Images = Float32[np.ndarray, "b height width 3"]
Measure = Callable[[Images], tuple[float, float]]


def config() -> c.Config:
    return c.override(
        finetune.config(),
        [
            "name=few_steps", "init=chroma-radiance-x0.safetensors", "data.batch_size=128",
            "data.caption_dropout=0", "flow.timestep_distribution=uniform",
            "optimizer.learning_rate=1e-5", "optimizer.weight_decay=0",
            "optimizer.gradient_accumulation_steps=2",
            "optimizer.frozen=text_embed,modulation,patch_embed,head",
            "optimizer.ema_decays=0.999", "distill.kind=trajectories", "distill.segments=4",
            "distill.num_trajectories=65536", "distill.sample.steps=12",
            "distill.sample.batch_size=16", "train.steps=5000", "train.validate_every=250",
            "train.sample_every=250", "train.checkpoint_every=250", "sample.steps=4",
            "sample.schedule=uniform", "sample.guidance_scale=1",
        ],
    )  # fmt: skip


def digit_metrics(run: c.Config, num_images: int) -> tuple[list[str], Measure]:
    """Return prompts for digits, and a function that measures their samples.

    It returns FD (random network) from all real digits of the training split, and the fraction of
    samples that the quickstart's classifier assigns to the requested digit.
    """
    extractor, classifier = RandomNetworkExtractor(), quickstart.train_classifier(run)
    source, resolution = open_source(run.data, "train"), run.data.resolution
    real = np.stack(
        [to_array(source.load_image(i), resolution, resolution) for i in range(len(source))]
    )
    real_moments = compute_moments([extractor(real)])
    requested = np.arange(num_images) % 10

    def measure(images: Images) -> tuple[float, float]:
        predicted = classifier.predict(images.mean(axis=-1).reshape(num_images, -1))
        moments = compute_moments([extractor(images)])
        return frechet_distance(moments, real_moments), (predicted == requested).mean()

    return [f"a handwritten {quickstart.DIGIT_NAMES[digit]}" for digit in requested], measure


def shape_metrics(run: c.Config, num_images: int) -> tuple[list[str], Measure]:
    """Return captions of held-out scenes, and a function that measures their samples.

    It returns F1 of the described objects, and the fraction of images that match their caption
    completely, the counted number of objects included.
    """
    source = open_source(run.data, "validation")
    described = [source.attributes(i)["described"] for i in range(num_images)]

    def measure(images: Images) -> tuple[float, float]:
        scores = scoring.score_readings(scoring.read_pixels(images), described)
        return scores.f1, scores.exact

    return [source.captions(i)[0] for i in range(num_images)], measure


def compare(teacher: str, students: list[str], num_images: int = 300) -> None:
    """Print a table row for each run: three numbers for each number of steps.

    These are both metrics of `digit_metrics` or `shape_metrics`, and the root mean square distance
    (of values in [-1, 1]) from the teacher's samples of the same noise in 30 steps. Students, which
    are runs or files, sample without guidance. A sheet RUN.steps.png (RUN.unguided.steps.png for
    students) has a row of samples for each number of steps.
    """
    teacher_run = load(teacher).run
    metrics = shape_metrics if teacher_run.data.source == "shapes" else digit_metrics
    prompts, measure = metrics(teacher_run, num_images)

    def sample(run: str, steps: int) -> Images:
        changes = [f"steps={steps}", *(["guidance_scale=1"] if run != teacher else [])]
        generated = load(run, changes=changes, dtype="float32")(prompts)
        return np.stack([to_array(x.image, *x.image.size) for x in generated])

    target = sample(teacher, STEPS[-1])
    for run in (teacher, *students):
        samples = {steps: sample(run, steps) for steps in STEPS}
        cells = [
            (*measure(images), np.sqrt(np.square(images - target).mean()))
            for images in samples.values()
        ]
        columns = " | ".join(", ".join(f"{value:.3f}" for value in cell) for cell in cells)
        print(f"| {run} | {columns} |", flush=True)
        sheet = make_contact_sheet(
            [to_image(image) for images in samples.values() for image in images[:20]], columns=20
        )
        path = Path(f"{run}{'' if run == teacher else '.unguided'}.steps.png")
        save_png(path, sheet, {"steps": STEPS, "prompts": prompts[:20]})


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2:])
