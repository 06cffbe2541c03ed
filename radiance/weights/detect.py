"""Detect the model in a file by the names and shapes of its native tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights.heads import infer_head
from radiance.weights.names import strip_prefix
from radiance.weights.native_rules import count_blocks
from radiance.weights.tensors import TensorShapes

MODEL_KEY = "radiance.model"  # of the metadata
# Empty tensors by which readers recognize a variant, and the setting that each determines.
MARKERS = {"__x0__": "prediction", "__32x32__": "patch", "__sequential__": "text_ids"}
SIGNATURE_TENSOR = "txt_in.weight"  # every checkpoint with native names has it
LORA_DESCRIPTION = "a LoRA: give it as --lora, or merge it with radiance convert --lora"
# Substrings of tensor names, and the kind of file that contains them.
OTHER_FILE_KINDS = (
    *((name, LORA_DESCRIPTION) for name in ("lora_", ".lora.", "_lora.", "hada_w", "lokr_w")),
    (
        "dec_net.",
        "a Zeta-Chroma checkpoint: Chroma's successor uses another network (Z-Image), which is not "
        "supported",
    ),
    ("double_stream_modulation_img.", "a FLUX.2 checkpoint, which is another network"),
    ("SelfAttention.q.", "a T5 text encoder: give it as --text-encoder"),
    ("enc.blk.0.", "a T5 text encoder: give it as --text-encoder"),
    ("decoder.conv_in.", "an autoencoder: give it as --autoencoder"),
    ("text_model.encoder.layers.", "a CLIP text encoder, which Chroma does not read"),
    ("vision_model.encoder.layers.", "a CLIP image encoder"),
    ("self_attn.q_proj.", "a language model"),
    ("controlnet_blocks.", "a ControlNet"),
    ("img_mod.1.", "a Qwen-Image checkpoint, which is another network"),
    ("cap_embedder.", "a checkpoint of Lumina or Z-Image, which is another network"),
    ("individual_token_refiner.", "a Hunyuan checkpoint, which is another network"),
    ("cross_attn.norm_k.", "a Wan checkpoint, which is another network"),
    ("exp_avg", "the state of an optimizer"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint, which is another network"),
    ("input_blocks.", "a Stable Diffusion checkpoint, which is another network"),
    ("transformer_blocks.", "a transformer in the layout of diffusers, but not Chroma's"),
)
MAX_PLAUSIBLE_DEPTH = 64  # blocks; metadata with more must come with as many tensors


def model_markers(model: config.Model) -> list[str]:
    """Return the markers of a model."""
    flags = (
        model.prediction == "x0",
        model.patch == 32 or model.patch_embed == "conv_half",
        model.text_ids == "sequential",
    )
    return [name for name, is_set in zip(MARKERS, flags) if is_set]


def check_shapes(expected: TensorShapes, actual: TensorShapes, origin: object):
    """Check that tensors are those of a model; markers are optional.

    Args:
        expected: Shapes by name.
        actual: Shapes by name, in the file.
        origin: The file that errors name.

    Raises:
        CheckpointError: If there are differences, all of which are named.
    """
    expected, actual = (
        {n: s for n, s in shapes.items() if n not in MARKERS} for shapes in (expected, actual)
    )
    problems = []
    if missing_names := [n for n in expected if n not in actual]:
        problems.append(f"missing {', '.join(missing_names)}")
    if extra_names := [n for n in actual if n not in expected]:
        problems.append(f"not expected {', '.join(extra_names)}")
    if mismatches := [
        f"{n} is {list(actual[n])}, not {list(expected[n])}"
        for n in expected
        if n in actual and actual[n] != expected[n]
    ]:
        problems.append(f"of another shape: {'; '.join(mismatches)}")
    if problems:
        raise CheckpointError(f"{origin} does not hold this model: {'. '.join(problems)}.")


def canonical_names(
    keys: Mapping[str, object], origin: object = "The checkpoint"
) -> dict[str, str]:
    """Return the key in the file for every native name.

    Prefixes are removed, and `.weight` of norms, as newer tools call it, becomes `.scale`. Markers
    may lack the prefix of the other names.

    Args:
        keys: The keys of a file.
        origin: The file that errors name.

    Raises:
        CheckpointError: If two keys have the same native name, or names have several prefixes.
    """
    names: dict[str, str] = {name: name for name in MARKERS if name in keys}
    for name, key in strip_prefix(keys, (SIGNATURE_TENSOR,), origin).items():
        *parents, last = name.split(".")
        is_norm = parents and (parents[-1].endswith("norm") or parents[-2:-1] == ["norms"])
        if last == "weight" and is_norm:
            name = name.removesuffix("weight") + "scale"
        if names.get(name, key) != key:
            raise CheckpointError(
                f"The tensors {names[name]} and {key} are both {name}: the file contains more than "
                f"one model."
            )
        names[name] = key
    return names


def check_architecture(shapes: TensorShapes, origin: object):
    """Check that a file is a checkpoint of a supported architecture.

    Args:
        shapes: Shapes by native name.
        origin: The file that errors name.

    Raises:
        CheckpointError: If it is not, with the kind of file that it seems to be.
    """
    has_blocks = any(n.startswith(("double_blocks.0.", "single_blocks.0.")) for n in shapes)
    is_flux2 = any(n.startswith("double_stream_modulation_img.") for n in shapes)
    if SIGNATURE_TENSOR in shapes and has_blocks and not is_flux2:
        return
    for pattern, description in OTHER_FILE_KINDS:
        if any(pattern in name for name in shapes):
            raise CheckpointError(f"{origin} is {description}.")
    raise CheckpointError(
        f"{origin} is not a Chroma, Radiance or FLUX checkpoint: it has no txt_in.weight or no "
        f"blocks."
    )


def detect_model(
    shapes: TensorShapes,
    metadata: Mapping[str, str] | None = None,
    origin: object = "The checkpoint",
    **known_fields,
) -> config.Model:
    """Return the model of a file, from the metadata of our exports or from its tensors.

    Args:
        shapes: Shapes by native name.
        metadata: Metadata of the file.
        origin: The file that errors name.
        **known_fields: Fields of the model that shapes do not determine (rope_axes, rope_theta,
            patch, …).

    Raises:
        CheckpointError: If the tensors are not those of a Chroma, Radiance or FLUX model.
    """
    if metadata and MODEL_KEY in metadata:
        return _parse_model(metadata[MODEL_KEY], len(shapes), origin, known_fields)
    check_architecture(shapes, origin)
    try:
        return _infer_model(shapes, known_fields)
    except KeyError as error:
        raise CheckpointError(
            f"{origin} looks like a Chroma checkpoint, but has no {error.args[0]}: the file is "
            f"incomplete."
        ) from None
    except config.ConfigError as error:
        raise CheckpointError(
            f"{origin} has tensors whose sizes do not make a model. {error}"
        ) from None
    except (ValueError, IndexError, ArithmeticError):  # a tensor with more, fewer or empty axes
        raise CheckpointError(
            f"{origin} has the names of a Chroma checkpoint, but its tensors are of other kinds "
            f"(quantized?)."
        ) from None


def _parse_model(
    text: str, num_tensors: int, origin: object, known_fields: Mapping[str, Any]
) -> config.Model:
    """Return the model that the metadata of our exports describe."""
    try:
        model = replace(config.from_json(config.Model, text), **known_fields)
    # Numbers without end overflow, and lists without end exceed the recursion limit.
    except (ValueError, OverflowError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"{origin} describes its model in a way that this version does not know: {reason}."
        ) from None
    # The layout of a model is made block by block, which must not take forever.
    depths = (
        model.text_refiner_blocks,
        model.double_blocks,
        model.single_blocks,
        model.approximator_depth,
        model.nerf_depth,
    )
    if max(depths) > max(num_tensors, MAX_PLAUSIBLE_DEPTH):
        raise CheckpointError(
            f"{origin} describes a model that is deeper than its {num_tensors} tensors allow: it "
            f"is damaged."
        )
    return model


def _infer_model(shapes: TensorShapes, known_fields: dict[str, Any]) -> config.Model:
    """Return the model whose native tensors have these shapes."""
    fields = {
        **_infer_trunk(shapes, known_fields),
        **_infer_modulation(shapes),
        **_infer_input(shapes, known_fields),
        **({"head": "linear"} if _is_latent(shapes) else infer_head(shapes)),
    }
    return config.Model(**(fields | known_fields))


def _is_latent(shapes: TensorShapes) -> bool:
    """Return True for models of latents, whose input is a linear layer."""
    return "img_in.weight" in shapes


def _infer_trunk(shapes: TensorShapes, known_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return widths and depths of the blocks, and the settings that markers determine."""
    num_double_blocks = count_blocks(shapes, "double_blocks.{i}.img_attn.qkv.weight")
    hidden, text_dim = shapes["txt_in.weight"]
    if num_double_blocks:
        head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        mlp_dim = shapes["double_blocks.0.img_mlp.0.weight"][0]
    else:  # linear1 is queries, keys and values, then the MLP
        head_dim = shapes["single_blocks.0.norm.query_norm.scale"][0]
        mlp_dim = shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
    if head_dim != 128 and "rope_axes" not in known_fields:
        raise config.ConfigError(
            f"Heads of {head_dim} channels are in no published model, and the file does not give "
            f"their rotary axes."
        )
    fields = {
        "hidden": hidden,
        "text_dim": text_dim,
        "heads": hidden // head_dim,
        "double_blocks": num_double_blocks,
        "single_blocks": count_blocks(shapes, "single_blocks.{i}.linear1.weight"),
        "text_refiner_blocks": count_blocks(shapes, "text_blocks.{i}.txt_attn.qkv.weight"),
        "mlp_ratio": mlp_dim / hidden,
        "rope_axes": (16, 56, 56),
        "text_ids": "sequential" if "__sequential__" in shapes else "zero",
        "prediction": "x0" if "__x0__" in shapes else "velocity",
        "registers": shapes.get("registers", (0,))[0],
    }
    if "txt_padding" in shapes:
        fields |= {"padding": "learned", "masking": "off"}
    return fields


