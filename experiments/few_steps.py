"""Chroma1-Radiance in few steps and without guidance: students of its own trajectories, and the other ways there are.

    radiance train experiments/few_steps.py init=FILE data.path=FOLDER text.file=T5 distill.trajectory_dir=TRAJECTORIES
    radiance convert runs/few_steps flash.safetensors --extract FILE --rank 64 --to peft
    radiance sample FILE --text-encoder T5 --lora flash.safetensors:1.0 --prompt "…" steps=4 schedule=uniform guidance=1

FILE: the published weights, such as chroma-radiance-x0.safetensors. FOLDER: images and captions, of which trajectories read the captions alone.
T5: the encoder of T5 v1.1 XXL. TRAJECTORIES: a folder for them, which all arms that use them may share: 65,536 in four segments are 412 GB at
512 pixels. They are painted first, and painting goes on where it was stopped.

| arm | what is learned |
|---|---|
| (none) | the teacher's guided way in four segments, each made straight: as in the first of Chroma's own trainers for few steps, and PeRFlow (arXiv 2405.07510) |
| reflow | the whole way made straight (arXiv 2209.03003), as Chroma's next trainer |
| one_step | the image from the noise alone, as its third |
| guidance | the guided velocity in one evaluation: the teacher's predictions are extrapolated |
| guidance_image | the same by Chroma's rule: the velocity of each image is, away from the student's own unconditional prediction |
| mean_flow | the mean velocity of any step, whose length the network reads in place of the guidance number (arXiv 2505.13447) |
| toy | digits on a CPU, from the quickstart's model; before another arm (`few_steps.py:toy:reflow`) it makes that one small |
| shapes | the same from experiments/one_shape.py's, whose objects are read exactly |
| three | and from its arm three, in whose images there are objects that no caption describes |

The blocks alone are trained (of mean_flow also the approximator and what is at the image's ends), so that all of the difference fits into a LoRA. In
Chroma's first trainer segments began at real images with noise; here they lie on the teacher's own way, where the student will be. All else is
experiments/finetune.py; the learning rate is a guess. Nothing has been run at full size. The toy, for each SEED:

    make quickstart
    radiance train experiments/few_steps.py:toy distill.trajectory_dir=ways train.seed=SEED name=segments-SEED
    radiance train experiments/few_steps.py:toy:reflow distill.trajectory_dir=ways train.seed=SEED name=reflow-SEED      and so one_step; the others without ways
    radiance convert runs/one_step-0 lora.safetensors --extract runs/quickstart --rank 64 --to peft --dtype fp32
    radiance convert runs/quickstart merged.safetensors --lora lora.safetensors --dtype fp32
    python experiments/few_steps.py runs/quickstart ./runs/quickstart runs/segments-0 runs/reflow-0 … merged.safetensors

The second ./runs/quickstart is the teacher without guidance, as all but the first are. In each cell three numbers are printed, of which two stand below: the
second, the share that is read as asked, says little of digits and of one shape.

Made on 2 CPU cores, shared with other work (2026-11-27, JAX 0.10.2): 1.8 M parameters, 2,048 trajectories in three minutes, 300 steps of a student in three to ten.
In each cell the distance of 300 digits from the real ones (FD of 480 features of a random network: lower is nearer) and how far they are from what
the teacher paints from the same noise in 30 steps (root mean square). Where 3 seeds are told it is the mean of 0 to 2, whose distances lie within 2 %;
the teacher evaluates the network twice a step, for its guidance, and students once.

| | seeds | 1 step | 2 | 4 | 8 | 30 |
|---|---|---|---|---|---|---|
| teacher, guidance 2 | | 3.46, 0.243 | 2.01, 0.136 | 1.51, 0.071 | 1.37, 0.041 | 1.27, 0 |
| teacher without guidance | | 4.21, 0.263 | 1.48, 0.191 | 0.97, 0.186 | 0.86, 0.196 | 0.82, 0.215 |
| segments | 3 | 2.95, 0.204 | 1.83, 0.120 | 1.46, 0.078 | 1.33, 0.062 | 1.22, 0.054 |
| reflow | 3 | 1.47, 0.126 | 1.28, 0.091 | 1.24, 0.079 | 1.21, 0.075 | 1.20, 0.075 |
| one_step | 3 | 1.35, 0.102 | 1.16, 0.121 | 1.24, 0.182 | 1.33, 0.214 | 1.45, 0.248 |
| guidance | 1 | 3.43, 0.234 | 2.01, 0.140 | 1.52, 0.081 | 1.36, 0.059 | 1.25, 0.050 |
| guidance_image | 1 | 3.36, 0.240 | 1.97, 0.151 | 1.42, 0.109 | 1.26, 0.100 | 1.15, 0.104 |
| mean_flow | 1 | 2.07, 0.160 | 1.27, 0.095 | 1.15, 0.076 | 1.21, 0.060 | 1.17, 0.062 |

- One evaluation of one_step is as near to real digits as 16 of the teacher's, and nearer to the teacher's own images than its two steps are. With more
  steps it leaves them, for it was asked at one time alone. Reflow is near at every number of steps: one of its is worth four of the teacher's.
- In four segments nothing is gained at four steps beyond the guidance, that is, half the work: digits are painted nearly straight within a quarter of the
  way as it is. All of it learns the teacher's guided distribution, and not the wider one without guidance, whose distance is least.
- Guidance in one evaluation: by the teacher's predictions students end half as far from its images as by Chroma's rule (0.050 and 0.104),
  whose targets scatter four times as much at guidance 2; Chroma's lies nearer to the real digits.
- mean_flow: by derivatives (`distill.finite_difference=0 compute.attention=chunked`) its loss was 14.6 before the first step and 23.6 after 100, where the
  mean square of a velocity without guidance is at most 2: the network reads 1000·t, and its derivative in t says nothing of a step. By
  differences it is learned, and at four steps it is the nearest of the students. (Measured before errors below epsilon were weighed by the time.)
- **As a LoRA** of rank 64 seed 0 of one_step paints at 1.349, 0.103 in one step, where the weights themselves do at 1.350,
  0.102, and the model without it at 4.21: all of the gain. At rank 16 it is 1.346, 0.110, of segments at rank 64 1.431, 0.077 in four. Biases, which it
  cannot carry, changed by up to 72 %, and are not missed. The file of rank 64, added to the quickstart's model in PyTorch
  (`add_lora`), painted from the same noise what JAX did, to 2e-6; of toys tests/weights/test_torch_export.py shows it.

The classifier of the quickstart reads at least 99 % of them as asked at any number of steps, and of one_step and the teacher without guidance 93 %: digits are
too easy to tell models apart so. The same on `shapes`, whose reader is exact, from experiments/one_shape.py (the same commands with `few_steps.py:shapes`
and runs/one_shape; one core, 300 steps of a student in two to four minutes). In each cell F1 of the objects of 300 held-out captions, and the
distance from the teacher's 30 steps; the mean of the seeds, whose F1 lie within 0.01:

| | seeds | 1 step | 2 | 4 | 8 | 30 |
|---|---|---|---|---|---|---|
| teacher, guidance 2 | | 0.007, 0.077 | 0.672, 0.032 | 0.960, 0.009 | 0.960, 0.005 | 0.960, 0 |
| teacher without guidance | | 0.963, 0.024 | 0.955, 0.019 | 0.946, 0.017 | 0.945, 0.018 | 0.950, 0.018 |
| segments | 3 | 0.000, 0.069 | 0.960, 0.018 | 0.961, 0.012 | 0.958, 0.011 | 0.962, 0.009 |
| reflow | 3 | 0.965, 0.020 | 0.962, 0.014 | 0.961, 0.012 | 0.957, 0.011 | 0.959, 0.009 |
| one_step | 1 | 0.968, 0.017 | 0.948, 0.030 | 0.923, 0.040 | 0.895, 0.048 | 0.820, 0.056 |

At four steps all of segments and reflow keep the F1 of the teacher's 30 (0.958 to 0.963 of 0.960), and reflow does in one, where the guided teacher
paints nothing that can be read. But a caption tells nearly all of an image with one object, so the teacher without guidance does too: that few steps are
enough here is no merit of the students, and what they learn shows in the distance alone.

Of one to three objects a caption counts all and describes what it has room for, so that there is something to decide. From the same commands with
`few_steps.py:three` and runs/one_shape-three (a core of another machine, 2026-11-27; two to three minutes a student), in each cell F1 of the
objects that are described, the share of images that are all as told, as many objects as the caption counts among it (one standard error: 0.03),
and the distance from the teacher's 30 steps; the mean of the seeds, whose shares lie within 0.05:

| | seeds | 1 step | 2 | 4 | 8 | 30 |
|---|---|---|---|---|---|---|
| teacher, guidance 2 | | 0.000, 0.000, 0.130 | 0.780, 0.360, 0.082 | 0.837, 0.543, 0.052 | 0.818, 0.583, 0.035 | 0.810, 0.630, 0 |
| teacher without guidance | | 0.863, 0.430, 0.094 | 0.846, 0.440, 0.079 | 0.813, 0.547, 0.057 | 0.770, 0.580, 0.053 | 0.743, 0.587, 0.058 |
| segments | 3 | 0.005, 0.000, 0.119 | 0.847, 0.442, 0.080 | 0.823, 0.520, 0.059 | 0.809, 0.575, 0.048 | 0.789, 0.597, 0.040 |
| reflow | 3 | 0.849, 0.460, 0.064 | 0.837, 0.525, 0.054 | 0.807, 0.578, 0.050 | 0.788, 0.587, 0.052 | 0.775, 0.585, 0.056 |
| one_step | 3 | 0.851, 0.496, 0.056 | 0.780, 0.481, 0.067 | 0.560, 0.285, 0.116 | 0.340, 0.138, 0.154 | 0.134, 0.036, 0.181 |
| guidance | 2 | 0.000, 0.000, 0.135 | 0.836, 0.415, 0.084 | 0.833, 0.539, 0.056 | 0.813, 0.592, 0.042 | 0.796, 0.615, 0.032 |
| guidance_image | 2 | 0.003, 0.000, 0.135 | 0.845, 0.432, 0.085 | 0.826, 0.533, 0.062 | 0.805, 0.593, 0.051 | 0.792, 0.619, 0.047 |
| mean_flow | 3 | 0.745, 0.298, 0.096 | 0.841, 0.477, 0.072 | 0.810, 0.534, 0.047 | 0.802, 0.571, 0.039 | 0.786, 0.582, 0.041 |

By F1 four steps keep all of the teacher's thirty again (segments 0.823, reflow 0.807, of 0.810), but F1 asks for what is described alone, and that is painted
first. Of the images that are all as told reflow keeps 92 % at four steps (0.578 of 0.630), where the teacher itself in as many, of twice the work,
keeps 86 %, and segments 83 %; in one step one_step keeps 79 %, where the guided teacher has none. Segments that end where a quarter of the way does
gain nothing but the guidance, as with digits. mean_flow is as the teacher with half the work, and in one step not near one_step.
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


def small(run: c.Config, rate: float) -> list[str]:
    """What makes this experiment and its arms those of a student of a small model, trained for minutes on a CPU.

    run: that model's experiment. rate: the learning rate.
    """
    found = differences(finetune.config(), run)
    like = [
        f"{key}={value}"
        for key, (_, value) in found.items()
        if key.split(".")[0] in ("model", "compute", "text", "data")
    ]
    return [
        *like, f"init={run.run_dir}", "data.caption_dropout=0", "data.batch_size=64", "optimizer.gradient_accumulation_steps=1", f"optimizer.learning_rate={rate}",
        "optimizer.warmup_steps=20", "optimizer.lr_schedule=cosine", "optimizer.ema_decays=0.99", "distill.sample.steps=8", "distill.sample.guidance_scale=2",
        "distill.sample.batch_size=64", "distill.num_trajectories=2048", "train.steps=300", "train.log_every=50", "train.validate_every=100",
        "train.sample_every=300", "train.checkpoint_every=100", "sample.batch_size=50", "mesh.data=-1", "mesh.fsdp=1",
    ]  # fmt: skip


NO_TRAJECTORIES = ["distill.segments=1", "distill.trajectory_dir="]
VARIANTS = {
    "reflow": ["distill.segments=1", "flow.timestep_distribution=uniform"],
    "one_step": ["distill.segments=1", "flow.timestep_distribution=pure_noise", "sample.steps=1"],
    "guidance": [*NO_TRAJECTORIES, "distill.kind=guidance", "flow.timestep_distribution=logistic", "sample.steps=28"],
    "guidance_image": [
        *NO_TRAJECTORIES, "distill.kind=guidance", "distill.guidance_target=image", "data.caption_dropout=0.1", "flow.timestep_distribution=logistic", "sample.steps=28",
    ],
    "mean_flow": [*NO_TRAJECTORIES, "distill.kind=mean_flow", "optimizer.frozen=text_embed", "sample.solver=mean_flow"],
    "toy": small(quickstart.config(), 5e-4),
    "shapes": small(one_shape.config(), 5e-4),
    "three": small(load_experiment(f"{one_shape.__file__}:three"), 5e-4),
}  # fmt: skip
STEPS = (1, 2, 4, 8, 30)
Images = Float32[np.ndarray, "b height width 3"]
Measure = Callable[[Images], tuple[float, float]]


def config() -> c.Config:
    return c.override(
        finetune.config(),
        [
            "name=few_steps", "init=chroma-radiance-x0.safetensors", "data.batch_size=128", "data.caption_dropout=0", "flow.timestep_distribution=uniform",
            "optimizer.learning_rate=1e-5", "optimizer.weight_decay=0", "optimizer.gradient_accumulation_steps=2",
            "optimizer.frozen=text_embed,modulation,patch_embed,head", "optimizer.ema_decays=0.999", "distill.kind=trajectories", "distill.segments=4",
            "distill.num_trajectories=65536", "distill.sample.steps=12", "distill.sample.batch_size=16", "train.steps=5000", "train.validate_every=250",
            "train.sample_every=250", "train.checkpoint_every=250", "sample.steps=4", "sample.schedule=uniform", "sample.guidance_scale=1",
        ],
    )  # fmt: skip


def digits(run: c.Config, images: int) -> tuple[list[str], Measure]:
    """Prompts, and of what is painted for them FD(random-network) from all real digits of the training split, and the share that the quickstart's
    classifier reads as asked.
    """
    features, classifier, source = (
        RandomNetworkExtractor(),
        quickstart.reader(run),
        open_source(run.data, "train"),
    )
    real = compute_moments(
        [
            features(
                np.stack(
                    [
                        to_array(source.load_image(i), run.data.resolution, run.data.resolution)
                        for i in range(len(source))
                    ]
                )
            )
        ]
    )
    asked = np.arange(images) % 10

    def measured(found: Images) -> tuple[float, float]:
        read = classifier.predict(found.mean(axis=-1).reshape(images, -1))
        return frechet_distance(compute_moments([features(found)]), real), (read == asked).mean()

    return [f"a handwritten {quickstart.DIGIT_NAMES[digit]}" for digit in asked], measured


def shapes(run: c.Config, images: int) -> tuple[list[str], Measure]:
    """Captions of held-out images, and of what is painted for them F1 of the objects that are told, and the share that is all as told, which needs
    as many objects as the caption counts, whether or not it says more of them.
    """
    source = open_source(run.data, "validation")
    facts = [source.attributes(i)["told"] for i in range(images)]

    def measured(found: Images) -> tuple[float, float]:
        scores = scoring.score_readings(scoring.read_pixels(found), facts)
        return scores.f1, scores.exact

    return [source.captions(i)[0] for i in range(images)], measured


def compare(teacher: str, students: list[str], pictures: int = 300):
    """Prints a row of each run, and in it for each number of steps: both that `digits` or `shapes` measures, as the teacher was taught, and how far the
    images are from what the teacher paints from the same noise in 30 steps (root mean square, of values in [-1, 1]). Students, runs or files, paint
    without guidance. Beside each is written RUN.steps.png, of students RUN.unguided.steps.png: a row of images a number of steps.
    """
    taught = load(teacher).run
    prompts, measured = (shapes if taught.data.source == "shapes" else digits)(taught, pictures)

    def painted(run: str, steps: int) -> Images:
        changes = [f"steps={steps}", *(["guidance=1"] if run != teacher else [])]
        return np.stack(
            [
                to_array(x.image, *x.image.size)
                for x in load(run, changes=changes, dtype="float32")(prompts)
            ]
        )

    aim = painted(teacher, STEPS[-1])
    for run in (teacher, *students):
        found = {steps: painted(run, steps) for steps in STEPS}
        cells = [(*measured(x), np.sqrt(np.square(x - aim).mean())) for x in found.values()]
        print(
            f"| {run} | {' | '.join(', '.join(f'{value:.3f}' for value in cell) for cell in cells)} |",
            flush=True,
        )
        sheet = make_contact_sheet(
            [to_image(image) for images in found.values() for image in images[:20]], columns=20
        )
        save_png(
            Path(f"{run}{'' if run == teacher else '.unguided'}.steps.png"),
            sheet,
            {"steps": STEPS, "prompts": prompts[:20]},
        )


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2:])
