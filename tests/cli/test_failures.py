"""How commands fail: one line and code 2, a report and code 70, or quietly when nobody reads."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from radiance.base.errors import CheckpointError
from radiance.base.images import save_png
from radiance.cli import COMMANDS, main, report
from radiance.cli.arguments import parse_seeds, read_prompts
from radiance.evaluation.prompt_suites import SUITES

VERBS = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def run_command(*arguments, environment=None, **options) -> subprocess.CompletedProcess:
    """Run a command in its own process, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "radiance", *map(str, arguments)],
        env=os.environ | (environment or {}),
        stderr=subprocess.PIPE,
        timeout=300,
        **{"stdout": subprocess.PIPE} | options,
    )


def fail_with(monkeypatch, capsys, error: BaseException) -> tuple[int, str]:
    """Return the exit code and stderr of a command whose implementation raises an error."""

    def fail(options):
        raise error

    fail.__doc__ = report.main.__doc__
    monkeypatch.setattr(report, "main", fail)
    code = main(["report", "runs/a b"])
    return code, capsys.readouterr().err


# --- errors of the input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("It is damaged: copy it again."), "It is damaged: copy it again."),
        (ImportError("pip install x"), "pip install x"),
        (
            FileNotFoundError(2, "No such file or directory", "a\nb"),
            r"a\\nb cannot be read or written \(No such file or directory\)\.",
        ),
        (
            IsADirectoryError(21, "Is a directory", b"\xff"),
            r"\\udcff cannot be read or written \(Is a directory\)\.",
        ),
        (
            OSError("the bucket does not exist\n  details\x1b[31m"),
            r"the bucket does not exist details\\x1b\[31m",
        ),
        (MemoryError("Unable to allocate 4 TiB"), r".*memory \(Unable to allocate 4 TiB\): use .*"),
    ],
)
def test_errors_of_the_input_are_one_line(monkeypatch, capsys, error, message):
    code, printed = fail_with(monkeypatch, capsys, error)
    assert code == 2
    assert re.fullmatch(f"radiance: (?:{message})\n", printed), printed


