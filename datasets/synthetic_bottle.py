"""Make the small synthetic "bottle" set in the MVTec layout, with exact masks."""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.synthetic_defects import DEFECTS
from datasets.synthetic_scene import bottle, look, photograph, shrink
from utils.errors import UserError
from utils.files import atomic_folder, atomic_write_bytes

COUNTS = {"train/good": 40, "test/good": 10} | {f"test/{defect}": 8 for defect in DEFECTS}
SAMPLES = {"bottle_good.png": None, "bottle_bad.png": "broken_large"}

Picture = NDArray[np.uint8]


def render(seed: tuple[int, ...], defect: str | None = None) -> tuple[Picture, Picture]:
    """Return one picture (320, 320, 3) RGB and its mask (320, 320) of 0 and 255.

    With and without a defect, one seed gives the same bottle, light and noise.
    """
    place, damage, camera = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    view = look(place)
    scene = bottle(place, view)
    region = np.zeros(scene.shape[:2])
    if defect is not None:
        scene, region = DEFECTS[defect](damage, view, scene)
    # A quarter, not a half: a fibre narrower than a pixel still belongs to the mask.
    mask = (shrink(region) >= 0.25).astype(np.uint8) * np.uint8(255)
    return photograph(camera, scene), mask


def encode(picture: Picture) -> bytes:
    """Return the PNG of an RGB picture or a mask."""
    if picture.ndim == 3:
        picture = np.ascontiguousarray(picture[..., ::-1])
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def picture_files(folder: str, number: int, seed: int) -> dict[str, bytes]:
    """Return {path inside the set: bytes} of picture `number` in a folder such as test/good."""
    kind = folder.removeprefix("test/")
    defect = kind if kind in DEFECTS else None
    picture, mask = render((seed, list(COUNTS).index(folder), number), defect)
    files = {f"{folder}/{number:03d}.png": encode(picture)}
    if defect is not None:
        files[f"ground_truth/{defect}/{number:03d}_mask.png"] = encode(mask)
    return files


def write_set(out: Path, seed: int, overwrite: bool = False) -> None:
    """Write the whole set to the folder `out`; replace what is there only if told to."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative, choose 0 or more")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; name a new folder or add --overwrite")
    with atomic_folder(out) as folder:
        for name, count in COUNTS.items():
            for number in range(count):
                for path, data in picture_files(name, number, seed).items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(data)


def write_samples(folder: Path, seed: int) -> None:
    """Write one good and one broken bottle, neither of them in the set, to `folder`."""
    for number, (name, defect) in enumerate(SAMPLES.items()):
        picture, _ = render((seed, len(COUNTS), number), defect)
        atomic_write_bytes(folder / name, encode(picture))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--samples", type=Path, help="folder for two single pictures as well")
    options = parser.parse_args(arguments)
    try:
        write_set(options.out, options.seed, options.overwrite)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.samples is not None:
        write_samples(options.samples, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
