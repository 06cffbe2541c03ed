"""LoRA training: gradients against those of merged weights, resumed runs, and their exports."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import radiance
from radiance import config
from radiance.base.trees import flatten_tree
from radiance.cli import main
from radiance.model.lora import LoraKernel
from radiance.model.paths import is_block_matrix
from radiance.training.lora import attach_adapters, init_adapters, to_lora_weights
from radiance.training.optimizer import make_optimizer
from radiance.weights import checkpoint, lora, lora_reading
from tests.helpers.toy_models import apply, gradients, toy_inputs, toy_model, toy_params
from tests.helpers.toy_runs import PLAIN, metrics, same, toy_run, train, train_on_devices

# The inputs of all matrices divide into blocks of 32.
SIZES = PLAIN | dict(hidden=64, rope_axes=(4, 14, 14), text_refiner_blocks=1, double_blocks=1)
MODEL = toy_model(**SIZES | dict(double_blocks=2))
LORA = config.Lora(rank=3, alpha=6.0)


def noisy_adapters(model=MODEL, settings=LORA):
    """Sample adapters whose `up` is not 0, as after some steps."""
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(partial(init_adapters, model, settings), jax.random.key(0))
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)


def test_initial_adapters_change_nothing():
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    params, inputs = toy_params(MODEL), toy_inputs(MODEL)
    matrices = {path for path in flatten_tree(params) if is_block_matrix(path)}
    assert {path.rpartition("/")[0] for path in flatten_tree(adapters)} == matrices
    assert adapters["single"]["attention"]["proj"]["kernel"]["down"].shape == (3, 64, 3)
    assert adapters["double"]["text"]["attention"]["qkv"]["kernel"]["up"].shape == (2, 3, 3 * 64)
    assert float(
        jnp.std(adapters["single"]["mlp"]["linear_out"]["kernel"]["down"])
    ) == pytest.approx(1 / 16, rel=0.1)
    complete = apply(MODEL, attach_adapters(params, adapters, LORA), inputs)
    np.testing.assert_allclose(complete, apply(MODEL, params, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_follow_from_those_of_the_merged_weights(remat):
    """For W + s · down · up they are s · dW · upᵀ for down, and s · downᵀ · dW for up."""
    params, adapters, inputs = toy_params(MODEL), noisy_adapters(), toy_inputs(MODEL)
    weights = jnp.asarray(
        np.random.default_rng(0).standard_normal(inputs["image"].shape, np.float32)
    )
    compute = config.Compute(dtype="float32", remat=remat)

    def loss(adapters):
        return jnp.vdot(
            weights, apply(MODEL, attach_adapters(params, adapters, LORA), inputs, compute)
        )

    result = jax.jit(jax.grad(loss))(adapters)

    def merge(p, a):
        return p + (2.0 * a["down"] @ a["up"]).reshape(p.shape)

    def matrices_by_path(tree):
        return {path.rpartition("/")[0]: None for path in flatten_tree(tree)}

    pairs = {
        path: {factor: flatten_tree(adapters)[f"{path}/{factor}"] for factor in ("down", "up")}
        for path in matrices_by_path(adapters)
    }
    complete = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            merge(p, pairs[name]) if (name := "/".join(k.key for k in path)) in pairs else p
        ),
        params,
    )
    dense = flatten_tree(gradients(MODEL, complete, inputs, weights)[1][0])
    for path, pair in pairs.items():
        dw = dense[path].reshape(len(pair["down"]), pair["down"].shape[1], -1)
        for side, expected in (
            ("down", 2.0 * dw @ pair["up"].swapaxes(1, 2)),
            ("up", 2.0 * pair["down"].swapaxes(1, 2) @ dw),
        ):
            np.testing.assert_allclose(
                flatten_tree(result)[f"{path}/{side}"],
                expected,
                rtol=0,
                atol=2e-5 * np.abs(expected).max(),
                err_msg=path,
            )


@pytest.mark.parametrize(
    "target_modules",
    [
        ("refiner", "double", "single"),
        ("single/mlp",),
        ("refiner",),
        ("single/attention", "double/image/attention/qkv"),
    ],
)
def test_the_exported_lora_equals_the_trained_one(target_modules, tmp_path):
    settings = config.Lora(rank=3, alpha=6.0, target_modules=target_modules)
    run = config.Config(
        model=MODEL, lora=settings, init="elsewhere", data=config.Data(resolution=8)
    )
    params, inputs = toy_params(MODEL), toy_inputs(MODEL)
    adapters = noisy_adapters(settings=settings)
    lora.write_lora(
        tmp_path / "lora.safetensors", to_lora_weights(run, adapters, "toy"), "kohya", "float32"
    )
    merged = lora.merge_lora(
        checkpoint.checkpoint_from_params(MODEL, params, "toy"),
        lora_reading.read_lora(tmp_path / "lora.safetensors", MODEL),
    ).load_params()
    result = apply(MODEL, attach_adapters(params, adapters, settings), inputs)
    expected = np.asarray(apply(MODEL, merged, inputs))
    assert np.abs(expected - apply(MODEL, params, inputs)).max() > 1e-2
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Write the base weights to a file."""
    run = toy_run(".", ".", **SIZES)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    checkpoint.write_checkpoint(path, run.model, toy_params(run.model))
    return path


