"""Folders of photos and masks, as people keep them and as datasets are published. data.py recognises them by looking.

Each function below takes a folder and answers None where the folder is not of its kind, else which photo belongs to which
mask in which split, by the dataset's own split as far as it has one.
A dataset with an encoding of its own brings a function `read()` for each mask: class ids (H, W), 255 for void.
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

VOID = 255
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")


@dataclass
class Found:
    layout: str  # what it is, and how it was split
    names: tuple = ()  # of the classes; empty where the masks decide how many there are
    pairs: dict = field(default_factory=lambda: {split: [] for split in SPLITS})  # {split: [(name, photo, mask, read or None)]}
    problems: list = field(default_factory=list)

    def add(self, split, name, photo, mask, read=None):
        missing = [f"{file}" for file in (photo, mask) if not file.exists()]
        if missing:
            self.problems.append(f"{' and '.join(missing)}: missing; every photo needs its mask, and every mask its photo")
        else:
            self.pairs[split].append((name, photo, mask, read))


# ---------------------------------------------------------------- files


def open_picture(path):
    """The picture, upright: cameras store it as it fell and note in EXIF how to turn it."""
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except Exception as error:  # Pillow answers broken files with a dozen kinds of exception
        raise ValueError(unreadable(path, error)) from None


def unreadable(path, error):
    return f"{path}: cannot be read as a picture ({error or type(error).__name__}); save it anew as JPEG or PNG"


def above_half(path):
    """A mask whose background is dark and whose foreground is bright, whatever JPEG did to it: 0 and 1."""
    return (np.asarray(open_picture(path).convert("L")) > 127).astype(np.uint8)


def has(folder, *names):
    """Whether the folder holds all of these, by their exact names: to a Mac's disk Images/ is images/ as well."""
    return set(names) <= {path.name for path in folder.iterdir()}


def by_stem(folder, problems):
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            if path.stem in found:
                problems.append(f"{path}: has the name of {found[path.stem].name}; two files may not share a name")
            found[path.stem] = path
    return found


def read_list(path, problems):
    """The names in a list, one a line, without a picture's ending."""
    if not path.exists():
        problems.append(f"{path}: missing; the lists for {', '.join(SPLITS)} come together")
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]  # -sig: Windows marks its UTF-8
    except UnicodeDecodeError:
        problems.append(f"{path}: is no UTF-8 text; save it as plain text, a name a line")
        return []
    return [line[: -len(Path(line).suffix)] if Path(line).suffix.lower() in ENDINGS else line for line in lines]


# ---------------------------------------------------------------- your own


def pair_up(found, split, folder, names=None):
    """Match folder/images and folder/masks by name; `names` are the wanted ones, or None for all."""
    images, masks = by_stem(folder / "images", found.problems), by_stem(folder / "masks", found.problems)
    for stem in sorted(images.keys() | masks.keys()) if names is None else names:
        missing = [kind for kind, files in (("images", images), ("masks", masks)) if stem not in files]
        if missing:
            wanted = " and ".join(f"{folder / kind}/{stem}.*" for kind in missing)
            found.problems.append(f"{wanted}: missing; every photo needs a mask of the same name, and every mask its photo")
        else:
            found.pairs[split].append((stem, images[stem], masks[stem], None))


def lists(root):
    """images/ and masks/ with train.txt, val.txt, test.txt"""
    if not has(root, "images", "masks") or not any((root / f"{s}.txt").exists() for s in SPLITS):
        return None
    found, seen = Found("train.txt, val.txt, test.txt"), {}
    for split in SPLITS:
        path = root / f"{split}.txt"
        names = [Path(name).name for name in read_list(path, found.problems)]
        for name in names:
            if name in seen:
                found.problems.append(f"{path}: names {name}, which {seen[name].name} has already; once is enough")
            seen[name] = path
        pair_up(found, split, root, names)
    return found


def folders(root):
    """train/, val/, test/ with images/ and masks/ in each"""
    if not all((root / split / kind).is_dir() for split in SPLITS for kind in ("images", "masks")):
        return None
    found = Found("train/, val/, test/")
    for split in SPLITS:
        pair_up(found, split, root / split)
    return found


