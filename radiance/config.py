"""Every setting of the project, with its default, its meaning and its limits.

A `Config` is a tree of frozen dataclasses: hashable (so it can be a static argument of `jax.jit`), compared by value, and
checked when it is built. Experiments return one from `config()`; the command line changes it with `section.key=value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from radiance.sections import ConfigError, Section, differences, from_dict, from_json, meant, override, require, to_dict, to_json

__all__ = [
    "Compute", "Config", "ConfigError", "Data", "Flow", "Lora", "MODELS", "Mesh", "Model", "Optimizer", "PRESETS", "Preset", "Sample", "Section", "Text", "Train",
    "differences", "from_dict", "from_json", "override", "preset", "preset_for", "to_dict", "to_json",
]  # fmt: skip


@dataclass(frozen=True)
class Model(Section):
    """The network, and nothing of noise, data or devices. Defaults are Chroma1-Radiance."""

    channels: int = 3  # of the picture; 64 for packed latents
    patch: int = 16  # side of the square that one image token stands for; 1 for packed latents
    # conv_half reads every second pixel (the first kind of patch-32 model); bottleneck has few channels on the way (JiT, arXiv 2511.13720)
    patch_embed: Literal["conv", "conv_half", "bottleneck"] = "conv"
    bottleneck: int = 128  # those channels
    hidden: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    mlp_ratio: float = 4.0
    rope_axes: tuple[int, ...] = (16, 56, 56)  # parts of a head rotated by text index, row and column
    rope_theta: float = 10_000.0
    text_dim: int = 4096  # width of the text encoder's output
    text_ids: Literal["zero", "sequential"] = "zero"  # rotary ids of text tokens
    masking: Literal["one_pad", "strict", "off"] = "one_pad"  # padding tokens that are attended: one, none, all
    padding: Literal["encoder", "learned"] = "encoder"  # what stands at padded text: its output, or one vector (MiniT2I)
    registers: int = 0  # learned tokens beside the text, always visible
    text_preamble: int = 0  # blocks of text and registers alone, before those that see the picture
    modulation: Literal["approximator", "per_block", "shared", "none"] = "approximator"
    approximator_dim: int = 64  # width of the embedding of (time, guidance, index)
    approximator_hidden: int = 5120
    approximator_depth: int = 5
    pooled_dim: int = 0  # width of a pooled text vector (FLUX: 768); 0 for none. Not for the approximator
    guidance_embed: bool = False  # embed the guidance number (FLUX dev). The approximator always does
    head: Literal["nerf_conv", "nerf_linear", "linear"] = "nerf_conv"
    nerf_hidden: int = 64
    nerf_mlp_ratio: int = 4
    nerf_depth: int = 4
    nerf_freqs: int = 8  # cosine frequencies per axis
    prediction: Literal["velocity", "x0"] = "velocity"  # what the last layer puts out; the model always returns velocity

    def check(self):
        for name in (
            "channels", "patch", "bottleneck", "hidden", "heads", "text_dim", "approximator_hidden", "approximator_depth",
            "nerf_hidden", "nerf_mlp_ratio", "nerf_depth", "nerf_freqs",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}: it must be at least 1.")
        for name in ("double_blocks", "single_blocks", "registers", "text_preamble", "pooled_dim"):
            require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}: it cannot be negative.")
        require(
            self.double_blocks + self.single_blocks >= 1,
            "model.double_blocks and model.single_blocks are both 0: a model needs at least one block.",
        )
        require(
            self.hidden % self.heads == 0,
            f"model.hidden={self.hidden} does not divide into model.heads={self.heads} heads: change one of them.",
        )
        require(
            len(self.rope_axes) == 3 and all(a >= 0 and a % 2 == 0 for a in self.rope_axes),
            f"model.rope_axes={self.rope_axes}: three even numbers are needed (text index, row, column).",
        )
        require(
            sum(self.rope_axes) == self.head_dim,
            f"model.rope_axes={self.rope_axes} add up to {sum(self.rope_axes)}, but a head has {self.head_dim} channels (model.hidden / model.heads): make them equal.",
        )
        require(self.mlp_ratio > 0 and self.rope_theta > 0, "model.mlp_ratio and model.rope_theta must be positive.")
        require(
            abs(self.mlp_ratio * self.hidden - self.mlp_hidden) < 1e-6,
            f"model.mlp_ratio={self.mlp_ratio} times model.hidden={self.hidden} is not a whole number.",
        )
        require(
            self.approximator_dim % 8 == 0 and self.approximator_dim > 0,
            f"model.approximator_dim={self.approximator_dim} must be a positive multiple of 8.",
        )
        require(
            self.patch_embed != "conv_half" or self.patch % 2 == 0,
            f"model.patch_embed=conv_half needs an even model.patch, not {self.patch}.",
        )
        require(
            self.patch_embed != "bottleneck" or self.patch > 1,
            "model.patch_embed=bottleneck presses the pixels of a patch together, but model.patch is 1: use model.patch_embed=conv.",
        )
        require(
            self.padding == "encoder" or self.masking != "strict",
            "model.padding=learned fills padded text, and model.masking=strict shows none of it: use model.masking=off or one_pad.",
        )
        require(
            self.patch > 1 or self.head == "linear",
            f"model.head={self.head} paints the pixels of a patch, but model.patch is 1: use model.head=linear.",
        )
        require(
            self.pooled_dim == 0 or self.modulation in ("per_block", "shared"),
            f"model.pooled_dim={self.pooled_dim} is read only by modulation per_block and shared, not {self.modulation}: set it to 0.",
        )
        require(
            not self.guidance_embed or self.modulation in ("per_block", "shared"),
            f"model.guidance_embed is for modulation per_block and shared; {self.modulation} does not use it: set it to false.",
        )

    @classmethod
    def named(cls, name: str) -> Model:
        """A published model, or one of the sizes for research. Raises ConfigError with the nearest name."""
        if name not in MODELS:
            raise ConfigError(f"There is no model named {name!r}{meant(name, MODELS) or '.'} The names are {', '.join(MODELS)}.")
        return MODELS[name]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return round(self.hidden * self.mlp_ratio)

    @property
    def vectors(self) -> int:
        """Number of modulation vectors (FLUX's layout: 3 a single block, 12 a double block, 2 for the output)."""
        return 3 * self.single_blocks + 12 * self.double_blocks + 2


@dataclass(frozen=True)
class Compute(Section):
    """How the network is run. Changes speed, memory and rounding, never what is computed."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products and activations; parameters are float32
    # auto takes the fastest for the device; pieces needs memory that grows with the tokens and not with their square
    attention: Literal["auto", "xla", "pieces", "cudnn", "splash"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass recomputes: nothing, each block, all but its matrix products
    head_tile: int = 512  # tokens of a picture that the NeRF head paints at a time; 0 for all at once

    def check(self):
        require(self.head_tile >= 0, f"compute.head_tile={self.head_tile}: give a number of tokens, or 0 for all at once.")


@dataclass(frozen=True)
class Text(Section):
    """The text encoder."""

    encoder: Literal["hash", "t5"] = "hash"
    length: int = 64  # longest caption in tokens, end-of-sequence included; T5 models use 512
    file: str = ""  # T5's weights: safetensors (a file, an index or a folder) or GGUF
    tokenizer: str = ""  # spiece.model or tokenizer.json; empty: found beside the weights
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of T5's weights and activations
    cache: str = ""  # folder of an embedding cache (`radiance encode`), which is read instead of encoding

    def check(self):
        require(self.length >= 2, f"text.length={self.length}: captions need room for a word and the end of the sequence, so at least 2.")
        require(self.encoder == "t5" or not self.file, f"text.file={self.file} is for text.encoder=t5: set that too.")


@dataclass(frozen=True)
class Data(Section):
    """Pictures and captions, and the batches made of them."""

    source: Literal["digits", "folder"] = "digits"
    path: str = ""  # of source=folder: a folder of pictures with captions, its subfolders included
    validation: float = 0.05  # of source=folder: share of the pictures that are held out, chosen by their names
    directory: str = "~/.cache/radiance"  # where prepared data sets are kept
    side: int = 512  # pictures are squares of this many pixels
    batch: int = 256  # pictures a step, over all devices and hosts
    crop: Literal["centre", "random"] = "centre"  # what is kept of a picture that is no square
    mirror: float = 0.0  # share of the pictures that are mirrored; never one whose caption says left or right
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels
    broken_limit: float = 0.1  # share of the pictures that may turn out broken before the run stops
    caption_dropout: float = 0.1  # share of captions that are left out, for guidance
    dropout_to: Literal["empty", "masked"] = "empty"  # what stands in their place: the empty prompt, or no text token at all
    tag_shuffle: bool = False  # of captions that are lists of tags: in a new order each time
    tag_drop: float = 0.0  # the largest share of a caption's tags that is left out
    lower: float = 0.0  # share of captions put in lower case
    prefix: str = ""  # before every caption that is not dropped, such as "a painting of "
    suffix: str = ""
    threads: int = 4  # readers ahead of the trainer

    def check(self):
        require(self.side >= 1 and self.batch >= 1 and self.threads >= 1, "data.side, data.batch and data.threads must be at least 1.")
        for name in ("mirror", "broken_limit", "caption_dropout", "tag_drop", "lower"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}={getattr(self, name)} must lie between 0 and 1.")
        require(all(0 <= c <= 255 for c in self.background), f"data.background={self.background}: three numbers from 0 to 255 are needed.")
        require(0 < self.validation < 1, f"data.validation={self.validation} must lie between 0 and 1: it is a share of the pictures.")
        require(self.source == "folder" or not self.path, f"data.path={self.path} is for data.source=folder: set that too.")


@dataclass(frozen=True)
class Flow(Section):
    """The method: time 1 is noise, 0 is the picture."""

    time_law: Literal["parabola", "logistic", "logit_normal", "uniform"] = "parabola"
    time_mean: float | None = None  # of logit(t); none: 0 for logit_normal, by resolution for logistic
    time_scale: float = 1.0  # of logit(t)
    noise_scale: float = 1.0
    epsilon: float = 0.05  # bounds the division by t in the loss of x0 models
    bound: Literal["add", "clamp"] = "add"  # t + epsilon, or max(t, epsilon)
    coupling: Literal["independent", "optimal_transport"] = "independent"  # which noise meets which picture of the batch
    coupling_cost: Literal["cosine", "euclidean"] = "cosine"

    def check(self):
        require(self.time_scale > 0, f"flow.time_scale={self.time_scale} must be positive.")
        require(self.noise_scale > 0, f"flow.noise_scale={self.noise_scale} must be positive.")
        require(self.epsilon > 0, f"flow.epsilon={self.epsilon} must be positive: it keeps the loss of x0 models finite at t = 0.")
        require(
            self.time_mean is None or self.time_law in ("logistic", "logit_normal"),
            f"flow.time_mean has no meaning for flow.time_law={self.time_law}: leave it none.",
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
                part.startswith(("preamble", "double", "single")),
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
class Sample(Section):
    """How pictures are made from a trained model."""

    solver: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    steps: int = 30
    schedule: Literal["uniform", "shifted", "beta"] = "uniform"
    shift: float | None = None  # log of the factor of schedule=shifted; none: by resolution, as FLUX does
    beta: tuple[float, float] = (0.4, 0.4)  # parameters of schedule=beta
    guidance: float = 3.5  # 1 is none
    negative: str = ""
    unconditional: Literal["negative", "masked"] = "negative"  # what guidance leads away from: that prompt, or no text token at all
    unguided_steps: int = 0  # first steps without guidance
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times with guidance
    guidance_rescale: float = 0.0  # 0 none, 1 the spread of the conditional prediction (arXiv 2305.08891)
    floor: float = 0.0  # of x0 models: x_t − x̂ is divided by the time, but by no less than this
    weights: str = "ema"  # ema (the largest decay), ema=DECAY, width=WIDTH (optimizer.ema_widths), or params
    batch: int = 8  # pictures at a time

    @classmethod
    def named(cls, name: str) -> Sample:
        """The recommended settings of a published model. Raises ConfigError with the nearest name."""
        return preset(name).sample

    def check(self):
        require(self.steps >= 1, f"sample.steps={self.steps} must be at least 1.")
        require(self.batch >= 1, f"sample.batch={self.batch} must be at least 1.")
        require(self.guidance >= 0, f"sample.guidance={self.guidance} cannot be negative.")
        require(all(b > 0 for b in self.beta), f"sample.beta={self.beta}: both numbers must be positive.")
        low, high = self.guidance_interval
        require(0 <= low <= high <= 1, f"sample.guidance_interval={self.guidance_interval} must be two rising times between 0 and 1.")
        require(0 <= self.floor < 1, f"sample.floor={self.floor} must lie between 0 and 1: it is a time.")
        require(
            self.unconditional == "negative" or not self.negative,
            f"sample.negative={self.negative!r} is not read with sample.unconditional=masked: leave one of them out.",
        )
        require(0 <= self.guidance_rescale <= 1, f"sample.guidance_rescale={self.guidance_rescale} must lie between 0 and 1.")
        require(
            self.weights in ("params", "ema") or self.weights.startswith("ema=") or self.width is not None,
            f"sample.weights={self.weights!r}: say params, ema, ema=DECAY or width=WIDTH, a width between 0 and {WIDEST}.",
        )

    @property
    def width(self) -> float | None:
        """The relative width of the average that `weights` names, if it names one so."""
        name, _, number = self.weights.partition("=")
        try:
            width = float(number) if name == "width" else None
        except ValueError:
            return None
        return width if width is not None and 0 < width < WIDEST else None


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


@dataclass(frozen=True)
class Config(Section):
    """One run."""

    name: str = "run"
    output: str = "runs"  # the run directory is output/name
    init: str = ""  # a checkpoint file or a run directory to start the weights from
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    text: Text = field(default_factory=Text)
    data: Data = field(default_factory=Data)
    flow: Flow = field(default_factory=Flow)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    mesh: Mesh = field(default_factory=Mesh)

    def check(self):
        require(self.name != "" and "/" not in self.name, f"name={self.name!r} must be the name of one folder.")
        require(
            self.data.side % self.model.patch == 0,
            f"data.side={self.data.side} is not a multiple of model.patch={self.model.patch}: pictures must divide into whole patches.",
        )
        require(
            self.data.batch % self.optimizer.accumulate == 0,
            f"data.batch={self.data.batch} does not divide into optimizer.accumulate={self.optimizer.accumulate} parts.",
        )
        changed = {name: getattr(self.data, name) for name in ("tag_shuffle", "tag_drop", "lower", "prefix", "suffix")}
        told = ", ".join(f"data.{name}={value}" for name, value in changed.items() if value)
        require(
            not (told and self.text.encoder == "t5" and self.text.cache and not self.text.file),
            f"{told} makes captions that text.cache={self.text.cache} cannot hold: give text.file, T5's weights, too, or leave captions as they are.",
        )
        require(
            self.lora.rank == 0 or bool(self.init),
            f"lora.rank={self.lora.rank} trains additions to weights that are there already: give init=FILE or a run.",
        )
        require(
            self.lora.rank == 0 or not self.optimizer.frozen,
            f"optimizer.frozen={self.optimizer.frozen} has no meaning with lora.rank={self.lora.rank}: lora.parts says what is trained.",
        )
        for kind, count, blocks in zip(("double", "single"), self.optimizer.rotate, (self.model.double_blocks, self.model.single_blocks)):
            require(
                self.optimizer.rotate == (0, 0) or min(1, blocks) <= count <= blocks,
                f"optimizer.rotate={self.optimizer.rotate} trains {count} {kind} blocks at a time, and model.{kind}_blocks={blocks}: "
                f"{f'give a number from 1 to {blocks}' if blocks else 'give 0'}, or 0,0 to train all blocks.",
            )
        require(
            self.sample.unconditional == "negative" or self.model.padding == "learned",
            f"sample.unconditional=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            self.data.dropout_to == "empty" or self.model.padding == "learned",
            f"data.dropout_to=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            self.lora.rank == 0 or self.optimizer.rotate == (0, 0),
            f"optimizer.rotate={self.optimizer.rotate} has no meaning with lora.rank={self.lora.rank}: a LoRA is small enough to be trained whole.",
        )
        require(
            self.sample.width is None or bool(self.optimizer.ema_widths),
            f"sample.weights={self.sample.weights}, but the run keeps no such averages: it needs optimizer.ema_widths, such as 0.05,0.1.",
        )
        require(
            self.sample.width is not None or self.sample.weights in ("ema", "params", *(f"ema={decay}" for decay in self.optimizer.ema)),
            f"sample.weights={self.sample.weights}, but the averages are optimizer.ema={self.optimizer.ema}: name one of them, ema or params.",
        )

    @property
    def directory(self) -> Path:
        return Path(self.output).expanduser() / self.name


# --- named models -----------------------------------------------------------------------------------------------------

_RADIANCE = Model()
_CHROMA = Model(channels=64, patch=1, head="linear")

MODELS: dict[str, Model] = {
    "chroma1-radiance": _RADIANCE,
    "chroma1-radiance-x0": replace(_RADIANCE, prediction="x0"),
    "chroma1-radiance-x0-patch32": replace(_RADIANCE, prediction="x0", patch=32, patch_embed="conv_half"),
    "chroma1-base": _CHROMA,
    "flux1-schnell": replace(_CHROMA, modulation="per_block", pooled_dim=768, masking="off"),
    # For research, with the proportions of the published model: two single blocks a double block, a head of a tenth of the whole.
    "nano": Model(
        hidden=256, heads=4, double_blocks=2, single_blocks=4, rope_axes=(8, 28, 28), approximator_hidden=256,
        nerf_hidden=32, nerf_mlp_ratio=2, nerf_depth=2, prediction="x0",
    ),
    "small": Model(
        hidden=768, heads=12, double_blocks=4, single_blocks=7, rope_axes=(8, 28, 28), approximator_hidden=768,
        nerf_hidden=32, nerf_mlp_ratio=4, nerf_depth=2, prediction="x0",
    ),
    "medium": Model(
        hidden=1536, heads=12, double_blocks=5, single_blocks=10, approximator_hidden=1536,
        nerf_hidden=64, nerf_mlp_ratio=2, nerf_depth=2, prediction="x0",
    ),
    "large": Model(
        hidden=2304, heads=18, double_blocks=7, single_blocks=14, approximator_hidden=2304,
        nerf_hidden=64, nerf_mlp_ratio=2, nerf_depth=3, prediction="x0",
    ),
}  # fmt: skip


# --- how the published models are sampled -----------------------------------------------------------------------------


class Preset(NamedTuple):
    sample: Sample
    side: int  # of the pictures it was made for, in pixels


_BETA = Sample(schedule="beta", beta=(0.4, 0.4))
PRESETS: dict[str, Preset] = {
    "radiance": Preset(Sample(steps=28, guidance=4.0, schedule="shifted"), 512),  # the schedule it was trained with
    "radiance-x0": Preset(replace(_BETA, steps=30, guidance=3.5), 1024),  # the authors' ComfyUI template
    "radiance-x0-patch32": Preset(replace(_BETA, steps=30, guidance=3.5), 1024),
    "chroma-base": Preset(replace(_BETA, steps=26, guidance=4.0), 512),  # its users' guide
    "chroma-hd": Preset(replace(_BETA, steps=26, guidance=4.0), 1024),
    "chroma-flash": Preset(Sample(solver="heun", steps=8, guidance=1.0), 1024),  # distilled: no guidance
}


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}{meant(name, PRESETS) or '.'} The presets are {', '.join(PRESETS)}.")
    return PRESETS[name]


def preset_for(model: Model) -> str:
    """The name of the settings that suit a published model best, as far as its sizes tell."""
    if model.patch == 1:
        return "chroma-hd"
    if model.prediction == "velocity":
        return "radiance"
    return "radiance-x0" if model.patch == 16 else "radiance-x0-patch32"
