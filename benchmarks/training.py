"""The forward pass and the training step (loss, backward pass, clip, AdamW): `radiance` beside our PyTorch module.

    python -m benchmarks.training --model small --side 256 --dtype float32 --text-limit 512 --prompt-tokens 40 --batch 1
    python -m benchmarks.training --remat none dots full --peers                # what recomputing costs and what it saves
    python -m benchmarks.training optimizer.{weights,mu,nu}_dtype=bfloat16 --model chroma1-radiance --batch 1 --remat full --peers

The last trains the 9.5 B model on one GPU of 141 GB. Otherwise both keep float32 weights, and compute in `--dtype`. PyTorch rows pad texts
to the limit, as trainers there do; rows with the text cut tell how much of the difference is this. The share of the limit is the MFU
against the measured matrix products.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure, networks
from benchmarks.measure import Contender, Limits, Report
from benchmarks.networks import Task
from radiance import config
from radiance.data.batches import MAX_TEXT_LENGTHS
from radiance.model.transformer import REMAT_POLICIES, Params, bind_model
from radiance.text.encoder import LENGTH_STEP
from radiance.training.step import init_state, make_train_step

PARTS = {"forward": 1, "step": 3}  # by how often they do the products of the forward pass


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.parser(__doc__)
    networks.add_arguments(parser, ("torch",), "large", 512, 16)
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: both"
    )
    parser.add_argument(
        "--remat",
        nargs="+",
        default=["none"],
        choices=["none", *REMAT_POLICIES],
        help="policies, measured side by side",
    )
    options = parser.parse_intermixed_args(arguments)
    task = networks.task_of(options)

    report = Report("training", arguments)
    limits = report.limits(task.dtype)
    report.say(f"{options.model}: {task.description} Text is cut to {cut(task)}.")
    for part in options.parts:
        compare(report, task, part, limits, options)
        measure.forget()
    if options.record:
        report.record()
    return report


def compare(report: Report, task: Task, part: str, limits: Limits, options: argparse.Namespace):
    params = networks.random_params(task.model, task.run.optimizer.weights_dtype)
    widths = {"text cut": cut(task), "text at the limit": task.limit}
    theirs, columns = (
        [],
        {"images/s": lambda result: f"{task.run.data.batch_size / result.median:.3g}"},
    )
    if "torch" in options.peers:
        module = cache(
            partial(networks.torch_module, task.model, params, task.run.optimizer.weights_dtype)
        )
        report.say(networks.agreement(task, params, module))
        theirs = torch_rows(
            task, part, module, widths, options.ways, recompute="none" not in options.remat
        )
    if part == "forward":
        ours = [
            Contender(
                f"radiance, {told}", partial(forward, task, params, n), work(task, part, n), False
            )
            for told, n in widths.items()
        ]
    else:
        steps = Steps(task, params)
        columns |= {"GB temporary": steps.column(temporary), "GB in all": steps.column(in_all)}
        ours = [
            steps.row(told, words, policy)
            for policy in options.remat
            for told, words in widths.items()
        ]
    del params  # which become the state of the steps
    report.say(f"### {part}")
    report.compare(measure.race(ours + theirs, options.repeats), limits, columns)


def cut(task: Task) -> int:
    """Text tokens of a batch as the trainer makes it."""
    return task.cut(max(LENGTH_STEP, task.limit // MAX_TEXT_LENGTHS))


def work(task: Task, part: str, words: int) -> float:
    return PARTS[part] * task.run.data.batch_size * task.flops(words, 1, 1)


# --- ours -------------------------------------------------------------------------------------------------------------


def forward(task: Task, params: Params, words: int) -> Callable[[], Any]:
    image, (text, lengths), time = (
        jnp.asarray(task.image),
        texts(task, words),
        jnp.full(len(task.image), 0.5),
    )
    velocity = jax.jit(
        lambda params: bind_model(task.model, task.run.compute, params)(image, text, lengths, time)
    )
    return lambda: velocity(params).block_until_ready()


class Steps:
    """Training steps of several programs, one after the other on one state: two of it may not fit into memory."""

    def __init__(self, task: Task, params: Params):
        self.task, self.state = (
            task,
            jax.jit(partial(init_state, task.run), donate_argnums=0)(params),
        )
        self.memory: dict[str, Any] = {}  # by row, what the compiler says of its program

    def row(self, told: str, words: int, policy: str) -> Contender:
        name = f"radiance, {told}" + (f", remat {policy}" if policy != "none" else "")
        return Contender(
            name,
            partial(self.step, name, words, policy),
            work(self.task, "step", words),
            peer=False,
        )

    def step(self, name: str, words: int, policy: str) -> Callable[[], Any]:
        task = self.task
        run = replace(task.run, compute=replace(task.run.compute, remat=policy))
        text, lengths = texts(task, words)
        batch = {
            "image": jnp.asarray(task.image),
            "text": text,
            "lengths": lengths,
            "weight": jnp.ones(len(lengths)),
        }
        program = jax.jit(make_train_step(run), donate_argnums=0).lower(self.state, batch).compile()
        self.memory[name] = program.memory_analysis()

        def call():
            self.state, metrics = program(self.state, batch)
            jax.block_until_ready((self.state, metrics))

        return call

    def column(self, size: Callable[[Any], int]) -> Callable[[measure.Result], str]:
        """Gigabytes of each row's program; PyTorch does not tell."""
        return lambda result: (
            f"{size(self.memory[name]) / 1e9:.3g}"
            if (name := result.contender.name) in self.memory
            else ""
        )


