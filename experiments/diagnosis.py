"""What a later pass makes of the mask that it is given: scores of trained networks on training and validation photos.

    python -m experiments.diagnosis DATA RUN...    write results/diagnosis.csv, a line for each score

DATA is a folder of two classes, each RUN a folder of train.py that learned from it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import open_dataset, survey
from evaluate import confusion, load, scores
from experiments import tables
from support.checkpoints import read_checkpoint
from support.pictures import VOID, resize


def second_masks(net, image, truth):
    """The logits of pass 2, from the h of pass 1 and each of several masks in place of its own."""
    _, (p, h) = net.step(image, net.start(image))
    known = F.one_hot(truth.clamp(max=1), 2).permute(0, 3, 1, 2).float()
    right = torch.where(truth[:, None] == VOID, p, known)
    blurred = F.avg_pool2d(p, 9, 1, 4, count_include_pad=False)
    given = {"the truth": right, "nothing": torch.zeros_like(p), "its mask, blurred": blurred}
    return {f"pass 2, given {what}": net.step(image, (mask, h))[0] for what, mask in given.items()}


def masks_of_tiles(net, image, side, passes):
    """The logits of every pass where the network sees squares alone, as in training."""
    masks = [image.new_zeros(1, 2, *image.shape[2:]) for _ in range(passes)]
    ys, xs = ([*range(0, n - side, side), max(0, n - side)] for n in image.shape[2:])
    for y, x in ((y, x) for y in ys for x in xs):
        here = ..., slice(y, y + side), slice(x, x + side)
        for mask, s in zip(masks, net(image[here], passes)):
            mask[here] = s
    return masks


@torch.no_grad()
def diagnose(model, photos, crop):
    """{what the network was given: F1 over all photos}."""
    matrices = {}
    for photo, mask in map(photos.pictures, range(len(photos))):
        image = model.to_input(photo)
        truth = torch.from_numpy(np.array(resize(mask, model.size, 0), np.int64))
        masks = model.net(image, 3)
        found = {f"pass {t}": s for t, s in enumerate(masks, 1)}
        found |= {f"tiles, pass {t}": s for t, s in enumerate(masks_of_tiles(model.net, image, crop, len(masks)), 1)}
        found |= second_masks(model.net, image, truth[None]) if hasattr(model.net, "step") else {}
        for what, s in found.items():
            matrices[what] = matrices.get(what, 0) + confusion(s[0].argmax(0), truth, 2)
    return {what: scores(matrix)["F1"] for what, matrix in matrices.items()}


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    root, *runs = map(Path, sys.argv[1:])
    folder, rows = survey(root), []
    for run in runs:
        model, config = load(run / "last.pt").eval(), read_checkpoint(run / "last.pt")["config"]
        crop = config["crop"] or model.size
        for split in "train", "val":
            found, name = diagnose(model, open_dataset(folder, split), crop), f"{config['model']}, crops of {crop}"
            more = dict(seed=config["seed"], split=split)
            rows += [dict(run=name, **more, given=what, F1=f"{f1:.4f}") for what, f1 in found.items()]
    (tables.RESULTS / "diagnosis.csv").unlink(missing_ok=True)
    tables.add_rows("diagnosis.csv", rows)


if __name__ == "__main__":
    main()
