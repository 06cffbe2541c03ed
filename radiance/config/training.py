"""The method, the optimizer, LoRA, the run, and the devices it is spread over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.sections import Section, require


@dataclass(frozen=True)
class Flow(Section):
    """The method: time 1 is noise, 0 is the picture."""

    # noise: every time is 1, or of a trajectory in segments the first of its segment, which is what one step a segment asks for.
    time_law: Literal["parabola", "logistic", "logit_normal", "uniform", "noise"] = "parabola"
    time_mean: float | None = None  # of logit(t); none: 0 for logit_normal, by resolution for logistic
    time_scale: float = 1.0  # of logit(t)
    time_weight: Literal["none", "uniform", "parabola"] = "none"  # training weighs times as if this law had drawn them
    noise_scale: float = 1.0
    epsilon: float = 0.05  # bounds the division by t in the loss of x0 models
    bound: Literal["add", "clamp"] = "add"  # t + epsilon, or max(t, epsilon)
    velocity_weight: Literal["one", "x0"] = "one"  # of the loss of velocity models; x0: such that it is the loss of x0 models
    # Which noise meets which picture of the batch; within_caption: by optimal transport, but only between pictures of the same caption.
    coupling: Literal["independent", "optimal_transport", "within_caption"] = "independent"
    coupling_cost: Literal["cosine", "euclidean"] = "cosine"
    coupling_captions: float = 0.0  # what a unit of distance between captions adds to the cost (C²OT, arXiv 2503.10636)
    coupling_group: int = 0  # pictures, one after the other, that noise is exchanged between; 0: the whole batch

    def check(self):
        require(self.time_scale > 0, f"flow.time_scale={self.time_scale} must be positive.")
        require(self.noise_scale > 0, f"flow.noise_scale={self.noise_scale} must be positive.")
        require(self.epsilon > 0, f"flow.epsilon={self.epsilon} must be positive: it keeps the loss of x0 models finite at t = 0.")
        require(
            self.time_mean is None or self.time_law in ("logistic", "logit_normal"),
            f"flow.time_mean has no meaning for flow.time_law={self.time_law}: leave it none.",
        )
        require(
            self.time_weight == "none" or self.time_law in ("parabola", "uniform"),
            f"flow.time_weight={self.time_weight} divides by the density of flow.time_law={self.time_law}, which may be near 0: "
            "use parabola or uniform.",
        )
        require(self.coupling_captions >= 0, f"flow.coupling_captions={self.coupling_captions} cannot be negative.")
        require(self.coupling_group >= 0, f"flow.coupling_group={self.coupling_group} cannot be negative (0 for the whole batch).")
        require(
            self.coupling_captions == 0 or self.coupling == "optimal_transport",
            f"flow.coupling_captions has no meaning for flow.coupling={self.coupling}: leave it 0.",
        )
        require(
            self.coupling_group == 0 or self.coupling != "independent",
            "flow.coupling_group has no meaning for flow.coupling=independent: leave it 0.",
        )


WIDEST = 0.288  # relative width of the plain mean, 1 / √12: no growing weight has a larger one


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW (arXiv 1711.05101) or Muon behind a clip, and the averages of the weights."""

    # muon (Jordan et al. 2024): for the matrices of the blocks, every layer by itself, and AdamW for the rest. Its steps are as large as Adam's
    # (arXiv 2502.16982), so that learning rates carry over. Of a LoRA it takes both factors of every matrix, each as a matrix.
    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to 0 at train.steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95  # of Muon's momentum, which is kept in mu_dtype
    weight_decay: float = 0.0  # never on norms, biases, tables and registers
    clip_norm: float = 1.0
    accumulate: int = 1  # parts that a batch is computed in
    frozen: tuple[str, ...] = ()  # parameter paths that start so are not trained, such as "modulation" or "double/image"
    rotate: tuple[int, int] = (0, 0)  # double and single blocks trained at a time, with moments of no more; 0,0 for all
    rotate_every: int = 100  # steps until the next of them; the moments of the optimizer begin anew
    # The first double and the last single blocks are trained, with moments of no more, and those between stay (L2P, arXiv 2605.12013); 0,0 for all.
    edges: tuple[int, int] = (0, 0)
    rates: tuple[str, ...] = ()  # PATH=FACTOR: the learning rate of what starts so is multiplied, as in "head=4"; the longest path counts
    ema: tuple[float, ...] = (0.9999,)  # decays; ramped up as (1 + step) / (10 + step)
    # Relative widths of averages whose weight grows as a power of the step (arXiv 2312.02696), such as 0.05,0.1; snapshots of them (train.snapshot_every)
    # give the average of any other width afterwards.
    ema_widths: tuple[float, ...] = ()
    # What weights and their averages, and Adam's first and second moments are kept in. bfloat16 is rounded up or down at random, in proportion to what lies
    # between: a small change, which rounding to the nearest would lose every time, then arrives on average.
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self):
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive.")
        require(self.accumulate >= 1, f"optimizer.accumulate={self.accumulate} must be at least 1.")
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive (1e9 for none).")
        require(self.warmup_steps >= 0 and self.weight_decay >= 0, "optimizer.warmup_steps and optimizer.weight_decay cannot be negative.")
        for name in ("beta1", "beta2", "muon_beta"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).")
        require(self.rotate_every >= 1, f"optimizer.rotate_every={self.rotate_every} must be at least 1.")
        require(
            all(0 < factor < float("inf") for factor in self.factors.values()),
            f"optimizer.rates={self.rates}: factors are positive numbers (optimizer.frozen names what does not move).",
        )
        require(len(self.factors) == len(self.rates), f"optimizer.rates={self.rates} names a path twice.")
        require(all(0 < d < 1 for d in self.ema), f"optimizer.ema={self.ema}: decays lie between 0 and 1.")
        require(len(set(self.ema)) == len(self.ema), f"optimizer.ema={self.ema} names a decay twice.")
        require(all(0 < w < WIDEST for w in self.ema_widths), f"optimizer.ema_widths={self.ema_widths}: widths lie between 0 and {WIDEST}.")
        require(len(set(self.ema_widths)) == len(self.ema_widths), f"optimizer.ema_widths={self.ema_widths} names a width twice.")

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages that are kept: decays, and width=WIDTH."""
        return (*(str(decay) for decay in self.ema), *(f"width={width}" for width in self.ema_widths))

    @property
    def factors(self) -> dict[str, float]:
        """`rates` by path."""
        found = {}
        for rate in self.rates:
            path, _, factor = rate.rpartition("=")
            try:
                found[path] = float(factor)
            except ValueError:
                path = ""
            require(path != "", f"optimizer.rates={rate!r}: write PATH=FACTOR, such as head=4.")
        return found


@dataclass(frozen=True)
class Lora(Section):
    """Low-rank additions to the blocks' matrices (arXiv 2106.09685), trained in place of the weights that `init` names."""

    rank: int = 0  # 0: the weights themselves are trained
    alpha: float | None = None  # additions are scaled by alpha / rank; none: by 1
    parts: tuple[str, ...] = ("preamble", "double", "single")  # the matrices whose paths start so, such as "single/attention"
    store: Literal["none", "q8_0", "int8", "float8_e4m3fn"] = "none"  # what the matrices that stay are kept in
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights that stay, but for what is stored smaller

    def check(self):
        require(self.rank >= 0, f"lora.rank={self.rank} cannot be negative (0 trains the weights themselves).")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha={self.alpha} must be positive.")
        for part in self.parts:
            require(
                part.split("/")[0] in ("preamble", "double", "single"),
                f"lora.parts={part!r}: only matrices of the blocks are adapted, as in double or single/mlp.",
            )
        require(bool(self.parts), "lora.parts is empty: name what is adapted, such as double,single.")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / max(self.rank, 1)


