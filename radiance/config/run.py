"""The configuration of one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from radiance.base.settings import Section, require
from radiance.config.compute import Compute
from radiance.config.data import Data
from radiance.config.distill import Distill
from radiance.config.flow import Flow
from radiance.config.lora import Lora
from radiance.config.mesh import Mesh
from radiance.config.model import Model
from radiance.config.optimizer import Optimizer
from radiance.config.sample import Sample
from radiance.config.text import Text
from radiance.config.train import Train


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
    distill: Distill = field(default_factory=Distill)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    mesh: Mesh = field(default_factory=Mesh)

    def check(self):
        require(
            self.name != "" and "/" not in self.name,
            f"name={self.name!r} must be the name of one folder.",
        )
        for resolution in self.data.resolutions:
            require(
                resolution % self.model.patch == 0,
                f"data.resolution={resolution} is not a multiple of model.patch={self.model.patch}: images must divide into whole patches.",
            )
        require(
            self.data.bucket_step % self.model.patch == 0,
            f"data.bucket_step={self.data.bucket_step} is not a multiple of model.patch={self.model.patch}: images must divide into whole patches.",
        )
        require(
            self.data.batch_size % self.optimizer.gradient_accumulation_steps == 0,
            f"data.batch_size={self.data.batch_size} does not divide into optimizer.gradient_accumulation_steps={self.optimizer.gradient_accumulation_steps} parts.",
        )
        require(
            self.flow.coupling_group_size == 0
            or self.data.batch_size % self.flow.coupling_group_size == 0,
            f"data.batch_size={self.data.batch_size} does not divide into groups of flow.coupling_group_size={self.flow.coupling_group_size}.",
        )
        for source in self.data.sources:
            require(
                source.source != "shapes" or source.shapes.max_tokens <= self.text.max_length,
                f"data.shapes.max_tokens={source.shapes.max_tokens} gives captions that text.max_length={self.text.max_length} would cut: lower the one or raise the other.",
            )
        caption_changes = {
            name: getattr(self.data, name) for name in ("shuffle_tags", "tag_dropout", "lowercase_probability")
        }
        description = ", ".join(
            f"data.{name}={value}" for name, value in caption_changes.items() if value
        )
        require(
            not (
                description and self.text.encoder == "t5" and self.text.cache and not self.text.file
            ),
            f"{description} makes captions that text.cache={self.text.cache} cannot hold: give text.file, T5's weights, too, or leave captions as they are.",
        )
        require(
            self.lora.rank == 0 or bool(self.init),
            f"lora.rank={self.lora.rank} trains additions to weights that are there already: give init=FILE or a run.",
        )
        require(
            self.lora.rank == 0 or not self.optimizer.frozen,
            f"optimizer.frozen={self.optimizer.frozen} has no meaning with lora.rank={self.lora.rank}: lora.target_modules says what is trained.",
        )
        for name, counts in (
            ("rotate", self.optimizer.block_rotation),
            ("edges", self.optimizer.edge_blocks),
        ):
            for kind, count, blocks in zip(
                ("double", "single"), counts, (self.model.double_blocks, self.model.single_blocks)
            ):
                require(
                    counts == (0, 0) or min(1, blocks) <= count <= blocks,
                    f"optimizer.{name}={counts} trains {count} {kind} blocks at a time, and model.{kind}_blocks={blocks}: "
                    f"{f'give a number from 1 to {blocks}' if blocks else 'give 0'}, or 0,0 to train all blocks.",
                )
            require(
                self.lora.rank == 0 or counts == (0, 0),
                f"optimizer.{name}={counts} has no meaning with lora.rank={self.lora.rank}: a LoRA is small enough to be trained whole.",
            )
        require(
            (0, 0) in (self.optimizer.block_rotation, self.optimizer.edge_blocks),
            f"optimizer.block_rotation={self.optimizer.block_rotation} and optimizer.edge_blocks={self.optimizer.edge_blocks} both say which blocks are trained: leave one out.",
        )
        require(
            self.sample.unconditional == "negative" or self.model.padding == "learned",
            f"sample.unconditional=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            self.data.dropped_caption == "empty" or self.model.padding == "learned",
            f"data.dropped_caption=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            self.sample.ema_width is None or bool(self.optimizer.ema_widths),
            f"sample.weights={self.sample.weights}, but the run keeps no such averages: it needs optimizer.ema_widths, such as 0.05,0.1.",
        )
        require(
            self.sample.ema_width is not None
            or self.sample.weights
            in ("ema", "params", *(f"ema={decay}" for decay in self.optimizer.ema_decays)),
            f"sample.weights={self.sample.weights}, but the averages are optimizer.ema_decays={self.optimizer.ema_decays}: name one of them, ema or params.",
        )
        self._check_distillation()

    def _check_distillation(self):
        kind = self.distill.kind
        require(
            self.flow.timestep_distribution != "pure_noise" or kind == "trajectories",
            f"flow.timestep_distribution=pure_noise teaches no time but 1, and distill.kind={kind} needs all of them: it is for distill.kind=trajectories.",
        )
        if kind == "none":
            return
        require(
            bool(self.teacher) or not (self.distill.needs_teacher or kind == "trajectories"),
            f"distill.kind={kind} learns from a teacher: give distill.teacher=FILE_OR_RUN, or init, to start from it too.",
        )
        require(
            kind == "guidance"
            or (self.flow.coupling == "independent" and self.flow.timestep_weighting == "none"),
            f"distill.kind={kind} brings pairs and times of its own: leave flow.coupling=independent and flow.timestep_weighting=none.",
        )
        teacher_sample = self.distill.sample
        require(
            kind == "trajectories"
            or (teacher_sample.guidance_interval == (0, 1) and teacher_sample.unguided_steps == 0),
            f"distill.kind={kind} learns one guidance for all times: leave distill.sample.guidance_interval and unguided_steps out.",
        )
        require(
            teacher_sample.unconditional == "negative" or self.model.padding == "learned",
            f"distill.sample.unconditional=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            kind != "trajectories"
            or (not self.data.extra_resolutions and not self.data.bucket_step),
            "distill.kind=trajectories has squares of data.resolution alone: leave data.extra_resolutions and data.bucket_step out.",
        )
        require(
            kind != "mean_flow"
            or self.distill.finite_difference > 0
            or self.compute.attention in ("xla", "chunked"),
            f"distill.finite_difference=0 differentiates forwards, which compute.attention={self.compute.attention} may not: use xla or pieces.",
        )
        require(
            kind != "mean_flow"
            or self.model.modulation == "approximator"
            or self.model.guidance_embed,
            "distill.kind=mean_flow tells the network a step's length in place of the guidance number, which this one does not read: use "
            "model.guidance_embed=true or model.modulation=approximator.",
        )

    @property
    def teacher(self) -> str:
        """The run directory or file that `distill` learns from."""
        return self.distill.teacher or self.init

    @property
    def is_base_teacher(self) -> bool:
        """Whether the teacher of every step is what a LoRA adds to, which is in memory already."""
        return self.distill.needs_teacher and self.lora.rank > 0 and not self.distill.teacher

    @property
    def run_dir(self) -> Path:
        return Path(self.output).expanduser() / self.name
