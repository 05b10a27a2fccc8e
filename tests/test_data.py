"""data.py, support/pictures.py, support/toy.py: folders of photos and masks, what is wrong with them, sizes, crops."""

import os
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BOX, FUZZ, STORED, blob, letter_f, run, save_turned, seeds, spoiled, write_checkpoint, write_pair
from hypothesis import given, strategies as st
from PIL import Image

import data
from data import open_dataset, survey
from evaluate import evaluate_split, load, segment
from rurnet import RecurrentUNet
from support.pictures import SPLITS, normalise, read_photo
from support.toy import draw_set

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the literature gives them


def names(root):
    return [[name for name, *_ in open_dataset(root, split).pairs] for split in SPLITS]


def test_lists_split_folders_and_seeded_split(folder, tmp_path):
    assert names(folder) == [["p0", "p1", "p2", "p3"], ["p4"], ["p5"]]
    for i, split in enumerate(SPLITS):
        write_pair(tmp_path / "three" / split, f"n{i}")
    assert names(tmp_path / "three") == [["n0"], ["n1"], ["n2"]]
    for i in range(20):
        write_pair(tmp_path / "bare", f"q{i:02}")
    for name in "._q01.png", "Thumbs.db":  # what a Mac and Windows leave
        (tmp_path / "bare/images" / name).write_bytes(b"no picture")
    parts = names(tmp_path / "bare")
    assert [len(part) for part in parts] == [14, 3, 3] and len(set(sum(parts, []))) == 20
    assert parts == names(tmp_path / "bare") and "seed 0" in survey(tmp_path / "bare").layout


@pytest.mark.parametrize("part, split, size, words", [
    ("absent", "train", None, "absent: is not a folder; `python data.py .*absent` would draw the toy set"),
    ("images", "train", None, r"(?s)holds p0.png, .*must be one of these.*lists  .*train.txt.*DRIVE"),
    ("", "training", None, "split is 'training'; the splits are train, val, test"),
    ("", "train", 8, "size is 8; it must be a whole number of pixels from 16"),
    ("", "train", 64.0, "size is 64.0; it must be a whole number of pixels from 16"),
])  # fmt: skip
def test_a_wrong_call_is_told_what_is_right(folder, part, split, size, words):
    with pytest.raises(ValueError, match=words):
        open_dataset(folder / part, split, size)


def test_masks_in_every_honest_encoding(tmp_path):
    white, palette = Image.fromarray(BOX * np.uint8(255)), Image.fromarray(BOX).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    ids = (BOX * 2 + (np.arange(40) > 30)).astype(np.uint8)  # classes 0 to 2
    void = np.where(np.arange(40) < 3, 255, ids).astype(np.uint8)
    for name, mask, want in [
        ("white", white, BOX),
        ("bits", Image.fromarray(BOX > 0), BOX),
        ("palette", palette, BOX),
        ("grey as RGBA", white.convert("RGBA"), BOX),
        ("16 bits", Image.fromarray(BOX.astype(np.uint16)), BOX),
        ("ids and void", Image.fromarray(void), void),
    ]:
        for i in range(3):
            write_pair(tmp_path / name, str(i), mask)
        write_pair(tmp_path / name, "3", Image.fromarray(BOX * 0))  # one class alone, where others hold more
        dataset = open_dataset(tmp_path / name, "train")
        assert dataset.classes == len(set(want.flat) - {255}), name
        np.testing.assert_array_equal(dataset[0][1], want, err_msg=name)
    chosen = open_dataset(tmp_path / "ids and void", "train", void=2)  # besides 255
    assert chosen.classes == 2
    np.testing.assert_array_equal(chosen[0][1], np.where(void == 2, 255, void))


def test_photos_of_every_kind_read_alike(tmp_path):
    photo = blob()[0].convert("L").convert("RGB")  # grey, so that every mode can hold it
    pixels = np.asarray(photo)
    photo.quantize(64).save(tmp_path / "palette.png", transparency=0)
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    for orientation in STORED:
        save_turned(photo, tmp_path / f"turned{orientation}.png", orientation)
    for ending in "jpg", "tif", "webp":
        save_turned(photo, tmp_path / f"turned.{ending}", quality=100, lossless=True)
    for path in tmp_path.iterdir():
        np.testing.assert_allclose(np.asarray(read_photo(str(path)), int), pixels, atol=1, err_msg=path.name)
    Image.fromarray(pixels[..., 0].astype(np.int32) * 70_000).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif: cannot be read as a picture .more than 16 bits"):
        read_photo(tmp_path / "deep.tif")


