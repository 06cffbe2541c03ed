"""All settings, with their defaults, meanings and limits.

A `Config` is a tree of frozen dataclasses. It is hashable, so it can be a static argument of
`jax.jit`, it is compared by value, and it is checked when it is built. Experiments return one from
`config()`; the command line changes it with `section.key=value`.
"""

from __future__ import annotations

from radiance.base.errors import ConfigError
from radiance.base.settings import (
    Section,
    differences,
    from_dict,
    from_json,
    override,
    resumable_settings,
    to_dict,
    to_json,
)
from radiance.config.compute import Compute
from radiance.config.data import CACHE_DIR, Data, MixtureSource, Shapes
from radiance.config.distill import Distill
from radiance.config.flow import Flow
from radiance.config.lora import WEIGHT_FORMATS, Lora
from radiance.config.mesh import Mesh
from radiance.config.model import MODELS, Model
from radiance.config.optimizer import Optimizer
from radiance.config.run import Config, make_sampling_config
from radiance.config.sample import (
    PRESETS,
    PROMPT_SUITES,
    Preset,
    Sample,
    find_preset_name,
    get_preset,
)
from radiance.config.text import Text
from radiance.config.train import Train

__all__ = [
    "CACHE_DIR",
    "MODELS",
    "PRESETS",
    "PROMPT_SUITES",
    "WEIGHT_FORMATS",
    "Compute",
    "Config",
    "ConfigError",
    "Data",
    "Distill",
    "Flow",
    "Lora",
    "Mesh",
    "MixtureSource",
    "Model",
    "Optimizer",
    "Preset",
    "Sample",
    "Section",
    "Shapes",
    "Text",
    "Train",
    "differences",
    "find_preset_name",
    "from_dict",
    "from_json",
    "get_preset",
    "make_sampling_config",
    "override",
    "resumable_settings",
    "to_dict",
    "to_json",
]