def lora_run(output, data_directory, base, *changes):
    settings = [
        "lora.rank=4",
        f"init={base}",
        "lora.weight_format=int8",
        "lora.dtype=float32",
        "optimizer.learning_rate=1e-2",
    ]
    return toy_run(output, data_directory, *settings, *changes, **SIZES)


@pytest.mark.slow
def test_a_run_resumes_samples_and_exports(base, tmp_path, data_directory):
    complete, interrupted = (
        lora_run(tmp_path / name, data_directory, base) for name in ("complete", "interrupted")
    )
    assert train(complete) == 8
    assert train(config.override(interrupted, ["train.steps=5"])) == 5
    assert train(interrupted) == 8
    assert [row for row in metrics(interrupted) if row["step"] % 4 == 0] == [
        row for row in metrics(complete) if row["step"] % 4 == 0
    ]
    from radiance.loading import load_trained_lora, open_model, restore_run_weights

    ours, _ = restore_run_weights(complete.run_dir, complete)
    assert same(ours, restore_run_weights(interrupted.run_dir, interrupted)[0])
    assert sum(x.size for x in jax.tree.leaves(ours)) < 0.5 * sum(
        x.size for x in jax.tree.leaves(toy_params(complete.model))
    )
    assert any(
        np.abs(x).max() > 1e-3 for path, x in flatten_tree(ours).items() if path.endswith("up")
    )

    # The run, and the merged weights, generate the same image.
    assert (
        main(["convert", str(complete.run_dir), str(tmp_path / "lora.safetensors"), "--to", "peft"])
        == 0
    )
    assert (
        main(
            [
                "convert",
                str(complete.run_dir),
                str(tmp_path / "merged.safetensors"),
                "--dtype",
                "fp32",
            ]
        )
        == 0
    )
    assert (
        load_trained_lora(complete.run_dir, complete).pairs.keys()
        == lora_reading.read_lora(tmp_path / "lora.safetensors", complete.model).pairs.keys()
    )
    assert open_model(tmp_path / "merged.safetensors").metadata["radiance.run"]
    pipelines = [
        radiance.load(complete.run_dir, weight_format="none"),
        radiance.load(tmp_path / "merged.safetensors", dtype="float32"),
    ]
    assert any(
        isinstance(x, LoraKernel)
        for x in jax.tree.leaves(pipelines[0].params, is_leaf=lambda x: isinstance(x, LoraKernel))
    )
    first, second = (
        np.asarray(p(["a handwritten one"], seeds=[3])[0].image, int) for p in pipelines
    )
    assert np.abs(first - second).max() <= 2
    assert first.std() > 5

    # A base that has changed is an error.
    settings = complete.run_dir / "config.json"
    checkpoint.write_checkpoint(
        tmp_path / "other.safetensors", complete.model, toy_params(complete.model, 1)
    )
    settings.write_text(
        settings.read_text().replace(str(base), str(tmp_path / "other.safetensors"))
    )
    for read in (radiance.load, open_model):
        with pytest.raises(config.ConfigError, match="was trained on another"):
            read(complete.run_dir)


def test_weight_decay_acts_on_both_matrices():
    optimizer = make_optimizer(
        config.Optimizer(weight_decay=0.5, learning_rate=1.0, warmup_steps=0), 10
    )
    adapters = noisy_adapters()
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(adapters), adapters)
    jax.tree.map(lambda u, a: np.testing.assert_allclose(u, -0.5 * a, rtol=1e-6), updates, adapters)


@pytest.mark.slow
def test_a_run_on_two_devices(base, tmp_path, data_directory):
    one = lora_run(tmp_path, data_directory, base, "train.steps=4")
    assert train(one) == 4
    two = config.override(one, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    train_on_devices(two, 2)
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_other_weights_in_a_resumed_run_are_an_error(base, tmp_path, data_directory, capsys):
    run = lora_run(tmp_path, data_directory, base, "train.steps=2")
    assert train(run) == 2
    other = tmp_path / "other.safetensors"
    checkpoint.write_checkpoint(other, run.model, toy_params(run.model, 1), "bfloat16")
    with pytest.raises(config.ConfigError, match=r"another run \(base.identity was"):
        train(config.override(run, [f"init={other}", "train.steps=4"]))
    with pytest.raises(config.ConfigError, match="is a LoRA run without weights"):
        train(config.override(run, [f"init={run.run_dir}", "name=second"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora.rank=4"], "set init to a checkpoint"),
        (
            ["lora.rank=4", "init=x", "optimizer.frozen=single"],
            "lora.target_modules names what is trained",
        ),
        (["lora.target_modules=modulation"], "only matrices of the blocks"),
        (["lora.target_modules=singles"], "only matrices of the blocks"),
        (["lora.alpha=0"], "must be positive"),
    ],
)
def test_wrong_settings_are_an_error(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.override(config.Config(), changes)


@pytest.mark.parametrize("target_modules", [("single/attention", "double/attention"), ("refiner",)])
def test_modules_that_the_model_does_not_have_are_an_error(target_modules):
    model = toy_model(**SIZES | dict(text_refiner_blocks=0))
    with pytest.raises(
        config.ConfigError,
        match=f"none of .* is in {target_modules[-1]}: choose among .*double/image/attention",
    ):
        noisy_adapters(model, config.Lora(rank=2, target_modules=target_modules))
    # A kind of block that is in the defaults may be missing.
    noisy_adapters(model, config.Lora(rank=2))
