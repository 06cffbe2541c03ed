"""Painting a batch of images with guidance: `radiance` beside our PyTorch module and diffusers' Chroma.

    python -m benchmarks.sampling --model small --side 256 --dtype float32 --text-limit 512 --prompt-tokens 40 --steps 4 --batch 1
    python -m benchmarks.sampling --stores int8 q8_0 float8_e4m3fn --peers      # what storing the weights small costs

PyTorch rows compute as pipelines there do: text at its limit, modulation at every step. Rows with the text cut tell how much of the
difference is this, and how much the engine. diffusers paints latents of as many tokens, without a pixel head. One evaluation is one
call of the network with both halves of the guidance, and there is one a step.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax

from benchmarks import measure, networks
from benchmarks.measure import Contender, Limits, Report
from benchmarks.networks import Task
from radiance import config
from radiance.flow.sampler import TextCondition, compute_modulations, generate_images
from radiance.flow.schedules import make_time_schedule
from radiance.model.rope import position_ids
from radiance.model.transformer import Params

EMPTY = 1  # tokens of the empty prompt: the end of the sequence


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.parser(__doc__)
    networks.add_arguments(parser, ("torch", "diffusers"), "chroma1-radiance", 1024, 1)
    steps = 4 if jax.default_backend() == "cpu" else 30
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument(
        "--stores",
        nargs="*",
        default=[],
        choices=config.WEIGHT_FORMATS,
        help="ways to keep the weights small, to compare",
    )
    options = parser.parse_intermixed_args(arguments)
    options.changes.append(f"sample.steps={options.steps}")
    task = networks.task_of(options)

    report = Report("sampling", arguments)
    limits = report.limits(task.dtype)
    report.say(
        f"{options.model}: {task.description} Text is cut to {task.cut()}. {options.steps} steps with guidance."
    )
    params = networks.random_params(task.model, task.dtype)
    compare_peers(report, task, params, limits, options)
    measure.forget()
    if options.stores:
        compare_stores(report, task, params, limits, options)
    if options.record:
        report.record()
    return report


def compare_peers(
    report: Report, task: Task, params: Params, limits: Limits, options: argparse.Namespace
):
    widths = {"text cut": task.cut(), "text at the limit": task.limit}
    ours = [
        Contender(
            f"radiance, {told}",
            partial(radiance, task, params, words),
            work(task, words),
            peer=False,
        )
        for told, words in widths.items()
    ]
    results = measure.race(ours + theirs(report, task, params, widths, options), options.repeats)
    report.compare(results, limits, evaluation(task))
    products, weights = (
        results[0].contender.flops / limits.flops,
        task.run.sample.steps * networks.bytes_of(params) / limits.bandwidth,
    )
    report.say(
        f"At the measured rates the first row's products take {products:.3g} s, and reading the weights once a step {weights:.3g} s."
    )


def theirs(
    report: Report, task: Task, params: Params, widths: dict[str, int], options: argparse.Namespace
) -> list[Contender]:
    found = []
    if "torch" in options.peers:
        module = cache(lambda: networks.torch_module(task.model, params, task.dtype))
        report.say(networks.agreement(task, params, module))
        for way in options.ways:
            for told, words in reversed(widths.items()):
                make = partial(torch_module, task, module, way, words)
                found.append(
                    Contender(
                        f"PyTorch module, {way}, {told}", make, work(task, words, hoisted=False)
                    )
                )
    if "diffusers" in options.peers:
        latent = networks.latent(task)
        module = cache(lambda: networks.diffusers_module(latent.model, task.dtype))
        for way in options.ways:
            make = partial(diffusers_module, latent, module, way)
            found.append(
                Contender(
                    f"diffusers, {way}, text at the limit",
                    make,
                    work(latent, latent.limit, hoisted=False),
                )
            )
    return found


def compare_stores(
    report: Report, task: Task, params: Params, limits: Limits, options: argparse.Namespace
):
    kept = {task.dtype: params} | {
        store: networks.stored_small(params, store) for store in options.stores
    }
    size = {
        f"radiance, weights in {name}": f"{networks.bytes_of(tree) / 1e9:.3g}"
        for name, tree in kept.items()
    }
    contenders = [
        Contender(
            name, partial(radiance, task, tree, task.cut()), work(task, task.cut()), peer=False
        )
        for name, tree in zip(size, kept.values())
    ]
    results = measure.race(contenders, options.repeats)
    report.compare(
        results, limits, evaluation(task) | {"GB": lambda result: size[result.contender.name]}
    )


def evaluation(task: Task) -> dict[str, Callable[[measure.Result], str]]:
    """The column of the time of one evaluation."""
    return {"s an evaluation": lambda result: f"{result.median / task.run.sample.steps:.4g}"}


def work(task: Task, words: int, hoisted: bool = True) -> float:
    """Operations of a batch; ours makes the modulation once a time for all rows, and at time 0 too."""
    batch, steps = task.run.data.batch_size, task.run.sample.steps
    return task.flops(words, 2 * batch * steps, steps + 1 if hoisted else 2 * batch * steps)


# --- what is timed ----------------------------------------------------------------------------------------------------


def radiance(task: Task, params: Params, words: int) -> Callable[[], Any]:
    batch, side, *_ = task.shape
    seeds = jax.numpy.arange(batch, dtype=jax.numpy.uint32)
    conditions = [
        TextCondition(*task.text(words, [tokens] * batch)) for tokens in (task.tokens, EMPTY)
    ]
    network, run = (
        {name: x for name, x in params.items() if name != "modulation"},
        dict(model=task.model, compute=task.run.compute),
    )
    settings = dict(settings=task.run.sample, noise_scale=1.0, height=side, width=side)
    times = make_time_schedule(task.run.sample, task.image_tokens)

    def call():
        vectors = compute_modulations(params["modulation"], times, **run)
        generate_images(
            network, seeds, *conditions, **run, **settings, vectors=vectors
        ).block_until_ready()

    return call


def torch_module(task: Task, module: Callable[[], Any], way: str, words: int) -> Callable[[], Any]:
    network = networks.running(module(), way)
    batch, side, _, channels = task.shape
    text, lengths = texts(task, words)
    return euler(
        task, lambda x, time: network(x, text, lengths, time), (batch, channels, side, side), words
    )


def diffusers_module(task: Task, module: Callable[[], Any], way: str) -> Callable[[], Any]:
    import torch

    network = networks.running(module(), way)
    batch, side, _, channels = task.shape
    text, lengths = texts(task, task.limit)
    ids = networks.to_torch(
        position_ids(side, side, 0, task.limit, sequential=False).astype("float32")
    )
    seen = torch.arange(task.limit, device=lengths.device) < lengths[:, None] + 1
    mask = torch.cat([seen, seen.new_ones(2 * batch, side**2)], dim=1)  # theirs has the text first
    fixed = dict(
        encoder_hidden_states=text,
        img_ids=ids[: side**2],
        txt_ids=ids[side**2 :],
        attention_mask=mask,
        return_dict=False,
    )

    def velocity(x, time):
        return network(hidden_states=x.to(text.dtype), timestep=time, **fixed)[0]

    return euler(task, velocity, (batch, side**2, channels), task.limit)


def texts(task: Task, words: int) -> tuple[Any, Any]:
    """Text and lengths of the prompts, then of the empty ones, for PyTorch."""
    text, lengths = task.text(
        words, [task.tokens] * task.run.data.batch_size + [EMPTY] * task.run.data.batch_size
    )
    return networks.to_torch(text, task.dtype), networks.to_torch(lengths)


def euler(task: Task, velocity: Callable, shape: tuple[int, ...], words: int) -> Callable[[], Any]:
    """The loop of a PyTorch pipeline: both halves of the guidance in one batch."""
    import torch

    settings, batch = task.run.sample, shape[0]
    times = networks.to_torch(make_time_schedule(settings, task.image_tokens))
    attention = networks.fastest_attention(
        2 * batch, task.image_tokens + words, task.model, task.dtype
    )

    def run():
        with torch.no_grad(), attention():
            x = torch.randn(shape, device=times.device)
            for now, after in zip(times[:-1], times[1:]):
                positive, negative = velocity(torch.cat([x, x]), now.expand(2 * batch)).chunk(2)
                x = x + (after - now) * (negative + settings.guidance_scale * (positive - negative))
            measure.synchronize()

    return run


if __name__ == "__main__":
    main()
