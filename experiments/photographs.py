"""Memorize sixteen photographs in many formats, beside files that are broken on purpose.

    python experiments/photographs.py          (needs pip install 'radiance[photographs]')

This tests everything between a folder and an image: formats, profiles, orientation, aspect-ratio
buckets, captions, broken files, training and sampling. It writes photographs that ship with
scikit-image, scikit-learn and matplotlib into runs/photographs/images and trains on them. Then it
samples every caption at the size of its training image. runs/photographs/pairs.png shows the pairs
side by side with their PSNR.

1,620 steps on 2 CPU cores, interrupted and not timed: median PSNR 20.9 dB:
experiments/results/photographs.md.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from radiance import config as c
from radiance.base.images import make_contact_sheet, resize_and_crop, save_png
from radiance.cli import main as radiance
from radiance.data.datasets import open_source
from radiance.data.sampler import BatchSampler
from radiance.data.unusable import UnusableError
from radiance.loading import load

CAPTIONS = {
    "astronaut": "an astronaut in an orange suit, smiling before a flag",
    "brick": "a wall of bricks, grey",
    "camera": "a man with a camera on a tripod, in black and white",
    "chelsea": "a ginger cat looking at you",
    "china": "a temple in China behind trees",
    "coffee": "a cup of coffee on a wooden table, with a spoon",
    "coins": "rows of old coins on a dark ground",
    "flower": "an orange flower, close",
    "grace_hopper": "a portrait of an admiral in uniform",
    "grass": "blades of grass, grey",
    "gravel": "a ground of gravel, grey",
    "hubble_deep_field": "many galaxies on black",
    "moon": "the cratered surface of the moon",
    "motorcycle_left": "a motorcycle in a workshop",
    "retina": "the retina of an eye, orange and round",
    "rocket": "a rocket starting at night",
}
VARIANTS = {
    "toy": [
        "model.hidden=64",
        "model.heads=2",
        "data.resolution=32",
        "data.bucket_step=16",
        "train.steps=40",
        "train.sample_every=40",
    ],
}


def config() -> c.Config:
    return c.Config(
        name="photographs",
        model=c.Model(
            patch=16,
            hidden=192,
            heads=6,
            rope_axes=(8, 12, 12),
            double_blocks=2,
            single_blocks=4,
            mlp_ratio=3,
            text_dim=64,
            approximator_hidden=64,
            approximator_depth=2,
            nerf_hidden=16,
            nerf_mlp_ratio=2,
            nerf_depth=2,
            nerf_freqs=4,
            prediction="x0",
        ),
        compute=c.Compute(dtype="float32", head_chunk_size=0),
        text=c.Text(encoder="hash", max_length=16),
        data=c.Data(
            source="folder",
            path="runs/photographs/images",
            validation_fraction=0.03,
            resolution=128,
            bucket_step=32,
            batch_size=8,
            caption_dropout=0.0,
            max_broken_fraction=0.5,
            num_threads=2,
        ),
        flow=c.Flow(timestep_distribution="parabola"),
        optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=50, ema_decays=(0.99,)),
        train=c.Train(
            steps=1620,
            log_every=25,
            validate_every=1620,
            sample_every=500,
            checkpoint_every=250,
            sample_prompts=tuple(CAPTIONS.values()),
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=1.0, batch_size=16),
    )


def write_photographs(folder: Path) -> None:
    """Write the photographs in different formats, with captions and broken files.

    An existing folder stays as it is: a resumed run needs the same files, and a profile contains
    the time of its creation.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    _write_images(temporary)
    _write_unusable_files(temporary)
    temporary.rename(folder)


