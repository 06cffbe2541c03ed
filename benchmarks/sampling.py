"""Sample a batch of images with guidance: `radiance`, our PyTorch module, and Chroma of diffusers.

    python -m benchmarks.sampling --model small --resolution 256 --dtype float32 --steps 4
    python -m benchmarks.sampling --weight-formats int8 q8_0 float8_e4m3fn --peers

PyTorch rows compute what pipelines do: text padded to its limit, modulation at every step. Rows
with cut text show how much of the difference this is, and how much the engine. diffusers samples
latents with as many tokens, without a pixel head. One evaluation is one call of the network with
both halves of the guidance; each step has one. The second command measures what quantized weights
cost.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax

from benchmarks import measure, networks
from benchmarks.measure import Contender, Limits, Report
from benchmarks.networks import Task
from radiance import config
from radiance.flow.sampler import TextCondition, compute_modulations, generate_images
from radiance.flow.schedules import make_time_schedule
from radiance.model.rope import make_position_ids
from radiance.model.transformer import Params

EMPTY_PROMPT_TOKENS = 1  # the end of the sequence


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.make_parser(__doc__)
    networks.add_arguments(parser, ("torch", "diffusers"), "chroma1-radiance", 1024, 1)
    steps = 4 if jax.default_backend() == "cpu" else 30
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument(
        "--weight-formats",
        nargs="*",
        default=[],
        choices=config.WEIGHT_FORMATS,
        help="formats of quantized weights to compare",
    )
    options = parser.parse_intermixed_args(arguments)
    options.changes.append(f"sample.steps={options.steps}")
    task = networks.make_task(options)

    report = Report("sampling", arguments)
    limits = report.measure_limits(task.dtype)
    report.write(
        f"{options.model}: {task.description} Text is cut to {task.padded_length()}. "
        f"{options.steps} steps with guidance."
    )
    params = networks.make_random_params(task.model, task.dtype)
    compare_peers(report, task, params, limits, options)
    measure.free_memory()
    if options.weight_formats:
        compare_weight_formats(report, task, params, limits, options)
    if options.record:
        report.record()
    return report


def compare_peers(
    report: Report, task: Task, params: Params, limits: Limits, options: argparse.Namespace
):
    lengths = {"text cut": task.padded_length(), "text at the limit": task.max_length}
    contenders = [
        Contender(
            f"radiance, {label}",
            partial(make_radiance_call, task, params, length),
            count_flops(task, length),
            peer=False,
        )
        for label, length in lengths.items()
    ]
    results = measure.time_in_turn(
        contenders + make_peers(report, task, params, lengths, options), options.repeats
    )
    report.compare(results, limits, evaluation_column(task))
    products, weights = (
        results[0].contender.flops / limits.flops,
        task.run.sample.steps * networks.count_bytes(params) / limits.bandwidth,
    )
    report.write(
        f"At the measured rates the first row's matrix products take {products:.3g} s, and reading "
        f"the weights once per step {weights:.3g} s."
    )


def make_peers(
    report: Report, task: Task, params: Params, lengths: dict[str, int], options: argparse.Namespace
) -> list[Contender]:
    contenders = []
    if "torch" in options.peers:
        module = cache(lambda: networks.make_torch_module(task.model, params, task.dtype))
        report.write(networks.compare_outputs(task, params, module))
        for mode in options.modes:
            for label, length in reversed(lengths.items()):
                make = partial(make_torch_call, task, module, mode, length)
                contenders.append(
                    Contender(
                        f"PyTorch module, {mode}, {label}",
                        make,
                        count_flops(task, length, hoisted=False),
                    )
                )
    if "diffusers" in options.peers:
        latent = networks.make_latent_task(task)
        module = cache(lambda: networks.make_diffusers_module(latent.model, task.dtype))
        for mode in options.modes:
            make = partial(make_diffusers_call, latent, module, mode)
            contenders.append(
                Contender(
                    f"diffusers, {mode}, text at the limit",
                    make,
                    count_flops(latent, latent.max_length, hoisted=False),
                )
            )
    return contenders


def compare_weight_formats(
    report: Report, task: Task, params: Params, limits: Limits, options: argparse.Namespace
):
    params_by_format = {task.dtype: params} | {
        weight_format: networks.quantize_params(params, weight_format)
        for weight_format in options.weight_formats
    }
    size = {
        f"radiance, weights in {name}": f"{networks.count_bytes(tree) / 1e9:.3g}"
        for name, tree in params_by_format.items()
    }
    contenders = [
        Contender(
            name,
            partial(make_radiance_call, task, tree, task.padded_length()),
            count_flops(task, task.padded_length()),
            peer=False,
        )
        for name, tree in zip(size, params_by_format.values())
    ]
    results = measure.time_in_turn(contenders, options.repeats)
    report.compare(
        results,
        limits,
        evaluation_column(task) | {"GB": lambda result: size[result.contender.name]},
    )


def evaluation_column(task: Task) -> dict[str, Callable[[measure.Result], str]]:
    """Return the column with the time of one evaluation."""
    return {"s an evaluation": lambda result: f"{result.median / task.run.sample.steps:.4g}"}


def count_flops(task: Task, length: int, hoisted: bool = True) -> float:
    """Count the FLOP of a batch; ours computes modulation once per time, also at time 0."""
    batch, steps = task.run.data.batch_size, task.run.sample.steps
    return task.count_flops(length, 2 * batch * steps, steps + 1 if hoisted else 2 * batch * steps)


# --- What is timed ---


def make_radiance_call(task: Task, params: Params, length: int) -> Callable[[], Any]:
    batch, resolution, *_ = task.shape
    seeds = jax.numpy.arange(batch, dtype=jax.numpy.uint32)
    conditions = [
        TextCondition(*task.make_text(length, [tokens] * batch))
        for tokens in (task.num_tokens, EMPTY_PROMPT_TOKENS)
    ]
    network, run = (
        {name: x for name, x in params.items() if name != "modulation"},
        dict(model=task.model, compute=task.run.compute),
    )
    settings = dict(settings=task.run.sample, noise_scale=1.0, height=resolution, width=resolution)
    times = make_time_schedule(task.run.sample, task.num_image_tokens)

    def call():
        vectors = compute_modulations(params["modulation"], times, **run)
        generate_images(
            network, seeds, *conditions, **run, **settings, vectors=vectors
        ).block_until_ready()

    return call


def make_torch_call(
    task: Task, module: Callable[[], Any], mode: str, length: int
) -> Callable[[], Any]:
    network = networks.compile_module(module(), mode)
    batch, resolution, _, channels = task.shape
    text, lengths = make_torch_text(task, length)
    return make_euler_call(
        task,
        lambda x, time: network(x, text, lengths, time),
        (batch, channels, resolution, resolution),
        length,
    )


def make_diffusers_call(task: Task, module: Callable[[], Any], mode: str) -> Callable[[], Any]:
    import torch

    network = networks.compile_module(module(), mode)
    batch, resolution, _, channels = task.shape
    text, lengths = make_torch_text(task, task.max_length)
    ids = networks.to_torch(
        make_position_ids(resolution, resolution, 0, task.max_length, sequential=False).astype(
            "float32"
        )
    )
    visible = torch.arange(task.max_length, device=lengths.device) < lengths[:, None] + 1
    mask = torch.cat(
        [visible, visible.new_ones(2 * batch, resolution**2)], dim=1
    )  # diffusers has the text first
    inputs = dict(
        encoder_hidden_states=text,
        img_ids=ids[: resolution**2],
        txt_ids=ids[resolution**2 :],
        attention_mask=mask,
        return_dict=False,
    )

    def velocity(x, time):
        return network(hidden_states=x.to(text.dtype), timestep=time, **inputs)[0]

    return make_euler_call(task, velocity, (batch, resolution**2, channels), task.max_length)


def make_torch_text(task: Task, length: int) -> tuple[Any, Any]:
    """Return text and lengths of the prompts, then of empty prompts, for PyTorch."""
    text, lengths = task.make_text(
        length,
        [task.num_tokens] * task.run.data.batch_size
        + [EMPTY_PROMPT_TOKENS] * task.run.data.batch_size,
    )
    return networks.to_torch(text, task.dtype), networks.to_torch(lengths)


def make_euler_call(
    task: Task, velocity: Callable, shape: tuple[int, ...], length: int
) -> Callable[[], Any]:
    """Make the loop of a PyTorch pipeline: both halves of the guidance in one batch."""
    import torch

    settings, batch = task.run.sample, shape[0]
    times = networks.to_torch(make_time_schedule(settings, task.num_image_tokens))
    attention = networks.find_fastest_attention(
        2 * batch, task.num_image_tokens + length, task.model, task.dtype
    )

    def run():
        with torch.no_grad(), attention():
            x = torch.randn(shape, device=times.device)
            for time, next_time in pairwise(times):
                positive, negative = velocity(torch.cat([x, x]), time.expand(2 * batch)).chunk(2)
                x = x + (next_time - time) * (
                    negative + settings.guidance_scale * (positive - negative)
                )
            measure.synchronize_torch()

    return run


if __name__ == "__main__":
    main()