def seeded(root):
    """images/ and masks/ alone: split 70/15/15 by a fixed seed"""
    if not has(root, "images", "masks") or any([*root.glob(f"{s}.txt"), *root.glob(f"*/{s}.txt")] for s in SPLITS):
        return None
    found = Found("seeded split 70/15/15, seed 0")
    pair_up(found, "train", root)
    pairs = found.pairs["train"]
    order, part = np.random.default_rng(0).permutation(len(pairs)), max(1, round(0.15 * len(pairs)))
    parts = order[2 * part :], order[:part], order[part : 2 * part]
    found.pairs = {split: [pairs[i] for i in sorted(part)] for split, part in zip(SPLITS, parts)}
    return found


# ---------------------------------------------------------------- hands


EGOHANDS = {  # the main split of the dataset; whatever is not named here trains
    "val": "CARDS_LIVINGROOM_S_H CHESS_COURTYARD_H_S JENGA_COURTYARD_T_S PUZZLE_OFFICE_S_T",
    "test": "CARDS_COURTYARD_B_T CARDS_OFFICE_S_B CHESS_COURTYARD_B_T CHESS_LIVINGROOM_T_H "
    "JENGA_LIVINGROOM_S_T JENGA_OFFICE_H_T PUZZLE_COURTYARD_H_T PUZZLE_LIVINGROOM_T_B",
}


@lru_cache(maxsize=64)
def load_polygons(path):
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{path}: reading .mat files takes scipy; pip install scipy") from None
    try:
        return loadmat(path)["polygons"][0]
    except Exception as error:  # scipy answers a broken file with half a dozen kinds of exception
        raise ValueError(f"{path}: is no polygons.mat of EgoHands, or is damaged ({type(error).__name__})") from None


def read_polygons(photo, mat, i):
    """The pixels inside any of the hands that the i-th entry outlines."""
    mask = Image.new("L", Image.open(photo).size)
    for hand in "myleft", "myright", "yourleft", "yourright":
        outline = load_polygons(mat)[i][hand]
        if outline.ndim == 2 and outline.shape[1] == 2 and len(outline) > 2:  # a hand that is not seen is empty
            ImageDraw.Draw(mask).polygon([tuple(point) for point in outline.tolist()], fill=1)
    return np.asarray(mask)


