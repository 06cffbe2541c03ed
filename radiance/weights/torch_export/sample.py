"""Sample images for the prompts of prompts.safetensors: `python sample.py`. Apache-2.0.

Needs torch and safetensors, and beside this file model.py, config.json and model.safetensors.
Each prompt has its own seed (--seed for the first, then one more each) and gives a PNG in images/.
Latent models write latents there, as safetensors.

prompts.safetensors holds the output of the text encoder of the model's training, such as T5:

    text [n, l, e]         output for n prompts, padded to l tokens (padding must be masked in T5)
    lengths [n]            text tokens of each prompt, end-of-sequence included; most models also
                           read the one padding token that follows
    negative_text [1, l, e], negative_lengths [1]
                           the same for the negative prompt, which is mostly the empty prompt
    pooled [n, p], negative_pooled [1, p]
                           only for models that read a pooled text vector

and as metadata `prompts`, a JSON list of the texts, and `sample`, a JSON object such as
{"steps": 30, "guidance_scale": 3.5, "resolution": 512, "noise_scale": 1.0}. Its "times", a list
that falls from 1 to 0, are the schedule, unless --steps is given, which makes even steps.
safetensors.torch.save_file(tensors, "prompts.safetensors", metadata) writes the file.
"""

import argparse
import json
import math
import struct
import time
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from model import Transformer, add_lora, load
from safetensors import safe_open
from torch import Tensor

# This script supports only these values of the run's settings.
SUPPORTED_SETTINGS = {"solver": "euler", "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0}
REQUIRED_TENSORS = {"text", "lengths", "negative_text", "negative_lengths"}
REQUIRED_METADATA = {"prompts", "sample"}
REQUIRED_SETTINGS = {"steps", "guidance_scale", "resolution", "noise_scale"}


def main() -> None:
    """Sample an image for each prompt, with the settings of the command line."""
    folder = Path(__file__).resolve().parent
    tensors, prompts, settings = read_prompt_tensors(folder / "prompts.safetensors")
    arguments = parse_arguments(settings)
    sample_times = make_times(settings, arguments.steps)
    dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    model = load(folder, arguments.device, getattr(torch, dtype)).eval()
    for path, strength in arguments.lora:
        add_lora(model, path, strength)
    tensors = {name: x.to(arguments.device) for name, x in tensors.items()}

    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(prompts):
        start_time, seed = time.perf_counter(), arguments.seed + i
        noise = make_noise(model, seed, *arguments.size).to(arguments.device)
        image = sample(
            model,
            settings["noise_scale"] * noise,
            tensors["text"][i : i + 1],
            tensors["lengths"][i : i + 1],
            tensors["negative_text"],
            tensors["negative_lengths"],
            times=sample_times,
            guidance_scale=arguments.guidance_scale,
            unguided_steps=settings.get("unguided_steps", 0),
            min_divisor=settings.get("min_divisor", 0.0),
            pooled=tensors["pooled"][i : i + 1] if "pooled" in tensors else None,
            negative_pooled=tensors.get("negative_pooled"),
        )
        if not image.isfinite().all():
            raise SystemExit(
                f"The image of prompt {i} is not finite: lower --guidance-scale, or give --dtype "
                "float32."
            )
        path = write_sample(arguments.out / f"{i:03}-seed{seed}", image[0].cpu(), *arguments.size)
        seconds = time.perf_counter() - start_time
        print(f"{i + 1}/{len(prompts)} {path} ({seconds:.1f} s): {prompt}", flush=True)


# --- settings -------------------------------------------------------------------------------------


def parse_arguments(settings: dict) -> argparse.Namespace:
    """Return the arguments of the command line; defaults come from the run's settings."""
    parser = argparse.ArgumentParser(description="Sample images for the prompts of a file.")
    parser.add_argument("--steps", type=int, help=f"even steps; default: {settings['steps']}")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=settings["guidance_scale"],
        help="1 disables guidance; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; default: %(default)s"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=(settings["resolution"],) * 2,
        metavar="WIDTHxHEIGHT",
        help="in pixels, or in tokens of a latent",
    )
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to add; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("images"), help="output folder; default: %(default)s"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: bfloat16 on cuda, float32 elsewhere",
    )
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least one step is needed.")
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height of a size such as 640x512."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x512.")
    return int(width), int(height)


