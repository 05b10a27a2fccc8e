"""paper/datasets.py against drawn folders of each published kind; paper/baselines.py against equations and weights."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
from conftest import BOX, HERE, blob, process, run, save_turned
from PIL import Image, ImageDraw
from torch.nn import functional as F

from data import open_dataset, survey
from paper import baselines
from paper.baselines import build
from rurnet import recurrent_loss
from support.pictures import SPLITS

# ---------------------------------------------------------------- datasets: a small one of each kind
def save_pair(root, photo, mask, picture=blob()[0], labels=blob()[1], **how):
    for name, content in (photo, picture), (mask, labels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(root / name, **how)


def write_names(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(f"{name}\n" for name in names)


def ids(front, back=0, void=None):
    """The box as class ids; `void` fills the six columns at the left, which the box does not reach."""
    labels = np.where(BOX, front, back).astype(np.uint8)
    labels[:, :6] = labels[:, :6] if void is None else void
    return Image.fromarray(labels)


def make_egohands(root, videos=(("CARDS_OFFICE_T_B", 0), ("CHESS_OFFICE_B_S", 0), ("JENGA_COURTYARD_T_S", 1),
                                ("PUZZLE_COURTYARD_H_T", 2))):  # fmt: skip
    """Two frames a video; the second shows a hand. Each video comes with the number of its split."""
    parts, unseen, box = [[], [], []], np.zeros((1, 0)), np.float64([[8, 4], [20, 4], [20, 19], [8, 19]])
    for video, part in videos:
        folder = root / "_LABELLED_SAMPLES" / video
        folder.mkdir(parents=True)
        polygons = np.zeros((1, 2), [(hand, object) for hand in ("myleft", "myright", "yourleft", "yourright")])
        polygons[0, 0], polygons[0, 1] = (unseen, unseen, unseen, unseen), (unseen, unseen, box, unseen)
        scipy.io.savemat(folder / "polygons.mat", {"polygons": polygons})
        for frame in "frame_0000", "frame_0100":
            blob()[0].save(folder / f"{frame}.jpg")
            parts[part].append(f"{video}_{frame}")
    return parts


def make_eyth(root):
    for split, name in zip(SPLITS, ("vid4_1", "vid6_2", "vid9_3")):
        save_pair(root, f"images/{name}.jpg", f"masks/{name}.png")
        write_names(root / f"train-val-test-split/{split}.txt", name)
    (root / "masks/vid4_1.png").rename(root / "masks/vid4_1")  # as in the archive
    return [["vid4_1"], ["vid6_2"], ["vid9_3"]]


def make_gtea(root):
    frames = ["s1_tea_0000000010", "s2_cheese_0000000020", "s3_tea_0000000030", "s4_pealate_0000000040"]
    for name in frames:
        save_pair(root, f"Images/{name}.jpg", f"Masks/{name}.jpg", quality=60)  # which adds noise around 0 and 255
    return [[frames[0], frames[2]], [frames[3]], [frames[1]]]


def make_hof(root):
    for name, mode in ("12", "RGB"), ("7", "L"), ("9", "RGB"):
        save_pair(root, f"images_resized/{name}.jpg", f"masks/{name}.png", blob()[0].convert(mode))
    write_names(root / "train.txt", "12", "9")
    write_names(root / "test.txt", "7")
    return [["12", "9"], ["7"], ["7"]]


def make_kbh(root):
    for name, listed in ("36_1/00081", "test"), ("29_2/00033", "val"), ("1_3/00010", "train"), ("1_3/00020", "train"):
        save_pair(root, f"data_split_by_seq/{name}_halfres.jpg", f"data_split_by_seq/{name}_mask.png")
        write_names(root / f"train_val_test_split/{listed}.txt", name)
    return [["36_1_00081"], ["29_2_00033"], ["1_3_00010", "1_3_00020"]]


def make_drive(root):
    view = Image.fromarray((np.arange(40) >= 6) * np.full((32, 1), 255, np.uint8))
    for part, n in [*(("training", n) for n in range(21, 29)), *(("test", f"0{n}") for n in range(1, 4))]:
        save_pair(root, f"{part}/images/{n}_{part}.tif", f"{part}/1st_manual/{n}_manual1.gif")
        save_pair(root, f"{part}/images/{n}_{part}.tif", f"{part}/mask/{n}_{part}_mask.gif", labels=view)
    train, val = ([f"{n}_training" for n in range(a, a + 4)] for a in (21, 25))
    return [train, val, ["01_test", "02_test", "03_test"]]


def make_roads(root, at="{0}/sat/{0}1.tiff {0}/map/{0}1.tif"):
    tile, splits = blob()[0], ("train", "val" if "tiff/" in at else "valid", "test")
    ImageDraw.Draw(tile).rectangle((0, 0, 5, 40), fill=(255, 255, 255))
    for split in splits:
        save_pair(root, *at.format(split).split(), tile)
    return [[f"{split}1"] for split in splits]


def make_cityscapes(root):
    labels = ids(26, 7, void=4)  # a car on a road; 4 has no train id
    for at in "train/aachen/a", "train/ulm/b", "val/munster/c", "test/bonn/d":
        save_pair(root, f"leftImg8bit/{at}_leftImg8bit.png", f"gtFine/{at}_gtFine_labelIds.png", labels=labels)
    return [["a"], ["b"], ["c"]]


def make_camvid(root):
    for i, split in enumerate(SPLITS):
        save_pair(root, f"{split}/{i}.png", f"{split}annot/{i}.png", labels=ids(8, void=11))
    return [["0"], ["1"], ["2"]]


@pytest.mark.parametrize("name, make, classes, front, void", [
    ("EgoHands", make_egohands, 2, 1, None), ("EYTH", make_eyth, 2, 1, None), ("GTEA", make_gtea, 2, 1, None),
    ("HOF", make_hof, 2, 1, None), ("KBH", make_kbh, 2, 1, None), ("DRIVE", make_drive, 2, 1, 255),
    ("Massachusetts", make_roads, 2, 1, 255),
    ("Massachusetts", partial(make_roads, at="tiff/{0}/{0}1.tiff tiff/{0}_labels/{0}1.tif"), 2, 1, 255),
    ("Cityscapes", make_cityscapes, 19, 13, 255), ("CamVid", make_camvid, 11, 8, 255),
])  # fmt: skip
def test_datasets_are_read_as_they_are_published(name, make, classes, front, void, tmp_path):
    want, found = make(tmp_path), survey(tmp_path)
    assert [[name for name, *_ in found.pairs[split]] for split in SPLITS] == want and not found.problems
    assert found.layout.startswith(name) and found.classes == len(found.names) == classes
    assert survey(tmp_path, 3).problems == [f"--void 3: {found.layout} has void pixels of its own; leave --void out"]
    for split in SPLITS:
        *others, (image, mask) = open_dataset(found, split)
        np.testing.assert_array_equal(mask, ids(front, void=void))
        assert image.shape == (3, 32, 40) and (name != "EgoHands" or not others[0][1].any())  # no hand in frame_0000


def test_a_part_of_egohands_is_split_by_video(tmp_path):
    videos = [(f"V{i:02}", i // 13) for i in range(15)] + [("CARDS_COURTYARD_B_T", 2)]  # 15 // 7 videos validate
    want, found = make_egohands(tmp_path, videos), survey(tmp_path)
    assert [[name for name, *_ in found.pairs[split]] for split in SPLITS] == want
    assert "no video of its val split, so the last seventh of the others takes its place" in found.layout


CHESS, SMALL = "_LABELLED_SAMPLES/CHESS_OFFICE_B_S", ids(1).crop((0, 0, 9, 9))


@pytest.mark.parametrize("make, file, content, words", [
    (make_kbh, "data_split_by_seq/1_3/00020_mask.png", None, "00020_mask.png: missing"),
    (make_camvid, "trainannot/0.png", blob()[0], "0.png: holds .* and colours; the annotations of CamVid"),
    (make_camvid, "valannot/1.png", ids(11, 11), "the masks of val hold nothing but void"),
    (make_egohands, f"{CHESS}/frame_0000.jpg", None, "polygons.mat: outlines 2 frames, .* holds 1"),
    (make_egohands, f"{CHESS}/polygons.mat", SMALL, "is not a polygons.mat of EgoHands, or is"),
    (make_drive, "test/1st_manual/01_manual1.gif", None, "01_test.tif: has no vessels in 1st_manual/"),
    (make_drive, "test/mask/01_test_mask.gif", SMALL, "_mask.gif: is 9x9, its vessels are 40x32"),
    (make_roads, "test/map/test1.tif", SMALL, "test1.tif: is 9x9, its photo is 40x32"),
    (make_hof, "images/12.png", SMALL, "could be lists or hof; move what belongs to only one of them elsewhere"),
])  # fmt: skip
def test_a_broken_dataset_says_what_is_wrong(make, file, content, words, tmp_path):
    make(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        content.save(tmp_path / file, "PNG")
    with pytest.raises(ValueError, match=words):
        open_dataset(tmp_path, "train")


# ---------------------------------------------------------------- baselines: every system
VGG, RESNET50, RESNET101 = ((), 14_714_688), ((3, 4, 6, 3), 23_508_032), ((3, 4, 23, 3), 42_500_160)
DEEP = {  # depths of the encoder, and torchvision's number of its parameters without the classifier
    "unet-vgg16": VGG, "dru-vgg16": VGG, "unet-resnet50": RESNET50, "dru-resnet50": RESNET50,
    "deeplabv3plus": RESNET50, "refinenet": RESNET101,
}  # fmt: skip
TEXT = (HERE / "paper/README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.+`) \|.+\| (.+) \|$", TEXT, re.M)
SIZES = {name: numbers for names, numbers in ROWS for name in re.findall("`(.+?)`", names)}


@pytest.mark.parametrize("name", baselines.SYSTEMS)
def test_a_system_takes_any_size_returns_its_passes_and_every_parameter_learns(name):
    net = build(name, 3).eval()
    image = torch.randn(2, net.image_channels, 16, 49)  # the least height, and a width that is odd at every level
    masks, longer = net(image, 2), net(image)
    assert (len(masks), len(longer)) == ((2, 3) if "passes" in baselines.options(name) else (1, 1))
    assert all(s.shape == (2, 3, 16, 49) for s in longer) and all(map(torch.equal, masks, longer))
    recurrent_loss(masks, torch.randint(3, (2, 16, 49)), 0.4).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("name", [name for name in SIZES if name in baselines.SYSTEMS])
def test_a_system_has_as_many_parameters_as_the_table_says(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(name, 2).parameters())
    assert {f"{parameters:,}", f"{parameters / 1e6:.2f}"} & set(SIZES[name].split()) and len(SIZES) >= 13, parameters


def test_batch_norm_is_where_group_norm_was():
    kinds = [[type(m).__name__ for m in build(name, 2).modules()] for name in ("unet-b", "unet-g")]
    assert kinds[0] == [k.replace("GroupNorm", "BatchNorm2d") for k in kinds[1]] and "BatchNorm2d" in kinds[0]


def test_recurrent_baselines_equal_their_equations():
    simple, middle, last = (build(f"rec-{kind}", 2, width=4).double() for kind in ("simple", "middle", "last"))
    image, mask = torch.randn(1, 3, 32, 40).double(), torch.zeros(1, 2, 32, 40).double()
    for s in simple(image):
        torch.testing.assert_close(s, simple.head(simple.unet(torch.cat([image, mask], 1))))
        mask = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
    gru = baselines.ConvGRU(6, 8).double()
    e, h = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 8, 5, 7).double()
    z, r = (1 / (1 + torch.exp(-f(torch.cat([e, h], 1)))) for f in (gru.net_z, gru.net_r))
    torch.testing.assert_close(gru(e, h), z * h + (1 - z) * torch.tanh(gru.net_c(torch.cat([e, r * h], 1))))
    (e, skips), h = middle.unet.encode(image), torch.zeros(1, 64, 2, 3).double()
    for s in middle(image):
        h = middle.unet.middle(e, h)
        torch.testing.assert_close(s, middle.head(middle.unet.decode(h, skips)))
    e, h = last.unet(image), torch.zeros(1, 4, 32, 40).double()
    for s in last(image):
        h = last.unit(e, h)
        torch.testing.assert_close(s, last.head(h))


# ---------------------------------------------------------------- baselines: encoders trained elsewhere
def vgg16_by_hand(p, x):
    skips = []
    for block in (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28):
        for at in block:
            x = F.conv2d(x, p.pop(f"features.{at}.weight"), p.pop(f"features.{at}.bias"), padding=1).relu()
        skips.append(x)
        x = F.max_pool2d(x, 2)
    return [x, *skips]


def resnet_by_hand(p, x, depths, dilate):
    def conv(at, norm, x, *how):
        x = F.conv2d(x, p.pop(f"{at}.weight"), None, *how)
        return F.batch_norm(x, *(p.pop(f"{norm}.{n}") for n in ("running_mean", "running_var", "weight", "bias")))

    skips = [conv("conv1", "bn1", x, 2, 3).relu()]
    x = F.max_pool2d(skips[0], 3, 2, 1)
    for i, depth in enumerate(depths, 1):
        spread = 2 if dilate and i == 4 else 1
        for j in range(depth):
            at, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 and spread == 1 else 1
            y = conv(f"{at}.conv1", f"{at}.bn1", x).relu()
            y = conv(f"{at}.conv2", f"{at}.bn2", y, stride, spread, spread).relu()
            y = conv(f"{at}.conv3", f"{at}.bn3", y)
            x = (y + (x if j else conv(f"{at}.downsample.0", f"{at}.downsample.1", x, stride))).relu()
        skips.append(x)
    return [skips.pop(), *skips]


@pytest.mark.parametrize("name", DEEP)
def test_an_encoder_is_torchvisions(name, tmp_path):
    (depths, parameters), image, path = DEEP[name], torch.randn(1, 3, 64, 96), tmp_path / "encoder.pth"
    p = (baselines.ResNet(3, depths) if depths else baselines.VGG16()).state_dict()
    for n, x in p.items():
        if x.dim() == 4:
            torch.nn.init.kaiming_normal_(x)
        elif x.dim() == 1:
            x.uniform_(0.5, 1) if n.endswith(("weight", "running_var")) else x.normal_(0, 0.1)
    assert sum(x.numel() for n, x in p.items() if not re.search("running|num_batches", n)) == parameters
    torch.save(p | {"classifier.6.bias": torch.zeros(1000), "fc.bias": torch.zeros(1000)}, path)  # as torchvision's
    net = build(name, 3, weights=path).eval()
    path.unlink()
    # The mask's channels start at zero, so any mask gives the features of the photo alone.
    seen, p = torch.cat([image, torch.rand(1, 3, 64, 96)], 1) if name.startswith("dru") else image, dict(p)
    with torch.no_grad():
        want = resnet_by_hand(p, image, depths, "deeplab" in name) if depths else vgg16_by_hand(p, image)
        e, skips = baselines.encoder_of(net)(seen)
        for got, x in zip([e, *skips], want, strict=True):
            torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4 * x.abs().max())  # float32, a hundred layers deep
        if not depths:  # VGG-16: what the decoder is given has a spread of one, whatever the weights
            e, skips = net.outer.encode(seen)
            for got, x in zip([e, *skips], want, strict=True):
                torch.testing.assert_close(got, F.group_norm(x, 8), rtol=1e-3, atol=1e-3)
    assert not [n for n in p if "num_batches" not in n]  # every weight was used, under its name


@pytest.mark.parametrize("name", ["dru-vgg16", "dru-resnet50"])
def test_a_deep_dru_carries_its_state(name):
    net, image = build(name, 3).eval(), torch.randn(1, 3, 70, 64)
    with torch.no_grad():
        _, (mask, h) = net.step(image, net.start(image))
        after, forgetful = (net.step(image, (mask, state))[0] for state in (h, torch.zeros_like(h)))
    assert h.shape == (1, 512, 3, 2) and h.abs().max() > 0 and not torch.equal(after, forgetful)


def test_an_unknown_system_option_or_weights_file_is_refused(tmp_path, monkeypatch):
    p = {name: torch.zeros(()).expand(x.shape) for name, x in baselines.VGG16().state_dict().items()}  # small files
    torch.save(p, tmp_path / "vgg16.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "vgg16.pth").read_bytes()[:1000])
    torch.save(p | {"features.0.weight": torch.zeros(64, 1, 3)}, tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    monkeypatch.chdir(tmp_path)
    for name, options, words in [
        ("dru-vgg16", {"weights": "absent.pth"}, "absent.pth: no such file"),
        ("dru-vgg16", {"weights": "half.pth"}, "half.pth: is not torchvision's state dict of the encoder, or is dam"),
        ("dru-vgg16", {"weights": "list.pth"}, "list.pth: is a list; it must be torchvision's state dict"),
        ("unet-vgg16", {"weights": "odd.pth"}, r"features.0.weight is \(64, 1, 3\), not \(64, 3, 3, 3\)"),
        ("dru-resnet50", {"weights": "vgg16.pth"}, "does not fit ResNet: conv1.weight is missing; .* and [0-9]+ more"),
        ("dru", {"weights": "vgg16.pth"}, "dru has no pretrained encoder; leave vgg16.pth out"),
    ]:
        with pytest.raises(ValueError, match=words), torch.device("meta"):  # nothing is computed
            build(name, 2, **options)


# ---------------------------------------------------------------- what a reader changes, as paper/README.md shows it
PAGE = [*re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S), re.search("before its `return`: `(.+)`", TEXT)[1]]


def test_an_exported_network_masks_a_photo_as_predict_does(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_turned(blob(203, 331, 100)[0], "photo.jpg")
    for flags in ["--export", "net.onnx"], ["photo.jpg"]:
        assert run("predict.py", trained[0] / "run/best.pt", *flags).returncode == 0
    exec(PAGE[0], found := {})
    want = np.asarray(Image.open("predicted/photo.png")) // 255
    assert found["mask"].shape == want.shape == (331, 203) and 0 < want.mean() < 1
    assert (found["mask"] != want).mean() < 1e-4  # where two classes are equally likely


def test_a_system_a_loss_and_an_augmentation_are_changed_in_one_place_each(trained, tmp_path):
    _, system, loss, line = PAGE
    for file in [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py"), HERE / "paper/README.md"]:
        (tmp_path / file.relative_to(HERE)).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(HERE))
    with open(tmp_path / "paper/baselines.py", "a") as file:
        file.write(system)
    text, end = (tmp_path / "data.py").read_text(), "    return photo.point("
    assert text.count(end) == 1
    (tmp_path / "data.py").write_text(text.replace(end, f"    {line}\n{end}"))
    (tmp_path / "mine.py").write_text(loss)
    data, flags = ("--data", trained[0] / "photos"), ("--model", "forgetful", "--size", 16, "--epochs", 1)
    learn, evaluate = ("mine.py", *data, "--out", "run", *flags), ("train.py", *data, "--evaluate", "run/best.pt")
    for command in learn, evaluate, ("-m", "pytest", "-q", "tests/test_paper.py", "-k", "forgetful"):
        done = process(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout  # it has passes, learns, takes any size
