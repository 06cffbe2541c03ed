"""Photographs learned by heart: sixteen real ones in many formats and proportions, and files that are broken on purpose.

    python experiments/photographs.py          (needs pip install 'radiance[photographs]')

A test of everything between a folder and an image: formats, profiles, turns, aspect buckets, captions, broken files, training and sampling. It
writes the photographs that ship with scikit-image, scikit-learn and matplotlib into runs/photographs/images, trains until each
is known by its caption, paints every caption at the shape its image was trained at, and lays the pairs side by side in
runs/photographs/pairs.png with their PSNR.

Run for 1,620 steps, with stops (seed 0, 2 CPU cores shared with other work, 2026-11-26, so that its time says nothing): 17
images are trained on, one of which turns out cut short and is told and passed over; 5 files are left out of them and 1 of the held-out ones,
with their reasons. Painted from their captions the sixteen have a median PSNR of 20.9 dB, from 15.0 (gravel) to 31.0 (moon):
experiments/photographs.jpg. All but the textures are known again at sight; grass and gravel are as rough as they should be and no more, and
the bricks are rows without their bonds. After 1,000 steps it was 15.7 dB. The trainer waited for images in 0.1 % of its time.
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
from radiance.data.decode import UnusableError
from radiance.data.sampler import BatchSampler
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
            patch=16, hidden=192, heads=6, rope_axes=(8, 12, 12), double_blocks=2, single_blocks=4, mlp_ratio=3, text_dim=64,
            approximator_hidden=64, approximator_depth=2, nerf_hidden=16, nerf_mlp_ratio=2, nerf_depth=2, nerf_freqs=4, prediction="x0",
        ),
        compute=c.Compute(dtype="float32", head_chunk_size=0),
        text=c.Text(encoder="hash", max_length=16),
        data=c.Data(
            source="folder", path="runs/photographs/images", validation_fraction=0.03, resolution=128, bucket_step=32, batch_size=8, caption_dropout=0.0,
            max_broken_fraction=0.5, num_threads=2,
        ),
        flow=c.Flow(timestep_distribution="parabola"),
        optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=50, ema_decays=(0.99,)),
        train=c.Train(
            steps=1620, log_every=25, validate_every=1620, sample_every=500, checkpoint_every=250, sample_prompts=tuple(CAPTIONS.values()),
        ),
        sample=c.Sample(solver="euler", steps=30, guidance_scale=1.0, batch_size=16),
    )  # fmt: skip


def write(folder: Path):
    """The photographs, each kept in another way, with their captions, and what a folder of millions has besides; once, for a run that goes
    on needs the same files, and a profile holds the time it was made.
    """
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    _fill(part)
    part.rename(folder)


def _fill(folder: Path):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter
    adobe = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, caption in CAPTIONS.items():
        image = original(name)
        match name:
            case "chelsea":
                image.transpose(Image.Transpose.ROTATE_90).save(
                    folder / f"{name}.jpg", quality=95, exif=turned
                )
            case "coffee":
                image.convert("CMYK").save(folder / f"{name}.jpg", quality=95)
            case "moon":
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(
                    folder / f"{name}.tif"
                )  # 16 bits
            case "astronaut":
                image.save(folder / f"{name}.webp", quality=95, icc_profile=adobe)
            case "rocket":
                image.quantize(256).save(folder / f"{name}.png")
            case "coins":
                image.save(folder / f"{name}.bmp")
            case "flower":
                image.convert("RGBA").save(folder / f"{name}.png")
            case _:
                image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n")

    original("chelsea").resize((300, 200)).save(
        folder / "chelsea_again.webp", quality=60
    )  # whose name holds it out, alone
    (folder / "chelsea_again.txt").write_text(CAPTIONS["chelsea"] + "\n")

    file = io.BytesIO()
    original("china").save(file, "JPEG")
    broken = {
        "cut_short.jpg": file.getvalue()[: len(file.getvalue()) // 2], "not_found.jpg": b"<!DOCTYPE html><title>404</title>", "empty.png": b"",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 640 480\n",
    }  # fmt: skip
    for name, content in broken.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("an image that is not there\n")
    original("rocket").resize((64, 42)).save(folder / "too_small.png")
    (folder / "too_small.txt").write_text("a small rocket\n")
    original("rocket").resize((900, 150)).save(folder / "too_long.png")
    (folder / "too_long.txt").write_text("a long rocket\n")
    original("rocket").save(folder / "no_caption.png")


def original(name: str) -> Image.Image:
    """A photograph as it ships."""
    try:
        import matplotlib
        import skimage
        import sklearn
    except ImportError as error:
        raise SystemExit(
            f"The photographs ship with other packages ({error}): pip install 'radiance[photographs]'."
        ) from None
    places = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images", Path(matplotlib.__file__).parent / "mpl-data/sample_data")  # fmt: skip
    found = next(
        path
        for place in places
        for path in sorted(place.glob(f"{name}.*"))
        if path.suffix in (".png", ".jpg")
    )
    return Image.open(found).convert("RGB")


def pairs(run: c.Config) -> dict[str, float]:
    """PSNR in dB of every learned photograph's caption, painted; both side by side in pairs.png."""
    source, painter = open_source(run.data, "train"), load(run.run_dir)
    order = BatchSampler(source, run.data, run.train.seed)
    sheet, scores = [], {}
    for index in range(len(source)):
        size = order.assignment.bucket_sizes[order.assignment.bucket_indices[0, index]]
        try:
            real = resize_and_crop(source.load_image(index, size), *size)
        except UnusableError:
            continue
        painted = painter([source.captions(index)[0]], seeds=[0], width=size[0], height=size[1])[
            0
        ].image
        error = np.mean((np.asarray(painted, np.float64) - real) ** 2)
        scores[Path(source.name(index)).stem] = float(10 * np.log10(255**2 / error))
        sheet += [Image.fromarray(real), painted]
    save_png(run.run_dir / "pairs.png", make_contact_sheet(sheet, columns=8), {"psnr": scores})
    return scores


def main(changes: list[str]) -> int:
    run = c.override(config(), changes)
    write(Path(run.data.path))
    code = radiance(["train", __file__, *changes])
    if code == 0:
        scores = pairs(run)
        print("PSNR in dB: " + ", ".join(f"{name} {score:.1f}" for name, score in scores.items()))
        print(
            f"Median {np.median(list(scores.values())):.1f} dB, least {min(scores.values()):.1f} dB. Look at {run.run_dir / 'pairs.png'}."
        )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
