"""The paper's datasets as they are published, one function each. data.py recognises a folder by asking all of them.

Each function takes a folder and returns None where the folder is not of its kind. Otherwise it returns a Found:
which photo belongs to which mask in which split, by the dataset's own split as far as it has one.
To add a dataset, write its function and name it in LAYOUTS.
"""

from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw

from support.pictures import SPLITS, VOID, Found, by_stem, has, open_picture, read_list


def read_bright(path):
    """A mask with a dark background and a bright foreground, through JPEG noise: 0 and 1, (H, W)."""
    return (np.asarray(open_picture(path).convert("L")) > 127).astype(np.uint8)


# ---------------------------------------------------------------- hands
HANDS = ("background", "hand")
EGOHANDS = {  # the main split of the dataset; every other video trains
    "val": "CARDS_LIVINGROOM_S_H CHESS_COURTYARD_H_S JENGA_COURTYARD_T_S PUZZLE_OFFICE_S_T",
    "test": "CARDS_COURTYARD_B_T CARDS_OFFICE_S_B CHESS_COURTYARD_B_T CHESS_LIVINGROOM_T_H "
    "JENGA_LIVINGROOM_S_T JENGA_OFFICE_H_T PUZZLE_COURTYARD_H_T PUZZLE_LIVINGROOM_T_B",
}


@lru_cache(maxsize=64)
def load_polygons(path):
    from scipy.io import loadmat  # only here: it takes half a second to import

    try:
        return loadmat(path)["polygons"][0]
    except Exception as error:  # a broken file raises any of half a dozen kinds of exception in scipy
        raise ValueError(f"{path}: is not a polygons.mat of EgoHands, or is damaged ({type(error).__name__})") from None


def read_polygons(photo, mat, i):
    """The pixels inside any of the hands that the i-th entry outlines."""
    mask = Image.new("L", open_picture(photo, small=True).whole)
    for hand in "myleft", "myright", "yourleft", "yourright":
        outline = load_polygons(mat)[i][hand]
        if outline.ndim == 2 and outline.shape[1] == 2 and len(outline) > 2:  # an unseen hand is empty
            ImageDraw.Draw(mask).polygon([tuple(point) for point in outline.tolist()], fill=1)
    return np.asarray(mask)


