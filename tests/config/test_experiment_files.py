"""Files of experiments whose code fails, or that return something else, give one sentence."""

import pytest

from radiance.cli import main
from radiance.config import ConfigError
from radiance.config.experiments import load_experiment

HEADER = "from radiance import config as c\n"
CONFIG = HEADER + "def config():\n    return c.Config()\n"
FILES = {
    "no_config": ("x = 1\n", r"it has no function config\(\)"),
    "constant": ("config = 3\n", r"it has no function config\(\)"),
    "nothing": ("def config():\n    pass\n", "returns NoneType: return a"),
    "dict": ("def config():\n    return {}\n", "returns dict: return a"),
    "section": (HEADER + "def config():\n    return c.Model()\n", "returns Model: return a"),
    "argument": ("def config(size):\n    return size\n", r"fails .*TypeError: .*size"),
    "error": ("def config():\n    return 1 / 0\n", r"in line 2 of .*error.py .ZeroDivisionError"),
    "name": (CONFIG + "oops\n", r"in line 4 of .*NameError: name 'oops'"),
    "syntax": ("def config(:\n", r"syntax.py is not valid Python .line 1"),
    "indentation": ("def config():\nreturn 1\n", "is not valid Python"),
    "nul": ("x = '\0'\n", "is not valid Python|ValueError"),
    "exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "recursion": ("def config():\n    return config()\n", "RecursionError"),
    "setting": (HEADER + "def config():\n    return c.Train(steps=0)\n", "train.steps=0 must be"),
    "variants": (CONFIG + "VARIANTS = ['a']\n", "VARIANTS of .* dictionary of lists of changes"),
    "changes": (CONFIG + "VARIANTS = {'a': 'name=b'}\n", "VARIANTS of .* dictionary of lists"),
    "numbers": (CONFIG + "VARIANTS = {'a': [1]}\n", "VARIANTS of .* dictionary of lists"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_experiment(kind, tmp_path):
    text, message = FILES[kind]
    path = tmp_path / f"{kind}.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_experiment(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"x = '\xff'\n", b"\xff\xfe" + "x".encode("utf-16-le")])
def test_files_that_are_no_text(content, tmp_path):
    (tmp_path / "bytes.py").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not valid Python|fails"):
        load_experiment(str(tmp_path / "bytes.py"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", ".a", "a b", "/etc/passwd", "missing.py", "experiments.missing",
             "a\0.py", "-"]
)  # fmt: skip
def test_names_that_are_no_experiment(name):
    with pytest.raises(ConfigError, match="There is no experiment"):
        load_experiment(name)


@pytest.mark.parametrize(
    "text", ["SUITE = 3\n", "SUITES = 3\n", "SUITES = {'a': 1}\n", "SUITE = None\n", "x = 1\n"]
)
def test_files_that_are_no_suite(text, tmp_path, capsys):
    path = tmp_path / "suite.py"
    path.write_text(text)
    assert main(["ablate", str(path), "--table"]) == 2
    error = capsys.readouterr().err
    assert "is not a suite" in error
    assert error.count("\n") == 1