@dataclass(frozen=True)
class Train(Section):
    """The run."""

    steps: int = 100_000
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1000
    validate_pictures: int = 256
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ()  # none: captions of the validation split
    checkpoint_every: int = 1000
    snapshot_every: int = 5000  # steps between snapshots of the averages of optimizer.ema_widths, which are never removed
    keep: int = 3  # newest checkpoints to keep
    keep_every: int = 0  # also keep every checkpoint at a multiple of this; 0 for none
    skip_limit: int = 20  # non-finite steps in a row that end the run
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where numbers and pictures go beside the run directory
    profile_steps: int = 0  # steps, from the third of this start, that are traced into profile/ for TensorBoard

    def check(self):
        for name in (
            "steps", "log_every", "validate_every", "validate_pictures", "sample_every", "checkpoint_every", "snapshot_every", "keep", "skip_limit",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie between 0 and 2**32 - 1.")
        require(self.keep_every >= 0, "train.keep_every cannot be negative.")
        require(len(set(self.track)) == len(self.track), f"train.track={self.track} names a tracker twice.")


@dataclass(frozen=True)
class Mesh(Section):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # replicas of the weights, each with its part of the batch
    fsdp: int = 1  # weights, optimizer and batch in parts
    tensor: int = 1  # attention heads and MLP channels in parts
    uneven: Literal["whole", "refuse"] = (
        "whole"  # what a parameter does whose axis does not divide: every device has that axis whole, or nothing starts
    )

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh={sizes}: sizes are at least 1, and one of them may be -1.",
        )
