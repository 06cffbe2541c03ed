"""Everything that README and docs show works: code, commands, settings, paths, messages, links.

Python blocks are run in the order of their page, in a folder with a small trained model in
runs/quickstart. A block that begins with `# FILE.py` is written to that file. Commands are parsed
by the parsers of the command line, and their changes are applied to the settings of their
experiment. `<!-- not run: REASON -->` before a block excepts it from being run, not from parsing.
"""

import ast
import importlib.util
import itertools
import re
import shlex
import shutil
import string
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from radiance import config
from radiance.base.settings import Section
from radiance.cli import inspect, parse_arguments
from radiance.cli.evaluate import main as evaluate
from radiance.cli.inspect import main as inspect_main
from radiance.cli.sample import main as sample
from radiance.config.experiments import load_experiment, load_module
from radiance.config.reference import describe_sections, find_sections
from tests.helpers.toy_runs import PLAIN, toy_run, train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "text", "json", "yaml"}
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?(?P<indent> *)```(?P<language>\w*).*\n"
    r"(?P<text>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)
# Commands of other programs: only their place in a page is checked.
OTHER_PROGRAMS = {
    *("cd", "cp", "export", "git", "ls", "mkdir", "mv", "rsync", "unzip"),
    *("gcloud", "gsutil", "kubectl", "llama-quantize", "nvidia-smi", "squeue", "tensorboard"),
}


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Forget the folders of the pages' experiments, whose names others have too."""
    monkeypatch.setattr(sys, "path", [*sys.path])


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    text: str
    is_run: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("language")) + 1
        blocks.append(Block(name_of(page), line, match["language"], code, not match["reason"]))
    return blocks


BLOCKS = {name_of(page): read_blocks(page) for page in PAGES}


def blocks_of(language: str) -> list:
    """Blocks of a language, as parameters with the names of their lines."""
    return [
        pytest.param(block, id=f"{page}:{block.line}")
        for page, blocks in BLOCKS.items()
        for block in blocks
        if block.language == language
    ]


def read_prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def named_file(block: Block) -> str:
    """The file that a block is the content of, or ""."""
    match = re.match(r"# ([\w/.-]+\.py)\n", block.text)
    return match[1] if match else ""


SHOWN_FILES = {named_file(block) for blocks in BLOCKS.values() for block in blocks} - {""}


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_has_a_known_language(page):
    assert {block.language for block in BLOCKS[page]} <= LANGUAGES
    assert len(BLOCKS[page]) * 2 == len(
        re.findall(r"^ *```", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the experiments, and the files whose content pages show."""
    folder = tmp_path_factory.mktemp("docs")
    ignored = shutil.ignore_patterns("*.jpg", "*.png", "results", "__pycache__")
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "golden", folder / "tests" / "golden")
    for block in itertools.chain.from_iterable(BLOCKS.values()):
        if file := named_file(block):
            (folder / file).write_text(block.text)
    return folder


@pytest.fixture(scope="module")
def trained(folder, data_directory):
    """The folder, with a model of two steps in runs/quickstart."""
    changes = ("name=quickstart", "train.steps=2", "data.resolution=16")
    assert train(toy_run(folder / "runs", data_directory, *changes, **PLAIN)) == 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page, blocks in BLOCKS.items() if any(b.language == "python" for b in blocks)]
)
def test_python_blocks_run(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    names, missing = {"__name__": "docs"}, set()
    for block in BLOCKS[page]:
        if block.language != "python":
            continue
        code = compile(block.text, f"{page}:{block.line}", "exec")
        if not block.is_run:
            imports = [
                x for x in ast.parse(block.text).body if isinstance(x, ast.Import | ast.ImportFrom)
            ]
            modules = [x.names[0].name if isinstance(x, ast.Import) else x.module for x in imports]
            packages = {module.partition(".")[0] for module in modules}
            if absent := {name for name in packages if importlib.util.find_spec(name) is None}:
                missing |= absent
                continue
            code = compile(ast.Module(imports, []), page, "exec")
        if file := named_file(block):
            sys.path.insert(0, str(Path(file).parent.resolve()))  # where it may import others
        exec(code, names)
        if "def config(" in block.text:
            Path("shown.py").write_text(block.text)
            check_variants("shown.py")
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} not installed: a block was only compiled")