def _write_images(folder: Path) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6  # displayed after a quarter turn
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, caption in CAPTIONS.items():
        image = load_photograph(name)
        path = folder / f"{name}.png"
        match name:
            case "chelsea":
                turned = image.transpose(Image.Transpose.ROTATE_90)
                turned.save(path.with_suffix(".jpg"), quality=95, exif=rotated)
            case "coffee":
                image.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
            case "moon":
                sixteen_bit = np.asarray(image.convert("L")).astype(np.uint16) * 257
                Image.fromarray(sixteen_bit).save(path.with_suffix(".tif"))
            case "astronaut":
                image.save(path.with_suffix(".webp"), quality=95, icc_profile=profile)
            case "rocket":
                image.quantize(256).save(path)
            case "coins":
                image.save(path.with_suffix(".bmp"))
            case "flower":
                image.convert("RGBA").save(path)
            case _:
                image.save(path)
        path.with_suffix(".txt").write_text(caption + "\n")

    # The hash of this name puts it into the validation split, as the only image there.
    copy = load_photograph("chelsea").resize((300, 200))
    copy.save(folder / "chelsea_again.webp", quality=60)
    (folder / "chelsea_again.txt").write_text(CAPTIONS["chelsea"] + "\n")


def _write_unusable_files(folder: Path) -> None:
    file = io.BytesIO()
    load_photograph("china").save(file, "JPEG")
    contents = {
        "cut_short.jpg": file.getvalue()[: len(file.getvalue()) // 2],
        "not_found.jpg": b"<!DOCTYPE html><title>404</title>",
        "empty.png": b"",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 640 480\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("an image that is not there\n")
    rocket = load_photograph("rocket")
    rocket.resize((64, 42)).save(folder / "too_small.png")
    (folder / "too_small.txt").write_text("a small rocket\n")
    rocket.resize((900, 150)).save(folder / "too_long.png")
    (folder / "too_long.txt").write_text("a long rocket\n")
    rocket.save(folder / "no_caption.png")


def load_photograph(name: str) -> Image.Image:
    """Load a photograph from the package that ships it."""
    try:
        import matplotlib
        import skimage
        import sklearn
    except ImportError as error:
        raise SystemExit(
            f"The photographs ship with other packages ({error}): "
            "pip install 'radiance[photographs]'."
        ) from None
    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets/images",
        Path(matplotlib.__file__).parent / "mpl-data/sample_data",
    )
    paths = (path for folder in folders for path in sorted(folder.glob(f"{name}.*")))
    return Image.open(next(p for p in paths if p.suffix in (".png", ".jpg"))).convert("RGB")


def measure_psnr(run: c.Config) -> dict[str, float]:
    """Sample every caption, write pairs.png, and return the PSNR in dB of each photograph."""
    source, pipeline = open_source(run.data, "train"), load(run.run_dir)
    assignment = BatchSampler(source, run.data, run.train.seed).assignment
    sheet, psnr = [], {}
    for index in range(len(source)):
        width, height = assignment.bucket_sizes[assignment.bucket_indices[0, index]]
        try:
            real = resize_and_crop(source.load_image(index, (width, height)), width, height)
        except UnusableError:
            continue
        caption = source.captions(index)[0]
        generated = pipeline([caption], seeds=[0], width=width, height=height)[0].image
        error = np.mean((np.asarray(generated, np.float64) - real) ** 2)
        psnr[Path(source.name(index)).stem] = float(10 * np.log10(255**2 / error))
        sheet += [Image.fromarray(real), generated]
    save_png(run.run_dir / "pairs.png", make_contact_sheet(sheet, columns=8), {"psnr": psnr})
    return psnr


def main(changes: list[str]) -> int:
    """Write the photographs, train on them and measure; return the exit code."""
    run = c.override(config(), changes)
    write_photographs(Path(run.data.path))
    code = radiance(["train", __file__, *changes])
    if code == 0:
        psnr = measure_psnr(run)
        print("PSNR in dB: " + ", ".join(f"{name} {value:.1f}" for name, value in psnr.items()))
        values = list(psnr.values())
        print(f"Median {np.median(values):.1f} dB, minimum {min(values):.1f} dB.")
        print(f"The pairs are in {run.run_dir / 'pairs.png'}.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
