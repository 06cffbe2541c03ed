"""The command line: results, and one sentence for each error."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import radiance
from radiance import config
from radiance.cli import COMMANDS, main, output
from radiance.cli.inspect import load_data_config
from radiance.config.experiments import load_experiment
from radiance.data.datasets import open_source
from radiance.distributed import hosts
from tests.helpers.toy_files import PIXELS, published, save
from tests.helpers.toy_folders import fill
from tests.helpers.toy_runs import PLAIN, toy_run, train

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_directory):
    run = toy_run(tmp_path_factory.mktemp("cli"), data_directory, "train.steps=2", **PLAIN)
    assert train(run) == 2
    return run.run_dir


def read_error(capsys, *arguments) -> str:
    """The one line on stderr of a command that fails."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("radiance: ")
    return lines[0]


def test_help_comes_without_jax():
    """JAX takes seconds to import, and reads the variables that `prepare_environment` sets."""
    script = """
import sys
from radiance.cli import main
try: main(['--help'])
finally: print('jax' in sys.modules, 'numpy' in sys.modules)
"""
    assert (
        subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()[-1]
        == "False False"
    )


@pytest.mark.parametrize("verb", [command.__name__.rpartition(".")[2] for command in COMMANDS])
def test_the_help_of_every_verb_ends_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text, _, examples = capsys.readouterr().out.partition("examples:\n")
    assert "usage: radiance" in text
    lines = examples.splitlines()
    assert 2 <= len(lines) <= 3
    assert all(line.startswith(f"  radiance {verb} ") for line in lines)


def test_the_version_is_printed_without_jax():
    script = """
import sys
from radiance.cli import main
try: main(['--version'])
finally: print('jax' in sys.modules)
"""
    output_text = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output_text.splitlines() == [f"radiance {radiance.__version__}", "False"]


def test_verify():
    """As users run it: with the compiler's optimizations, which tests disable."""
    user = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [
        sys.executable,
        "-m",
        "radiance",
        "verify",
        str(GOLDEN / "radiance_linear_head.safetensors"),
    ]
    done = subprocess.run(command, env=user, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "velocity" in done.stdout


def test_verify_fails_on_another_result(capsys, tmp_path):
    from safetensors.numpy import load_file, save_file

    from radiance.weights.opening import open_tensors

    tensors = load_file(GOLDEN / "chroma_latent.safetensors")
    tensors["velocity"] = tensors["velocity"] * 1.001
    save_file(
        tensors,
        tmp_path / "off.safetensors",
        open_tensors(GOLDEN / "chroma_latent.safetensors").metadata,
    )
    assert main(["verify", str(tmp_path / "off.safetensors")]) == 1
    assert "TOO FAR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "number"),
    [("out.safetensors", signal.SIGTERM), ("out.gguf", signal.SIGINT), ("out", signal.SIGTERM)],
)
def test_a_stopped_conversion_leaves_nothing(tmp_path, out, number):
    slow = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from radiance.cli import main
