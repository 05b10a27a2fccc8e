"""Opening photos and masks, resizing and normalising them, and pairing them by name in a folder."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps

from rurnet import VOID  # noqa: F401  (for all who read masks)
from support.checkpoints import first_line

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # no other: to open an EPS, Pillow runs Ghostscript
SPLITS = ("train", "val", "test")
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet, by custom
warnings.filterwarnings("ignore", module="PIL")  # Pillow's warnings name no file


def open_picture(path, small=False):
    """The picture, upright: `turn` is its EXIF tag, `whole` its size, `pages` how many it has. A `small` JPEG is
    decoded at an eighth of that size. ValueError names a file that cannot be read."""
    try:
        if not Path(path).is_file():
            raise ValueError("not a file")  # reading a named pipe would wait forever
        picture = Image.open(path, formats=FORMATS)
        if picture.mode == "F":
            raise ValueError("floating-point values of unknown range")
        turn, (w, h), pages = picture.getexif().get(0x0112, 1), picture.size, getattr(picture, "n_frames", 1)
        if small:
            picture.draft("RGB", (64, 64))
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
        if picture.mode.startswith("I") and not 0 <= np.min(picture) <= np.max(picture) < 2**16:
            raise ValueError("more than 16 bits a pixel")
        sideways = turn in (5, 6, 7, 8) and picture.format != "TIFF"  # of a TIFF Pillow turns the size itself
        picture.turn, picture.whole, picture.pages = turn, (h, w) if sideways else (w, h), pages
        return picture
    except MemoryError:
        raise  # not the picture's fault
    except Exception as error:  # a broken file raises any of a dozen kinds of exception in Pillow
        why = f"cannot be read as a picture ({first_line(error)}); save it again as JPEG or PNG"
        raise ValueError(f"{path}: {why}") from None


def read_photo(path):
    """Any photograph as an RGB picture: grey, palette, transparent, 16-bit."""
    photo = open_picture(path)
    if photo.mode.startswith("I"):  # Pillow would clip 16 bits at 255 instead of scaling them
        photo = Image.fromarray((np.asarray(photo) // 257).astype(np.uint8))
    if photo.mode == "P":
        photo = photo.convert("RGBA")
    return photo.convert("RGB")


def read_labels(path):
    """The numbers stored in a mask, (H, W). Only a palette's indices count; its colours are for looking at."""
    mask = open_picture(path)
    if mask.pages > 1:
        raise ValueError(f"{path}: holds {mask.pages} pages; save the one that is the mask")
    if mask.mode == "P":
        used = np.unique(mask)
        colours = np.array(mask.getpalette()).reshape(-1, 3)[used]
        if used[0] == 0 and colours[0].min() > 127 and (colours == colours[:, :1]).all():
            raise ValueError(f"{path}: is a palette whose index 0, the background, is white; save it as greyscale")
    if mask.mode in ("1", "L", "P") or mask.mode.startswith("I"):
        return np.asarray(mask).astype(np.int32)
    bands = np.asarray(mask.convert("RGBA")).astype(np.int32)
    if (bands[..., :3] != bands[..., :1]).any() or (bands[..., 3] != bands[0, 0, 3]).any():
        colours = np.unique(bands[:: len(bands) // 64 + 1].reshape(-1, 4), axis=0)[:4, :3].tolist()
        shown = ", ".join(str(tuple(colour)) for colour in colours)
        raise ValueError(f"{path}: holds colours ({shown}, ...) or transparency; a mask holds one number a pixel, "
                         'saved as greyscale PNG. See "Your photos" in README.md')  # fmt: skip
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
    incomplete: dict = field(default_factory=lambda: {split: [] for split in SPLITS})  # problems of a split alone
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # what a user should know, and what stops nothing

    def add(self, split, name, photo, mask, read=None):
        if missing := [f"{file}" for file in (photo, mask) if not file.exists()]:
            about = f"a photo and its mask come together, as {', '.join(sorted(ENDINGS))}: add it, or remove the other"
            self.incomplete[split].append(f"{' and '.join(missing)}: missing; {about}")
        else:
            self.pairs[split].append((name, photo, mask, read))


def has(folder, *names):
    """Whether the folder holds all of these by their exact names. A Mac's disk takes Images/ for images/."""
    return set(names) <= {path.name for path in folder.iterdir()}


def stem_of(path):
    """The name without its ending. One letter with an accent may be stored in two ways; this makes them equal."""
    return normalize("NFC", path.stem)


def by_stem(folder, problems):
    """{name without ending: path} of the pictures in a folder."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            if (other := found.setdefault(stem_of(path), path)) != path:
                problems.append(f"{path}: has the name of {other.name}; give each picture its own name")
    return found


def read_list(path, problems):
    """The names in a list, one a line, without a picture's ending; none where there is no list."""
    if not path.is_file():
        return []
    try:
        text = normalize("NFC", path.read_text(encoding="utf-8-sig"))  # -sig: Windows puts a mark before UTF-8
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text; save it as plain text, one name a line")
        return []
    names = [line.strip() for line in text.splitlines() if line.strip()]
    return [name[: name.rindex(".")] if name.lower().endswith(tuple(ENDINGS)) else name for name in names]