P1 = np.asarray(blob(x=9)[1]) // 255  # the mask of p1, the second photo of the folder to train on
write = lambda name, content: lambda f: (f / name).write_bytes(content)
delete = lambda name: lambda f: (f / name).unlink()
rename = lambda old, new: lambda f: (f / old).rename(f / new)
renamed = lambda photo, mask: lambda f: [step(f) for step in (  # the photo p1 and its mask under other names
    rename("images/p1.png", f"images/{photo}.png"), rename("masks/p1.png", f"masks/{mask}.png"),
    write("train.txt", f"p0\n{photo}\np2\np3\n".encode()))]
remask = lambda values, name="p1.png": lambda f: Image.fromarray(values).save(f / "masks" / name)
remask_all = lambda mask_of: lambda f: [remask(mask_of(i), f"p{i}.png")(f) for i in range(6)]
rewrite = lambda how, **options: lambda f: how(blob()[1]).save(f / "masks/p1.png", **options)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
link = lambda to: lambda f: delete("images/p1.png")(f) or (f / "images/p1.png").symlink_to(to)
pipe = lambda f: delete("images/p1.png")(f) or os.mkfifo(f / "images/p1.png")


def retype(ending, how=lambda photo: photo, keep=1.0, **options):
    """The photo p1 again in another format, changed by `how`; `keep` is a part of the file, or a number of bytes."""

    def apply(f):
        path = f / f"images/p1.{ending}"
        delete("images/p1.png")(f)
        how(Image.open(f / "images/p2.png").convert("RGB")).save(path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: round(keep * len(whole)) if keep > 0 else keep])

    return apply


def bomb(f):
    """A small PNG whose header claims 60,000 pixels a side."""
    png = bytearray((f / "images/p1.png").read_bytes())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    write("images/p1.png", png)(f)


