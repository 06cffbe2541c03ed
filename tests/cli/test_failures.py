"""How commands fail: one line and code 2, a report and code 70, or quietly when nobody reads."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from radiance.base.errors import CheckpointError
from radiance.cli import COMMANDS, main, report

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


@pytest.mark.parametrize("arguments", [[], ["nonsense"], *([verb] for verb in VERBS)])
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


def test_seeds_of_several_ranges(capsys):
    from radiance.cli.arguments import parse_seeds

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