from radiance.weights import conversion_report
find_network_part = conversion_report.find_network_part
conversion_report.find_network_part = lambda name: time.sleep(0.2) or find_network_part(name)
sys.exit(main(["convert", *sys.argv[1:]]))
"""
    save(tmp_path / "in.safetensors", published(PIXELS), PIXELS)
    arguments = [
        tmp_path / "in.safetensors",
        tmp_path / out,
        "--to",
        {".gguf": "gguf", "": "torch"}.get(Path(out).suffix, "native"),
    ]
    command = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out*.part")):
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(number)
    errors = command.communicate(timeout=60)[1]
    expected = {signal.SIGTERM: (143, ""), signal.SIGINT: (130, "radiance: stopped by Ctrl-C.")}[
        number
    ]
    assert (command.returncode, errors.strip()) == expected, errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_sample(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten one\n\nthe digit 2\n")
    out = tmp_path / "out"
    assert (
        main(
            [
                "sample",
                str(trained),
                "guidance_scale=1",
                "--prompts",
                str(prompts),
                "--seeds",
                "0-1,7",
                "--size",
                "12x8",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    files = sorted(p.name for p in out.iterdir())
    assert files == [
        "00000_seed0.png",
        "00000_sheet.png",
        *(f"{i:05d}_seed{s}.png" for i, s in enumerate([1, 7, 0, 1, 7], 1)),
    ]
    image = Image.open(out / "00005_seed7.png")
    assert image.size == (12, 8)
    assert image.text["prompt"] == "the digit 2"
    assert "params" not in image.text["model"]
    assert np.asarray(image).std() > 0


def test_no_contact_sheet_of_many_images_is_made(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output, "MAX_SHEET_IMAGES", 1)
    assert (
        main(
            [
                "sample",
                str(trained),
                "guidance_scale=1",
                "--prompt",
                "the digit 2",
                "--seeds",
                "0-1",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000_seed0.png",
        "00001_seed1.png",
    ]
    assert "2 images of 2 are in" in capsys.readouterr().out


def test_sample_from_an_image(capsys, trained, tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 12, 3)).astype(np.uint8))
    mask = Image.new("L", (12, 9))
    mask.paste(255, (4, 0, 12, 9))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    command = [
        "sample",
        trained,
        "guidance_scale=1",
        "--prompt",
        "a one",
        "--image",
        tmp_path / "image.png",
        "--mask",
        tmp_path / "mask.png",
    ]
    assert main([str(part) for part in [*command, "--out", tmp_path / "out"]]) == 0
    sample = Image.open(tmp_path / "out" / "00000_seed0.png")
    changed = np.asarray(sample, int) - np.asarray(image)
    assert not changed[:, :4].any()
    assert changed[:, 4:].any()
    assert json.loads(sample.text["start"])["strength"] == 1
    assert "give --image FILE too" in read_error(
        capsys, *command[:5], "--strength", "0.5", "--out", tmp_path / "other"
    )
    assert "strength=2.0 must be" in read_error(
        capsys, *command, "--strength", "2", "--out", tmp_path / "other"
    )
    assert (
        "mask has 12×8 pixels"
        in (
            mask.resize((12, 8)).save(tmp_path / "mask.png"),
            read_error(capsys, *command, "--out", tmp_path / "other"),
        )[1]
    )
    (tmp_path / "mask.png").write_text("no image")
    assert "mask.png cannot be used: not an image." in read_error(
        capsys, *command, "--out", tmp_path / "other"
    )


def test_changes_may_follow_flags(trained, tmp_path):
    """As in the README; and samples come from the chosen weights."""
    pixels = {}
    for weights in ("ema=0.9", "params"):
        out = tmp_path / weights
        command = [
            "sample",
            str(trained),
            "--prompt",
            "a handwritten seven",
            "--size",
            "8x8",
            "--out",
            str(out),
            f"weights={weights}",
            "guidance_scale=3",
        ]
        assert main(command) == 0
        image = Image.open(out / "00000_seed0.png")
        assert image.text["model"].endswith(weights)
        assert '"guidance_scale": 3.0' in image.text["settings"]
        pixels[weights] = np.asarray(image, int)
    assert np.abs(pixels["params"] - pixels["ema=0.9"]).max() > 0


def test_samples_are_added_to_a_folder(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sample", str(trained), "guidance_scale=1", "--prompt", "one", "--seeds", "4-5"]
    assert main(command) == 0
    assert "2 images and 00000_sheet.png are in samples." in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("samples").iterdir()}
    assert main([*command, "weights=params"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in Path("samples").iterdir()) == [
        *("00000_seed4.png", "00000_sheet.png", "00001_seed5.png"),
        *("00002_seed4.png", "00002_sheet.png", "00003_seed5.png"),
    ]
    jobs = [output.SampleJob(index, "one", 4) for index in range(6)]
    assert output.OutputFolder(Path("samples"), 6, num_hosts=2).find_pending(jobs[1::2])
    with pytest.raises(config.ConfigError, match="several hosts cannot add to them"):
        output.OutputFolder(Path("samples"), 6, num_hosts=2).find_pending(jobs[::2])


@pytest.mark.parametrize("caption_file", ["photo.txt", "metadata.jsonl"])
def test_samples_are_not_mixed_with_training_data(caption_file, capsys, trained, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "photo.jpg")
    (tmp_path / caption_file).write_text("one")
    command = ["sample", trained, "--prompt", "one"]
    assert f"is a data set (it contains {caption_file})" in read_error(
        capsys, *command, "--out", tmp_path
    )
    assert "contains photo.jpg" in read_error(capsys, *command, "--folder", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_data_set_is_continued(capsys, trained, tmp_path, data_directory):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "samples"
    prompts.write_text(
        "\ufeffa handwritten one\nthe digit 2\n", "utf-8"
    )  # as editors on Windows begin a file
    command = [
        "sample",
        str(trained),
        "guidance_scale=1",
        "--prompts",
        str(prompts),
        "--seeds",
        "3-4",
        "--folder",
        str(folder),
    ]
    assert main(command) == 0
    names = [f"{i:05d}_seed{s}" for i, s in enumerate([3, 4, 3, 4])]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}{end}" for name in names for end in (".png", ".txt")
    )
    source = open_source(
        config.Data(
            source="folder",
            path=str(folder),
            cache_dir=data_directory,
            resolution=8,
            validation_fraction=0.0,
        ),
        "train",
    )
    assert [source.captions(i) for i in range(4)] == [("a handwritten one",)] * 2 + [
        ("the digit 2",)
    ] * 2
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    lost = folder / f"{names[1]}.png"
    lost.unlink()
    assert main(command) == 0
    assert lost.read_bytes() == before.pop(lost)[0]
    lost.with_suffix(".txt").write_bytes(before.pop(lost.with_suffix(".txt"))[0])
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    assert main(command) == 0
    assert "All images of" in capsys.readouterr().out
    lost.unlink()
    assert "was sampled with another settings" in read_error(
        capsys, *(part.replace("guidance_scale=1", "guidance_scale=2") for part in command)
    )
    lost.write_bytes((folder / f"{names[0]}.png").read_bytes())
    assert "was started with other prompts" in read_error(
        capsys, *command[:-4], "--seeds", "4-5", "--folder", folder
    )
    assert "(it contains 00002_seed3.txt)" in read_error(
        capsys, *command[:3], "--prompt", "a handwritten one", "--prompt", "3", *command[5:]
    )


def test_experiments_have_dotted_names(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.py").write_text(
        "from radiance import config as c\n\n\ndef config():\n    return c.Config(name='mine')\n"
    )
    (tmp_path / "mine" / "larger.py").write_text(
        "import small\n\nVARIANTS = {'b': ['data.batch_size=8']}\nconfig = small.config\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_experiment("mine.small").name == "mine"
    assert (
        load_experiment("mine.larger:b").data.batch_size
        == load_experiment("mine/larger.py:b").data.batch_size
        == 8
    )  # it imports what lies beside it


def test_experiments(tmp_path):
    run = load_experiment("experiments/quickstart.py")
    assert run.name == "quickstart"
    file = tmp_path / "variants.py"
    file.write_text(
        "from radiance import config as c\n"
        "VARIANTS = {\n"
        "    'none': ['model.modulation=none'],\n"
        "    'shared': ['model.modulation=shared', 'data.batch_size=8'],\n"
        "}\n"
        "\n\ndef config():\n    return c.Config()\n"
    )
    variant = load_experiment(f"{file}:none")
    assert variant.model.modulation == "none"
    assert variant.name == "run-none"
    both = load_experiment(f"{file}:shared:none")  # the later one counts
    assert (both.model.modulation, both.data.batch_size, both.name) == (
        "none",
        8,
        "run-shared-none",
    )
    for name in ("nine", "none:nine"):
        with pytest.raises(config.ConfigError, match="has no variant 'nine': it has none, shared"):
            load_experiment(f"{file}:{name}")
    with pytest.raises(config.ConfigError, match="There is no experiment file"):
        load_experiment("experiments/quickstrat.py")
    with pytest.raises(config.ConfigError, match=r"There is no experiment nothing\.here"):
        load_experiment("nothing.here")


def test_inspect_data(capsys, tmp_path):
    """A folder: skipped images, buckets, captions, near-duplicates, and a list without them."""
    china = Image.fromarray(load_sample_image("china.jpg"))
    images = {
        "a.jpg": china,
        "b.png": china.resize((320, 213)),
        "c.jpg": china.crop((0, 0, 300, 300)),
        "d.png": china.resize((20, 20)),
    }
    images["plain.png"] = Image.new("RGB", (256, 256), "red")
    for name, image in images.items():
        image.save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a temple " * 9)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    (tmp_path / "broken.txt").write_text("a temple")
    (tmp_path / "none.png").write_bytes((tmp_path / "b.png").read_bytes())
    changes = [
        "data.resolution=128",
        "data.batch_size=2",
        "data.validation_fraction=0.0",
        f"data.cache_dir={tmp_path}/.kept",
        "text.max_length=16",
    ]
    assert (
        main(
            [
                "inspect",
                str(tmp_path),
                "--duplicates",
                "--write",
                str(tmp_path / "kept.jsonl"),
                *changes,
            ]
        )
        == 0
    )
    output_text, errors = capsys.readouterr()
    assert not errors
    assert all(len(line) <= 100 for line in output_text.splitlines() if str(tmp_path) not in line)
    for line in (
        r"images +5",
        r"skipped: no caption +1\n  'none.png'",
        r"skipped: too small +1\n  'd.png'",
        r"  256 – 383  3  60.0%  █{50}\n  384 – 511  0   0.0%\n  512 – 767  2  40.0%  █{33}▍\n",
        r"  3:2  3  60.0%  █{50}",
        r"128 × 128 +5 +2 +1\n",
        r"over 16  4  80.0%  █{50}",
        r"truncated: 4 captions \(80.0%\)",
        r"Programs to compile, at most: 1 = 1 bucket × 1 text length \(16 tokens\)",
        r"1 image besides the largest of 1 group\n  'a.jpg' 640×427, 'b.png' 320×213",
        r"Too uniform to compare: 1 image",
        r"Cannot be decoded: 1 image\n  'broken.jpg'",
        r"kept.jsonl lists 3 of the 5 images",
        r"256 +4 +2 *\n192 +5 +1 *\n128 +5 +1 +used here",
    ):
        assert re.search(line, output_text), (line, output_text)
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(line["filename"], line["width"]) for line in lines] == [
        ("a.jpg", 640),
        ("c.jpg", 300),
        ("plain.png", 256),
    ]


def test_inspect_chooses_the_resolution_that_keeps_images(capsys, tmp_path):
    fill(tmp_path, 24, size=(100, 100))
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    (tmp_path / "small.txt").write_text("small")
    command = ["inspect", str(tmp_path), f"data.cache_dir={tmp_path}/.kept"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"\nresolution 96, ", text)
    table = (
        r"kept  left out *\n128 +0 +25 *\n96 +24 +1 +used here\n64 +24 +1 *\n48 +24 +1 *\n32 +25 +0"
    )
    assert re.search(table, text), text
    assert f"radiance inspect EXPERIMENT data.source=folder data.path={tmp_path}" in text
    assert main([*command, "data.resolution=32"]) == 0
    assert re.search(r"\nresolution 32, [^$]*\n32 +25 +0 +used here", capsys.readouterr().out)


def test_inspect_detects_models_and_data_sets(capsys, tmp_path, trained):
    def source(what):
        run = load_data_config(str(what))
        return run and (run.data.source, run.data.path)

    for name in ("images", "tars", "parquets", "mixed"):
        (tmp_path / name).mkdir()
    for name in ("tars/0.tar", "parquets/0.parquet", "mixed/0.tar", "mixed/a.PNG"):
        (tmp_path / name).touch()
    expected = {"images": "folder", "mixed": "folder", "tars": "tar", "parquets": "parquet"}
    expected |= {
        "a.jsonl": "jsonl",
        "tars/0.tar": "tar",
        "tars/*.tar": "tar",
        "parquets/0.parquet": "parquet",
    }
    for name, kind in expected.items():
        assert source(tmp_path / name) == (kind, str(tmp_path / name))
    for model in (
        trained,
        GOLDEN / "radiance_v.safetensors",
        "chroma1-base",
        "missing",
        tmp_path / "missing.safetensors",
    ):
        assert source(model) is None
    assert source("experiments/quickstart.py") == source("experiments.quickstart") == ("digits", "")

    assert main(["inspect", str(trained)]) == 0
    assert "total" in capsys.readouterr().out
    assert "--write is for data" in read_error(capsys, "inspect", trained, "--write", "kept.jsonl")
    assert "data.resolution=8 is for data" in read_error(
        capsys, "inspect", "chroma1-base", "data.resolution=8"
    )
    assert "There is no run directory and no checkpoint missing" in read_error(
        capsys, "inspect", "missing"
    )
    assert "--distance 12 must be between 0 and 11" in read_error(
        capsys, "inspect", tmp_path / "images", "--duplicates", "--distance", 12
    )
    assert "give that too" in read_error(capsys, "inspect", tmp_path / "images", "--distance", 3)


def test_unknown_keys_and_names_are_reported_with_a_suggestion(capsys):
    assert "did you mean 'learning_rate'?" in read_error(
        capsys, "train", "experiments/quickstart.py", "optimizer.learning_rte=1"
    )
    assert "did you mean 'chroma1-radiance'" in read_error(
        capsys, "train", "experiments/quickstart.py", "model=chroma1-radianse"
    )
    assert "did you mean 'parabola'?" in read_error(
        capsys, "train", "experiments/quickstart.py", "flow.timestep_distribution=parabol"
    )
    assert "a whole number is expected" in read_error(
        capsys, "train", "experiments/quickstart.py", "train.steps=many"
    )
    assert "not of the form key=value" in read_error(
        capsys, "train", "experiments/quickstart.py", "faster"
    )
    assert "name one of them" in read_error(
        capsys, "train", "experiments/quickstart.py", "sample.weights=ema=0.5"
    )


def test_sizes_that_do_not_divide_are_reported(capsys):
    assert "does not divide into model.heads=5" in read_error(
        capsys, "train", "experiments/quickstart.py", "model.heads=5"
    )
    assert "complete patches" in read_error(
        capsys, "train", "experiments/quickstart.py", "data.resolution=18"
    )
    assert "optimizer.gradient_accumulation_steps=3 microbatches" in read_error(
        capsys, "train", "experiments/quickstart.py", "optimizer.gradient_accumulation_steps=3"
    )
    assert "there are 1" in read_error(capsys, "train", "experiments/quickstart.py", "mesh.fsdp=3")


@pytest.mark.parametrize(
    ("error", "waits"), [(None, 1), (OSError, 1), (config.ConfigError, 1), (KeyboardInterrupt, 0)]
)
def test_hosts_wait_for_each_other(error, waits, monkeypatch):
    """Also one that has failed, but not one that is stopped; a host alone waits for nobody."""
    from orbax.checkpoint import multihost

    waited = []
    monkeypatch.setattr(
        multihost,
        "get_barrier_sync_fn",
        lambda: lambda key, timeout_ms: waited.append((key, timeout_ms)),
    )
    for count in (2, 1):
        monkeypatch.setattr("jax.process_count", lambda count=count: count)
        with pytest.raises(error) if error else nullcontext(), hosts.wait_for_hosts():
            if error:
                raise error
    assert waited == [("done", hosts.BARRIER_TIMEOUT_MS)] * waits


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "one", "'one': seeds are whole numbers"),
        ("--seeds", "5-3", "'5-3': seeds are whole numbers"),
        ("--size", "12by8", "'12by8': a size is WIDTHxHEIGHT"),
        ("--size", "0x8", "'0x8': a size is WIDTHxHEIGHT"),
    ],
)
def test_values_of_another_form_are_reported_by_argparse(option, value, message, capsys):
    with pytest.raises(SystemExit):
        main(["sample", "MODEL", option, value])
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_captions_of_a_few_images_are_encoded(capsys, tmp_path):
    fill(tmp_path / "images", 3)
    changes = [
        "data.source=folder",
        f"data.path={tmp_path / 'images'}",
        f"data.cache_dir={tmp_path / 'kept'}",
        "data.resolution=8",
        f"text.cache={tmp_path / 'cache'}",
    ]
    main(["encode", "experiments/quickstart.py", *changes, "data.validation_fraction=0"])
    assert "cache: 14 captions encoded" in capsys.readouterr().out  # 3 of images, and prompts
    main(["encode", "experiments/quickstart.py", *changes])  # one image is held out
    assert ": 0 captions encoded" in capsys.readouterr().out


def test_missing_and_wrong_inputs_are_reported(capsys, trained, tmp_path):
    assert "There is no prompt" in read_error(capsys, "sample", trained)
    assert "has 21 tokens, and the limit is 8" in read_error(
        capsys, "sample", trained, "--prompt", "one " * 20
    )
    assert "is not a run directory" in read_error(capsys, "sample", tmp_path, "--prompt", "one")
    assert "give --hosts N too" in read_error(
        capsys, "sample", trained, "--prompt", "one", "--host", "1"
    )
    assert "is not an index of --hosts 2" in read_error(
        capsys, "encode", "experiments/quickstart.py", "text.cache=x", "--host", "2", "--hosts", "2"
    )
    for option in ("--prompts", "--image"):
        missing = read_error(
            capsys, "sample", trained, "--prompt", "one", option, tmp_path / "missing"
        )
        assert (
            "missing cannot be read (No such file or directory): give an existing file." in missing
        )
    suite = read_error(
        capsys, "sample", trained, "--suite", "geneval", "--prompts", tmp_path / "missing"
    )
    assert (
        "missing cannot be read (No such file or directory): give the prompts of suite geneval."
        in suite
    )
    (tmp_path / "file").touch()
    for command in (
        ("sample", trained, "--prompt", "one", "--out", tmp_path / "file" / "images"),
        ("train", "experiments/quickstart.py", f"output={tmp_path / 'file'}"),
        ("evaluate", trained, "--out", tmp_path / "file" / "evaluation.json"),
    ):
        assert f"{tmp_path / 'file'} is a file, so nothing can be written below it" in read_error(
            capsys, *command
        )
    assert "is a folder: give the name of a file" in read_error(
        capsys, "evaluate", trained, "--out", tmp_path
    )
    assert "did you mean 'guidance_scale'" in read_error(
        capsys, "sample", trained, "guidance_scal=2", "--prompt", "one"
    )


def test_unfit_checkpoints_are_reported(capsys, tmp_path, data_directory):
    whole = (GOLDEN / "radiance_v.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-100])
    assert "not a complete safetensors file" in read_error(
        capsys, "verify", tmp_path / "short.safetensors"
    )
    (tmp_path / "foreign.safetensors").write_bytes(b"hello world, this is no checkpoint at all")
    assert "not a complete safetensors file" in read_error(
        capsys, "verify", tmp_path / "foreign.safetensors"
    )
    assert "There is no file" in read_error(capsys, "verify", tmp_path / "missing.safetensors")
    init = f"init={GOLDEN / 'radiance_v.safetensors'}"
    message = read_error(
        capsys,
        "train",
        "experiments/quickstart.py",
        f"output={tmp_path}",
        f"data.cache_dir={data_directory}",
        init,
    )
    assert "does not hold this model" in message
    assert "no checkpoint nowhere" in read_error(
        capsys,
        "train",
        "experiments/quickstart.py",
        f"output={tmp_path / 'b'}",
        f"data.cache_dir={data_directory}",
        "init=nowhere",
    )
