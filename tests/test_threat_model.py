"""The threat model: every claim has a test that exists, and lower bounds exclude known holes."""

import ast
import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_every_claim_names_a_test_that_exists():
    text = (ROOT / "docs" / "threat_model.md").read_text("utf-8")
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and line != "| claim | test |"
    ]
    assert len(rows) > 10
    for row in rows:
        match = re.fullmatch(r"\| .+\. \| `(tests/.+\.py)::(\w+)` \|", row)
        assert match, row
        tree = ast.parse((ROOT / match[1]).read_text("utf-8"))
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert match[2] in names, row


def test_lower_bounds_exclude_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    requirements = {requirement.name: requirement for requirement in map(Requirement, lines)}
    last_versions_with_holes = {
        "fsspec": "2026.4.0",
        "pillow": "12.3.0",
        "sentencepiece": "0.2.0",
        "pyarrow": "14.0.0",
    }
    for name, version in last_versions_with_holes.items():
        assert version not in requirements[name].specifier, name
