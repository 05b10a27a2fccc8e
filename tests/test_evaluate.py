"""evaluate.py: from a checkpoint to a network, from a network to masks, from masks to scores."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOX, HERE, seeds, write_checkpoint, write_pair
from hypothesis import given, strategies as st
from PIL import Image
from torch.nn import functional as F

from data import open_dataset
from evaluate import (Segmenter, break_even, confusion, evaluate_split, load, print_table, scores, segment, summary,
                      start_from, to_classes, to_probabilities)  # fmt: skip
from experiments import tables
from paper.baselines import build
from rurnet import RecurrentUNet
from support.checkpoints import read_checkpoint


def test_a_checkpoint_describes_its_own_network(tmp_path, monkeypatch):
    path, options = tmp_path / "it.pt", {"level": 2, "width": 4}
    want = write_checkpoint(path, "sru", classes=3, size=20, passes=4, views=2, **options).state_dict()
    monkeypatch.setitem(sys.modules, "train", None)  # importing it now fails
    for model in load(path, "cpu"), load(path, net=build("sru", 3, **options)):
        assert (model.classes, model.size, model.passes, model.views) == (3, 20, 4, 2) and not model.training
        got = model.net.state_dict()  # the running mean, not the weights of the last step
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("before, now", [(2, 2), (2, 3), (3, 2)])
def test_a_run_starts_from_all_weights_but_the_head_of_other_classes(tmp_path, capsys, before, now):
    path, both = tmp_path / "it.pt", 3 + min(before, now)  # channels of the photo and of the masks that both runs have
    want, net = write_checkpoint(path, classes=before, width=4).state_dict(), build("dru", now, width=4)
    fresh = {name: x.clone() for name, x in net.state_dict().items()}
    torch.save(torch.load(path) | {"photos": {"train/a": "1", "val/b": "2", "val/c": "3"}}, path)
    hashes = {"val": {"x": "2", "y": "1"}, "test": {"z": "3", "w": "4", "v": "5"}}
    folder = SimpleNamespace(fingerprint=hashes.get)
    start_from(net, path, {"name": "dru", "options": {"width": 4, "passes": 7}}, folder)
    told, learned = capsys.readouterr().out.splitlines()
    assert told.startswith(f"--start {path}: dru of {before} classes, short side ")
    assert ("head is new" in told) == (before != now) and "knows 2 of the photos" in learned  # y trained, z chose
    for name, x in net.state_dict().items():
        if name == "outer.down.0.0.weight":
            assert torch.equal(x[:, :both], want[name][:, :both]) and torch.equal(x[:, both:], fresh[name][:, both:])
        else:
            assert torch.equal(x, (fresh if name.startswith("head.") and before != now else want)[name]), name


def test_another_architecture_and_a_photo_too_long_are_refused(tmp_path):
    write_checkpoint(tmp_path / "it.pt", width=4)
    model = load(tmp_path / "it.pt")
    for name, width in ("sru", 4), ("dru", 8), ("unet-g", 4):
        with pytest.raises(ValueError, match="--start .*it.pt: holds .*'dru'.*; this run builds "):
            network = {"name": name, "options": {"width": width}}
            start_from(build(name, 2, width=width), tmp_path / "it.pt", network, None)
    with pytest.raises(ValueError, match="16x40000 is too much for a network of short side 512"):
        Segmenter(model.net, 512, 1, 1).to_input(Image.new("L", (16, 40000)))


@pytest.mark.parametrize("name, data, system", [("drive", "DRIVE", "DRU(4), 5 x steps"), ("roads", "roads", "U-Net-G")])
def test_weights_are_those_of_the_card_and_of_the_long_runs(name, data, system):
    path, card = HERE / f"weights/{name}.pt", (HERE / "weights/README.md").read_text(encoding="utf-8")
    content, section = read_checkpoint(path), card.partition(f"## {name}.pt")[2].partition("##")[0]
    row = tables.runs_of(data, system, "long.csv")[content["config"]["seed"]]
    assert sum(p.numel() for p in load(path).net.parameters()) == int(row["parameters"])
    assert path.stat().st_size < 2.1e6 and f"{content['best']:.4f}" == row["val_mIoU"].split()[-1]
    for words in f"F1 {row['F1'].split()[-1]}", f"IoU {row['IoU'].split()[-1]}", f"--seed {row['seed']}", row["commit"]:
        assert words in section


@given(k=st.integers(2, 5), size=st.tuples(*[st.integers(16, 90)] * 4), seed=seeds)
def test_logits_are_enlarged_and_then_made_to_sum_to_one_also_in_strips(k, size, seed):
    s, photo = torch.randn(1, k, *size[:2], generator=torch.Generator().manual_seed(seed)), Image.new("L", size[2:])
    want = torch.exp(F.interpolate(s, size[:1:-1], mode="bilinear")[0])
    torch.testing.assert_close(to_probabilities(s, photo), want / want.sum(0))
    np.testing.assert_array_equal(to_classes(s, photo, rows=7), to_probabilities(s, photo).max(0).indices)


def test_views_are_the_mean_of_mirror_images_and_of_all_turns():
    net, image = RecurrentUNet(width=4), torch.randn(1, 3, 24, 31)
    look = lambda x, turns: [s.softmax(1).rot90(-turns, (2, 3)) for s in net(x.rot90(turns, (2, 3)), 2)]
    mirrored = lambda turns: [s.flip(-1) for s in look(image.flip(-1), turns)]
    for views, turns in (2, range(1)), (8, range(4)):
        want = zip(*(of(k) for k in turns for of in (lambda k: look(image, k), mirrored)))
        for s, seen in zip(Segmenter(net, 16, 2, views)(image), want, strict=True):
            torch.testing.assert_close(s.softmax(1), torch.stack(seen).mean(0))


def test_a_split_is_counted_once_for_each_pass(tmp_path):
    def look(image, passes):
        """Pass 1 predicts background everywhere, with probability 0.8; pass 2 foreground where it is bright."""
        red = image[:, :1]
        return [torch.cat([0 * red, np.log(4) * sign], 1) for sign in (-torch.ones_like(red), red.sign())]

    for i in range(6):  # 4 train; two columns are void
        write_pair(tmp_path, f"p{i}", Image.fromarray(np.where(np.arange(40) < 2, 255, BOX).astype(np.uint8)))
    model = Segmenter(torch.nn.Conv2d(3, 2, 1), 32, 2, 1)
    model.net.forward = look
    matrices, curves, entropies = evaluate_split(model, open_dataset(tmp_path, "train"))
    box, rest, want = 4 * 13 * 16, 4 * (40 * 32 - 2 * 32 - 13 * 16), torch.zeros(2, 2, 1001, dtype=torch.long)
    assert matrices.tolist() == [[[rest, 0], [box, 0]], [[rest, 0], [0, box]]]
    model.net.forward = lambda *given: [s / 0 for s in look(*given)]
    with pytest.raises(ValueError, match="images.p.*png: the network's output is not finite"):
        evaluate_split(model, open_dataset(tmp_path, "train"))
    want[0, :, 200], want[1, 0, 200], want[1, 1, 800] = torch.tensor([rest, box]), rest, box
    assert torch.equal(curves, want)
    entropy = -rest * np.log(0.8) - box * np.log(0.2), -(rest + box) * np.log(0.8)
    assert entropies.tolist() == pytest.approx(entropy, rel=1e-5)
    score, columns = summary(matrices, curves, entropies)
    assert score == columns["mIoU_2"] == 1 and columns["CE_1"] == pytest.approx(entropy[0] / (rest + box), rel=1e-5)


@given(classes=st.integers(2, 4), seed=seeds)
def test_scores_equal_their_definition_by_sets(classes, seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, classes, (2, 11, 13))
    truth[rng.random(truth.shape) < 0.2] = 255
    row, each = scores(confusion(torch.tensor(predicted), torch.tensor(truth), classes)), []
    for k in range(classes):
        true = {at for at in np.ndindex(truth.shape) if truth[at] == k}
        found = {at for at in np.ndindex(truth.shape) if predicted[at] == k and truth[at] != 255}
        both, sizes = len(true & found), (len(true | found), len(found), len(true), (len(true) + len(found)) / 2)
        each.append([both / n for n in sizes])
    want = dict(zip(("mIoU", "mPrec", "mRec", "mF1"), np.mean(each, axis=0)))
    assert row == pytest.approx(want | ({"IoU": each[1][0], "F1": each[1][3]} if classes == 2 else {}))


def test_scores_of_classes_that_are_nowhere_or_never_predicted():
    assert scores(torch.diag(torch.tensor([4, 4, 0]))) == dict(mIoU=1, mPrec=1, mRec=1, mF1=1)  # class 2 is nowhere
    missed = scores(torch.tensor([[4, 0], [2, 0]]))  # class 1 is never predicted
    assert missed["IoU"] == 0 and missed["mIoU"] == missed["mPrec"] == pytest.approx(4 / 6 / 2)


def test_break_even_is_where_precision_meets_recall():
    curve = torch.zeros(2, 11, dtype=torch.long)
    curve[1, [9, 8, 4, 1]] = curve[0, [7, 3, 2]] = 1  # at 0.4, four are predicted foreground and four are; three agree
    assert break_even(curve) == pytest.approx(3 / 4)


def test_the_table_names_classes(capsys):
    matrix = torch.tensor([[[4, 0, 1], [0, 3, 0], [1, 1, 2]]])
    for names, shown in (("sky", "road", "car"), "sky 0.6667, road 0.7500, car 0.4000"), ((), "0 0.6667, 1 0.7500"):
        print_table(matrix, torch.zeros(1, 2, 1001), "title", names)
        assert shown in (text := capsys.readouterr().out) and "background" not in text
    assert summary(matrix, None, torch.ones(1))[1]["IoU of class 2"] == pytest.approx(0.4)
    print_table(torch.tensor([[[4, 0], [2, 0]]]), torch.zeros(1, 2, 1001), "title", ())
    assert "predicts background everywhere" in capsys.readouterr().out
