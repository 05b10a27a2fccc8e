"""Photographs and their masks.

    python data.py hands/            draw the toy set: 240 photos of hands over desks
    python data.py --check FOLDER    count, measure, and list every problem

A folder of your own holds photographs and, under the same names, masks:

    images/NAME.jpg  masks/NAME.png  train.txt val.txt test.txt    each list has one NAME a line
    train/images/  train/masks/  val/...  test/...                 or a folder for each split
    images/  masks/                                                or neither: split 70/15/15 by a fixed seed

A mask is 0 and 1, or 0 and 255, or class ids 0, 1, 2, ... with 255 for void: pixels that neither train nor count.
The paper's datasets are read as they are published: see paper/datasets.py.
"""

if __name__ == "__main__":
    from support import terminal  # noqa: F401  (before torch)

import argparse
import hashlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from paper import datasets
from support.pictures import (MEAN, SPLITS, VOID, Found, by_stem, has, normalise, open_picture, read_labels,
                              read_list, read_photo, resize)  # fmt: skip
from support.processes import one_ending
from support.toy import draw_set

# ---------------------------------------------------------------- 1. which photo belongs to which mask
def pair_up(found, split, folder, names=None):
    """Match folder/images and folder/masks by name; `names` are the wanted ones, or None for all."""
    images, masks = (by_stem(folder / kind, found.problems) for kind in ("images", "masks"))
    for name in sorted(images | masks) if names is None else names:
        files = images.get(name, folder / f"images/{name}.*"), masks.get(name, folder / f"masks/{name}.*")
        found.add(split, name, *files)


def lists(root):
    """images/ and masks/ with train.txt, val.txt, test.txt"""
    if not has(root, "images", "masks") or not any((root / f"{split}.txt").exists() for split in SPLITS):
        return None
    found, listed = Found("train.txt, val.txt, test.txt"), {}
    for split in SPLITS:
        names = [Path(name).name for name in read_list(root / f"{split}.txt", found.problems)]
        for name in names:
            if name in listed:
                found.problems.append(f"{root / split}.txt: names {name}, which {listed[name]}.txt has already")
            listed[name] = split
        pair_up(found, split, root, names)
    if unlisted := sorted(by_stem(root / "images", []).keys() - listed.keys()):
        found.notes.append(f"{root}/images: {len(unlisted)} photos are in no list ({', '.join(unlisted[:3])}, ...)")
    return found


def folders(root):
    """train/, val/, test/ with images/ and masks/ in each"""
    found = Found("train/, val/, test/")
    for split in SPLITS:
        if (root / split).is_dir() and has(root / split, "images", "masks"):
            pair_up(found, split, root / split)
    return found if any(found.pairs.values()) else None


def seeded(root):
    """images/ and masks/ alone: split 70/15/15 by a fixed seed"""
    listed = any([*root.glob(f"{split}.txt"), *root.glob(f"*/{split}.txt")] for split in SPLITS)
    if not has(root, "images", "masks") or listed:
        return None
    found = Found("seeded split 70/15/15, seed 0")
    pair_up(found, "train", root)
    pairs = found.pairs["train"]
    order, n = np.random.default_rng(0).permutation(len(pairs)), max(1, round(0.15 * len(pairs)))
    for split, part in zip(SPLITS, (order[2 * n :], order[:n], order[n : 2 * n])):
        found.pairs[split] = [pairs[i] for i in sorted(part)]
    return found


LAYOUTS = [lists, folders, seeded, *datasets.LAYOUTS]


def find_pairs(root, splits):
    """The pairs of these splits. A broken one becomes a problem; an unknown folder raises ValueError."""
    if not root.is_dir():
        raise ValueError(f"{root}: is not a folder; `python data.py {root}` would draw the toy set there")
    fits = {layout.__name__: found for layout in LAYOUTS if (found := layout(root))}
    if len(fits) > 1:
        raise ValueError(f"{root}: could be {' or '.join(fits)}; move what belongs to only one of them elsewhere")
    if not fits:
        here = ", ".join(sorted(path.name + "/" * path.is_dir() for path in root.iterdir())[:8]) or "nothing"
        known = "\n".join(f"  {layout.__name__:14} {layout.__doc__}" for layout in LAYOUTS)
        raise ValueError(f"{root}: holds {here}; it must be one of these:\n{known}")
    (found,) = fits.values()
    found.pairs = {split: pairs if split in splits else [] for split, pairs in found.pairs.items()}
    for split in splits:
        empty = [f"{root} ({found.layout}): has no photos for {split}; it needs one"] * (not found.pairs[split])
        found.problems += found.incomplete[split] or empty
    found.problems = [*dict.fromkeys(found.problems)]  # a file in the way of every split is one problem
    return found


