"""Photographs and their masks.

    python data.py hands/            draw the toy set: 240 photos of hands over desks
    python data.py --check FOLDER    count, measure and list every problem found

A folder of your own holds photographs and, under the same names, masks:

    images/NAME.jpg  masks/NAME.png  train.txt val.txt test.txt    the lists name one NAME a line
    train/images/  train/masks/  val/...  test/...                 or a folder for each split
    images/  masks/                                                or neither: split 70/15/15 by a fixed seed

A mask is 0 and 1, or 0 and 255, or class ids 0, 1, 2, ... with 255 for void: pixels that neither train nor count.
The datasets of the paper are read as they are published: layouts.py has them, one function each.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from layouts import LAYOUTS, SPLITS, VOID, Found, find_pairs, open_picture, unreadable

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet's, by custom

# ---------------------------------------------------------------- one file


def read_photo(path):
    """Any photograph as RGB: grey, palette, transparent, 16-bit."""
    photo = open_picture(path)
    check_mode(path, photo)
    if photo.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255, not scale
        photo = Image.fromarray((np.asarray(photo).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    return photo.convert("RGBA" if photo.mode == "P" else "RGB").convert("RGB")


def check_mode(path, photo):
    if photo.mode == "F":
        raise ValueError(f"{path}: holds floating-point values of unknown range; save it with 8 or 16 bits")


def read_labels(path):
    """The numbers stored in a mask, (H, W). Of a palette only the indices count, its colours are for looking at."""
    mask = open_picture(path)
    check_mode(path, mask)
    if mask.mode in ("1", "L", "P") or mask.mode.startswith("I"):
        return np.asarray(mask).astype(np.int32)
    bands = np.asarray(mask.convert("RGBA")).astype(np.int32)
    if (bands[..., :3] != bands[..., :1]).any() or (bands[..., 3] != bands[0, 0, 3]).any():
        some = [tuple(map(int, c)) for c in np.unique(bands[:: len(bands) // 64 + 1].reshape(-1, 4), axis=0)[:4, :3]]
        raise ValueError(
            f"{path}: holds colours ({', '.join(map(str, some))}, ...) or transparency; a mask holds one number a pixel, "
            'saved as greyscale PNG. See "Your own photos" in README.md'
        )
    return bands[..., 0]


# ---------------------------------------------------------------- one folder


@dataclass
class Survey(Found):
    """What a folder holds, and whatever is wrong with it."""

    classes: int = 2
    white: bool = False  # masks are 0 and 255, and 255 is class 1
    sizes: dict = field(default_factory=dict)  # {photo: (width, height)}
    pixels: dict = field(default_factory=dict)  # {photo: how many pixels of its mask hold 0, 1, 2, ...}


def look(pair):
    """Decode a photo and its mask: the photo's size, how often the mask holds each value, and what is wrong with them."""
    _, photo, mask, read = pair
    try:
        with Image.open(photo) as head:
            if head.format == "JPEG":
                turned = head.getexif().get(0x0112, 1) >= 5
                size = head.size[::-1] if turned else head.size
                head.draft("RGB", (64, 64))  # decoded at an eighth of its size
            else:
                size = ImageOps.exif_transpose(head).size  # of a TIFF Pillow has turned the size, and not yet the pixels
            head.load()
    except Exception as error:  # as in open_picture
        return None, None, unreadable(photo, error)
    try:
        check_mode(photo, head)
        labels = read() if read else read_labels(mask)
        if labels.shape[::-1] != size:
            h, w = labels.shape
            return size, None, f"{mask}: is {w}x{h}, its photo is {size[0]}x{size[1]}; they must match pixel by pixel"
        if min(size) < 16:
            return size, None, f"{photo}: is {size[0]}x{size[1]}; wanted at least 16x16"
        if labels.min() < 0 or labels.max() > 255:
            return size, None, f"{mask}: holds values from {labels.min()} to {labels.max()}; wanted 0 to 255"
        return size, np.bincount(labels.ravel(), minlength=256), None
    except ValueError as error:
        return None, None, str(error)


def survey(root, void=VOID, layout=None):
    """Look at every photo and mask once, so that a bad file is known before training, not in its third hour."""
    found = find_pairs(Path(root), layout)
    files = [(split, path) for split, pairs in found.pairs.items() for _, *paths, _ in pairs for path in paths]
    seen = tuple((split, path, path.stat().st_mtime_ns, path.stat().st_size) for split, path in files if os.path.exists(path))
    return looked_at(root, void, layout, Path(root).resolve(), seen, tuple(found.problems))


