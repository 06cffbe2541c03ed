"""The complete configuration of one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from radiance.base.settings import Section, require, resumable
from radiance.config.compute import Compute
from radiance.config.data import Data
from radiance.config.distill import Distill
from radiance.config.flow import Flow
from radiance.config.lora import Lora
from radiance.config.mesh import Mesh
from radiance.config.model import Model
from radiance.config.optimizer import Optimizer
from radiance.config.sample import Sample, find_preset_name, get_preset
from radiance.config.text import T5_MAX_LENGTH, Text
from radiance.config.train import Train

MAX_NAME_BYTES = 200  # disks allow 255


@dataclass(frozen=True)
class Config(Section):
    """All settings of one run."""

    name: str = resumable("run")
    """Name of the run; the run directory is output/name."""
    output: str = resumable("runs")
    """Folder of run directories."""
    init: str = resumable("")
    """Checkpoint file or run directory of the initial weights; empty: random weights."""
    model: Model = field(default_factory=Model)
    """The network."""
    compute: Compute = resumable(factory=Compute)
    """Numerics, memory and speed."""
    text: Text = field(default_factory=Text)
    """The text encoder."""
    data: Data = field(default_factory=Data)
    """Images and captions."""
    flow: Flow = field(default_factory=Flow)
    """The training objective."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer and averages of the weights."""
    lora: Lora = field(default_factory=Lora)
    """LoRA fine-tuning."""
    distill: Distill = field(default_factory=Distill)
    """Distillation."""
    train: Train = field(default_factory=Train)
    """The training run."""
    sample: Sample = resumable(factory=Sample)
    """Sampling."""
    mesh: Mesh = resumable(factory=Mesh)
    """The device mesh."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        is_folder_name = self.name.isprintable() and not set(self.name) & set("/\\")
        require(
            is_folder_name and self.name not in ("", ".", ".."),
            f"name={self.name!r} must be the name of one folder, without / and \\.",
        )
        require(
            len(self.name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES,
            f"name={self.name[:20]!r}… is longer than {MAX_NAME_BYTES} bytes: choose another.",
        )
        self._check_sizes()
        self._check_batch_size()
        self._check_captions()
        self._check_lora()
        self._check_trained_blocks()
        self._check_masked_text()
        self._check_averages()
        self._check_distillation()

    def _check_sizes(self):
        """Check that images consist of complete patches."""
        sizes = [("resolution", resolution) for resolution in self.data.resolutions]
        for name, size in (*sizes, ("bucket_step", self.data.bucket_step)):
            require(
                size % self.model.patch == 0,
                f"data.{name}={size} is not a multiple of model.patch={self.model.patch}: images "
                "must consist of complete patches.",
            )

    def _check_batch_size(self):
        batch_size, num_microbatches = (
            self.data.batch_size,
            self.optimizer.gradient_accumulation_steps,
        )
        require(
            batch_size % num_microbatches == 0,
            f"data.batch_size={batch_size} does not divide into "
            f"optimizer.gradient_accumulation_steps={num_microbatches} microbatches.",
        )
        group_size = self.flow.coupling_group_size
        require(
            group_size == 0 or batch_size % group_size == 0,
            f"data.batch_size={batch_size} does not divide into groups of "
            f"flow.coupling_group_size={group_size}.",
        )

    def _check_captions(self):
        for source in self.data.sources:
            max_tokens = source.shapes.max_tokens
            require(
                source.source != "shapes" or max_tokens <= self.text.max_length,
                f"data.shapes.max_tokens={max_tokens} gives captions that text.max_length="
                f"{self.text.max_length} would truncate: decrease the former or increase the "
                "latter.",
            )
        # A cache holds captions as they are in the data set; others must be encoded in the run.
        names = ("shuffle_tags", "tag_dropout", "lowercase_probability")
        changes = [f"data.{name}={value}" for name in names if (value := getattr(self.data, name))]
        has_only_cache = bool(self.text.cache) and not self.text.file
        require(
            not (changes and self.text.encoder == "t5" and has_only_cache),
            f"{', '.join(changes)} makes captions that text.cache={self.text.cache} cannot hold: "
            "set text.file to the weights of T5 too, or leave captions unchanged.",
        )

    def _check_lora(self):
        rank = self.lora.rank
        if rank == 0:
            return
        require(
            bool(self.init),
            f"lora.rank={rank} fine-tunes existing weights: set init to a checkpoint file or a "
            "run directory.",
        )
        require(
            not self.optimizer.frozen,
            f"optimizer.frozen={self.optimizer.frozen} has no meaning with lora.rank={rank}: "
            "lora.target_modules names what is trained.",
        )
        for name in ("block_rotation", "edge_blocks"):
            counts = getattr(self.optimizer, name)
            require(
                counts == (0, 0),
                f"optimizer.{name}={counts} has no meaning with lora.rank={rank}: a LoRA is small "
                "enough to be trained completely.",
            )

    def _check_trained_blocks(self):
        optimizer, model = self.optimizer, self.model
        for name in ("block_rotation", "edge_blocks"):
            counts = getattr(optimizer, name)
            for kind, count, num_blocks in zip(
                ("double", "single"), counts, (model.double_blocks, model.single_blocks)
            ):
                remedy = f"a number from 1 to {num_blocks}" if num_blocks else "0"
                require(
                    counts == (0, 0) or min(1, num_blocks) <= count <= num_blocks,
                    f"optimizer.{name}={counts} trains {count} {kind} blocks at a time, and "
                    f"model.{kind}_blocks={num_blocks}: give {remedy}, or 0,0 to train all blocks.",
                )
        require(
            (0, 0) in (optimizer.block_rotation, optimizer.edge_blocks),
            f"optimizer.block_rotation={optimizer.block_rotation} and optimizer.edge_blocks="
            f"{optimizer.edge_blocks} both choose the trained blocks: set only one of them.",
        )

    def _check_masked_text(self):
        """Check that the network has an embedding for texts without any token."""
        masked_settings = {
            "sample.unconditional": self.sample.unconditional,
            "data.dropped_caption": self.data.dropped_caption,
        }
        if self.distill.kind != "none":
            masked_settings["distill.sample.unconditional"] = self.distill.sample.unconditional
        for name, value in masked_settings.items():
            require(
                value != "masked" or self.model.padding == "learned",
                f"{name}=masked leaves no text token, and model.padding={self.model.padding} has "
                "no embedding for that: use model.padding=learned.",
            )

    def _check_averages(self):
        weights, optimizer = self.sample.weights, self.optimizer
        if self.sample.ema_width is not None:
            require(
                bool(optimizer.ema_widths),
                f"sample.weights={weights}, but the run stores no such averages: set "
                "optimizer.ema_widths, such as 0.05,0.1.",
            )
            return
        require(
            weights in ("ema", "params", *(f"ema={decay}" for decay in optimizer.ema_decays)),
            f"sample.weights={weights}, but the averages are optimizer.ema_decays="
            f"{optimizer.ema_decays}: name one of them, ema or params.",
        )

    def _check_distillation(self):
        kind = self.distill.kind
        require(
            self.flow.timestep_distribution != "pure_noise" or kind == "trajectories",
            "flow.timestep_distribution=pure_noise trains only time 1, and distill.kind="
            f"{kind} needs all times: use it with distill.kind=trajectories.",
        )
        if kind == "none":
            return
        require(
            bool(self.teacher) or not (self.distill.needs_teacher or kind == "trajectories"),
            f"distill.kind={kind} needs a teacher: set distill.teacher to a checkpoint file or a "
            "run directory, or init, which the run then starts from too.",
        )
        if kind != "guidance":
            require(
                self.flow.coupling == "independent" and self.flow.timestep_weighting == "none",
                f"distill.kind={kind} has its own pairs and times: leave flow.coupling=independent "
                "and flow.timestep_weighting=none.",
            )
        if not self.distill.reads_images:
            require(
                not self.data.extra_resolutions and not self.data.bucket_step,
                f"distill.kind={kind} supports only squares of data.resolution: do not set "
                "data.extra_resolutions and data.bucket_step.",
            )
        if kind == "trajectories":
            return
        teacher_sample = self.distill.sample
        require(
            teacher_sample.guidance_interval == (0, 1) and teacher_sample.unguided_steps == 0,
            f"distill.kind={kind} learns the same guidance for all times: do not set "
            "distill.sample.guidance_interval and distill.sample.unguided_steps.",
        )
        if kind == "mean_flow":
            self._check_mean_flow()
        if kind == "distribution_matching":
            self._check_distribution_matching()

    def _check_distribution_matching(self):
        require(
            self.lora.rank > 0,
            "distill.kind=distribution_matching trains a LoRA beside the weights of init, its "
            "teacher: set lora.rank, such as 64.",
        )
        require(
            not self.distill.teacher,
            f"distill.teacher={self.distill.teacher} is not used: with "
            "distill.kind=distribution_matching the teacher is init.",
        )

    def _check_mean_flow(self):
        require(
            self.distill.finite_difference > 0 or self.compute.attention in ("xla", "chunked"),
            "distill.finite_difference=0 uses forward-mode differentiation, which "
            f"compute.attention={self.compute.attention} may not support: use xla or chunked.",
        )
        require(
            self.distill.finite_difference > 0 or self.compute.product_dtype == "compute",
            "distill.finite_difference=0 uses forward-mode differentiation, which "
            f"compute.product_dtype={self.compute.product_dtype} does not have: set "
            "distill.finite_difference, or compute.product_dtype=compute.",
        )
        require(
            self.model.modulation == "approximator" or self.model.guidance_embed,
            "distill.kind=mean_flow passes the length of a step through the guidance input, which "
            "this network does not have: use model.guidance_embed=true or "
            "model.modulation=approximator.",
        )

    @property
    def teacher(self) -> str:
        """The run directory or checkpoint file of the teacher."""
        return self.distill.teacher or self.init

    @property
    def is_base_teacher(self) -> bool:
        """Whether the teacher is the base of the LoRA, which is in memory already."""
        return self.distill.needs_teacher and self.lora.rank > 0 and not self.distill.teacher

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.output).expanduser() / self.name


def make_sampling_config(model: Model, name: str = "run", compute: Compute | None = None) -> Config:
    """Return a config that samples a published model with the recommended settings.

    Args:
        model: Its architecture, which determines the preset.
        name: Name of the config.
        compute: Numerics; the defaults when None.
    """
    preset = get_preset(find_preset_name(model))
    return Config(
        name=name,
        model=model,
        compute=compute or Compute(),
        text=Text(encoder="t5", max_length=T5_MAX_LENGTH),
        sample=preset.sample,
        data=Data(resolution=preset.resolution),
    )
