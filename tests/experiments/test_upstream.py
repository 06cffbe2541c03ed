"""Each script on faults of public code runs and prints the effect that the table states."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "upstream"
EFFECTS = {  # the last number of each script, as in the table of README.md
    "union_mask": 0.733,
    "summed_t5_mask": 0.583,
    "float_mask": 0.023,
    "checkpointed_mask": 0.0195,
    "bfloat16_time": 0.372,
    "same_seed": 2.71,
    "dropped_batch": 256,
    "permanent_dropout": 0.653,
}
TORCH = ("float_mask", "checkpointed_mask")


def run_script(name: str, capsys) -> str:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def parse_effect(output: str) -> float:
    return float(re.fullmatch(r"effect = (\S+)", output.splitlines()[-1])[1])


@pytest.mark.parametrize("name", [name for name in EFFECTS if name not in TORCH])
def test_a_fault_is_reproduced(name, capsys):
    assert parse_effect(run_script(name, capsys)) == pytest.approx(EFFECTS[name], rel=0.3)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_a_fault_of_the_installed_package_is_reproduced(name, capsys, monkeypatch):
    """An effect of 0 means that the package was fixed: note it in the table."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    output = run_script(name, capsys)
    assert EFFECTS[name] / 3 < parse_effect(output) < EFFECTS[name] * 3
    assert (
        "0.0e+00 with the same mask as booleans" in output
        or "0.0e+00 without checkpointing" in output
    )


def test_table_lists_every_script_with_its_effect():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"toy_chroma"}
    assert scripts == EFFECTS.keys()
    rows = dict(
        re.findall(
            r"^\| \[(\w+)\]\(\1\.py\) .*\*\*([\d.]+)\*\*",
            (FOLDER / "README.md").read_text("utf-8"),
            re.MULTILINE,
        )
    )
    assert {name: float(number) for name, number in rows.items()} == pytest.approx(
        EFFECTS, rel=0.01
    )