def egohands(root):
    """EgoHands: _LABELLED_SAMPLES/VIDEO/frame_0001.jpg and polygons.mat in each"""
    top = root / "_LABELLED_SAMPLES" if (root / "_LABELLED_SAMPLES").is_dir() else root
    videos = sorted(path.parent for path in top.glob("*/polygons.mat"))
    if not videos:
        return None
    of = {video.name: next((s for s in EGOHANDS if video.name in EGOHANDS[s].split()), "train") for video in videos}
    found = Found("EgoHands, main split by video", ("background", "hand"))
    for split in "val", "test":
        rest = [name for name in of if of[name] == "train"]
        if split not in of.values() and len(rest) > 1:  # part of the dataset alone is here
            for name in rest[-max(1, len(rest) // 7) :]:
                of[name] = split
            found.layout += f"; no video of its {split} split is here, so the last seventh of the others stands in"
    for video in videos:
        frames, mat = sorted(video.glob("frame_*.jpg")), video / "polygons.mat"
        outlines = len(load_polygons(mat))
        if outlines != len(frames):
            found.problems.append(f"{mat}: outlines {outlines} frames, the folder holds {len(frames)}; they go together in order of name")
            continue
        for i, frame in enumerate(frames):
            found.add(of[video.name], f"{video.name}_{frame.stem}", frame, mat, partial(read_polygons, frame, mat, i))
    return found


def eyth(root):
    """EYTH: images/, masks/ and train-val-test-split/train.txt"""
    if not (root / "train-val-test-split").is_dir():
        return None
    found = Found("EYTH, its lists", ("background", "hand"))
    for split in SPLITS:
        for name in read_list(root / "train-val-test-split" / f"{split}.txt", found.problems):
            mask = root / "masks" / f"{name}.png"
            mask = mask if mask.exists() else root / "masks" / name  # two videos of the archive lack the ending
            found.add(split, name, root / "images" / f"{name}.jpg", mask, partial(above_half, mask))
    return found


def gtea(root):
    """GTEA: Images/s2_cheese_0000000020.jpg and Masks/"""
    if not has(root, "Images", "Masks") or not any((root / "Images").glob("s[1-4]_*.jpg")):
        return None
    found = Found("GTEA, subject s2 tests, s4 validates, s1 and s3 train", ("background", "hand"))
    masks = by_stem(root / "Masks", found.problems)
    for photo in sorted((root / "Images").glob("s[1-4]_*.jpg")):
        mask = masks.get(photo.stem, root / "Masks" / f"{photo.stem}.*")
        found.add({"2": "test", "4": "val"}.get(photo.name[1], "train"), photo.stem, photo, mask, partial(above_half, mask))
    return found


def hof(root):
    """HOF: images_resized/, masks/ and train.txt, test.txt"""
    if not (root / "images_resized").is_dir():
        return None
    found = Found("HOF, its lists; validation is the test split, as the paper has it", ("background", "hand"))
    for split in SPLITS:
        for name in read_list(root / f"{'train' if split == 'train' else 'test'}.txt", found.problems):
            mask = root / "masks" / f"{name}.png"
            found.add(split, name, root / "images_resized" / f"{name}.jpg", mask, partial(above_half, mask))
    return found


def kbh(root):
    """KBH: data_split_by_seq/PERSON_SEQUENCE/FRAME_halfres.jpg and train_val_test_split/"""
    if not (root / "data_split_by_seq").is_dir():
        return None
    # its test.txt lists a fifth of the frames and train.txt three fifths; the paper trains on a fifth and tests on three
    found = Found("KBH, split as in the paper: trains on test.txt, tests on train.txt", ("background", "hand"))
    for split, name_of in zip(SPLITS, ("test", "val", "train")):
        for name in read_list(root / "train_val_test_split" / f"{name_of}.txt", found.problems):
            at = root / "data_split_by_seq"
            mask = at / f"{name}_mask.png"
            found.add(split, name.replace("/", "_"), at / f"{name}_halfres.jpg", mask, partial(above_half, mask))
    return found


# ---------------------------------------------------------------- vessels, roads, streets


def read_drive(manual, view):
    labels, inside = above_half(manual), above_half(view)
    if labels.shape != inside.shape:
        shapes = [f"{shape[1]}x{shape[0]}" for shape in (inside.shape, labels.shape)]
        raise ValueError(f"{view}: is {shapes[0]}, its vessels are {shapes[1]}; they must match pixel by pixel")
    return np.where(inside, labels, VOID).astype(np.uint8)


def drive(root):
    """DRIVE: training/ and test/ with images/, 1st_manual/, mask/"""
    if not (root / "training" / "1st_manual").is_dir():
        return None
    found = Found("DRIVE, the last 4 training images for validation", ("background", "vessel"))
    for part in "training", "test":
        kinds = [by_stem(root / part / kind, found.problems) for kind in ("images", "1st_manual", "mask")]
        for name in kinds[0]:
            photo, manual, view = kinds[0][name], kinds[1].get(f"{name[:2]}_manual1"), kinds[2].get(f"{name}_mask")
            if manual and view:
                found.add("train" if part == "training" else "test", name, photo, manual, partial(read_drive, manual, view))
            else:
                found.problems.append(f"{photo}: has no vessels in 1st_manual/ or no field of view in mask/")
    found.pairs["train"], found.pairs["val"] = found.pairs["train"][:-4], found.pairs["train"][-4:]
    return found


def read_road(photo, road):
    """Road is bright. Where the photo is pure white there is no photo: void."""
    blank = (np.asarray(open_picture(photo).convert("RGB")) == 255).all(2)
    labels = above_half(road)
    if blank.shape != labels.shape:
        return labels  # the sizes are compared, and reported, elsewhere
    return np.where(blank, VOID, labels).astype(np.uint8)


def massachusetts(root):
    """Massachusetts Roads: train/, valid/, test/ with sat/ and map/; or tiff/ with train/, train_labels/, val/, ..."""
    names = [(root / s / "sat", root / s / "map") for s in ("train", "valid", "test")]
    if not all(a.is_dir() and b.is_dir() for a, b in names):
        top = root / "tiff" if (root / "tiff").is_dir() else root
        names = [(top / s, top / f"{s}_labels") for s in SPLITS]
        if not all(a.is_dir() and b.is_dir() for a, b in names):
            return None
    found = Found("Massachusetts Roads, its own split", ("background", "road"))
    for split, (sat, road) in zip(SPLITS, names):
        photos, roads = by_stem(sat, found.problems), by_stem(road, found.problems)
        for name in sorted(photos.keys() | roads.keys()):
            files = photos.get(name, sat / f"{name}.tiff"), roads.get(name, road / f"{name}.tif")
            found.add(split, name, *files, partial(read_road, *files))
    return found


CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def read_cityscapes(path):
    train_id = np.full(256, VOID, np.uint8)
    train_id[list(CITYSCAPES)] = range(len(CITYSCAPES))
    return train_id[np.asarray(open_picture(path).convert("L"))]


def cityscapes(root):
    """Cityscapes: leftImg8bit/ and gtFine/ with train/CITY/ and val/CITY/"""
    if not (root / "leftImg8bit").is_dir() or not (root / "gtFine").is_dir():
        return None
    found = Found("Cityscapes, its val tests, the last seventh of its training cities validates", tuple(CITYSCAPES.values()))
    cities = sorted(path.name for path in (root / "leftImg8bit" / "train").glob("*") if path.is_dir())
    held_out = set(cities[-max(1, len(cities) // 7) :])
    for part in "train", "val":
        for photo in sorted((root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            name, city = photo.name.replace("_leftImg8bit.png", ""), photo.parent.name
            mask = root / "gtFine" / part / city / f"{name}_gtFine_labelIds.png"
            split = "test" if part == "val" else "val" if city in held_out else "train"
            found.add(split, name, photo, mask, partial(read_cityscapes, mask))
    return found


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def read_camvid(path):
    ids = np.asarray(open_picture(path))
    if ids.ndim != 2 or ids.max() > len(CAMVID):
        raise ValueError(f"{path}: holds {ids.max()}{' and colours' * (ids.ndim > 2)}; the annotations of CamVid are ids 0 to 11")
    return np.where(ids == len(CAMVID), VOID, ids).astype(np.uint8)


def camvid(root):
    """CamVid: train/, val/, test/ and trainannot/, valannot/, testannot/"""
    if not all((root / f"{split}{kind}").is_dir() for split in SPLITS for kind in ("", "annot")):
        return None
    found = Found("CamVid, its own split", CAMVID)
    for split in SPLITS:
        photos, masks = (by_stem(root / f"{split}{kind}", found.problems) for kind in ("", "annot"))
        for name in sorted(photos.keys() | masks.keys()):
            files = photos.get(name, root / split / f"{name}.png"), masks.get(name, root / f"{split}annot" / f"{name}.png")
            found.add(split, name, *files, partial(read_camvid, files[1]))
    return found


# ---------------------------------------------------------------- which of them

LAYOUTS = {f.__name__: f for f in (lists, folders, seeded, egohands, eyth, gtea, hof, kbh, drive, massachusetts, cityscapes, camvid)}


def find_pairs(root, layout=None):
    """Recognise the layout by looking, or take the named one. Broken pairs become problems, an unknown folder a ValueError."""
    if not root.is_dir():
        raise ValueError(f"{root}: is no folder; `python data.py {root}` would draw the toy set there")
    if layout not in (None, "", *LAYOUTS):
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    fits = {name: found for name in ([layout] if layout else LAYOUTS) if (found := LAYOUTS[name](root))}
    if len(fits) > 1:
        raise ValueError(f"{root}: could be {' or '.join(fits)}; say which with --layout")
    if not fits:
        here = ", ".join(sorted(p.name + "/" * p.is_dir() for p in root.iterdir())[:8]) or "nothing"
        looked = "\n".join(f"  {name:14} {LAYOUTS[name].__doc__}" for name in ([layout] if layout else LAYOUTS))
        raise ValueError(f"{root}: holds {here}; wanted one of these:\n{looked}")
    (found,) = fits.values()
    found.problems += [f"{root}: has no photos for {split}; wanted at least one" for split in SPLITS if not found.pairs[split]]
    return found