# ---------------------------------------------------------------- 2. what a folder holds, and what is wrong with it
@dataclass
class Survey(Found):
    """A folder with every photo and mask inspected once, so that a bad file is known before training starts."""

    root: Path = None
    void: int = VOID
    classes: int = 2
    white: bool = False  # masks are 0 and 255, and 255 is class 1
    sizes: dict = field(default_factory=dict)  # {photo: (width, height)}
    counts: dict = field(default_factory=dict)  # {photo: how many pixels of its mask hold 0, 1, 2, ...}
    hashes: dict = field(default_factory=dict)  # {photo: fingerprint of it and its mask}

    def short_side(self, split):
        """Of the median photo."""
        sides = sorted(min(self.sizes[photo]) for _, photo, *_ in self.pairs[split])
        return sides[len(sides) // 2]

    def fingerprint(self, *splits):
        return {f"{split}/{name}": self.hashes[photo] for split in splits for name, photo, *_ in self.pairs[split]}

    def values(self, photo):
        return set(np.flatnonzero(self.counts[photo]).tolist())


def survey(root, void=VOID, splits=SPLITS, classes=None):
    """Inspect a folder. `void` is the class id that neither trains nor counts, besides 255. `classes` is how many
    there are, where the masks of these splits may not show all of them."""
    found = Survey(**vars(find_pairs(Path(root), splits)), root=Path(root), void=void)
    pairs, notes = sum(found.pairs.values(), []), Counter()
    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        for (_, photo, *_), seen in zip(pairs, [pool.submit(inspect_pair, *pair) for pair in pairs]):
            try:
                found.sizes[photo], found.counts[photo], found.hashes[photo], noted = seen.result()
                notes.update(noted)
            except ValueError as error:
                found.problems.append(str(error))
    found.notes += [f"{root}: {count} photos {what}" for what, count in notes.items()]
    if found.names:
        found.classes = len(found.names)
        if void != VOID:
            found.problems.append(f"--void {void}: {found.layout} has void pixels of its own; leave --void out")
    else:
        held = {mask: found.values(photo) for _, photo, mask, _ in pairs if photo in found.counts}
        find_classes(found, held, classes)
    ignored = set() if found.white else {VOID} if found.names else {void, VOID}
    for split, pairs in found.pairs.items():
        held = [found.values(photo) for _, photo, *_ in pairs if photo in found.counts]
        if held and set().union(*held) <= ignored:
            found.problems.append(f"{root}: the masks of {split} hold nothing but void")
    if found.classes < 2 and not found.problems:
        found.problems.append(f"{root}: every mask holds one class alone; there is nothing to learn")
    return found


def inspect_pair(name, photo, mask, read):
    """A photo's size, how often its mask holds each value, a fingerprint of both, and notes."""
    picture, labels, notes = open_picture(photo, small=True), read() if read else read_labels(mask), []
    (width, height), (h, w), smallest, largest = picture.whole, labels.shape, labels.min(), labels.max()
    if (w, h) != (width, height):
        raise ValueError(f"{mask}: is {w}x{h}, its photo is {width}x{height}; they must match pixel by pixel")
    if min(w, h) < 16:
        raise ValueError(f"{photo}: is {w}x{h}; it must be at least 16x16")
    if smallest < 0 or largest > 255:
        raise ValueError(f"{mask}: holds values from {smallest} to {largest}; they must be 0 to 255")
    if picture.mode == "RGBA" and picture.getextrema()[3] != (255, 255):
        notes.append("have a fourth band, which is not read")
    if picture.turn != 1:
        same = not read and open_picture(mask, small=True).turn == picture.turn
        fit = "and so are their masks" if same else "but their masks are not; do these fit the upright photos?"
        notes.append(f"are turned by EXIF, {fit}")
    labels = labels.astype(np.uint8)
    both = hashlib.blake2b(photo.read_bytes() + labels.tobytes(), digest_size=8).hexdigest()
    return (w, h), np.bincount(labels.ravel(), minlength=256), both, notes


def differences(before, now):
    """In which photos two fingerprints differ, in words."""
    before = {str(name): content for name, content in before.items()}
    kind = lambda name: "new" if name not in before else "gone" if name not in now else "changed"
    names = sorted({name for name, _ in before.items() ^ now.items()})
    shown = ", ".join(f"{name} {kind(name)}" for name in names[:3])
    return f"{shown}, {len(names)} in all" if names else "only their order"


def find_classes(found, held, classes):
    """From {mask: its values}: which are class ids, how many classes there are, and which masks disagree."""
    union = set().union(*held.values())
    found.white = union == {0, 255} and found.void == VOID and classes in (None, 2)
    ids = {0, 1} if found.white else union - {found.void, VOID}
    own = next((k for k in range(201) if k not in ids), 201)  # 201 to 254 are noise around white
    found.classes = classes if classes and ids <= set(range(classes)) else own
    for mask, values in held.items():
        if ids & values - set(range(found.classes)):
            shown = ", ".join(map(str, sorted(values)[:5])) + ", ..." * (len(values) > 5)
            found.problems.append(f"{mask}: holds the values [{shown}]; a mask is 0 and 1, or 0 and 255, or class ids "
                                  f"without gaps and {VOID} for void. JPEG adds noise: save masks as PNG. "
                                  'See "Your photos" in README.md')  # fmt: skip
    ones, whites = ({m for m, values in held.items() if wanted <= values} for wanted in ({1}, {0, VOID}))
    if found.classes == 2 and not found.white and ones and whites and not ones & whites:
        found.problems.append(f"{min(whites)}: is 0 and 255, {min(ones)} is 0 and 1; use one of the two in all masks. "
                              "If 255 is void, make it 2 in all masks and add --void 2")  # fmt: skip


# ---------------------------------------------------------------- 3. the dataset
class Photos(torch.utils.data.Dataset):
    """Pairs of image float32 (3, H, W), normalised, and mask int64 (H, W): classes 0..K-1, 255 for void.

    size       the short side after resizing; None keeps each photo's own
    augment    flip, scale, turn, cut out a square and change the light, by a seed for each epoch and photo
    crop       side of that square; by default the short side after resizing
    rotate     largest turn, degrees either way: 180 where a picture has no up
    repeat     how often an epoch shows each photo
    """

    def __init__(self, found, split, size=None, augment=False, crop=None, rotate=15, seed=0, repeat=1):
        self.found, self.pairs, self.classes = found, found.pairs[split], found.classes
        self.size, self.augment, self.rotate, self.seed, self.repeat = size, augment, rotate, seed, repeat
        self.crop = crop or size or found.short_side(split)
        small = size and 6 * size * size * len(self.pairs) < 1e9  # bytes, at 1.5 times as wide as high
        self.cache = {} if augment and small else None  # a small set is decoded once

    def __len__(self):
        return len(self.pairs) * self.repeat

    def pictures(self, i):
        """The i-th photo (RGB) and its mask (class ids), both as pictures at their own size."""
        _, photo, mask, read = self.pairs[i]
        labels = read() if read else read_labels(mask)
        if self.found.white:
            labels = labels == 255
        elif not read:
            labels = np.where(labels == self.found.void, VOID, labels)
        picture, labels = read_photo(photo), labels.astype(np.uint8)
        if picture.size != labels.shape[::-1] or ((labels >= self.classes) & (labels != VOID)).any():
            raise ValueError(f"{photo}: the photo or its mask has changed since it was checked")
        return picture, Image.fromarray(labels)

    def resized(self, i):
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        photo, mask = self.pictures(i)
        if self.size:
            photo, mask = resize(photo, self.size), resize(mask, self.size, Image.NEAREST)
        if self.cache is not None:
            self.cache[i] = photo, mask
        return photo, mask

    def __getitem__(self, k):
        """The k-th pair; in training (epoch, k), as every epoch augments differently."""
        epoch, k = k if isinstance(k, tuple) else (0, k)
        if not 0 <= k < len(self):
            raise IndexError(k)  # this also ends `for image, mask in dataset`
        photo, mask = self.resized(k % len(self.pairs))
        if self.augment:
            # Seeded by what is asked for, not by what came before: workers and resuming change no crop.
            photo, mask = augment(photo, mask, self.crop, self.rotate, np.random.default_rng([self.seed, epoch, k]))
        return normalise(photo), torch.from_numpy(np.array(mask, np.int64))


def augment(photo, mask, crop, rotate, rng):
    """Flip, scale, turn and cut out of both pictures by one map, and change the photo's light. Outside is void."""
    angle, scale = np.radians(rng.uniform(-rotate, rotate)), np.exp(rng.uniform(np.log(0.75), np.log(1.5)))
    flip, (w, h) = rng.choice([-1, 1]), photo.size
    reach = crop / scale / 2  # half of the square, in pixels of the photo
    cx, cy = (rng.uniform(min(reach, side / 2), max(side - reach, side / 2)) for side in (w, h))
    cos, sin, mid = np.cos(angle) / scale, np.sin(angle) / scale, crop / 2
    a, b, d, e = flip * cos, -sin, flip * sin, cos  # output (u, v), from its middle -> photo (x, y), from (cx, cy)
    how = (a, b, cx - (a + b) * mid, d, e, cy - (d + e) * mid)
    grey = tuple(int(255 * m) for m in MEAN)
    photo = photo.transform((crop, crop), Image.AFFINE, how, Image.BILINEAR, fillcolor=grey)
    mask = mask.transform((crop, crop), Image.AFFINE, how, Image.NEAREST, fillcolor=VOID)
    photo = ImageEnhance.Color(photo).enhance(rng.uniform(0.9, 1.1))
    gamma, exposure, *tint = np.exp(rng.uniform(-1, 1, 5) * (0.15, 0.1, 0.02, 0.02, 0.02))
    curve = np.linspace(0, 1, 256)[:, None] ** gamma * exposure * tint
    return photo.point((255 * curve).clip(0, 255).astype(np.uint8).T.ravel().tolist()), mask


def open_dataset(root, split, size=None, augment=False, *, void=VOID, **more):
    """The photos of one split of a folder, or of what `survey` found in it; size, augment and `more` as in Photos.
    ValueError names the folder's first problem."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SPLITS)}")
    if size and (not isinstance(size, int) or size < 16):
        raise ValueError(f"size is {size!r}; it must be a whole number of pixels from 16, or None for each photo's own")
    found = root if isinstance(root, Survey) else survey(root, void)
    if found.problems:
        first, *others = found.problems
        raise ValueError(first + f"\n{len(others)} more such lines: python data.py --check {found.root}" * bool(others))
    return Photos(found, split, size, augment, **more)


# ---------------------------------------------------------------- the command line
def check(root, void):
    """Print what a folder holds; return how many problems it has."""
    found = survey(root, void)
    print(f"{root}: {found.layout}, {found.classes} classes {' '.join(found.names)}".rstrip())
    for split, pairs in found.pairs.items():
        sizes = sorted({found.sizes[photo] for _, photo, *_ in pairs if photo in found.sizes}, key=np.prod)
        pixels = sum((found.counts[photo] for _, photo, *_ in pairs if photo in found.counts), np.zeros(256, int))
        shares = ", ".join(f"{value}: {pixels[value] / pixels.sum():.1%}" for value in np.flatnonzero(pixels))
        span = f"{sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}" if sizes else "-"
        print(f"{split:5} {len(pairs):5} photos, {span}; mask values {shares}")
    print(*found.notes, *found.problems, f"{len(found.problems)} problems", sep="\n")
    return len(found.problems)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path, help="where to draw the toy set, or what to check")
    cli.add_argument("--check", action="store_true", help="list every problem of a folder instead of drawing")
    cli.add_argument("--void", type=int, default=VOID, help="class id that is void, besides 255")
    args = cli.parse_args()
    with one_ending("data.py"):
        if args.check:
            sys.exit(check(args.folder, args.void) > 0)
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise ValueError(f"{args.folder}: exists and is not empty; name a new folder for the toy set")
        draw_set(args.folder)
        print(f"drew 240 photos and masks into {args.folder}/; now: python train.py --data {args.folder}/")


if __name__ == "__main__":
    main()
