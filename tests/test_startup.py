import os
import subprocess
import sys

import pytest

from radiance import startup


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304 --other")
    monkeypatch.setattr(startup, "Path", lambda path: type("Path", (), {"exists": lambda _: True, "expanduser": lambda _: path})())
    monkeypatch.setenv("XLA_FLAGS", "")
    startup.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    tpu = os.environ["LIBTPU_INIT_ARGS"].split()
    assert tpu[:2] == ["--xla_tpu_scoped_vmem_limit_kib=98304", "--other"] and len(tpu) == len(startup.TPU) + 1
    assert os.environ["XLA_FLAGS"].split() == list(startup.GPU)
    startup.prepare(several=True)
    assert os.environ["XLA_FLAGS"].split() == [*startup.GPU, *startup.CPUS]
    before = dict(os.environ)
    startup.prepare()
    assert dict(os.environ) == before


@pytest.mark.parametrize("flags, good", [((*startup.GPU, *startup.CPUS), True), ((*startup.GPU, "--xla_gpu_no_such_flag=on"), False)])
def test_flags_of_xla_parse(flags, good):
    """XLA ends a process at the first flag that it does not know; it knows those for GPUs everywhere too."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == good, done.stderr


def test_flags_for_tpus_parse():
    pytest.importorskip("libtpu", reason="libtpu, which knows the flags for TPUs, is not installed.")
    script = "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    environment = os.environ | {"LIBTPU_INIT_ARGS": " ".join(startup.TPU), "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
