import ctypes
import os
import subprocess
import sys

import pytest

from radiance.distributed import environment


def test_settings_of_the_user_have_precedence(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304 --other")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    # A path for which the driver of an NVIDIA GPU exists.
    monkeypatch.setattr(
        environment,
        "Path",
        lambda path: type("Path", (), {"exists": lambda _: True, "expanduser": lambda _: path})(),
    )
    environment.prepare_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1"
    tpu_flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert tpu_flags[:2] == ["--xla_tpu_scoped_vmem_limit_kib=98304", "--other"]
    assert len(tpu_flags) == len(environment.TPU_FLAGS) + 1
    assert os.environ["XLA_FLAGS"].split() == list(environment.GPU_FLAGS)
    environment.prepare_environment(multi_process=True)
    assert os.environ["XLA_FLAGS"].split() == [*environment.GPU_FLAGS, *environment.MULTI_CPU_FLAGS]
    before = dict(os.environ)
    environment.prepare_environment()
    assert dict(os.environ) == before


@pytest.mark.parametrize("accelerator", [None, *environment.ACCELERATOR_PATHS])
def test_kernels_are_optimized_little_only_without_an_accelerator(accelerator, monkeypatch):
    def make_path(name):
        methods = {"exists": lambda _: name == accelerator, "expanduser": lambda _: name}
        return type("Path", (), methods)()

    monkeypatch.setattr(environment, "Path", make_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.prepare_environment()
    flags = os.environ["XLA_FLAGS"].split()
    assert (flags == list(environment.CPU_FLAGS)) == (accelerator is None)


@pytest.mark.parametrize("device", ["h200", "v5p"])
def test_programs_for_absent_accelerators_are_optimized_as_usual(device, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    for name in environment.LIBTPU_OFFLINE_ENV:
        monkeypatch.setenv(name, "1")
    environment.prepare_plan_environment(device, 1)
    environment.prepare_environment()
    levels = [flag for flag in os.environ["XLA_FLAGS"].split() if "optimization_level" in flag]
    assert levels == list(environment.ACCELERATOR_PLAN_FLAGS)


@pytest.mark.parametrize(
    ("flags", "is_valid"),
    [
        ((*environment.GPU_FLAGS, *environment.MULTI_CPU_FLAGS, *environment.CPU_FLAGS), True),
        ((*environment.GPU_FLAGS, "--xla_gpu_no_such_flag=on"), False),
    ],
)
def test_xla_knows_all_flags(flags, is_valid):
    """XLA ends a process at the first unknown flag; it knows those for GPUs on any machine."""
    process = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
        capture_output=True,
        text=True,
    )
    assert (process.returncode == 0) == is_valid, process.stderr


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_programs_compile_with_the_flags_for_tpus(topology):
    """The program has a collective: some flags parse, but are errors on another kind of TPU."""
    pytest.importorskip("libtpu", reason="libtpu, which knows the flags, is not installed.")
    script = f"""
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
topology = topologies.get_topology_desc(platform="tpu", topology_name="{topology}")
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=topology.devices)
sharding = NamedSharding(mesh, P("x"))
product = jax.jit(lambda x, w: x @ w, out_shardings=sharding)
x, w = (jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=sharding) for _ in range(2))
product.lower(x, w).compile()
"""
    variables = os.environ | environment.LIBTPU_OFFLINE_ENV
    # libtpu does not know all flags of XLA.
    variables |= {"LIBTPU_INIT_ARGS": " ".join(environment.TPU_FLAGS), "XLA_FLAGS": ""}
    process = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc is not the allocator here."
)
def test_freed_memory_is_retained():
    """Allocating the same array again causes no page faults."""
    script = """
import resource, sys
import numpy as np
from radiance.distributed.environment import retain_freed_memory
if sys.argv[1] == "retain":
    retain_freed_memory()
np.ones(1 << 25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    retained_faults, default_faults = (
        int(subprocess.check_output([sys.executable, "-c", script, mode]))
        for mode in ("retain", "default")
    )
    assert retained_faults < 100
    assert default_faults > 5000