def check_variants(file: str):
    """Build the config of an experiment and of each of its variants."""
    load_experiment(file)
    for variant in getattr(load_module(file), "VARIANTS", {}):
        load_experiment(f"{file}:{variant}")


@pytest.mark.parametrize("block", blocks_of("sh"))
def test_commands_are_accepted(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    variables = {}
    commands = list(read_commands(block.text))
    assert commands
    for words in commands:
        check_command([string.Template(x).safe_substitute(variables) for x in words], variables)


def read_commands(text: str) -> list[list[str]]:
    """Split a block into commands, at line ends and operators of the shell."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|;&"):
                commands.append(words)
                words = []
            else:
                words.append(word)
        commands.append(words)
    return [words for words in commands if words]


def check_command(words: list[str], variables: dict[str, str]):
    """Fail unless the program would accept a command."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if not words:
        return
    words = [
        part for word in words for part in (word.split() if word in variables.values() else [word])
    ]
    program, *arguments = words
    program = Path(program).name if program.startswith((".venv", "experiments")) else program
    if program == "radiance":
        check_radiance(arguments)
    elif program in ("slurm.sh", "tpu_pod.sh"):
        check_radiance(arguments if program == "slurm.sh" else arguments[2:])
    elif program in ("sbatch", "srun"):
        check_command([x for x in arguments if not x.startswith("--")], variables)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program in ("pip", "python", "pre-commit"):
        check_python(program, arguments)
    else:
        assert program in OTHER_PROGRAMS, f"unknown program {program}"


def check_python(program: str, arguments: list[str]):
    """Fail unless the extras, modules and scripts of a command exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|radiance)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    if program == "python" and arguments[0].startswith("experiments/"):
        assert Path(arguments[0]).is_file()


def check_radiance(words: list[str]):
    """Parse a command, and apply its changes to the settings that it would use."""
    options = parse_arguments(words)
    changes = getattr(options, "changes", [])
    if hasattr(options, "experiment") and options.run is not evaluate:
        if options.experiment in config.MODELS:
            run = config.make_sampling_config(config.Model.from_name(options.experiment))
        else:
            run = load_experiment(options.experiment)
        config.override(run, changes)
    elif options.run is sample:
        config.override(config.Sample(), changes)
        if options.preset:
            config.get_preset(options.preset)
    elif options.run is evaluate:
        run = load_experiment(options.experiment) if options.experiment else config.Config()
        config.override(run, changes)
    elif options.run is inspect_main:
        Path(options.target).suffix or Path(options.target).mkdir(parents=True, exist_ok=True)
        run = inspect.load_data_config(options.target) if changes else None
        config.override(run or config.Config(), changes)
    elif "section" in options:
        find_sections(options.section)


# --- names in the text ----------------------------------------------------------------------------


@cache
def known_names() -> set[str]:
    """All settings and sections."""
    sections = describe_sections()
    return {x.key for section in sections.values() for x in section.settings} | set(sections)


SECTION_NAMES = [
    f for f in config.to_dict(config.Config()) if isinstance(getattr(config.Config(), f), Section)
]
SETTING = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(SECTION_NAMES)})\.[a-z_]+(?:\.[a-z_]+)*)(=[^\s`]+)?"
)
FILE_SUFFIXES = ("py", "json", "jsonl", "safetensors", "gguf", "md", "png", "txt", "yaml", "html")


@pytest.mark.parametrize("page", BLOCKS)
def test_settings_exist(page):
    for code in re.findall(r"`([^`\n]+)`", read_prose(ROOT / page)):
        for name, value in SETTING.findall(code):
            if name.rpartition(".")[2] in FILE_SUFFIXES:
                continue
            assert name in known_names(), f"`{code}`"
            if value and "…" not in value and not value[1:].isupper() and "," not in value:
                check_value(f"{name}{value}")


def check_value(change: str):
    """Fail if a setting does not accept a value by its type; others may have to change with it."""
    try:
        config.override(config.Config(), [change])
    except config.ConfigError as error:
        if re.search("choices are|is expected", str(error)):
            raise


@pytest.mark.parametrize("page", BLOCKS)
def test_paths_exist(page):
    folders = "radiance|tests|experiments|docs|benchmarks|notebooks"
    for code in re.findall(r"`([^`\n]+)`", read_prose(ROOT / page)):
        match = re.fullmatch(rf"((?:{folders})/[\w/.*-]*)(?:::(\w+))?", code)
        if match is None or match[1].startswith("experiments/NAME") or match[1] in SHOWN_FILES:
            continue
        paths = list(ROOT.glob(match[1].rstrip("/")))
        assert paths, code
        if match[2]:
            assert re.search(rf"def {match[2]}\b", paths[0].read_text("utf-8")), code


@pytest.mark.parametrize("page", BLOCKS)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s#]+)", read_prose(ROOT / page)):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


# --- messages -------------------------------------------------------------------------------------


@cache
def read_program_texts() -> str:
    """All texts in the package; what is filled in is "…"."""
    texts = []
    for path in (ROOT / "radiance").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


MESSAGE_STARTS = ("radiance: ", "step 0: ")
MESSAGES = [
    pytest.param(line, id=f"{page}:{block.line}")
    for page, blocks in BLOCKS.items()
    for block in blocks
    if block.language == "text"
    for line in block.text.splitlines()
    if line.startswith(MESSAGE_STARTS)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_program(message):
    """The parts of a message between "…" are texts of the package, in one or several pieces."""
    fragments = [x.strip() for x in message.removeprefix("radiance: ").split("…")]
    texts = read_program_texts()
    assert any(len(x) >= 12 for x in fragments)
    for fragment in fragments:
        assert fragment in texts, fragment


# --- the manifest of Kubernetes -------------------------------------------------------------------


def test_the_job_set_starts_as_many_hosts_as_it_names():
    job_set = yaml.safe_load((ROOT / "experiments/cluster/gke_jobset.yaml").read_text("utf-8"))
    (group,) = job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    _, *words = [*container["command"], *container["args"]]
    words = [word.removeprefix("/data/") if word.endswith(".py") else word for word in words]
    options = parse_arguments([x.replace("$(JOB_COMPLETION_INDEX)", "3") for x in words])
    run = config.override(load_experiment(f"{ROOT}/{options.experiment}"), options.changes)
    assert int(options.hosts) == job["parallelism"] == job["completions"] == run.mesh.data
    assert run.mesh.fsdp == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job_set["metadata"]["name"]
    assert options.coordinator.startswith(f"{name}-{group['name']}-0-0.{name}:")


# --- the generated parts --------------------------------------------------------------------------


def load_script(name: str):
    """Import a script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load_script("hooks")


def test_the_diagram_is_that_of_its_script():
    script = load_script("diagram")
    assert script.OUTPUT.read_text("utf-8") == script.draw_network()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_page_of_settings_has_all_of_them(hooks):
    text = hooks.format_settings()
    for section in find_sections():
        assert f"## {section.name}\n" in text
        for setting in section.settings:
            (row,) = [x for x in text.splitlines() if x.startswith(f"| `{setting.key}`")]
            assert len(re.findall(r"(?<!\\)\|", row)) == 5
            assert setting.meaning.replace("|", "\\|") in row


def test_the_page_of_commands_has_all_arguments(hooks):
    text = hooks.format_commands()
    for words in ("## train\n", "| `--allow-changes NAMES` |", "| `key=value …` |",
                  "radiance config optimizer\n", "`--scale "):  # fmt: skip
        assert words in text
    assert len(re.findall("^## ", text, re.MULTILINE)) == 11


def test_links_that_leave_the_site_become_paths(hooks):
    page = ROOT / "docs" / "data.md"
    text = "[a](glossary.md#terms) [b](../radiance/pipeline.py) ![c](../experiments/quickstart.png)"
    assert hooks.rewrite_links(text, page) == (
        "[a](glossary.md#terms) b (`radiance/pipeline.py`{ .path }) "
        "![c](experiments/quickstart.png)"
    )
    below = ROOT / "docs" / "tutorials" / "page.md"
    assert hooks.rewrite_links("[plans](../../experiments/plans.md)", below) == (
        "[plans](../experiments/plans.md)"
    )
    with pytest.raises(ValueError, match="does not exist"):
        hooks.rewrite_links("[a](missing.md)", page)


def test_the_index_names_pages_with_their_first_paragraph(hooks):
    text = hooks.format_index(["index.md", {"Guides": [{"Memory": "howto/memory.md"}]}])
    lines = text.splitlines()
    assert lines[0] == "# radiance"
    assert "## Guides" in lines
    (line,) = [x for x in lines if x.startswith("- [Plan memory](howto/memory/): ")]
    assert len(line) > 80


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.relative_to(ROOT / "docs").as_posix() in menu, page
