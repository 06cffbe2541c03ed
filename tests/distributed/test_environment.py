import ctypes
import os
import subprocess
import sys

import pytest

from radiance.distributed import environment


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304 --other")
    monkeypatch.setattr(
        environment,
        "Path",
        lambda path: type("Path", (), {"exists": lambda _: True, "expanduser": lambda _: path})(),
    )
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.prepare_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    tpu = os.environ["LIBTPU_INIT_ARGS"].split()
    assert tpu[:2] == ["--xla_tpu_scoped_vmem_limit_kib=98304", "--other"]
    assert len(tpu) == len(environment.TPU_FLAGS) + 1
    assert os.environ["XLA_FLAGS"].split() == list(environment.GPU_FLAGS)
    environment.prepare_environment(multi_process=True)
    assert os.environ["XLA_FLAGS"].split() == [*environment.GPU_FLAGS, *environment.MULTI_CPU_FLAGS]
    before = dict(os.environ)
    environment.prepare_environment()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("flags", "good"),
    [
        ((*environment.GPU_FLAGS, *environment.MULTI_CPU_FLAGS), True),
        ((*environment.GPU_FLAGS, "--xla_gpu_no_such_flag=on"), False),
    ],
)
def test_flags_of_xla_parse(flags, good):
    """XLA ends a process at the first flag that it does not know; it knows those for GPUs everywhere too."""
    variables = os.environ | {"XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == good, done.stderr


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_flags_for_tpus_compile(topology):
    """A program with a collective: some flags parse, and are refused where it is compiled for another kind of TPU."""
    pytest.importorskip(
        "libtpu", reason="libtpu, which knows the flags for TPUs, is not installed."
    )
    script = f"""
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
whole = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("x")))
x, w = (jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=NamedSharding(mesh, P("x"))) for _ in range(2))
whole.lower(x, w).compile()
"""
    variables = (
        os.environ
        | environment.LIBTPU_OFFLINE_ENV
        | {"LIBTPU_INIT_ARGS": " ".join(environment.TPU_FLAGS), "XLA_FLAGS": ""}
    )  # it does not know all of XLA's
    done = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc is not the allocator here."
)
def test_memory_is_kept():
    """Page faults of an array that is made and freed again and again: once kept, none."""
    script = """
import resource, sys
import numpy as np
from radiance.startup import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
np.ones(1 << 25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", script, way])) for way in ("keep", "not")
    )
    assert kept < 100
    assert given_back > 5000