def temporary(memory: Any) -> int:
    return memory.temp_size_in_bytes


def in_all(memory: Any) -> int:
    """With the state, which is written over, and the batch."""
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def texts(task: Task, words: int) -> tuple[jax.Array, jax.Array]:
    return task.text(words, [task.tokens] * len(task.image))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_rows(
    task: Task,
    part: str,
    module: Callable[[], Any],
    widths: Mapping[str, int],
    ways: Sequence[str],
    recompute: bool,
) -> list[Contender]:
    optimizer = cache(lambda: adamw(task.run.optimizer, module()))
    rows = []
    for way in ways:
        for told, words in reversed(widths.items()):
            if part == "forward":
                make = partial(torch_forward, task, module, way, words)
            else:
                make = partial(torch_step, task, module, optimizer, way, words, recompute)
            rows.append(Contender(f"PyTorch module, {way}, {told}", make, work(task, part, words)))
    return rows


def adamw(settings: config.Optimizer, module: Any) -> Any:
    import torch

    return torch.optim.AdamW(
        module.parameters(),
        settings.learning_rate,
        (settings.beta1, settings.beta2),
        settings.eps,
        settings.weight_decay,
        fused=True,
    )


def torch_inputs(task: Task, words: int) -> tuple[Any, Any, Any]:
    text, lengths = texts(task, words)
    return (
        networks.to_torch(task.image.transpose(0, 3, 1, 2)),
        networks.to_torch(text, task.dtype),
        networks.to_torch(lengths),
    )


def mixed_precision(task: Task) -> Any:
    import torch

    return torch.autocast(measure.torch_device(), torch.bfloat16, enabled=task.dtype == "bfloat16")


def torch_forward(task: Task, module: Callable[[], Any], way: str, words: int) -> Callable[[], Any]:
    import torch

    network, inputs = networks.running(module(), way), torch_inputs(task, words)
    time = torch.full((len(task.image),), 0.5, device=inputs[0].device)
    attention = attention_of(task, words)

    def call():
        with torch.no_grad(), attention(), mixed_precision(task):
            network(*inputs, time)
        measure.synchronize()

    return call


def torch_step(
    task: Task,
    module: Callable[[], Any],
    optimizer: Callable[[], Any],
    way: str,
    words: int,
    recompute: bool,
) -> Callable[[], Any]:
    import torch

    network, weights, optimizer = (
        networks.running(module(), way),
        list(module().parameters()),
        optimizer(),
    )
    module().recompute = recompute
    image, text, lengths = torch_inputs(task, words)
    attention, x0 = attention_of(task, words), task.model.prediction == "x0"

    def call():
        noise, time = torch.randn_like(image), torch.rand(len(image), device=image.device)
        mixed = torch.lerp(image, noise, time[:, None, None, None])
        divisor = time + task.run.flow.min_divisor
        target = (mixed - image) / divisor[:, None, None, None] if x0 else noise - image
        with attention(), mixed_precision(task):
            loss = torch.nn.functional.mse_loss(
                network(mixed, text, lengths, time, divisor=divisor), target
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, task.run.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        measure.synchronize()

    return call


def attention_of(task: Task, words: int) -> Callable[[], Any]:
    return networks.fastest_attention(
        task.run.data.batch_size, task.image_tokens + words, task.model, task.dtype
    )


if __name__ == "__main__":
    main()
