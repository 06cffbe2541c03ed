"""Every setting of the project, with its default, its meaning and its limits.

A `Config` is a tree of frozen dataclasses: hashable (so it can be a static argument of `jax.jit`), compared by value, and
checked when it is built. Experiments return one from `config()`; the command line changes it with `section.key=value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from radiance.config.data import Data, Part, Shapes, Text
from radiance.config.distillation import Distill
from radiance.config.network import MODELS, Compute, Model
from radiance.config.sampling import PRESETS, Preset, Sample, preset, preset_for
from radiance.config.training import Flow, Lora, Mesh, Optimizer, Train
from radiance.sections import ConfigError, Section, differences, from_dict, from_json, override, require, to_dict, to_json

__all__ = [
    "Compute", "Config", "ConfigError", "Data", "Distill", "Flow", "Lora", "MODELS", "Mesh", "Model", "Optimizer", "PRESETS", "Part", "Preset", "Sample", "Section", "Shapes", "Text", "Train",
    "differences", "from_dict", "from_json", "override", "preset", "preset_for", "to_dict", "to_json",
]  # fmt: skip


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
        require(self.name != "" and "/" not in self.name, f"name={self.name!r} must be the name of one folder.")
        for side in self.data.sides:
            require(
                side % self.model.patch == 0,
                f"data.side={side} is not a multiple of model.patch={self.model.patch}: pictures must divide into whole patches.",
            )
        require(
            self.data.bucket_step % self.model.patch == 0,
            f"data.bucket_step={self.data.bucket_step} is not a multiple of model.patch={self.model.patch}: pictures must divide into whole patches.",
        )
        require(
            self.data.batch % self.optimizer.accumulate == 0,
            f"data.batch={self.data.batch} does not divide into optimizer.accumulate={self.optimizer.accumulate} parts.",
        )
        require(
            self.flow.coupling_group == 0 or self.data.batch % self.flow.coupling_group == 0,
            f"data.batch={self.data.batch} does not divide into groups of flow.coupling_group={self.flow.coupling_group}.",
        )
        for part in self.data.parts:
            require(
                part.source != "shapes" or part.shapes.limit <= self.text.length,
                f"data.shapes.limit={part.shapes.limit} gives captions that text.length={self.text.length} would cut: lower the one or raise the other.",
            )
        changed = {name: getattr(self.data, name) for name in ("tag_shuffle", "tag_drop", "lower")}
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
        for name, counts in (("rotate", self.optimizer.rotate), ("edges", self.optimizer.edges)):
            for kind, count, blocks in zip(("double", "single"), counts, (self.model.double_blocks, self.model.single_blocks)):
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
            (0, 0) in (self.optimizer.rotate, self.optimizer.edges),
            f"optimizer.rotate={self.optimizer.rotate} and optimizer.edges={self.optimizer.edges} both say which blocks are trained: leave one out.",
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
            self.sample.width is None or bool(self.optimizer.ema_widths),
            f"sample.weights={self.sample.weights}, but the run keeps no such averages: it needs optimizer.ema_widths, such as 0.05,0.1.",
        )
        require(
            self.sample.width is not None or self.sample.weights in ("ema", "params", *(f"ema={decay}" for decay in self.optimizer.ema)),
            f"sample.weights={self.sample.weights}, but the averages are optimizer.ema={self.optimizer.ema}: name one of them, ema or params.",
        )
        self._check_distillation()

    def _check_distillation(self):
        kind = self.distill.kind
        require(
            self.flow.time_law != "noise" or kind == "trajectories",
            f"flow.time_law=noise teaches no time but 1, and distill.kind={kind} needs all of them: it is for distill.kind=trajectories.",
        )
        if kind == "none":
            return
        require(
            bool(self.teacher) or not (self.distill.needs_teacher or kind == "trajectories"),
            f"distill.kind={kind} learns from a teacher: give distill.teacher=FILE_OR_RUN, or init, to start from it too.",
        )
        require(
            kind == "guidance" or (self.flow.coupling == "independent" and self.flow.time_weight == "none"),
            f"distill.kind={kind} brings pairs and times of its own: leave flow.coupling=independent and flow.time_weight=none.",
        )
        guided = self.distill.sample
        require(
            kind == "trajectories" or (guided.guidance_interval == (0, 1) and guided.unguided_steps == 0),
            f"distill.kind={kind} learns one guidance for all times: leave distill.sample.guidance_interval and unguided_steps out.",
        )
        require(
            guided.unconditional == "negative" or self.model.padding == "learned",
            f"distill.sample.unconditional=masked leaves no text token, and model.padding={self.model.padding} has nothing to put there: use padding=learned.",
        )
        require(
            kind != "trajectories" or (not self.data.other_sides and not self.data.bucket_step),
            "distill.kind=trajectories has squares of data.side alone: leave data.other_sides and data.bucket_step out.",
        )
        require(
            kind != "mean_flow" or self.distill.difference > 0 or self.compute.attention in ("xla", "pieces"),
            f"distill.difference=0 differentiates forwards, which compute.attention={self.compute.attention} may not: use xla or pieces.",
        )
        require(
            kind != "mean_flow" or self.model.modulation == "approximator" or self.model.guidance_embed,
            "distill.kind=mean_flow tells the network a step's length in place of the guidance number, which this one does not read: use "
            "model.guidance_embed=true or model.modulation=approximator.",
        )

    @property
    def teacher(self) -> str:
        """The run directory or file that `distill` learns from."""
        return self.distill.teacher or self.init

    @property
    def base_teaches(self) -> bool:
        """Whether the teacher of every step is what a LoRA adds to, which is in memory already."""
        return self.distill.needs_teacher and self.lora.rank > 0 and not self.distill.teacher

    @property
    def directory(self) -> Path:
        return Path(self.output).expanduser() / self.name
