"""Which model a file holds, by the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace

from radiance import config
from radiance.weights.files import CheckpointError, Shapes

METADATA_KEY = "radiance.model"
# Empty tensors by which readers know the variant, and the setting that each stands for.
MARKERS = {"__x0__": "prediction", "__32x32__": "patch", "__sequential__": "text_ids"}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "params.")
# Tensors that give away what else a file may be.
OTHERS = (
    ("dec_net.", "a Zeta-Chroma checkpoint: Chroma's successor on another network (Z-Image), which this version does not run"),
    ("SelfAttention.q.", "a T5 text encoder: give it as --text-encoder"),
    ("enc.blk.0.", "a T5 text encoder: give it as --text-encoder"),
    ("decoder.conv_in.", "an autoencoder: give it as --autoencoder"),
    ("lora_", "a LoRA: give it as --lora, or merge it with radiance convert --lora"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint, which is another network"),
    ("input_blocks.", "a Stable Diffusion checkpoint, which is another network"),
    ("transformer_blocks.", "a transformer in the layout of diffusers, but not Chroma's"),
)


def markers(model: config.Model) -> list[str]:
    """The markers of a model."""
    there = (model.prediction == "x0", model.patch == 32 or model.patch_embed == "conv_half", model.text_ids == "sequential")
    return [name for name, yes in zip(MARKERS, there) if yes]


def check_shapes(expected: Shapes, found: Shapes, origin: object):
    """Raises one CheckpointError that names every difference; markers may be there or not."""
    expected, found = ({n: s for n, s in shapes.items() if n not in MARKERS} for shapes in (expected, found))
    problems = []
    if missing := [n for n in expected if n not in found]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [n for n in found if n not in expected]:
        problems.append(f"not expected {', '.join(extra)}")
    if wrong := [f"{n} is {list(found[n])}, not {list(expected[n])}" for n in expected if n in found and found[n] != expected[n]]:
        problems.append(f"of another shape: {'; '.join(wrong)}")
    if problems:
        raise CheckpointError(f"{origin} does not hold this model: {'. '.join(problems)}.")


def canonical_names(keys: Mapping[str, object]) -> dict[str, str]:
    """Native name → key in the file: known prefixes are taken off, and norms that newer tools call `.weight` are `.scale`."""
    prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in keys)), "")
    names = {}
    for key in keys:
        if not key.startswith(prefix) and key not in MARKERS:
            continue
        name = key.removeprefix(prefix)
        parts = name.split(".")
        if len(parts) > 1 and parts[-1] == "weight" and (parts[-2].endswith("norm") or parts[-3:-2] == ["norms"]):
            name = name.removesuffix("weight") + "scale"
        if name in names:
            raise CheckpointError(f"The tensors {names[name]} and {key} are both {name}: the file holds more than one model.")
        names[name] = key
    return names


def recognise(shapes: Shapes, origin: object):
    """Raises CheckpointError that says what else the file is, when its names are not those of a Chroma, Radiance or FLUX model."""
    if "txt_in.weight" in shapes and any(n.startswith(("double_blocks.0.", "single_blocks.0.")) for n in shapes):
        return
    for sign, told in OTHERS:
        if any(sign in name for name in shapes):
            raise CheckpointError(f"{origin} is {told}.")
    raise CheckpointError(f"{origin} is not a Chroma, Radiance or FLUX checkpoint: it has no txt_in.weight or no blocks.")


def detect(shapes: Shapes, metadata: Mapping[str, str] | None = None, origin: object = "The checkpoint", **known) -> config.Model:
    """The model whose native tensors have these names and shapes.

    Our own exports say it in their metadata. `known` gives fields that shapes cannot tell (rope_axes, rope_theta, patch, …).
    Raises CheckpointError when the tensors are not those of a Chroma, Radiance or FLUX model.
    """
    if METADATA_KEY in (metadata or {}):
        try:
            model = replace(config.from_json(config.Model, metadata[METADATA_KEY]), **known)
        except (ValueError, OverflowError, RecursionError) as error:  # numbers without end, lists without end
            told = str(error).rstrip(".")
            raise CheckpointError(f"{origin} describes its model in a way this version does not know: {told}.") from None
        # Before the model is laid out, block by block.
        depths = (model.text_preamble, model.double_blocks, model.single_blocks, model.approximator_depth, model.nerf_depth)
        if max(depths) > max(len(shapes), 64):
            raise CheckpointError(f"{origin} describes a model that is deeper than its {len(shapes)} tensors can be: it is damaged.")
        return model
    recognise(shapes, origin)
    try:
        return _detect(shapes, known)
    except KeyError as error:
        raise CheckpointError(f"{origin} looks like a Chroma checkpoint, but has no {error.args[0]}: the file is not whole.") from None
    except config.ConfigError as error:
        raise CheckpointError(f"{origin}: the sizes of its tensors do not make a model. {error}") from None
    except (ValueError, IndexError, ArithmeticError):  # a tensor with more, fewer or empty axes
        raise CheckpointError(f"{origin} has the names of a Chroma checkpoint, but its tensors are of other kinds (quantised?).") from None


def _detect(shapes: Shapes, known: Mapping) -> config.Model:
    def count(pattern: str) -> int:
        return next(i for i in range(len(shapes) + 1) if pattern.format(i=i) not in shapes)

    doubles, singles = count("double_blocks.{i}.img_attn.qkv.weight"), count("single_blocks.{i}.linear1.weight")
    hidden, text_dim = shapes["txt_in.weight"]
    norm = "double_blocks.0.img_attn.norm" if doubles else "single_blocks.0.norm"
    head_dim = shapes[f"{norm}.query_norm.scale"][0]
    mlp = shapes["double_blocks.0.img_mlp.0.weight"][0] if doubles else shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
    if head_dim != 128 and "rope_axes" not in known:
        raise config.ConfigError(f"Heads of {head_dim} channels are in no published model, and the file does not say how they are rotated.")
    fields = dict(
        hidden=hidden, text_dim=text_dim, heads=hidden // head_dim, double_blocks=doubles, single_blocks=singles,
        mlp_ratio=mlp / hidden, rope_axes=(16, 56, 56), text_ids="sequential" if "__sequential__" in shapes else "zero",
        prediction="x0" if "__x0__" in shapes else "velocity", registers=shapes.get("registers", (0,))[0],
        text_preamble=count("text_blocks.{i}.txt_attn.qkv.weight"),
    )  # fmt: skip
    if "txt_padding" in shapes:
        fields |= dict(padding="learned", masking="off")

    if "distilled_guidance_layer.in_proj.weight" in shapes:
        approximator_hidden, approximator_dim = shapes["distilled_guidance_layer.in_proj.weight"]
        depth = count("distilled_guidance_layer.layers.{i}.in_layer.weight")
        fields |= dict(approximator_hidden=approximator_hidden, approximator_dim=approximator_dim, approximator_depth=depth)
    elif "final_layer.modulation_offset" in shapes:
        fields["modulation"] = "none"
    else:
        fields |= dict(
            modulation="per_block", masking="off", guidance_embed="guidance_in.in_layer.weight" in shapes,
            pooled_dim=shapes.get("vector_in.in_layer.weight", (0, 0))[1],
        )  # fmt: skip

    if "img_in.weight" in shapes:
        return config.Model(**(fields | dict(patch=1, head="linear", channels=shapes["img_in.weight"][1]) | known))
    pressed = shapes.get("img_in_bottleneck.in_layer.weight")
    _, channels, kernel, _ = pressed or shapes["img_in_patch.weight"]
    patch = known.get("patch", 32 if "__32x32__" in shapes and kernel == 16 else kernel)
    fields |= dict(channels=channels, patch=patch, patch_embed="conv" if patch == kernel else "conv_half")
    if pressed:
        fields |= dict(patch_embed="bottleneck", bottleneck=pressed[0])
    if "nerf_image_embedder.embedder.0.weight" in shapes:
        nerf_hidden, features = shapes["nerf_image_embedder.embedder.0.weight"]
        generated = shapes["nerf_blocks.0.param_generator.weight"][0]
        fields |= dict(
            head="nerf_conv" if "nerf_final_layer_conv.norm.scale" in shapes else "nerf_linear",
            nerf_hidden=nerf_hidden, nerf_freqs=math.isqrt(features - channels), nerf_depth=count("nerf_blocks.{i}.param_generator.weight"),
            nerf_mlp_ratio=generated // (3 * nerf_hidden**2),
        )  # fmt: skip
    else:
        fields["head"] = "linear"
    return config.Model(**(fields | known))