def parse_lora(text: str) -> tuple[Path, float]:
    """Return the path and the strength of FILE[:STRENGTH]; the default strength is 1."""
    path, _, strength = text.rpartition(":")
    try:
        parsed = (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(parsed[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: the strength must be a finite number.")
    return parsed


def read_prompt_tensors(path: Path) -> tuple[dict[str, Tensor], list[str], dict]:
    """Read tensors, prompts and sample settings of prompts.safetensors.

    Raises:
        SystemExit: The file is missing or incomplete; the message says what it needs.
    """
    if not path.is_file():
        raise SystemExit(f"There is no {path}: the docstring of sample.py describes it.")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    missing = REQUIRED_TENSORS - set(tensors) | REQUIRED_METADATA - set(metadata)
    if missing:
        raise SystemExit(
            f"{path} has no {', '.join(sorted(missing))}: the docstring of sample.py describes it."
        )
    prompts, settings = json.loads(metadata["prompts"]), json.loads(metadata["sample"])
    if missing := REQUIRED_SETTINGS - set(settings):
        raise SystemExit(
            f"The sample settings of {path} have no {', '.join(sorted(missing))}: "
            "the docstring of sample.py describes them."
        )
    if len(prompts) != len(tensors["text"]):
        raise SystemExit(
            f"{path} has {len(prompts)} prompts and {len(tensors['text'])} encoded texts: "
            "write one text for each prompt."
        )
    return tensors, prompts, settings


def make_times(settings: dict, steps: int | None) -> Tensor:
    """Return the times of the run, or of even steps; report settings that are not supported."""
    use_run_times = steps is None and "times" in settings
    supported = (
        SUPPORTED_SETTINGS if use_run_times else SUPPORTED_SETTINGS | {"schedule": "uniform"}
    )
    for key, value in supported.items():
        if settings.get(key, value) != value:
            print(
                f"The run samples with {key}={settings[key]}, which this script does not support: "
                f"it uses {value}."
            )
    if use_run_times:
        return torch.tensor(settings["times"])
    return torch.linspace(1, 0, (steps or settings["steps"]) + 1)


# --- sampling -------------------------------------------------------------------------------------


def make_noise(model: Transformer, seed: int, width: int, height: int) -> Tensor:
    """Return noise [1, c, height, width], with the size rounded up to complete patches.

    It is generated on the CPU, so that a seed gives the same noise on every device.
    """
    patch, channels = model.settings.patch, model.settings.channels
    shape = (1, channels, -(-height // patch) * patch, -(-width // patch) * patch)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: Transformer,
    noise: Tensor,
    text: Tensor,
    lengths: Tensor,
    negative_text: Tensor | None = None,
    negative_lengths: Tensor | None = None,
    *,
    times: Tensor | Sequence[float],
    guidance_scale: float = 1.0,
    unguided_steps: int = 0,
    min_divisor: float = 0.0,
    pooled: Tensor | None = None,
    negative_pooled: Tensor | None = None,
) -> Tensor:
    """Sample images by Euler steps, with classifier-free guidance v⁻ + g·(v⁺ − v⁻).

    Args:
        model: The model.
        noise: Noise [b, c, height, width], times the noise scale.
        text: Output of the text encoder [b, l, e].
        lengths: Text tokens [b] of each row.
        negative_text: The negative prompt [b or 1, l, e]; needed for guidance.
        negative_lengths: Its text tokens [b or 1].
        times: Times that fall from 1 to 0. The model is not evaluated at the last time, so x0
            models do not divide by 0.
        guidance_scale: Scale g of the guidance; 1 disables it.
        unguided_steps: First steps without guidance.
        min_divisor: x0 models divide by the time, but by no less than this.
        pooled: Pooled text vector [b, p], for models that read one.
        negative_pooled: The same of the negative prompt [b or 1, p].

    Returns:
        Images [b, c, height, width], with values of about [-1, 1].

    Raises:
        ValueError: The times do not fall, or guidance lacks a negative prompt.
    """
    schedule, b = torch.as_tensor(times, dtype=torch.float32, device="cpu"), len(noise)
    if schedule.diff().ge(0).any() or schedule[-1] < 0:
        raise ValueError(f"times={schedule.tolist()} must fall from 1 (noise) to 0 (the image).")
    x, batch = noise.float(), (text, lengths, pooled)
    if guidance_scale != 1:
        batch = join_negatives(batch, (negative_text, negative_lengths, negative_pooled))
    for i, (time_now, time_next) in enumerate(pairwise(schedule)):
        batch_time, divisor = (
            t.to(x.device).expand(2 * b) for t in (time_now, time_now.clamp(min=min_divisor))
        )
        if guidance_scale == 1 or i < unguided_steps:
            velocity = model(x, text, lengths, batch_time[:b], pooled=pooled, divisor=divisor[:b])
        else:
            velocities = model(
                torch.cat([x, x]), batch[0], batch[1], batch_time, pooled=batch[2], divisor=divisor
            )
            velocity = velocities[b:] + guidance_scale * (velocities[:b] - velocities[b:])
        x = x + (time_next - time_now) * velocity
    return x


def join_negatives(
    batch: Sequence[Tensor | None], negatives: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Append the negative prompt to each tensor of a batch that is not None.

    Raises:
        ValueError: A negative tensor is missing.
    """
    pairs = list(zip(batch, negatives))
    if any(positive is not None and negative is None for positive, negative in pairs):
        raise ValueError(
            "A guidance scale other than 1 needs negative_text, negative_lengths and, "
            "with pooled, negative_pooled."
        )
    return [
        None if positive is None else torch.cat([positive, negative.expand_as(positive)])
        for positive, negative in pairs
    ]


# --- output ---------------------------------------------------------------------------------------


def write_sample(path: Path, image: Tensor, width: int, height: int) -> Path:
    """Write a cropped sample [c, height, width]: a PNG of three channels, latents of others.

    Returns:
        The path with its suffix.
    """
    image = image[:, :height, :width]
    if len(image) == 3:
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        path, content = path.with_suffix(".png"), encode_png(pixels)
    else:
        path, content = path.with_suffix(".safetensors"), encode_latents(image)
    path.write_bytes(content)
    return path


def encode_png(image: Tensor) -> bytes:
    """Return the PNG file of a uint8 image [3, height, width]."""
    height, width = image.shape[1:]
    # Each row begins with the number of its filter; 0 is none.
    filtered_rows = torch.nn.functional.pad(image.permute(1, 2, 0).flatten(1), (1, 0))

    def make_chunk(chunk_type: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(chunk_type + data)
        return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", checksum)

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    compressed_pixels = zlib.compress(bytes(filtered_rows.flatten().tolist()))
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + make_chunk(b"IDAT", compressed_pixels)
        + make_chunk(b"IEND", b"")
    )


def encode_latents(image: Tensor) -> bytes:
    """Return a safetensors file with one tensor, `latents` [c, height, width].

    The writer of the safetensors package needs NumPy, which may not be installed.
    """
    num_values = image.numel()
    entry = {"dtype": "F32", "shape": list(image.shape), "data_offsets": [0, 4 * num_values]}
    header = json.dumps({"latents": entry}).encode()
    values = struct.pack(f"<{num_values}f", *image.flatten().tolist())
    return struct.pack("<Q", len(header)) + header + values


if __name__ == "__main__":
    main()