def test_a_full_device_is_no_fault(monkeypatch, capsys):
    import jax

    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n x")
    code, printed = fail_with(monkeypatch, capsys, error)
    assert code == 2
    assert printed.count("\n") == 1
    assert "Out of memory allocating 9 bytes" in printed


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], *([verb] for verb in VERBS if verb != "config")]
)
def test_incomplete_command_lines_are_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("radiance")
    assert printed.count("\n") == 1
    assert "--help`" in printed
    assert "key=value" not in printed


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        *(("sample", "--seeds", x) for x in ("0-4294967295", "0-1000000", "-1", "1" * 5000)),
        *(("sample", "--size", x) for x in ("16385", "1x999999999", "1" * 5000, "1e9")),
        *(("sample", "--mesh", x) for x in ("fsdp=99999999", "data=0", "x=1", "fsdp=" + "9" * 99)),
        *(("ablate", "--seeds", x) for x in ("1", "1000000000000", "-3", "1.5")),
        *(("ablate", "--minutes", x) for x in ("nan", "-1", "long")),
        *(("convert", "--modulation-steps", x) for x in ("0", "1" * 30)),
        *(("convert", "--rank", x) for x in ("0", "1" * 30)),
        *(("convert", "--seed", x) for x in ("-1", "4294967296")),
        *(("convert", "--lora", x) for x in ("a:inf", "a:nan", "a:1e999")),
    ],
)
def test_amounts_of_work_have_limits(capsys, verb, option, value):
    with pytest.raises(SystemExit) as end:
        main([verb, "a", "b", f"{option}={value}"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert f"argument {option}: " in printed
    assert printed.count("\n") == 1
    assert len(printed) < 300


def test_seeds_of_several_ranges():
    assert parse_seeds("3,5-7,4294967295") == [3, 5, 6, 7, 4294967295]


# --- faults ---------------------------------------------------------------------------------------


def test_a_fault_is_reported_in_lines_to_copy(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, printed = fail_with(monkeypatch, capsys, ZeroDivisionError("division\nby \udcff"))
    assert code == 70
    lines = printed.splitlines()
    assert len(lines) == 4
    assert "a fault of this program (ZeroDivisionError: division by \\udcff)" in lines[0]
    assert re.search(r"radiance \S+, Python 3\.\S+, jax \S+, jaxlib \S+, numpy", lines[1])
    assert lines[2] == "  radiance report 'runs/a b'"
    (file,) = tmp_path.iterdir()
    assert lines[3] == f"  and the traceback in {file}"
    text = file.read_text("utf-8")
    assert lines[1].strip() in text
    assert "Traceback (most recent call last)" in text
    assert "line" in text and "in fail" in text  # noqa: PT018


def test_a_fault_is_reported_where_no_file_can_be_written(monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    code, printed = fail_with(monkeypatch, capsys, AssertionError())
    assert code == 70
    assert "Traceback (most recent call last)" in printed


# --- streams --------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    assert fail_with(monkeypatch, capsys, KeyboardInterrupt()) == (
        130,
        "radiance: stopped by Ctrl-C.\n",
    )


def test_nothing_is_printed_when_the_reader_has_ended():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run_command("inspect", "chroma1-radiance", stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_output_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = run_command("inspect", "chroma1-radiance", stdout=full)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"No space left on device" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_text_can_be_printed(encoding):
    """Names with bytes that are not UTF-8, and characters that a code page lacks."""
    name = os.fsdecode(b"\xff\xe4 \xe2\x96\x88")
    done = run_command("inspect", name, environment={"PYTHONIOENCODING": encoding})
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"no checkpoint \\udcff\\udce4 " in done.stderr


def test_commands_run_without_standard_streams():
    command = f"{sys.executable} -m radiance inspect chroma1-radiance >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], timeout=300).returncode == 0


@pytest.mark.parametrize("verb", ["train", "report"])
def test_ctrl_c_during_the_start_is_one_line(verb, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(f"import pathlib, time\npathlib.Path({str(tmp_path / 'started')!r}).touch()\n")
    with slow.open("a") as file:
        file.write("time.sleep(60)\n")
    script = "import signal, sys; signal.signal(2, signal.default_int_handler)\n"
    script += "from radiance.cli import main; sys.exit(main(sys.argv[1:]))"
    verb = ["train", slow] if verb == "train" else ["inspect", slow]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, verb)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, "radiance: stopped by Ctrl-C.\n")


# --- files and texts ------------------------------------------------------------------------------


def read_error(capsys, *arguments) -> str:
    """Return the one line on stderr of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


SEPARATORS = "one\u2028line\x85of\fa\vprompt\x1c\n\r\nanother\r\nthird"


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + SEPARATORS.encode())
    assert read_prompts(path) == [*SEPARATORS.split("\n")[:1], "another", "third"]


def test_lines_of_a_prompt_suite_are_json(tmp_path):
    """JSON may contain U+2028 as it is."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85"}\n{"prompt": "c"}\n', "utf-8")
    prompts = SUITES["geneval"].load_prompts("geneval", path, None)
    assert [prompt.prompt for prompt in prompts] == ["a\u2028b\x85", "c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("geneval", '{"prompt": 3}'),
        ("geneval", '{"prompt": "\\ud800"}'),
        ("geneval", '{"prompt": "a\\u0000"}'),
        ("geneval", "null"),
        ("geneval", "[" * 99999),
        ("coco30k", '{"annotations": 3}'),
        ("coco30k", '{"annotations": [{"image_id": 1e400, "caption": "a"}]}'),
        ("coco30k", '{"annotations": [{"image_id": -1, "caption": "a"}]}'),
        ("coco30k", f'{{"annotations": [{{"image_id": 1{"0" * 300}, "caption": "a"}}]}}'),
        ("coco30k", '{"annotations": [{"image_id": 1, "caption": null}]}'),
        ("coco30k", '{"a":' * 99999),
    ],
)
def test_suites_of_another_form_are_reported(capsys, tmp_path, name, content):
    path = tmp_path / "prompts"
    path.write_text(content)
    printed = read_error(capsys, "sample", "m", "--suite", name, "--prompts", path)
    assert len(printed) < 400


@pytest.mark.parametrize("suite", [[], ["--suite", "geneval"], ["--suite", "coco30k"]])
def test_prompt_files_that_cannot_be_read_are_reported(capsys, tmp_path, suite):
    pipe, socket_path, empty = (tmp_path / name for name in ("pipe", "socket", "empty"))
    os.mkfifo(pipe)
    empty.touch()
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(socket_path))
    for path, message in [
        (pipe, "it is a device or a pipe"),
        (socket_path, "it is a device or a pipe"),
        ("/dev/zero", "it is a device or a pipe"),
        ("/dev/null", "it is a device or a pipe"),
        (tmp_path, "Is a directory"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "latin1", "is not UTF-8 text (byte 3)"),
        (empty, "prompt"),
    ]:
        printed = read_error(capsys, "sample", "m", *suite, "--prompts", path)
        assert message in printed
    server.close()


def test_connected_pipes_are_files():
    done = subprocess.run(
        [sys.executable, "-m", "radiance", "sample", "m", "--prompts", "/dev/stdin"],
        input=b"a cat\n",
        capture_output=True,
        timeout=300,
    )
    assert b"no checkpoint m" in done.stderr


