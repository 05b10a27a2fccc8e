"""Three choices of a second day, each measured with three seeds into results/trials.csv.

    python -m experiments.trials DATA    trains what the csv lacks; DATA holds DRIVE/ hgr/ roads/ hands/

rare     which loss finds foreground that is few pixels: vessels, roads, and drawn cracks of 0.3 %
start    ten photos of hands over desks: from scratch, or from a network that knows the hands of HGR
longer   more epochs by --start, against as many at once

Stopped, it resumes. Each run chooses its epoch on validation photos and is scored once on the test photos.
"""

import csv
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

import train
from data import open_dataset, survey
from evaluate import evaluate_split, load, scores
from experiments.evidence import DATA, commit
from experiments.tables import RESULTS, read_rows
from rurnet import VOID, recurrent_loss
from support.toy import S, draw_desk

COLUMNS = "trial", "data", "way", "seed", "commit", "val_IoU", "IoU", "precision", "recall"

# ---------------------------------------------------------------- losses for few foreground pixels


def weighted(masks, truth, alpha, pixels, foreground):
    """Cross-entropy in which a pixel of the foreground counts several times, over passes as in eq. (7)."""
    weight = masks[0].new_tensor([1.0, foreground])
    losses = [F.cross_entropy(s, truth, weight, ignore_index=VOID, reduction="sum") / pixels for s in masks]
    return sum(alpha ** (len(masks) - t) * loss for t, loss in enumerate(losses, 1))


LOSSES = {"cross-entropy": recurrent_loss, "foreground counts 4 times": partial(weighted, foreground=4.0),
          "Dice beside it": partial(recurrent_loss, dice=1.0)}  # fmt: skip

# ---------------------------------------------------------------- the sets


def draw_cracks(folder, count=120):
    """Desks with a crack each, dark and a pixel or two wide, in the generic layout."""
    for kind in "images", "masks":
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng([2, i])
        desk, mask = draw_desk(rng, (160 * S, 120 * S)), Image.new("L", (160 * S, 120 * S))
        steps = rng.uniform(7, 12) * S * np.exp(1j * (rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.5, 7)))
        points = complex(*rng.uniform(0.25, 0.75, 2) * desk.size) + steps.cumsum()
        for canvas, colour in (desk, tuple(int(v) for v in np.asarray(desk).mean((0, 1)) * 0.55)), (mask, 255):
            line = [(z.real, z.imag) for z in points.tolist()]
            ImageDraw.Draw(canvas).line(line, colour, width=int(1.3 * S), joint="curve")
        desk.reduce(S).save(folder / f"images/{i:03d}.jpg", quality=90)
        mask.reduce(S).point(lambda v: 255 * (v > 127)).save(folder / f"masks/{i:03d}.png")


def first_ten(folder, source):
    """`source` with its first ten training photos alone."""
    folder.mkdir(parents=True)
    for name in "images", "masks", "val.txt", "test.txt":
        (folder / name).symlink_to((source / name).resolve())
    names = (source / "train.txt").read_text().split()
    (folder / "train.txt").write_text("\n".join(names[:: len(names) // 10][:10]) + "\n")


# ---------------------------------------------------------------- the runs


def all_trials(root):
    """(trial, data, way, seed), its Config, its loss."""
    cracks, ten = Path("runs/trials/cracks"), Path("runs/trials/ten")
    if not cracks.exists():
        draw_cracks(cracks)
    if not ten.exists():
        first_ten(ten, root / "hands")
    rare = {"DRIVE": root / "DRIVE", "roads": root / "roads", "cracks": cracks}
    how = DATA | {"cracks": dict(size=120, crop=80, epochs=16, rotate=180.0)}
    for seed in 0, 1, 2:
        def trial(name, data, way, folder, loss=recurrent_loss, **flags):
            key = name, data, way, str(seed)
            out = "runs/trials/" + "_".join(key).replace(" ", "_").replace(",", "")
            return key, train.Config(data=str(folder), out=out, seed=seed, **flags), loss

        for data, folder in rare.items():
            for way, loss in LOSSES.items():
                yield trial("rare", data, way, folder, loss, model="unet-g", **how[data])
        base = trial("start", "hgr", "its base", root / "hgr", size=64, epochs=12)
        yield base
        best = f"{base[1].out}/best.pt"
        for way, flags in {"from scratch": {}, "started": dict(start=best),
                           "started, a quarter of the rate": dict(start=best, lr=1e-3)}.items():  # fmt: skip
            yield trial("start", "hands", way, ten, size=64, epochs=6, **flags)
        short = trial("longer", "hgr", "12 epochs", root / "hgr", model="unet-g", size=64, epochs=12)
        yield short
        start = dict(start=f"{short[1].out}/best.pt", epochs=12)
        yield trial("longer", "hgr", "12 more by --start", root / "hgr", model="unet-g", size=64, **start)
        yield trial("longer", "hgr", "24 epochs", root / "hgr", model="unet-g", size=64, epochs=24)


def train_and_score(key, c, loss):
    folder, last = survey(c.data, c.void), Path(c.out) / "last.pt"
    c.resume, c.start = last.exists(), "" if last.exists() else c.start
    train.train(c, folder=folder, criterion=loss)
    model, row = load(f"{c.out}/best.pt"), dict(zip(COLUMNS, (*key, commit())))
    for split, column in ("val", "val_IoU"), ("test", "IoU"):
        matrix = evaluate_split(model, open_dataset(folder, split))[0][-1]
        row[column] = f"{scores(matrix)['IoU']:.4f}"
    hit, true, called = matrix[1, 1], matrix[1].sum(), matrix[:, 1].sum()
    return row | {"precision": f"{hit / called.clamp(min=1):.4f}", "recall": f"{hit / true:.4f}"}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    for key, c, loss in all_trials(Path(sys.argv[1])):
        if key not in {tuple(row[name] for name in COLUMNS[:4]) for row in read_rows("trials.csv")}:
            row = train_and_score(key, c, loss)
            with (RESULTS / "trials.csv").open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if not os.fstat(file.fileno()).st_size:
                    writer.writeheader()
                writer.writerow(row)
            print("==", *row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    main()
