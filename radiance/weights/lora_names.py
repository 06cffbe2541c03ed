"""The names of tensors in LoRA files: the weight that a tensor changes, and its role in the change.

Trainers write one name in many spellings. `single_blocks.0.linear1` with a down matrix is
`diffusion_model.single_blocks.0.linear1.lora_A.weight` (ai-toolkit, diffusion-pipe),
`base_model.model.single_blocks.0.linear1.lora_A.default.weight` (PEFT),
`lora_unet_single_blocks_0_linear1.lora_down.weight` (kohya),
`lycoris_single_blocks_0_linear1.lora_down.weight` (LyCORIS), and more.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from radiance import config
from radiance.weights import diffusers, native
from radiance.weights.detect import MARKERS

# Wrappers of PyTorch, PEFT, ComfyUI, diffusers, kohya, OneTrainer and LyCORIS, in any order.
MODULE_PREFIXES = (
    "module.",
    "base_model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "net.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
)
# Tensors of adapters → their role, with or without .weight at the end.
_TENSORS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora_mid": "mid",
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "lora_magnitude_vector": "output_magnitude",
    "dora_scale": "magnitude",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "bias_diff",
    "b_norm": "bias_diff",
    "set_weight": "set",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")},
    **{name: name for name in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2")},
}
# Kinds of adapters that are not supported, by the names of their tensors.
UNSUPPORTED_KINDS = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_R"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), "GLoRA"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), "VeRA"),
    "lora_E": "AdaLoRA",
    "ia3_l": "IA3",
    "hra_u": "HRA",
    "reshape_weight": "LoRA with more inputs",
}
KNOWN_TENSORS = {
    name: {"": role, "weight": role, **({"bias": "bias_up"} if role == "up" else {})}
    for name, role in {**_TENSORS, **{name: name for name in UNSUPPORTED_KINDS}}.items()
}
COMPLETE_TENSORS = {"weight": "set", "scale": "set", "bias": "bias_set"}
NAMED_IN_PEFT = {*KNOWN_TENSORS, "modules_to_save"}  # the name of the adapter may follow
# Names of wrappers of layers in diffusers, PEFT and PyTorch, which may be within a module's name.
WRAPPERS = (
    "processor",
    "base_layer",
    "modules_to_save",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
# XLabs' names of a LoRA in the processors of FLUX's blocks.
XLABS_MODULES = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}
# diffusers' names of FLUX's modules, which Chroma does not have: native pattern, replacement.
FLUX_MODULES = (
    (r"double_blocks\.(\d+)\.img_mod\.lin", r"transformer_blocks.\1.norm1.linear"),
    (r"double_blocks\.(\d+)\.txt_mod\.lin", r"transformer_blocks.\1.norm1_context.linear"),
    (r"single_blocks\.(\d+)\.modulation\.lin", r"single_transformer_blocks.\1.norm.linear"),
    (r"time_in\.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    (r"time_in\.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    (r"guidance_in\.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    (r"guidance_in\.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    (r"vector_in\.in_layer", "time_text_embed.text_embedder.linear_1"),
    (r"vector_in\.out_layer", "time_text_embed.text_embedder.linear_2"),
)
# What tensors outside this model are for, by patterns of their names.
FOREIGN_PARTS = (
    (
        r"^((base_model\.|model\.)*(lora_(prior_)?te\d?[_.]|te\d?\.|text_encoders?[_.\d]|text_model\.|"
        r"clip_[lgh]\.|t5xxl\.|conditioner\.|cond_stage_model\.))",
        "text encoders",
    ),
    (r"^(bundle_emb|emb_params|string_to_param|clip_[lgh]$|t5(xxl)?$|\*$)", "embeddings"),
    (r"^(lora_vae|vae\.|first_stage_model\.)", "autoencoders"),
)
MAX_PREFIXES = 8
OTHER_MODULES = "modules that this model does not have"
UNKNOWN_TENSORS = "no known part of a LoRA"


class TensorName(NamedTuple):
    """The name of a tensor in a LoRA file, in its parts."""

    module: str  # without prefixes, in the file's spelling: transformer_blocks.0.attn.to_q
    role: str  # its role in the change of the module: down, up, alpha, bias_diff, …


class Target(NamedTuple):
    """A native weight, or a range of its rows."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The range of rows."""
        return slice(self.start, self.stop)


