"""Folders of pictures, one per prompt, named by its id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """The pictures of one model. files: by id of the prompt."""

    name: str
    files: dict[str, Path]

    def stamp(self, key: str) -> str:
        """A short text that changes with the file."""
        stat = self.files[key].stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def load(self, key: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return read_image(self.files[key])

    def size(self, key: str) -> tuple[int, int]:
        """(width, height), from the file's header."""
        from PIL import Image

        with opening(self.files[key]), Image.open(self.files[key]) as image:
            return image.size


class opening:
    """Name the file in what Pillow raises."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Pillow has a SyntaxError of its own for broken PNGs and a DecompressionBombError for enormous ones.
        if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
            raise ValueError(f"{self.file} is not a readable image: {error}") from error


def read_image(file: Path) -> np.ndarray:
    """uint8 [H, W, 3] of an image file. ValueError names it if it cannot be read."""
    from PIL import Image

    with opening(file), Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def find_images(name: str, folder: Path, ids: Iterable[str]) -> ImageSet:
    """The pictures of `ids` in a folder and the folders in it. An id may have its file's suffix, as ``0001.jpg``.

    ValueError says how many are missing, and which, or which id has two.
    """
    by_stem: dict[str, list[Path]] = {}
    by_name: dict[str, list[Path]] = {}
    for file in folder_images(folder):
        by_stem.setdefault(file.stem, []).append(file)
        by_name.setdefault(file.name, []).append(file)
    found = by_name | by_stem  # an id with a suffix that was drawn here is a stem: 0001.jpg.png
    ids = list(ids)
    missing = [i for i in ids if i not in found]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(ids)} images, the first {missing[0]}.png; a folder of images needs "
            "one for every prompt, named by its id"
        )
    twice = next((i for i in ids if len(found[i]) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{folder} has {len(found[twice])} images for {twice!r}: {found[twice][0]}, {found[twice][1]}, …"
        )
    return ImageSet(name, {i: found[i][0] for i in ids})


def check_sizes(sets: Sequence[ImageSet], reference: ImageSet) -> None:
    """ValueError unless every picture has the size of the reference's for the same prompt."""
    for images in sets:
        for key in reference.files:
            mine, theirs = images.size(key), reference.size(key)
            if mine != theirs:
                raise ValueError(
                    f"{images.files[key]} has {mine[0]} × {mine[1]} pixels and {reference.files[key]} "
                    f"{theirs[0]} × {theirs[1]}; pairs are compared at one size"
                )


def folder_images(folder: Path) -> list[Path]:
    """All pictures of a folder and the folders in it, sorted; ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return files


def real_images(folder: Path, ids: Iterable[str] | None) -> list[Path]:
    """All pictures of a folder, or those of `ids`. ValueError as of `folder_images` and `find_images`."""
    return folder_images(folder) if ids is None else list(find_images("", folder, ids).files.values())
