"""Settings of the network, and named models: published ones and sizes for research."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from radiance.base.errors import ConfigError
from radiance.base.settings import (
    MAX_INTEGER,
    Section,
    require,
    require_at_least,
    suggest_name,
)


@dataclass(frozen=True)
class Model(Section):
    """The architecture of the network. The defaults are those of Chroma1-Radiance."""

    channels: int = 3
    """Channels of the image; 64 for packed latents."""
    patch: int = 16
    """Side in pixels of the square that an image token represents; 1 for packed latents."""
    patch_embed: Literal["conv", "conv_half", "bottleneck"] = "conv"
    """conv_half reads every second pixel, as in early models with patch=32; bottleneck has an
    intermediate layer of few channels (JiT, arXiv 2511.13720)."""
    bottleneck: int = 128
    """Channels of the intermediate layer of patch_embed=bottleneck."""
    hidden: int = 3072
    """Width of the residual stream."""
    heads: int = 24
    """Number of attention heads."""
    double_blocks: int = 19
    """Number of blocks with separate weights for text and image."""
    single_blocks: int = 38
    """Number of blocks with shared weights."""
    mlp_ratio: float = 4.0
    """Width of the blocks' MLP, relative to `hidden`."""
    rope_axes: tuple[int, ...] = (16, 56, 56)
    """Channels of a head that are rotated by text index, row and column."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    text_dim: int = 4096
    """Width of the text encoder's output."""
    text_ids: Literal["zero", "sequential"] = "zero"
    """Rotary indices of text tokens."""
    masking: Literal["one_pad", "strict", "off"] = "one_pad"
    """How many padding tokens are attended: one, none or all."""
    padding: Literal["encoder", "learned"] = "encoder"
    """Embedding of padding tokens: the encoder's output, or one learned vector (MiniT2I)."""
    registers: int = 0
    """Learned tokens beside the text, which are always visible."""
    text_refiner_blocks: int = 0
    """Blocks that process text and registers before the blocks that also see the image."""
    modulation: Literal["approximator", "per_block", "shared", "none"] = "approximator"
    """Where the modulation vectors come from: Chroma's approximator, a layer in every block
    (FLUX), layers that all blocks share, or nowhere."""
    approximator_dim: int = 64
    """Width of the embedding of (time, guidance, index); a multiple of 8."""
    approximator_hidden: int = 5120
    """Width of the approximator."""
    approximator_depth: int = 5
    """Layers of the approximator."""
    pooled_dim: int = 0
    """Width of a pooled text vector (FLUX: 768), for modulation per_block and shared; 0: none."""
    guidance_embed: bool = False
    """Embed the guidance scale (FLUX dev). The approximator always does."""
    head: Literal["nerf_conv", "nerf_linear", "linear"] = "nerf_conv"
    """Layers that turn tokens into pixels: a NeRF with a convolution or a linear layer at its
    end, or a linear layer alone."""
    nerf_hidden: int = 64
    """Width of the NeRF."""
    nerf_mlp_ratio: int = 4
    """Width of the NeRF's MLP, relative to `nerf_hidden`."""
    nerf_depth: int = 4
    """Blocks of the NeRF."""
    nerf_freqs: int = 8
    """Cosine frequencies of pixel positions per axis."""
    prediction: Literal["velocity", "x0"] = "velocity"
    """Output of the last layer; the model always returns velocity."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require_at_least(
            self,
            1,
            "channels",
            "patch",
            "bottleneck",
            "hidden",
            "heads",
            "text_dim",
            "approximator_hidden",
            "approximator_depth",
            "nerf_hidden",
            "nerf_mlp_ratio",
            "nerf_depth",
            "nerf_freqs",
        )
        require_at_least(
            self, 0, "double_blocks", "single_blocks", "registers", "text_refiner_blocks",
            "pooled_dim",
        )  # fmt: skip
        self._check_blocks()
        self._check_rope()
        self._check_patches()
        self._check_text_and_modulation()

    def _check_blocks(self):
        require(
            self.double_blocks + self.single_blocks >= 1,
            "model.double_blocks and model.single_blocks are both 0: a model needs at least one "
            "block.",
        )
        require(
            self.hidden % self.heads == 0,
            f"model.hidden={self.hidden} does not divide into model.heads={self.heads} heads: "
            "change one of them.",
        )
        require(
            0 < self.mlp_ratio * self.hidden < MAX_INTEGER
            and abs(self.mlp_ratio * self.hidden - self.mlp_hidden) < 1e-6,
            f"model.mlp_ratio={self.mlp_ratio} times model.hidden={self.hidden} is not a positive "
            "whole number, or too large.",
        )
        require(
            self.approximator_dim % 8 == 0 and self.approximator_dim > 0,
            f"model.approximator_dim={self.approximator_dim} must be a positive multiple of 8.",
        )

    def _check_rope(self):
        require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta} must be positive.")
        require(
            len(self.rope_axes) == 3 and all(a >= 0 and a % 2 == 0 for a in self.rope_axes),
            f"model.rope_axes={self.rope_axes}: three even numbers are needed (text index, row, "
            "column).",
        )
        require(
            sum(self.rope_axes) == self.head_dim,
            f"model.rope_axes={self.rope_axes} add up to {sum(self.rope_axes)}, but a head has "
            f"{self.head_dim} channels (model.hidden / model.heads): make them equal.",
        )

    def _check_patches(self):
        require(
            self.patch_embed != "conv_half" or self.patch % 2 == 0,
            f"model.patch_embed=conv_half needs an even model.patch, not {self.patch}.",
        )
        require(
            self.patch_embed != "bottleneck" or self.patch > 1,
            "model.patch_embed=bottleneck compresses the pixels of a patch, but model.patch is 1: "
            "use model.patch_embed=conv.",
        )
        require(
            self.patch > 1 or self.head == "linear",
            f"model.head={self.head} computes the pixels of a patch, but model.patch is 1: use "
            "model.head=linear.",
        )

    def _check_text_and_modulation(self):
        require(
            self.padding == "encoder" or self.masking != "strict",
            "model.padding=learned replaces padding tokens, but model.masking=strict hides them: "
            "use model.masking=off or one_pad.",
        )
        require(
            self.pooled_dim == 0 or self.modulation in ("per_block", "shared"),
            f"model.pooled_dim={self.pooled_dim} is used only by model.modulation=per_block and "
            f"shared, not {self.modulation}: set it to 0.",
        )
        require(
            not self.guidance_embed or self.modulation in ("per_block", "shared"),
            "model.guidance_embed=true is used only by model.modulation=per_block and shared, not "
            f"{self.modulation}: set it to false.",
        )

    @classmethod
    def from_name(cls, name: str) -> Model:
        """Return a published model or a size for research.

        Raises:
            ConfigError: For an unknown name; the message suggests the nearest one.
        """
        if name not in MODELS:
            raise ConfigError(
                f"There is no model named {name!r}{suggest_name(name, MODELS) or '.'} "
                f"The names are {', '.join(MODELS)}."
            )
        return MODELS[name]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the blocks' MLP."""
        return round(self.hidden * self.mlp_ratio)

    @property
    def num_modulation_vectors(self) -> int:
        """Number of modulation vectors in FLUX's layout.

        A single block has 3, a double block 12, and the output layer 2.
        """
        return 3 * self.single_blocks + 12 * self.double_blocks + 2


_RADIANCE = Model()
_CHROMA = Model(channels=64, patch=1, head="linear")

MODELS: dict[str, Model] = {
    "chroma1-radiance": _RADIANCE,
    "chroma1-radiance-x0": replace(_RADIANCE, prediction="x0"),
    "chroma1-radiance-x0-patch32": replace(
        _RADIANCE, prediction="x0", patch=32, patch_embed="conv_half"
    ),
    "chroma1-base": _CHROMA,
    "flux1-schnell": replace(_CHROMA, modulation="per_block", pooled_dim=768, masking="off"),
    # Sizes for research, with the proportions of the published model: two single blocks per
    # double block, and a tenth of the parameters in the head.
    "nano": Model(
        hidden=256, heads=4, double_blocks=2, single_blocks=4, rope_axes=(8, 28, 28),
        approximator_hidden=256, nerf_hidden=32, nerf_mlp_ratio=2, nerf_depth=2, prediction="x0",
    ),
    "small": Model(
        hidden=768, heads=12, double_blocks=4, single_blocks=7, rope_axes=(8, 28, 28),
        approximator_hidden=768, nerf_hidden=32, nerf_mlp_ratio=4, nerf_depth=2, prediction="x0",
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
