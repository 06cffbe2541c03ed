"""The faults of public code are shown: each script runs, what it shows is of the size that its table says, and the right way shows nothing."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "upstream"
EFFECTS = {  # the script's last number, as the table in README.md has it
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


def shown(name: str, capsys) -> str:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def effect(out: str) -> float:
    return float(re.fullmatch(r"effect = (\S+)", out.splitlines()[-1])[1])


@pytest.mark.parametrize("name", [name for name in EFFECTS if name not in TORCH])
def test_a_fault_is_shown(name, capsys):
    assert effect(shown(name, capsys)) == pytest.approx(EFFECTS[name], rel=0.3)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_a_fault_of_the_installed_package_is_shown(name, capsys, monkeypatch):
    """Its sizes are those of random weights. Where this fails with an effect of 0, the package was mended: say so in the table."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))
    out = shown(name, capsys)
    assert EFFECTS[name] / 3 < effect(out) < EFFECTS[name] * 3
    assert "0.0e+00 with the same mask as booleans" in out or "0.0e+00 without checkpointing" in out


def test_the_table_has_every_script_and_its_number():
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