def egohands(root):
    """EgoHands: _LABELLED_SAMPLES/VIDEO/frame_0001.jpg and polygons.mat in each"""
    top = root / "_LABELLED_SAMPLES" if (root / "_LABELLED_SAMPLES").is_dir() else root
    videos = sorted(path.parent for path in top.glob("*/polygons.mat"))
    if not videos:
        return None
    found = Found("EgoHands, main split by video", HANDS)
    held_out = {name: split for split, listed in EGOHANDS.items() for name in listed.split()}
    split_of = {video.name: held_out.get(video.name, "train") for video in videos}
    for split in "val", "test":
        rest = [name for name in split_of if split_of[name] == "train"]
        if split not in split_of.values() and len(rest) > 1:  # only a part of the dataset is here
            split_of |= {name: split for name in rest[-max(1, len(rest) // 7) :]}
            found.layout += f"; it has no video of its {split} split, so the last seventh of the others takes its place"
    for video in videos:
        frames, mat = sorted(video.glob("frame_*.jpg")), video / "polygons.mat"
        outlined = len(load_polygons(mat))
        if outlined != len(frames):
            found.problems.append(f"{mat}: outlines {outlined} frames, the folder holds {len(frames)}; both must agree")
            continue
        for i, frame in enumerate(frames):
            name, read = f"{video.name}_{frame.stem}", partial(read_polygons, frame, mat, i)
            found.add(split_of[video.name], name, frame, mat, read)
    return found


def eyth(root):
    """EYTH: images/, masks/ and train-val-test-split/train.txt"""
    if not (root / "train-val-test-split").is_dir():
        return None
    found = Found("EYTH, its lists", HANDS)
    for split in SPLITS:
        for name in read_list(root / "train-val-test-split" / f"{split}.txt", found.problems):
            mask = root / "masks" / f"{name}.png"
            mask = mask if mask.exists() else root / "masks" / name  # two videos of the archive lack the ending
            found.add(split, name, root / "images" / f"{name}.jpg", mask, partial(read_bright, mask))
    return found


def gtea(root):
    """GTEA: Images/s2_cheese_0000000020.jpg and Masks/"""
    if not has(root, "Images", "Masks") or not any((root / "Images").glob("s[1-4]_*.jpg")):
        return None
    found = Found("GTEA, subject s2 tests, s4 validates, s1 and s3 train", HANDS)
    masks = by_stem(root / "Masks", found.problems)
    for photo in sorted((root / "Images").glob("s[1-4]_*.jpg")):
        mask = masks.get(photo.stem, root / "Masks" / f"{photo.stem}.*")
        split = {"2": "test", "4": "val"}.get(photo.name[1], "train")
        found.add(split, photo.stem, photo, mask, partial(read_bright, mask))
    return found


def hof(root):
    """HOF: images_resized/, masks/ and train.txt, test.txt"""
    if not (root / "images_resized").is_dir():
        return None
    found = Found("HOF, its lists; it validates on the test split, as the paper does", HANDS)
    for split in SPLITS:
        for name in read_list(root / f"{'train' if split == 'train' else 'test'}.txt", found.problems):
            mask = root / "masks" / f"{name}.png"
            found.add(split, name, root / "images_resized" / f"{name}.jpg", mask, partial(read_bright, mask))
    return found


def kbh(root):
    """KBH: data_split_by_seq/PERSON_SEQUENCE/FRAME_halfres.jpg and train_val_test_split/"""
    frames, lists = root / "data_split_by_seq", root / "train_val_test_split"
    if not frames.is_dir():
        return None
    # The public test.txt names a fifth of the frames and train.txt three fifths; the paper trains on the fifth.
    found = Found("KBH, split as in the paper: trains on test.txt, tests on train.txt", HANDS)
    for split, listed in zip(SPLITS, ("test", "val", "train")):
        for name in read_list(lists / f"{listed}.txt", found.problems):
            photo, mask = frames / f"{name}_halfres.jpg", frames / f"{name}_mask.png"
            found.add(split, name.replace("/", "_"), photo, mask, partial(read_bright, mask))
    return found


# ---------------------------------------------------------------- vessels, roads, streets
def read_drive(manual, view):
    labels, inside = read_bright(manual), read_bright(view)
    if labels.shape != inside.shape:
        (h, w), (height, width) = inside.shape, labels.shape
        raise ValueError(f"{view}: is {w}x{h}, its vessels are {width}x{height}; they must match pixel by pixel")
    return np.where(inside, labels, VOID).astype(np.uint8)


def drive(root):
    """DRIVE: training/ and test/ with images/, 1st_manual/, mask/"""
    if not (root / "training" / "1st_manual").is_dir():
        return None
    found = Found("DRIVE, the last 4 training images for validation", ("background", "vessel"))
    for split, part in ("train", "training"), ("test", "test"):
        photos, manuals, views = (by_stem(root / part / k, found.problems) for k in ("images", "1st_manual", "mask"))
        for name, photo in photos.items():
            manual, view = manuals.get(f"{name[:2]}_manual1"), views.get(f"{name}_mask")
            if manual and view:
                found.add(split, name, photo, manual, partial(read_drive, manual, view))
            else:
                found.problems.append(f"{photo}: has no vessels in 1st_manual/ or no field of view in mask/")
    found.pairs["train"], found.pairs["val"] = found.pairs["train"][:-4], found.pairs["train"][-4:]
    return found


def read_road(photo, road):
    """Road is bright. Where the photo is pure white, the tile has no image: void."""
    blank = (np.asarray(open_picture(photo).convert("RGB")) == 255).all(2)
    labels = read_bright(road)
    if blank.shape != labels.shape:
        return labels  # the sizes are compared, and reported, in data.py
    return np.where(blank, VOID, labels).astype(np.uint8)


def massachusetts(root):
    """Massachusetts Roads: train/, valid/, test/ with sat/ and map/; or tiff/ with train/, train_labels/, val/, ..."""
    top = root / "tiff" if (root / "tiff").is_dir() else root
    folders = [(root / s / "sat", root / s / "map") for s in ("train", "valid", "test")]
    other = [(top / s, top / f"{s}_labels") for s in SPLITS]
    for pairs in folders, other:
        if all(folder.is_dir() for pair in pairs for folder in pair):
            break
    else:
        return None
    found = Found("Massachusetts Roads, its own split", ("background", "road"))
    for split, (sat, road) in zip(SPLITS, pairs):
        photos, roads = by_stem(sat, found.problems), by_stem(road, found.problems)
        for name in sorted(photos.keys() | roads.keys()):
            files = photos.get(name, sat / f"{name}.tiff"), roads.get(name, road / f"{name}.tif")
            found.add(split, name, *files, partial(read_road, *files))
    return found


CITYSCAPES = {  # label id: class; the train ids count them in this order
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def read_cityscapes(path):
    train_id = np.full(256, VOID, np.uint8)
    train_id[list(CITYSCAPES)] = range(len(CITYSCAPES))
    return train_id[np.asarray(open_picture(path).convert("L"))]


def cityscapes(root):
    """Cityscapes: leftImg8bit/ and gtFine/ with train/CITY/ and val/CITY/"""
    if not (root / "leftImg8bit").is_dir() or not (root / "gtFine").is_dir():
        return None
    layout = "Cityscapes, its val tests, the last seventh of its training cities validates"
    found = Found(layout, tuple(CITYSCAPES.values()))
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
        more = " and colours" * (ids.ndim > 2)
        raise ValueError(f"{path}: holds {ids.max()}{more}; the annotations of CamVid are ids 0 to 11")
    return np.where(ids == len(CAMVID), VOID, ids).astype(np.uint8)


def camvid(root):
    """CamVid: train/, val/, test/ and trainannot/, valannot/, testannot/"""
    if not all((root / f"{split}{kind}").is_dir() for split in SPLITS for kind in ("", "annot")):
        return None
    found = Found("CamVid, its own split", CAMVID)
    for split in SPLITS:
        folder, annotations = root / split, root / f"{split}annot"
        photos, masks = by_stem(folder, found.problems), by_stem(annotations, found.problems)
        for name in sorted(photos.keys() | masks.keys()):
            files = photos.get(name, folder / f"{name}.png"), masks.get(name, annotations / f"{name}.png")
            found.add(split, name, *files, partial(read_camvid, files[1]))
    return found


LAYOUTS = [egohands, eyth, gtea, hof, kbh, drive, massachusetts, cityscapes, camvid]