@lru_cache(maxsize=8)  # the three splits of a folder are opened one after the other
def looked_at(root, void, layout, *as_it_is):
    """`as_it_is`: where the folder lies and when its files were written, as a folder of old may have changed."""
    found = Survey(**vars(find_pairs(Path(root), layout)))
    pairs = [pair for pairs in found.pairs.values() for pair in pairs]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for (_, photo, _, _), (size, pixels, problem) in zip(pairs, pool.map(look, pairs)):
            found.sizes |= {photo: size} if size else {}
            found.pixels |= {photo: pixels} if pixels is not None else {}
            found.problems += [problem] if problem else []
    if found.names:
        found.classes = len(found.names)
        found.problems += void_all_over(root, found, {VOID})
        found.problems += [f"--void {void}: {found.layout} decides by itself what is void; leave --void out"] * (void != VOID)
        return found
    mask_of = {photo: mask for _, photo, mask, _ in pairs}
    held = {mask_of[photo]: set(np.flatnonzero(count).tolist()) for photo, count in found.pixels.items()}
    union = set().union(*held.values())
    found.white = union == {0, 255} and void == VOID
    ids = {0, 1} if found.white else union - {void, VOID}
    found.classes = next(k for k in range(202) if k not in ids or k == 201)  # 201 to 254: noise around white, not class ids
    for mask, values in held.items():
        odd = ids & values - set(range(found.classes))
        if odd:
            shown = ", ".join(map(str, sorted(values)[:5])) + (", ..." if len(values) > 5 else "")
            found.problems.append(
                f"{mask}: holds the values [{shown}]; a mask is 0 and 1, or 0 and 255, or class ids without gaps and {VOID} for "
                f"void. Noise around 0 and 255 comes from JPEG: save masks as PNG. See \"Your own photos\" in README.md"
            )
    with_one, with_white = ({m for m, values in held.items() if wanted <= values} for wanted in ({1}, {0, VOID}))
    if found.classes == 2 and not found.white and with_one and with_white and not with_one & with_white:
        odd = min(with_white)
        found.problems.append(f"{odd}: is 0 and 255, {min(with_one)} is 0 and 1; use one of the two in all masks. If 255 is void: make it 2 in all, and say --void 2")
    found.problems += void_all_over(root, found, set() if found.white else {void, VOID})
    if found.classes < 2 and not found.problems:
        found.problems.append(f"{root}: every mask holds {sorted(union)} alone; there is nothing to learn")
    return found


def void_all_over(root, found, void):
    """A problem for each split whose masks hold nothing else; a mask that could not be read has its own."""
    of = lambda photo: set(np.flatnonzero(found.pixels[photo]).tolist()) if photo in found.pixels else {0}
    blank = [split for split, pairs in found.pairs.items() if pairs and all(of(photo) <= void for _, photo, _, _ in pairs)]
    return [f"{root}: the masks of {split} are void all over" for split in blank]


# ---------------------------------------------------------------- the dataset