def parse_name(key: str) -> TensorName | None:
    """Return the parts of a tensor's name; None if it is in no scheme of LoRA files."""
    parts = key.split(".")
    kind = parts.pop() if parts[-1] in COMPLETE_TENSORS else ""
    if parts[-2:-1] and parts[-2] in NAMED_IN_PEFT and parts[-1] not in KNOWN_TENSORS:
        parts.pop()  # the name of the adapter
    last = parts[-1] if parts else ""
    if last in KNOWN_TENSORS and kind in KNOWN_TENSORS[last]:
        role = KNOWN_TENSORS[last][kind]
        parts.pop()
        if parts[-1:] == ["lora"]:  # X.lora.lora_A
            parts.pop()
    elif last in ("down", "up") and kind == "weight":
        role = last
        parts = _strip_lora_suffix(parts[:-1])
    elif kind and last not in KNOWN_TENSORS:
        role = COMPLETE_TENSORS[kind]
    else:
        return None
    if parts[-1:] == ["bias"] and role in ("diff", "set"):  # X.bias.diff, X.bias.set_weight
        parts.pop()
        role = f"bias_{role}"
    module = strip_prefixes(".".join(part for part in parts if part not in WRAPPERS))
    return TensorName(module, role) if module else None


def is_complete_tensor(key: str) -> bool:
    """Return True for a name as in a checkpoint: a weight, a scale or a bias itself."""
    *parents, kind = key.split(".")
    name = parse_name(key)
    return (
        name is not None
        and name.role == COMPLETE_TENSORS.get(kind)
        and (parents[-1] not in KNOWN_TENSORS)
    )


def _strip_lora_suffix(parts: list[str]) -> list[str]:
    """Return the module of `X.lora.down`, `X.to_q_lora.down` or XLabs' `X.qkv_lora1.down`."""
    *parents, last = parts or [""]
    if last in XLABS_MODULES:
        return [*parents, *XLABS_MODULES[last].split(".")]
    if last in ("lora", "lora_linear_layer"):
        return parents
    return [*parents, last.removesuffix("_lora")]


def strip_prefixes(module: str) -> str:
    """Return a module's name without the names of the wrappers that it was trained in."""
    for _ in range(MAX_PREFIXES):
        prefix = next((p for p in MODULE_PREFIXES if module.startswith(p)), "")
        module = module.removeprefix(prefix)
    return module


def describe_foreign(key: str) -> str:
    """Describe what a tensor that belongs to no module of the model is for."""
    default = UNKNOWN_TENSORS if parse_name(key) is None else OTHER_MODULES
    return find_foreign_part(key) or default


def find_foreign_part(key: str) -> str | None:
    """Return what other network a tensor is for by its name alone, such as a text encoder."""
    return next((part for pattern, part in FOREIGN_PARTS if re.match(pattern, key)), None)


def list_targets(model: config.Model) -> dict[str, Target]:
    """Return the weight that each name of a module stands for.

    The names are native names and those of diffusers, with _ in place of ., as kohya writes them.
    diffusers has several modules for some native matrices: each is a range of rows.
    """
    targets = {}
    for name, shape in native.native_layout(model)[0].items():
        if name in MARKERS or name.endswith(".bias"):
            continue
        for spelling, start, stop in _list_spellings(name, shape, model):
            targets[spelling.replace(".", "_")] = Target(name, start, stop)
    return targets


def _list_spellings(
    name: str, shape: tuple[int, ...], model: config.Model
) -> Iterator[tuple[str, int, int]]:
    """Yield the names of a tensor's module, each with the range of rows that it stands for."""
    try:
        slices = diffusers.locate_diffusers_slices(name, shape, model)
    except KeyError:  # diffusers has no such module
        slices = {}
    for diffusers_name, (rows, _) in slices.items():
        module = diffusers_name.removesuffix(".weight")
        yield module, rows.start, rows.stop
        if module.endswith(".to_out.0"):
            yield module.removesuffix(".0"), rows.start, rows.stop
    for spelling in {name, name.removesuffix(".scale").removesuffix(".weight")}:
        yield spelling, 0, shape[0]
    for pattern, replacement in FLUX_MODULES:
        if match := re.fullmatch(pattern, name.removesuffix(".weight")):
            yield match.expand(replacement), 0, shape[0]
    if name.endswith(".linear1.weight"):  # ComfyUI's name of queries, keys and values
        yield name.removesuffix(".weight") + "_qkv", 0, 3 * model.hidden
