"""Paints the prompts of prompts.safetensors with the model of this folder: `python sample.py`. Apache-2.0.

Needs torch and safetensors, and beside this file model.py, config.json and model.safetensors. Every prompt gets its own seed
(--seed, then one more each) and becomes a PNG in images/; models of latents leave the latents as safetensors there.

prompts.safetensors is made with any run of the text encoder that the model was trained with, such as T5's:
    text [n, l, e]        its output for n prompts padded to l tokens (T5 itself must not attend to the padding)
    lengths [n]           real tokens of each, end-of-sequence included; most models also read the one padding row that follows
    negative_text [1, l, e], negative_lengths [1]    the same for what guidance leads away from, mostly the empty prompt
    pooled [n, p], negative_pooled [1, p]            only for models with a pooled text vector
and as metadata `prompts`, a JSON list of the texts, and `sample`, a JSON object such as {"steps": 30, "guidance": 3.5, "side": 512,
"noise_scale": 1.0}; its "times", a list that falls from 1 to 0, are the schedule unless --steps is given, which makes even steps.
safetensors.torch.save_file(tensors, "prompts.safetensors", metadata) writes it.
"""

import argparse
import json
import math
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from model import Transformer, add_lora, load
from safetensors import safe_open
from torch import Tensor

# Settings of the run that this script does not follow unless they are so.
SUPPORTED_SETTINGS = {"solver": "euler", "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0}


def main():
    folder = Path(__file__).resolve().parent
    tensors, prompts, settings = read_prompt_tensors(folder / "prompts.safetensors")
    arguments = parse_arguments(settings)
    sample_times = make_times(settings, arguments.steps)
    dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    model = load(folder, arguments.device, getattr(torch, dtype)).eval()
    for path, strength in arguments.lora:
        add_lora(model, path, strength)
    tensors = {name: x.to(arguments.device) for name, x in tensors.items()}
    negative_inputs = [
        tensors.get(name) for name in ("negative_text", "negative_lengths", "negative_pooled")
    ]

    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(prompts):
        start_time, seed = time.perf_counter(), arguments.seed + i
        text, lengths, pooled = (
            x if x is None else x[i : i + 1]
            for x in map(tensors.get, ("text", "lengths", "pooled"))
        )
        noise = settings["noise_scale"] * make_noise(model, seed, *arguments.size).to(
            arguments.device
        )
        image = sample(
            model, noise, text, lengths, *negative_inputs[:2], times=sample_times, guidance=arguments.guidance,
            unguided_steps=settings.get("unguided_steps", 0), min_divisor=settings.get("floor", 0.0), pooled=pooled, negative_pooled=negative_inputs[2],
        )  # fmt: skip
        path = write_sample(arguments.out / f"{i:03}-seed{seed}", image[0].cpu(), *arguments.size)
        print(
            f"{i + 1}/{len(prompts)} {path} ({time.perf_counter() - start_time:.1f} s): {prompt}",
            flush=True,
        )


def parse_arguments(settings: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Paints the prompts of prompts.safetensors.")
    parser.add_argument("--steps", type=int, help=f"default: {settings['steps']}")
    parser.add_argument(
        "--guidance",
        type=float,
        default=settings["guidance"],
        help="1 is none; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first image; default: %(default)s"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=(settings["side"],) * 2,
        metavar="WxH",
        help="in pixels, or tokens of a latent",
    )
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="to be added; may be repeated",
    )
    parser.add_argument("--out", type=Path, default=Path("images"), help="default: %(default)s")
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
        parser.error(f"--steps {arguments.steps}: at least one is needed.")
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 640x512.")
    return int(width), int(height)


def parse_lora(text: str) -> tuple[Path, float]:
    path, _, strength = text.rpartition(":")
    try:
        parsed = (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(parsed[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: the strength is not a finite number.")
    return parsed


def read_prompt_tensors(path: Path) -> tuple[dict[str, Tensor], list[str], dict]:
    """Tensors, prompts and sample settings. Ends the program with a sentence when the file is not what it should be."""
    if not path.is_file():
        raise SystemExit(f"There is no {path}: the top of sample.py says how it is made.")
    with safe_open(path, "pt") as file:
        metadata, tensors = (
            file.metadata() or {},
            {name: file.get_tensor(name) for name in file.keys()},
        )
    if missing := {"text", "lengths", "negative_text", "negative_lengths"} - set(tensors) | {
        "prompts",
        "sample",
    } - set(metadata):
        raise SystemExit(
            f"{path} has no {', '.join(sorted(missing))}: the top of sample.py says what belongs in it."
        )
    prompts, settings = json.loads(metadata["prompts"]), json.loads(metadata["sample"])
    if missing := {"steps", "guidance", "side", "noise_scale"} - set(settings):
        raise SystemExit(
            f"The sample settings of {path} have no {', '.join(sorted(missing))}: the top of sample.py shows them."
        )
    if len(prompts) != len(tensors["text"]):
        raise SystemExit(
            f"{path} has {len(prompts)} prompts and {len(tensors['text'])} texts: it needs as many."
        )
    return tensors, prompts, settings


def make_times(settings: dict, steps: int | None) -> Tensor:
    """The run's own times, or even steps. Says which settings of the run are not followed."""
    use_run_times = steps is None and "times" in settings
    for key, value in (
        SUPPORTED_SETTINGS if use_run_times else SUPPORTED_SETTINGS | {"schedule": "uniform"}
    ).items():
        if settings.get(key, value) != value:
            print(
                f"The run samples with {key}={settings[key]}, which this script does not do: it takes {value}."
            )
    return (
        torch.tensor(settings["times"])
        if use_run_times
        else torch.linspace(1, 0, (steps or settings["steps"]) + 1)
    )


def make_noise(model: Transformer, seed: int, width: int, height: int) -> Tensor:
    """[1, c, height, width] in whole patches; made on the CPU, so that a seed is the same noise on every device."""
    patch, channels = model.settings.patch, model.settings.channels
    shape = (1, channels, -(-height // patch) * patch, -(-width // patch) * patch)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: Transformer, noise: Tensor, text: Tensor, lengths: Tensor, negative_text: Tensor | None = None,
    negative_lengths: Tensor | None = None, *, times: Tensor | Sequence[float], guidance: float = 1.0, unguided_steps: int = 0,
    min_divisor: float = 0.0, pooled: Tensor | None = None, negative_pooled: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Images [b, c, height, width] (about [-1, 1]) from scaled `noise`, by Euler steps along falling `times` from 1 to 0.

    Guidance is v⁻ + g·(v⁺ − v⁻), after the first `unguided_steps`; 1 is none. The negative text has as many tokens, and b rows or
    one. The model is not evaluated at the last time, so x0 models do not divide by 0; they divide by no less than `floor`.
    """
    times, b = torch.as_tensor(times, dtype=torch.float32, device="cpu"), len(noise)
    if times.diff().ge(0).any() or times[-1] < 0:
        raise ValueError(f"times={times.tolist()} must fall from 1 (noise) to 0 (the image).")
    x, batch = noise.float(), (text, lengths, pooled)
    if guidance != 1:
        pairs = list(zip(batch, (negative_text, negative_lengths, negative_pooled)))
        if any(positive is not None and negative is None for positive, negative in pairs):
            raise ValueError(
                "Guidance other than 1 needs negative_text, negative_lengths and, beside pooled, negative_pooled."
            )
        batch = [
            None if positive is None else torch.cat([positive, negative.expand_as(positive)])
            for positive, negative in pairs
        ]
    for i, (time_now, time_next) in enumerate(zip(times[:-1], times[1:])):
        batch_time, divisor = (
            t.to(x.device).expand(2 * b) for t in (time_now, time_now.clamp(min=min_divisor))
        )
        if guidance == 1 or i < unguided_steps:
            velocity = model(x, text, lengths, batch_time[:b], pooled=pooled, divisor=divisor[:b])
        else:
            velocities = model(
                torch.cat([x, x]), batch[0], batch[1], batch_time, pooled=batch[2], divisor=divisor
            )
            velocity = velocities[b:] + guidance * (velocities[:b] - velocities[b:])
        x = x + (time_next - time_now) * velocity
    return x


def write_sample(path: Path, image: Tensor, width: int, height: int) -> Path:
    """Writes [c, height, width], cropped: three channels are an image, others latents. Returns the path with its ending."""
    image = image[:, :height, :width]
    if len(image) == 3:
        path, content = (
            path.with_suffix(".png"),
            encode_png(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)),
        )
    else:
        path, content = path.with_suffix(".safetensors"), encode_latents(image)
    path.write_bytes(content)
    return path


def encode_png(image: Tensor) -> bytes:
    """A PNG file of a uint8 [3, height, width]."""
    height, width = image.shape[1:]
    filtered_rows = torch.nn.functional.pad(
        image.permute(1, 2, 0).flatten(1), (1, 0)
    )  # each row begins with its filter: none

    def make_chunk(chunk_type: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + chunk_type
            + data
            + struct.pack(">I", zlib.crc32(chunk_type + data))
        )

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    compressed_pixels = zlib.compress(bytes(filtered_rows.flatten().tolist()))
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + make_chunk(b"IDAT", compressed_pixels)
        + make_chunk(b"IEND", b"")
    )


def encode_latents(image: Tensor) -> bytes:
    """A safetensors file with one tensor, `latents` [c, height, width]; safetensors' own writer needs NumPy."""
    num_values = image.numel()
    header = json.dumps(
        {
            "latents": {
                "dtype": "F32",
                "shape": list(image.shape),
                "data_offsets": [0, 4 * num_values],
            }
        }
    ).encode()
    return (
        struct.pack("<Q", len(header))
        + header
        + struct.pack(f"<{num_values}f", *image.flatten().tolist())
    )


if __name__ == "__main__":
    main()
