"""The network and how it is run; published models and sizes for research, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from radiance.base.errors import ConfigError
from radiance.base.settings import Section, require, suggest_name


@dataclass(frozen=True)
class Model(Section):
    """The network, and nothing of noise, data or devices. Defaults are Chroma1-Radiance."""

    channels: int = 3  # of the image; 64 for packed latents
    patch: int = 16  # side of the square that one image token stands for; 1 for packed latents
    # conv_half reads every second pixel (the first kind of patch-32 model); bottleneck has few channels on the way (JiT, arXiv 2511.13720)
    patch_embed: Literal["conv", "conv_half", "bottleneck"] = "conv"
    bottleneck: int = 128  # those channels
    hidden: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    mlp_ratio: float = 4.0
    rope_axes: tuple[int, ...] = (
        16,
        56,
        56,
    )  # parts of a head rotated by text index, row and column
    rope_theta: float = 10_000.0
    text_dim: int = 4096  # width of the text encoder's output
    text_ids: Literal["zero", "sequential"] = "zero"  # rotary ids of text tokens
    masking: Literal["one_pad", "strict", "off"] = (
        "one_pad"  # padding tokens that are attended: one, none, all
    )
    padding: Literal["encoder", "learned"] = (
        "encoder"  # what stands at padded text: its output, or one vector (MiniT2I)
    )
    registers: int = 0  # learned tokens beside the text, always visible
    text_refiner_blocks: int = (
        0  # blocks of text and registers alone, before those that see the image
    )
    modulation: Literal["approximator", "per_block", "shared", "none"] = "approximator"
    approximator_dim: int = 64  # width of the embedding of (time, guidance, index)
    approximator_hidden: int = 5120
    approximator_depth: int = 5
    pooled_dim: int = (
        0  # width of a pooled text vector (FLUX: 768); 0 for none. Not for the approximator
    )
    guidance_embed: bool = (
        False  # embed the guidance number (FLUX dev). The approximator always does
    )
    head: Literal["nerf_conv", "nerf_linear", "linear"] = "nerf_conv"
    nerf_hidden: int = 64
    nerf_mlp_ratio: int = 4
    nerf_depth: int = 4
    nerf_freqs: int = 8  # cosine frequencies per axis
    prediction: Literal["velocity", "x0"] = (
        "velocity"  # what the last layer puts out; the model always returns velocity
    )

    def check(self):
        for name in (
            "channels", "patch", "bottleneck", "hidden", "heads", "text_dim", "approximator_hidden", "approximator_depth",
            "nerf_hidden", "nerf_mlp_ratio", "nerf_depth", "nerf_freqs",
        ):  # fmt: skip
            require(
                getattr(self, name) >= 1,
                f"model.{name} is {getattr(self, name)}: it must be at least 1.",
            )
        for name in (
            "double_blocks",
            "single_blocks",
            "registers",
            "text_refiner_blocks",
            "pooled_dim",
        ):
            require(
                getattr(self, name) >= 0,
                f"model.{name} is {getattr(self, name)}: it cannot be negative.",
            )
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
        require(
            self.mlp_ratio > 0 and self.rope_theta > 0,
            "model.mlp_ratio and model.rope_theta must be positive.",
        )
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
    def from_name(cls, name: str) -> Model:
        """A published model, or one of the sizes for research. Raises ConfigError with the nearest name."""
        if name not in MODELS:
            raise ConfigError(
                f"There is no model named {name!r}{suggest_name(name, MODELS) or '.'} The names are {', '.join(MODELS)}."
            )
        return MODELS[name]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return round(self.hidden * self.mlp_ratio)

    @property
    def num_modulation_vectors(self) -> int:
        """Number of modulation vectors (FLUX's layout: 3 a single block, 12 a double block, 2 for the output)."""
        return 3 * self.single_blocks + 12 * self.double_blocks + 2


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