FOLDERS = {  # what is done to the folder: words of the error, or None where it reads as if nothing had happened
    "photo: text": (write("images/p1.png", b"hello"), "images/p1.png: cannot be read as a picture"),
    "photo: dead link": (link("p9.png"), "missing"),
    "photo: a pipe": (pipe, "p1.png: cannot be read as a picture (not a file)"),
    "photo: a program for Ghostscript": (write("images/p1.png", EPS), "as a picture (cannot identify image file"),
    "photo: nine tenths of a JPEG": (retype("jpg", keep=0.9), "p1.jpg: cannot be read"),
    "photo: PNG without its checksum and end": (retype("png", keep=-20), None),
    "photo: 400x15": (lambda f: write_pair(f, "p1", *reversed(blob(400, 15))), "is 400x15; it must be at least 16x16"),
    "photo: a bomb": (bomb, "images/p1.png: cannot be read as a picture (Image size (3600000000 pixels) exceeds"),
    "photo: float TIFF": (retype("tif", lambda p: p.convert("F")), "p1.tif: cannot be read as a picture (floating"),
    "photo: CMYK JPEG": (retype("jpg", lambda p: p.convert("CMYK")), None),
    "photo: two pages": (retype("tif", save_all=True, append_images=[Image.new("RGB", (9, 9))]), None),
    "photo: broken colour profile": (retype("png", icc_profile=b"profile"), None),
    "photo: damaged EXIF": (retype("jpg", exif=b"Exif\0\0MM\0*\0\0\0\1"), None),
    "mask: too wide": (remask(np.pad(P1, ((0, 0), (0, 10)))), "p1.png: is 50x32, its photo is 40x32; they must match"),
    "mask: a grey pixel": (remask(np.where(np.arange(40) == 3, np.uint8(128), P1 * 255)), "values [0, 128, 255]; a"),
    "mask: an id with a gap": (remask(P1 * 7), "p1.png: holds the values [0, 7]"),
    "mask: an id of 300": (remask(P1.astype(np.uint16) * 300), "p1.png: holds values from 0 to 300; they must"),
    "mask: 0 and 1 among 0 and 255": (remask(P1), "masks/p1.png is 0 and 1; use one of the two in all masks"),
    "mask: colours": (lambda f: blob()[0].save(f / "masks/p1.png"), "p1.png: holds colours ((20, 20, 20)"),
    "mask: transparency": (rewrite(lambda m: Image.merge("LA", [m] * 2)), "or transparency;"),
    "mask: two pages": (rewrite(lambda m: m, save_all=True, append_images=[blob(x=2)[1]]), "holds 2 pages"),
    "mask: a palette with white first": (rewrite(lambda m: m.convert("RGB").quantize(2)), "the background, is white"),
    "masks: of one class": (remask_all(lambda i: BOX * 0), "every mask holds one class alone"),
    "masks: void in val": (remask_all(lambda i: BOX | (i == 4) * 255), "the masks of val hold nothing but void"),
    "folder: a mask is missing": (delete("masks/p1.png"), "masks/p1.*: missing; a photo and its mask come together"),
    "folder: a link": (link("p2.png"), None),
    "folder: two endings": (lambda f: blob()[0].save(f / "images/p1.jpg"), "p1.png: has the name of p1.jpg; give each"),
    "folder: another case": (rename("masks/p1.png", "masks/P1.png"), "masks/p1.*: missing"),
    "folder: an ending in capitals": (rename("images/p1.png", "images/p1.PNG"), None),
    "folder: spaces, dots, not ASCII": (renamed(*["my hand.v2 손 é"] * 2), None),
    "folder: one name, stored in two ways": (renamed("e\u0301", "\u00e9"), None),
    "lists: an absent name": (write("val.txt", b"p4\nq9\n"), "images/q9.* and"),
    "lists: a name in train and val": (write("val.txt", b"p4\np0.png\n"), "val.txt: names p0, which train.txt has"),
    "lists: one is missing": (delete("val.txt"), "(train.txt, val.txt, test.txt): has no photos for val; it needs one"),
    "lists: no text": (write("val.txt", b"\xff\xfe\0p"), "val.txt: is not UTF-8 text"),
    "lists: from Windows, with folders": (write("val.txt", b"\xef\xbb\xbfimages/p4.png\r\n\r\n"), None),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_reads_right_or_says_what_is_wrong(folder, name):
    how, words = FOLDERS[name]
    how(folder)
    if words is None:
        assert [len(part) for part in names(folder)] == [4, 1, 1]
        photos = open_dataset(folder, "train")
        image, mask = photos[1]
        assert (image - photos[2][0]).abs().mean() < 0.1  # all photos are alike
        np.testing.assert_array_equal(mask, P1)
    else:
        with pytest.raises(ValueError) as caught:
            open_dataset(folder, "train")
        first, *more = str(caught.value).splitlines()
        assert words in first and first.startswith(str(folder)) and len(more) <= 1, caught.value


def test_check_counts_notes_what_a_user_may_not_expect_and_lists_every_problem(folder):
    done = run("data.py", "--check", folder)
    assert done.returncode == 0 and "train.txt, val.txt, test.txt, 2 classes\n" in done.stdout
    assert "train     4 photos, 40x32 to 40x32; mask values 0: 83.8%, 255: 16.2%\n" in done.stdout  # 13 * 16 of 40 * 32
    photo = Image.open(folder / "images/p0.png")
    for name in "images/p0.png", "images/p1.png", "masks/p1.png":
        save_turned(Image.open(folder / name), folder / name, 3)
    Image.merge("RGBA", [*photo.split(), blob()[1]]).save(folder / "images/p2.png")
    photo.convert("RGBA").save(folder / "images/p4.png")  # whose fourth band says nothing
    write("train.txt", b"p0\np1\np2\n")(folder)
    done = run("data.py", "--check", folder)
    for words in ("turned by EXIF, but their masks are not", "turned by EXIF, and so are",
                  ": 1 photos have a fourth band", "images: 1 photos are in no list (p3, ...)",
                  "\n0 problems"):  # fmt: skip
        assert words in done.stdout, done.stdout
    photo.save(folder / "masks/p0.png")
    (folder / "masks/p1.png").unlink()
    (folder / "images/p2.png").write_bytes(b"GIF8")
    done = run("data.py", "--check", folder)
    assert done.returncode == 1 and all(f"p{i}" in done.stdout for i in range(3)) and "\n3 problems" in done.stdout
    with pytest.raises(ValueError, match="\n2 more such lines: python data.py --check"):
        open_dataset(folder, "train")


def test_one_split_is_surveyed_alone_and_may_lack_a_class(folder):
    delete("masks/p0.png")(folder)  # of train
    classes_of = lambda classes: survey(folder, splits=["test"], classes=classes).classes
    assert not survey(folder, splits=["test"], classes=3).white  # there 255 is void
    assert survey(folder, splits=["test"]).problems == [] != survey(folder).problems
    assert (classes_of(2), classes_of(3)) == (2, 3) and survey(folder, splits=["test"]).white
    remask_all(lambda i: BOX * 2 + (np.arange(40) < 3))(folder)
    assert (classes_of(2), classes_of(5)) == (3, 5)


@pytest.mark.parametrize("change", [
    lambda f: blob(50, 32)[0].save(f / "images/p0.png"), remask(BOX[:-1], "p0.png"), remask(BOX * 7, "p0.png")])
def test_a_survey_is_not_repeated_but_what_has_changed_since_is_named(folder, change):
    remask_all(lambda i: BOX)(folder)
    found = survey(folder)  # 0 and 1 now, where 255 was class 1
    assert open_dataset(folder, "train")[1][1].unique().tolist() == [0, 1]
    change(folder)
    photos = open_dataset(found, "train", 16, augment=True)
    with pytest.raises(ValueError, match="p0.png: the photo or its mask has changed since it was checked"):
        photos[0]
    with pytest.raises(ValueError, match="p0.png: "):
        open_dataset(folder, "train")


def test_the_short_side_of_a_split_is_its_medians(tmp_path):
    for split, sides in ("train", (20, 50, 30)), ("val", [60]), ("test", [60]):
        for side in sides:
            write_pair(tmp_path / split, f"p{side}", *reversed(blob(70, side)))
    assert [survey(tmp_path).short_side(split) for split in SPLITS] == [30, 60, 60]
    assert open_dataset(tmp_path, "train").crop == 30  # of photos at their own sizes


def test_a_network_sees_the_same_pixels_in_training_evaluation_and_prediction(tmp_path):
    write_checkpoint(tmp_path / "it.pt", passes=1)
    noise = np.random.default_rng(0).integers(0, 256, (45, 67, 4), np.uint8)  # any other way of resizing shows
    photo, mask = Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 3] // 128)
    for name in "abc":
        write_pair(tmp_path, name, mask)
        save_turned(photo, tmp_path / f"images/{name}.png")
    path, model, seen = tmp_path / "images/b.png", load(tmp_path / "it.pt"), []
    watch = lambda module, args: seen.append(args[0].cpu()) if isinstance(module, RecurrentUNet) else None
    with torch.nn.modules.module.register_module_forward_pre_hook(watch):
        evaluate_split(model, open_dataset(tmp_path, "test"))
        segment(model, read_photo(path))
        done = run("predict.py", tmp_path / "it.pt", path, "--out", tmp_path / "out")
    assert len(seen) == 3, done.stderr

    training = open_dataset(tmp_path, "train", model.size, augment=True)
    image, truth = open_dataset(tmp_path, "val", model.size)[0]
    for other in *seen, model.to_input(read_photo(path)), normalise(training.resized(0)[0])[None]:
        assert torch.equal(image[None], other)
    small = photo.resize((24, 16), Image.BILINEAR)  # Pillow's own, of a photo 67x45: 67 * 16 / 45 = 23.8
    want = (np.asarray(small, np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(image, want.transpose(2, 0, 1), atol=1e-5)
    assert image.dtype == torch.float32 and truth.dtype == torch.int64
    np.testing.assert_array_equal(truth, mask.resize((24, 16), Image.NEAREST))
    np.testing.assert_array_equal(training.resized(0)[1], truth)


@given(seed=seeds, crop=st.integers(24, 96), rotate=st.sampled_from([0, 15, 180]))
def test_augmentation_moves_photo_and_mask_together(seed, crop, rotate):
    image, mask = data.augment(*letter_f(), crop, rotate, np.random.default_rng(seed))
    image, mask = np.asarray(image).max(2).astype(float), np.asarray(mask)
    assert image.shape == mask.shape == (crop, crop) and set(np.unique(mask)) <= {0, 1, 255}
    for inside, dark in (mask == 1, False), (mask == 0, True):  # away from edges, the photo shows what the mask holds
        core = np.zeros_like(inside)
        core[2:-2, 2:-2] = np.lib.stride_tricks.sliding_window_view(inside, (5, 5)).all((2, 3))
        assert ((image[core] < 60) if dark else (image[core] > 60)).all()


def test_augmentation_flips_scales_turns_and_lights():
    drawn = [data.augment(*letter_f(), 70, 15, np.random.default_rng(seed)) for seed in range(40)]
    areas = [(np.asarray(mask) == 1).sum() for _, mask in drawn]
    assert max(areas) > 2 * min(areas)
    means = [np.asarray(image)[np.asarray(mask) == 1].mean(0) for image, mask in drawn]
    assert np.std(means, axis=0).min() > 3  # of 255: the light changes little, see augment
    stems = []  # the long stroke of F is left of its arms, or right of them in a flipped F; its tilt is the turn
    for _, mask in drawn:
        y, x = np.nonzero(np.asarray(mask) == 1)
        stems.append((np.mean((x - x.mean()) ** 3), np.polyfit(y, x, 1)[0]))
    assert min(s for s, _ in stems) < 0 < max(s for s, _ in stems)
    assert len({round(tilt, 3) for _, tilt in stems}) > 30


def test_crops_depend_on_nothing_but_seed_epoch_and_index(folder):
    found = survey(folder)
    photos = [open_dataset(found, "train", 24, True, seed=seed, repeat=3) for seed in (0, 0, 1)]
    first = list(photos[0])
    assert all(torch.equal(a, b) for k in reversed(range(12)) for a, b in zip(first[k], photos[1][k]))
    assert len(first) == len(photos[0]) == 12
    assert not torch.equal(first[0][0], photos[2][0][0]) and not torch.equal(first[0][0], first[4][0])
    assert torch.equal(first[0][0], photos[0][0, 0][0]) and not torch.equal(first[0][0], photos[0][1, 0][0])


def test_the_toy_set_is_seeded_shows_skin_and_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "draw_set", partial(draw_set, count=7))
    drawn, again, other = (run("data.py", tmp_path / name) for name in ("hands", "hands", "others"))
    assert drawn.returncode == other.returncode == 0 and [*map(len, names(tmp_path / "hands"))] == [5, 1, 1]
    assert again.returncode == 1 and "hands: exists and is not empty" in again.stderr
    for path in (tmp_path / "hands").glob("*/*"):
        assert path.read_bytes() == (tmp_path / "others" / path.relative_to(tmp_path / "hands")).read_bytes()
    for name in "003", "004":
        paths = tmp_path / f"hands/images/{name}.jpg", tmp_path / f"hands/masks/{name}.png"
        photo, mask = (np.asarray(Image.open(path)) for path in paths)
        assert photo.shape == (120, 160, 3) and mask.shape == (120, 160) and set(np.unique(mask)) == {0, 255}
        skin = photo[mask > 0].mean(0)
        assert 0.05 < (mask > 0).mean() < 0.45 and skin[0] > skin[2]  # under any lamp skin is redder than blue


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
@pytest.mark.parametrize("name", [*("images/p1." + e for e in ("jpg", "png", "tif", "webp", "gif", "bmp", "ppm")),
                                  "masks/p1.png", "masks/p1.gif", "masks/p1.tif", "train.txt"])  # fmt: skip
def test_a_spoiled_file_is_read_or_named(folder, name):
    """FUZZ=5000 python -m pytest -k spoiled    runs for ten minutes and more; a few examples are enough every day."""
    path = folder / name
    if name.startswith("images"):
        (folder / "images/p1.png").unlink()
        save_turned(blob()[0], path) if path.suffix in (".jpg", ".tif", ".webp") else blob()[0].save(path)
    elif name.startswith("masks"):
        rename("masks/p1.png", name)(folder)
    for mask in folder.glob("masks/*"):  # all are 0 and 1, as Pillow stores the indices of a palette in a GIF
        Image.fromarray(P1).save(mask)
    open_dataset(folder, "train")

    @FUZZ
    @given(spoiled(path.read_bytes()))
    def try_it(content):
        path.write_bytes(content)
        try:
            dataset = open_dataset(folder, "train", 16, augment=True)
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            for image, mask in dataset:
                assert image.shape == (3, 16, 16) and image.isfinite().all()
                assert set(mask.unique().tolist()) <= {*range(dataset.classes), 255}

    try_it()
