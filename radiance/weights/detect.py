"""Which model a file holds, by the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights.tensors import TensorShapes

MODEL_KEY = "radiance.model"
# Empty tensors by which readers know the variant, and the setting that each stands for.
MARKERS = {"__x0__": "prediction", "__32x32__": "patch", "__sequential__": "text_ids"}
KEY_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "params.")
# Tensors that give away what else a file may be.
OTHER_FILE_KINDS = (
    (
        "dec_net.",
        "a Zeta-Chroma checkpoint: Chroma's successor on another network (Z-Image), which this version does not run",
    ),
    ("SelfAttention.q.", "a T5 text encoder: give it as --text-encoder"),
    ("enc.blk.0.", "a T5 text encoder: give it as --text-encoder"),
    ("decoder.conv_in.", "an autoencoder: give it as --autoencoder"),
    ("lora_", "a LoRA: give it as --lora, or merge it with radiance convert --lora"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint, which is another network"),
    ("input_blocks.", "a Stable Diffusion checkpoint, which is another network"),
    ("transformer_blocks.", "a transformer in the layout of diffusers, but not Chroma's"),
)


def model_markers(model: config.Model) -> list[str]:
    """The markers of a model."""
    flags = (
        model.prediction == "x0",
        model.patch == 32 or model.patch_embed == "conv_half",
        model.text_ids == "sequential",
    )
    return [name for name, is_set in zip(MARKERS, flags) if is_set]


def check_shapes(expected: TensorShapes, actual: TensorShapes, origin: object):
    """Raises one CheckpointError that names every difference; markers may be there or not."""
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


def canonical_names(keys: Mapping[str, object]) -> dict[str, str]:
    """Native name → key in the file: known prefixes are taken off, and norms that newer tools call `.weight` are `.scale`."""
    prefix = next((p for p in KEY_PREFIXES if any(k.startswith(p) for k in keys)), "")
    names = {}
    for key in keys:
        if not key.startswith(prefix) and key not in MARKERS:
            continue
        name = key.removeprefix(prefix)
        components = name.split(".")
        if (
            len(components) > 1
            and components[-1] == "weight"
            and (components[-2].endswith("norm") or components[-3:-2] == ["norms"])
        ):
            name = name.removesuffix("weight") + "scale"
        if name in names:
            raise CheckpointError(
                f"The tensors {names[name]} and {key} are both {name}: the file holds more than one model."
            )
        names[name] = key
    return names


def check_architecture(shapes: TensorShapes, origin: object):
    """Raises CheckpointError that says what else the file is, when its names are not those of a Chroma, Radiance or FLUX model."""
    if "txt_in.weight" in shapes and any(
        n.startswith(("double_blocks.0.", "single_blocks.0.")) for n in shapes
    ):
        return
    for pattern, description in OTHER_FILE_KINDS:
        if any(pattern in name for name in shapes):
            raise CheckpointError(f"{origin} is {description}.")
    raise CheckpointError(
        f"{origin} is not a Chroma, Radiance or FLUX checkpoint: it has no txt_in.weight or no blocks."
    )


def detect_model(
    shapes: TensorShapes,
    metadata: Mapping[str, str] | None = None,
    origin: object = "The checkpoint",
    **known_fields,
) -> config.Model:
    """The model whose native tensors have these names and shapes.

    Our own exports say it in their metadata. `known` gives fields that shapes cannot tell (rope_axes, rope_theta, patch, …).
    Raises CheckpointError when the tensors are not those of a Chroma, Radiance or FLUX model.
    """
    if MODEL_KEY in (metadata or {}):
        try:
            model = replace(config.from_json(config.Model, metadata[MODEL_KEY]), **known_fields)
        except (
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:  # numbers without end, lists without end
            reason = str(error).rstrip(".")
            raise CheckpointError(
                f"{origin} describes its model in a way this version does not know: {reason}."
            ) from None
        # Before the model is laid out, block by block.
        depths = (
            model.text_refiner_blocks,
            model.double_blocks,
            model.single_blocks,
            model.approximator_depth,
            model.nerf_depth,
        )
        if max(depths) > max(len(shapes), 64):
            raise CheckpointError(
                f"{origin} describes a model that is deeper than its {len(shapes)} tensors can be: it is damaged."
            )
        return model
    check_architecture(shapes, origin)
    try:
        return _infer_model(shapes, known_fields)
    except KeyError as error:
        raise CheckpointError(
            f"{origin} looks like a Chroma checkpoint, but has no {error.args[0]}: the file is not whole."
        ) from None
    except config.ConfigError as error:
        raise CheckpointError(
            f"{origin}: the sizes of its tensors do not make a model. {error}"
        ) from None
    except (ValueError, IndexError, ArithmeticError):  # a tensor with more, fewer or empty axes
        raise CheckpointError(
            f"{origin} has the names of a Chroma checkpoint, but its tensors are of other kinds (quantized?)."
        ) from None


def _infer_model(shapes: TensorShapes, known_fields: Mapping) -> config.Model:
    def count_blocks(pattern: str) -> int:
        return next(i for i in range(len(shapes) + 1) if pattern.format(i=i) not in shapes)

    num_double_blocks, num_single_blocks = (
        count_blocks("double_blocks.{i}.img_attn.qkv.weight"),
        count_blocks("single_blocks.{i}.linear1.weight"),
    )
    hidden, text_dim = shapes["txt_in.weight"]
    norm_prefix = "double_blocks.0.img_attn.norm" if num_double_blocks else "single_blocks.0.norm"
    head_dim = shapes[f"{norm_prefix}.query_norm.scale"][0]
    mlp_dim = (
        shapes["double_blocks.0.img_mlp.0.weight"][0]
        if num_double_blocks
        else shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
    )
    if head_dim != 128 and "rope_axes" not in known_fields:
        raise config.ConfigError(
            f"Heads of {head_dim} channels are in no published model, and the file does not say how they are rotated."
        )
    fields = dict(
        hidden=hidden, text_dim=text_dim, heads=hidden // head_dim, double_blocks=num_double_blocks, single_blocks=num_single_blocks,
        mlp_ratio=mlp_dim / hidden, rope_axes=(16, 56, 56), text_ids="sequential" if "__sequential__" in shapes else "zero",
        prediction="x0" if "__x0__" in shapes else "velocity", registers=shapes.get("registers", (0,))[0],
        text_refiner_blocks=count_blocks("text_blocks.{i}.txt_attn.qkv.weight"),
    )  # fmt: skip
    if "txt_padding" in shapes:
        fields |= dict(padding="learned", masking="off")

    if "distilled_guidance_layer.in_proj.weight" in shapes:
        approximator_hidden, approximator_dim = shapes["distilled_guidance_layer.in_proj.weight"]
        depth = count_blocks("distilled_guidance_layer.layers.{i}.in_layer.weight")
        fields |= dict(
            approximator_hidden=approximator_hidden,
            approximator_dim=approximator_dim,
            approximator_depth=depth,
        )
    elif "final_layer.modulation_offset" in shapes:
        fields["modulation"] = "none"
    else:
        fields |= dict(
            modulation="per_block", masking="off", guidance_embed="guidance_in.in_layer.weight" in shapes,
            pooled_dim=shapes.get("vector_in.in_layer.weight", (0, 0))[1],
        )  # fmt: skip

    if "img_in.weight" in shapes:
        return config.Model(
            **(
                fields
                | dict(patch=1, head="linear", channels=shapes["img_in.weight"][1])
                | known_fields
            )
        )
    bottleneck_shape = shapes.get("img_in_bottleneck.in_layer.weight")
    _, channels, kernel_size, _ = bottleneck_shape or shapes["img_in_patch.weight"]
    patch = known_fields.get(
        "patch", 32 if "__32x32__" in shapes and kernel_size == 16 else kernel_size
    )
    fields |= dict(
        channels=channels, patch=patch, patch_embed="conv" if patch == kernel_size else "conv_half"
    )
    if bottleneck_shape:
        fields |= dict(patch_embed="bottleneck", bottleneck=bottleneck_shape[0])
    if "nerf_image_embedder.embedder.0.weight" in shapes:
        nerf_hidden, num_features = shapes["nerf_image_embedder.embedder.0.weight"]
        num_generated = shapes["nerf_blocks.0.param_generator.weight"][0]
        fields |= dict(
            head="nerf_conv" if "nerf_final_layer_conv.norm.scale" in shapes else "nerf_linear",
            nerf_hidden=nerf_hidden, nerf_freqs=math.isqrt(num_features - channels), nerf_depth=count_blocks("nerf_blocks.{i}.param_generator.weight"),
            nerf_mlp_ratio=num_generated // (3 * nerf_hidden**2),
        )  # fmt: skip
    else:
        fields["head"] = "linear"
    return config.Model(**(fields | known_fields))
