"""LoRA training: gradients against those of the whole weights, runs that are resumed, and what they export."""

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
from radiance.weights import checkpoint, lora
from tests.helpers.toy_models import apply, gradients, toy_inputs, toy_model, toy_params
from tests.helpers.toy_runs import PLAIN, command, metrics, same, toy_run, train

SIZES = PLAIN | dict(
    hidden=64, rope_axes=(4, 14, 14), text_refiner_blocks=1, double_blocks=1
)  # blocks of 32 divide
MODEL = toy_model(**SIZES | dict(double_blocks=2))
LORA = config.Lora(rank=3, alpha=6.0)


def noisy_adapters(model=MODEL, settings=LORA):
    """`up` is not 0, as after some steps."""
    draw = np.random.default_rng(5)
    shapes = jax.eval_shape(partial(init_adapters, model, settings), jax.random.key(0))
    return jax.tree.map(lambda x: 0.1 * draw.standard_normal(x.shape, np.float32), shapes)


def test_fresh_ones_change_nothing_and_have_the_sizes():
    adapters = init_adapters(MODEL, LORA, jax.random.key(0))
    params, inputs = toy_params(MODEL), toy_inputs(MODEL)
    matrices = {path for path in flatten_tree(params) if is_block_matrix(path)}
    assert {path.rpartition("/")[0] for path in flatten_tree(adapters)} == matrices
    assert adapters["single"]["attention"]["proj"]["kernel"]["down"].shape == (3, 64, 3)
    assert adapters["double"]["text"]["attention"]["qkv"]["kernel"]["up"].shape == (2, 3, 3 * 64)
    assert float(
        jnp.std(adapters["single"]["mlp"]["linear_out"]["kernel"]["down"])
    ) == pytest.approx(1 / 16, rel=0.1)
    whole = apply(MODEL, attach_adapters(params, adapters, LORA), inputs)
    np.testing.assert_allclose(whole, apply(MODEL, params, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_those_of_the_whole_weights_seen_through_the_pair(remat):
    """W + s · down · up: the gradient to down is s · dW · upᵀ, that to up is s · downᵀ · dW."""
    params, adapters, inputs = toy_params(MODEL), noisy_adapters(), toy_inputs(MODEL)
    weights = jnp.asarray(
        np.random.default_rng(0).standard_normal(inputs["image"].shape, np.float32)
    )
    compute = config.Compute(dtype="float32", remat=remat)

    def loss(adapters):
        return jnp.vdot(
            weights, apply(MODEL, attach_adapters(params, adapters, LORA), inputs, compute)
        )

    found = jax.jit(jax.grad(loss))(adapters)

    def merged(p, a):
        return p + (2.0 * a["down"] @ a["up"]).reshape(p.shape)

    def places(tree):
        return {path.rpartition("/")[0]: None for path in flatten_tree(tree)}

    at = {
        path: {side: flatten_tree(adapters)[f"{path}/{side}"] for side in ("down", "up")}
        for path in places(adapters)
    }
    whole = jax.tree_util.tree_map_with_path(
        lambda path, p: merged(p, at[name]) if (name := "/".join(k.key for k in path)) in at else p,
        params,
    )
    dense = flatten_tree(gradients(MODEL, whole, inputs, weights)[1][0])
    for path, pair in at.items():
        dw = dense[path].reshape(len(pair["down"]), pair["down"].shape[1], -1)
        for side, expected in (
            ("down", 2.0 * dw @ pair["up"].swapaxes(1, 2)),
            ("up", 2.0 * pair["down"].swapaxes(1, 2) @ dw),
        ):
            np.testing.assert_allclose(
                flatten_tree(found)[f"{path}/{side}"],
                expected,
                rtol=0,
                atol=2e-5 * np.abs(expected).max(),
                err_msg=path,
            )


@pytest.mark.parametrize(
    "parts",
    [
        ("refiner", "double", "single"),
        ("single/mlp",),
        ("refiner",),
        ("single/attention", "double/image/attention/qkv"),
    ],
)
def test_the_exported_lora_is_what_was_trained(parts, tmp_path):
    settings = config.Lora(rank=3, alpha=6.0, target_modules=parts)
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
        lora.read_lora(tmp_path / "lora.safetensors", MODEL),
    ).load_params()
    found = apply(MODEL, attach_adapters(params, adapters, settings), inputs)
    expected = np.asarray(apply(MODEL, merged, inputs))
    assert np.abs(expected - apply(MODEL, params, inputs)).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The weights to adapt, as a file from elsewhere."""
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
def test_a_run_goes_on_samples_and_exports(base, tmp_path, data_directory):
    whole, broken = (
        lora_run(tmp_path / name, data_directory, base) for name in ("whole", "broken")
    )
    assert train(whole) == 8
    assert train(config.override(broken, ["train.steps=5"])) == 5
    assert train(broken) == 8
    assert [row for row in metrics(broken) if row["step"] % 4 == 0] == [
        row for row in metrics(whole) if row["step"] % 4 == 0
    ]
    from radiance.loading import open_model, restore_run_weights, trained_lora

    ours, _ = restore_run_weights(whole.run_dir, whole)
    assert same(ours, restore_run_weights(broken.run_dir, broken)[0])
    assert sum(x.size for x in jax.tree.leaves(ours)) < 0.5 * sum(
        x.size for x in jax.tree.leaves(toy_params(whole.model))
    )
    assert any(
        np.abs(x).max() > 1e-3 for path, x in flatten_tree(ours).items() if path.endswith("up")
    )

    # The run, what it exports beside its base, and what it is merged to paint the same image.
    assert (
        main(["convert", str(whole.run_dir), str(tmp_path / "lora.safetensors"), "--to", "peft"])
        == 0
    )
    assert (
        main(
            ["convert", str(whole.run_dir), str(tmp_path / "merged.safetensors"), "--dtype", "fp32"]
        )
        == 0
    )
    assert (
        trained_lora(whole.run_dir, whole).pairs.keys()
        == lora.read_lora(tmp_path / "lora.safetensors", whole.model).pairs.keys()
    )
    assert open_model(tmp_path / "merged.safetensors").metadata["radiance.run"]
    pipelines = [
        radiance.load(whole.run_dir, store="none"),
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

    # Of a base that is another now, nothing is made.
    settings = whole.run_dir / "config.json"
    checkpoint.write_checkpoint(
        tmp_path / "other.safetensors", whole.model, toy_params(whole.model, 1)
    )
    settings.write_text(
        settings.read_text().replace(str(base), str(tmp_path / "other.safetensors"))
    )
    for read in (radiance.load, open_model):
        with pytest.raises(config.ConfigError, match="was trained on another"):
            read(whole.run_dir)


def test_weight_decay_takes_hold_of_both_matrices():
    optimizer = make_optimizer(
        config.Optimizer(weight_decay=0.5, learning_rate=1.0, warmup_steps=0), 10
    )
    adapters = noisy_adapters()
    none = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = jax.jit(optimizer.update)(none, optimizer.init(adapters), adapters)
    jax.tree.map(lambda u, a: np.testing.assert_allclose(u, -0.5 * a, rtol=1e-6), updates, adapters)


@pytest.mark.slow
def test_a_run_over_two_devices(base, tmp_path, data_directory):
    one = lora_run(tmp_path, data_directory, base, "train.steps=4")
    assert train(one) == 4
    two = config.override(one, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    process = command(two, devices=2)
    assert process.returncode == 0, process.output
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(base, tmp_path, data_directory, capsys):
    run = lora_run(tmp_path, data_directory, base, "train.steps=2")
    assert train(run) == 2
    other = tmp_path / "other.safetensors"
    checkpoint.write_checkpoint(other, run.model, toy_params(run.model, 1), "bfloat16")
    with pytest.raises(config.ConfigError, match="on other data .base in data.json"):
        train(config.override(run, [f"init={other}", "train.steps=4"]))
    with pytest.raises(config.ConfigError, match="has a LoRA and no weights"):
        train(config.override(run, [f"init={run.run_dir}", "name=second"]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["lora.rank=4"], "give init=FILE"),
        (
            ["lora.rank=4", "init=x", "optimizer.frozen=single"],
            "lora.target_modules says what is trained",
        ),
        (["lora.target_modules=modulation"], "only matrices of the blocks"),
        (["lora.target_modules=singles"], "only matrices of the blocks"),
        (["lora.alpha=0"], "must be positive"),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(config.ConfigError, match=told):
        config.override(config.Config(), changes)


@pytest.mark.parametrize("parts", [("single/attention", "double/attention"), ("refiner",)])
def test_parts_that_the_model_does_not_have(parts):
    model = toy_model(**SIZES | dict(text_refiner_blocks=0))
    with pytest.raises(
        config.ConfigError,
        match=f"none of the model's matrices is in {parts[-1]}; choose among .*double/image/attention",
    ):
        noisy_adapters(model, config.Lora(rank=2, target_modules=parts))
    noisy_adapters(
        model, config.Lora(rank=2)
    )  # the kind that is named by default and not there does no harm