class Photos(torch.utils.data.Dataset):
    """Pairs of image float32 (3, H, W), normalised, and mask int64 (H, W), classes 0..K-1 and 255 for void.

    size       the short side after resizing; None leaves photos as they are
    crop       side of the square pieces that augmentation cuts; by default the short side after resizing
    rotate     largest turn that augmentation makes, degrees either way: 180 where a picture has no up
    repeat     how often an epoch shows each photo
    """

    def __init__(self, found, split, size, augment, crop, rotate, void, seed):
        self.pairs, self.layout, self.classes, self.names = found.pairs[split], found.layout, found.classes, found.names
        self.white, self.void = found.white, void
        self.size, self.augment, self.rotate, self.seed = size, augment, rotate, seed
        sides = sorted(min(found.sizes[photo]) for _, photo, _, _ in self.pairs)
        self.typical = sides[len(sides) // 2]  # short side of the median photo
        self.crop = crop or size or self.typical
        self.repeat = 1
        self.cache = {} if size and 6 * size * size * len(self.pairs) < 1e9 else None  # decode once what fits in a gigabyte

    def __len__(self):
        return len(self.pairs) * self.repeat

    def read(self, i):
        """The photo and the mask, both as pictures."""
        _, photo, mask, read = self.pairs[i]
        image, labels = read_photo(photo), read() if read else read_labels(mask)
        if not read:
            labels = labels == 255 if self.white else np.where(labels == self.void, VOID, labels)
        labels = Image.fromarray(labels.astype(np.uint8))
        if self.size:
            scale = self.size / min(image.size)
            shape = [max(1, round(side * scale)) for side in image.size]
            image, labels = image.resize(shape, Image.BILINEAR), labels.resize(shape, Image.NEAREST)  # Pillow antialiases
        return image, labels

    def __getitem__(self, k):
        """The k-th pair; while training (epoch, k), as every epoch augments anew."""
        epoch, k = k if isinstance(k, tuple) else (0, k)
        if not 0 <= k < len(self):
            raise IndexError(k)  # which is also what ends `for image, mask in dataset`
        i = k % len(self.pairs)
        if self.augment:
            image, mask = (self.cache or {}).get(i) or self.read(i)
            if self.cache is not None:
                self.cache[i] = image, mask
            # seeded by what is asked for, not by what came before: neither workers nor resuming change a crop
            rng = np.random.default_rng([self.seed, epoch, k])
            image, mask = augment(image, mask, self.crop, self.rotate, rng)
        else:
            image, mask = self.read(i)
        return normalise(image), torch.from_numpy(np.array(mask, np.int64))


def augment(image, mask, crop, rotate, rng):
    """Flip, scale, turn and cut out of both pictures by one map, and change the light of the photo. Outside is void."""
    angle, scale = np.radians(rng.uniform(-rotate, rotate)), np.exp(rng.uniform(np.log(0.75), np.log(1.5)))
    flip, (w, h) = rng.choice([-1, 1]), image.size
    reach = crop / scale / 2  # half of the piece, in pixels of the photo
    cx, cy = (rng.uniform(min(reach, side / 2), max(side - reach, side / 2)) for side in (w, h))
    cos, sin, mid = np.cos(angle) / scale, np.sin(angle) / scale, crop / 2
    a, b, d, e = flip * cos, -sin, flip * sin, cos  # output (u, v), from its middle -> photo (x, y), from (cx, cy)
    how = (a, b, cx - (a + b) * mid, d, e, cy - (d + e) * mid)
    grey = tuple(int(255 * m) for m in MEAN)
    image = image.transform((crop, crop), Image.AFFINE, how, Image.BILINEAR, fillcolor=grey)
    mask = mask.transform((crop, crop), Image.AFFINE, how, Image.NEAREST, fillcolor=VOID)
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.9, 1.1))
    gamma, exposure, *tint = np.exp(rng.uniform(-1, 1, 5) * (0.15, 0.1, 0.02, 0.02, 0.02))
    curve = np.linspace(0, 1, 256)[:, None] ** gamma * exposure * tint
    return image.point((255 * curve).clip(0, 255).astype(np.uint8).T.ravel().tolist()), mask


def normalise(photo):
    """RGB picture -> float32 (3, H, W)."""
    pixels = (np.asarray(photo, np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def open_dataset(root, split, size=None, augment=False, *, crop=None, rotate=15, void=VOID, seed=0, layout=None):
    """The photos of one split of a folder, as Photos describes them. A ValueError names the first problem of the folder."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SPLITS)}")
    if size and (not isinstance(size, int) or size < 16):
        raise ValueError(f"size is {size!r}; wanted a whole number from 16, the short side in pixels, or None for photos as they are")
    found = survey(str(root), void, layout or None)
    if found.problems:
        more = len(found.problems) - 1
        raise ValueError(found.problems[0] + (f"\n{more} more such lines: python data.py --check {root}" if more else ""))
    return Photos(found, split, size, augment, crop, rotate, void, seed)


# ---------------------------------------------------------------- the command line


def check(root, void, layout):
    """Print what a folder holds; return how many problems it has."""
    found = survey(str(root), void, layout)
    print(f"{root}: {found.layout}, {found.classes} classes {' '.join(found.names)}".rstrip())
    for split, pairs in found.pairs.items():
        sizes = sorted({found.sizes[photo] for _, photo, _, _ in pairs if photo in found.sizes}, key=np.prod)
        pixels = sum((found.pixels[photo] for _, photo, _, _ in pairs if photo in found.pixels), np.zeros(256, int))
        shares = ", ".join(f"{value}: {pixels[value] / pixels.sum():.1%}" for value in np.flatnonzero(pixels))
        span = f"{sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}" if sizes else "-"
        print(f"{split:5} {len(pairs):5} photos, {span}; mask values {shares}")
    for problem in found.problems:
        print(problem)
    print(f"{len(found.problems)} problems")
    return len(found.problems)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path, help="where to draw the toy set, or what to check")
    cli.add_argument("--check", action="store_true", help="list every problem of a folder instead of drawing")
    cli.add_argument("--void", type=int, default=VOID, help="class id that is void, besides 255")
    cli.add_argument("--layout", choices=list(LAYOUTS), help="how the folder is laid out, where two layouts fit")
    args = cli.parse_args()
    try:
        if args.check:
            sys.exit(check(args.folder, args.void, args.layout) > 0)
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise ValueError(f"{args.folder}: exists and is not empty; name a new folder for the toy set")
        from toy import draw_set  # only here: data.py works without it

        draw_set(args.folder)
        print(f"drew 240 photos and masks into {args.folder}/; now: python train.py --data {args.folder}/")
    except (ValueError, OSError) as error:  # OSError: a folder that may not be read or written
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
