"""Opening photos and masks, resizing and normalising them, and pairing them by name in a folder."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps

from rurnet import VOID  # noqa: F401  (for all who read masks)

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet, by custom


def open_picture(path):
    """The picture as Pillow opens it, turned upright by its EXIF tag. ValueError names a file that cannot be read."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode == "F":
            raise ValueError("floating-point values of unknown range")
        return picture
    except Exception as error:  # a broken file raises any of a dozen kinds of exception in Pillow
        raise unreadable(path, error) from None


def unreadable(path, error):
    what = error or type(error).__name__
    return ValueError(f"{path}: cannot be read as a picture ({what}); save it again as JPEG or PNG")


def read_photo(path):
    """Any photograph as an RGB picture: grey, palette, transparent, 16-bit."""
    photo = open_picture(path)
    if photo.mode.startswith("I"):  # Pillow would clip 16 bits at 255 instead of scaling them
        photo = Image.fromarray((np.asarray(photo).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    return photo.convert("RGBA" if photo.mode == "P" else "RGB").convert("RGB")


def read_labels(path):
    """The numbers stored in a mask, (H, W). Only a palette's indices count; its colours are for looking at."""
    mask = open_picture(path)
    if mask.mode in ("1", "L", "P") or mask.mode.startswith("I"):
        return np.asarray(mask).astype(np.int32)
    bands = np.asarray(mask.convert("RGBA")).astype(np.int32)
    if (bands[..., :3] != bands[..., :1]).any() or (bands[..., 3] != bands[0, 0, 3]).any():
        colours = np.unique(bands[:: len(bands) // 64 + 1].reshape(-1, 4), axis=0)[:4, :3].tolist()
        raise ValueError(
            f"{path}: holds colours ({', '.join(str(tuple(c)) for c in colours)}, ...) or transparency; a mask holds "
            'one number a pixel, saved as greyscale PNG. See "Your photos" in README.md'
        )
    return bands[..., 0]


def resize(picture, short_side, how=Image.BILINEAR):
    """The picture with its short side at `short_side` pixels, antialiased: for training, testing and prediction.
    A mask of class ids needs `how=Image.NEAREST`."""
    scale = short_side / min(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], how)


def normalise(photo):
    """RGB picture -> float32 (3, H, W)."""
    pixels = (np.asarray(photo, np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass
class Found:
    """The pairs of a folder by split, each (name, photo, mask, read), and its problems. `read()` returns class ids
    (H, W) where a dataset has an encoding of its own; otherwise it is None."""

    layout: str
    names: tuple = ()  # of the classes; empty where the masks decide how many there are
    pairs: dict = field(default_factory=lambda: {split: [] for split in SPLITS})
    problems: list = field(default_factory=list)

    def add(self, split, name, photo, mask, read=None):
        missing = [f"{file}" for file in (photo, mask) if not file.exists()]
        if missing:
            self.problems.append(f"{' and '.join(missing)}: missing; a photo and its mask come together")
        else:
            self.pairs[split].append((name, photo, mask, read))


def has(folder, *names):
    """Whether the folder holds all of these by their exact names. A Mac's disk takes Images/ for images/."""
    return set(names) <= {path.name for path in folder.iterdir()}


def by_stem(folder, problems):
    """{name without ending: path} of the pictures in a folder."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"{path}: has the name of {found[path.stem].name}; give each picture its own name")
            found[path.stem] = path
    return found


def read_list(path, problems):
    """The names in a list, one a line, without a picture's ending."""
    if not path.exists():
        problems.append(f"{path}: missing; the lists for {', '.join(SPLITS)} come together")
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Windows puts a mark before UTF-8
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text; save it as plain text, one name a line")
        return []
    names = [line.strip() for line in text.splitlines() if line.strip()]
    return [name[: name.rindex(".")] if name.lower().endswith(tuple(ENDINGS)) else name for name in names]
