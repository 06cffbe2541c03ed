"""Functions that training compiles. Runs in one process share those that compute the same.

JAX finds a traced and compiled program again by the function that it was made from. So a run that
is resumed in the same process does not wait for the compiler again, nor does one that differs only
in its folder.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from radiance import config
from radiance.training.seeds import InitParams, init_states, make_seeds_step
from radiance.training.step import compute_validation_losses

NUM_SHARED = 16  # functions that are kept with their programs


def share_init(
    run: config.Config, seeds: tuple[int, ...], init_params: InitParams | None
) -> Callable[..., Any]:
    """Return `init_states` for a run; see there."""
    return _share(partial, init_states, _keep_computation(run), seeds, init_params=init_params)


def share_step(run: config.Config, num_seeds: int) -> Callable[..., Any]:
    """Return the step of `make_seeds_step` for a run; see there."""
    return _share(make_seeds_step, _keep_computation(run), num_seeds)


def share_validation(run: config.Config) -> Callable[..., Any]:
    """Return `compute_validation_losses` for a run; see there."""
    return _share(partial, compute_validation_losses, _keep_computation(run))


@lru_cache(maxsize=NUM_SHARED)
def _share(make_function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Return the function that was made from the same arguments before, or make it."""
    return make_function(*arguments, **keywords)


def _keep_computation(run: config.Config) -> config.Config:
    """Return a run without the settings that no program depends on: its name, and its intervals."""
    defaults = config.Config()
    has_end = run.optimizer.lr_schedule != "constant"
    return replace(
        run,
        name=defaults.name,
        output=defaults.output,
        train=config.Train(
            seed=run.train.seed, steps=run.train.steps if has_end else defaults.train.steps
        ),
    )