def _infer_modulation(shapes: TensorShapes) -> dict[str, Any]:
    """Return the kind of modulation and its settings."""
    if "distilled_guidance_layer.in_proj.weight" in shapes:
        approximator_hidden, approximator_dim = shapes["distilled_guidance_layer.in_proj.weight"]
        return {
            "approximator_hidden": approximator_hidden,
            "approximator_dim": approximator_dim,
            "approximator_depth": count_blocks(
                shapes, "distilled_guidance_layer.layers.{i}.in_layer.weight"
            ),
        }
    if "final_layer.modulation_offset" in shapes:
        return {"modulation": "none"}
    return {
        "modulation": "per_block",
        "masking": "off",
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        "pooled_dim": shapes.get("vector_in.in_layer.weight", (0, 0))[1],
    }


def _infer_input(shapes: TensorShapes, known_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return channels, patch size and patch embedding."""
    if _is_latent(shapes):
        return {"patch": 1, "channels": shapes["img_in.weight"][1]}
    bottleneck_shape = shapes.get("img_in_bottleneck.in_layer.weight")
    _, channels, kernel_size, _ = bottleneck_shape or shapes["img_in_patch.weight"]
    patch = 32 if "__32x32__" in shapes and kernel_size == 16 else kernel_size
    patch = known_fields.get("patch", patch)
    fields = {
        "channels": channels,
        "patch": patch,
        "patch_embed": "conv" if patch == kernel_size else "conv_half",
    }
    if bottleneck_shape:
        fields |= {"patch_embed": "bottleneck", "bottleneck": bottleneck_shape[0]}
    return fields
