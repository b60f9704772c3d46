"""Users' images in: any format PIL knows, refused in one line when it is broken, not one, or too large to decode."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmrecipes.errors import UserError, one_line

MAX_PIXELS = 100_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A user's image as PIL RGB: upright (EXIF), without palette or alpha (laid on white), 8 bits, from any PIL format.
    Raises UserError when it is missing, a directory, not an image, cut off, or over 100 megapixels (told from its header).
    >>> load_image(rows[0]["image"]).mode
    'RGB'
    """
    if isinstance(source, Image.Image):
        image, path = source, "the image"
    else:
        path = Path(source).expanduser()
        if path.is_dir() or not path.exists():
            what = "a directory, not an image" if path.is_dir() else "no such image"
            raise UserError(f"{path}: {what}; give the path of a PNG, JPEG or WebP file")
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as e:
            raise UserError(f"{path}: more than 100 megapixels ({one_line(e, 80)}); scale it down first") from e
        except Exception as e:  # UnidentifiedImageError, and what decoders raise on a broken header
            raise UserError(f"{path}: not an image that PIL can read; give a PNG, JPEG or WebP file") from e
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{path}: {image.width} x {image.height} px is more than 100 megapixels; scale it down first")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits: PIL's own conversion would clip them to white
            values = np.asarray(image, dtype=np.float32)
            top = 65535 if image.mode.startswith("I;16") else max(float(values.max(initial=0)), 1.0)
            image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ... on broken data
        raise UserError(f"{path}: truncated or corrupted ({one_line(e, 80)}); get a fresh copy") from e


def load_images(folder: str | Path) -> list[tuple[str, Image.Image]]:
    """The images in `folder` itself, sorted by name: [(file name, RGB image)]. Warns of files that are images and cannot be
    read, and leaves them out. UserError where none is left.
    >>> rows[0]["image"].save(folder / "a.png")
    >>> [name for name, _ in load_images(folder)]
    ['a.png']
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a folder of images")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    found, skipped = [], []
    for file in files:
        try:
            found.append((file.name, load_image(file)))
        except UserError as e:
            skipped.append(str(e))
    if not found:
        raise UserError(skipped[0] if skipped else f"{folder}: no images in it; put PNG, JPEG or WebP files there")
    if skipped:
        warnings.warn(f"{len(skipped)} of {len(files)} images are left out: {'; '.join(skipped[:5])}", stacklevel=2)
    return found