def test_large_files_are_not_read(monkeypatch, capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" * 9)
    monkeypatch.setattr("radiance.base.files.MAX_FILE_BYTES", 50)
    assert "it has more than" in read_error(capsys, "sample", "m", "--prompts", path)


def test_a_prompt_with_other_bytes_is_an_error_before_the_model_is_read(capsys):
    printed = read_error(capsys, "sample", "m", "--prompt", os.fsdecode(b"caf\xe9"))
    assert printed == r"radiance: --prompt 'caf\udce9' is not UTF-8 text (character 3): correct it."


def test_too_many_images_are_an_error(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" * 11)
    printed = read_error(capsys, "sample", "m", "--prompts", path, "--seeds", "0-999999")
    assert "more than 10,000,000 images" in printed


def test_names_that_are_not_utf_8_are_no_error(tmp_path):
    """Of folders, in the metadata of images."""
    path = tmp_path / os.fsdecode(b"caf\xe9") / "x.png"
    save_png(
        path, Image.new("RGB", (1, 1)), {"prompt": "a", "model": str(path), "start": [str(path)]}
    )
    assert "caf\ufffd" in Image.open(path).text["model"]


EXPERIMENTS = {
    "missing name": ("def config():\n    return nothing\n", "line 2 of .*NameError"),
    "syntax": ("def config(:\n", "is not valid Python \\(line 1"),
    "NUL": ("x = 1\0", "is not valid Python"),
    "other value": ("def config():\n    return 3\n", "returns int: return a"),
    "no config": ("x = 1\n", "it has no function config"),
    "number": ("config = 3\n", "it has no function config"),
    "arguments": ("def config(a):\n    pass\n", "fails \\(TypeError"),
    "exit": ("raise SystemExit(3)\n", "line 1 of .*SystemExit"),
    "recursion": ("def config():\n    return config()\n", "RecursionError"),
    "field": (
        "from radiance.config import Config\ndef config():\n    return Config(title='a')\n",
        "line 3 of .*TypeError",
    ),
    "variants": (
        "from radiance.config import Config as config\nVARIANTS = {'a': 'train.steps=3'}\n",
        "VARIANTS of .* is not a dictionary",
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("verb", ["train", "plan", "encode"])
def test_experiments_that_fail_are_one_line(capsys, tmp_path, name, verb):
    content, message = EXPERIMENTS[name]
    path = tmp_path / "experiment.py"
    path.write_text(content)
    options = ["--device", "cpu"] if verb == "plan" else []
    assert re.search(message, read_error(capsys, verb, path, *options))


@pytest.mark.parametrize("content", ["SUITE = 3", "SUITES = 3", "SUITES = {'a': 3}", "1/0", ""])
def test_suites_of_ablations_that_fail_are_one_line(capsys, tmp_path, content):
    path = tmp_path / "suite.py"
    path.write_text(content)
    read_error(capsys, "ablate", path)
    read_error(capsys, "ablate", f"{path}:a")


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_one_line(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    os.mkfifo(tmp_path / "pipe")
    for command in (
        *([verb, file] for verb in ("report", "inspect", "verify")),
        *([verb, tmp_path] for verb in ("report", "inspect", "verify")),
        *([verb, tmp_path / "pipe"] for verb in ("report", "inspect", "verify")),
        *([verb, "/dev/null"] for verb in ("report", "inspect", "verify", "train", "encode")),
        *([verb, tmp_path] for verb in ("train", "encode", "ablate", "evaluate")),
        *([verb, file] for verb in ("train", "encode", "ablate", "evaluate")),
        ["convert", file, tmp_path / "out.safetensors"],
        ["convert", tmp_path, tmp_path / "out.safetensors"],
        ["sample", file, "--prompt", "a"],
        ["plan", tmp_path, "--device", "cpu"],
    ):
        assert len(read_error(capsys, *command)) > 25, command


def test_all_missing_inputs_are_named_at_once(capsys):
    changes = ["init=nowhere.safetensors", "data.source=folder"]
    assert main(["train", "experiments/lora.py", *changes]) == 2
    error = capsys.readouterr().err
    for part in ("data.path=LOCATION", "text.file=FILE", "init=nowhere.safetensors does not exist"):
        assert part in error


def test_k_quants_point_to_their_recipe(capsys, tmp_path):
    (tmp_path / "model.safetensors").touch()
    for dtype in ("q4_k", "Q4_K_M", "iq4_xs"):
        command = ["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "out.gguf")]
        assert main([*command, "--dtype", dtype]) == 2
        assert "follow docs/checkpoints.md, section K-quants" in capsys.readouterr().err
