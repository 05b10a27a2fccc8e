"""Does the norm decide how a network fares with people it has not seen? Plain U-Net, 1000 steps of 8 augmented crops.

    python results/strangers.py results/strangers.csv desks/ 288 176 hgr/      table to append to, data, short side, crop, other data;
                                                                               four minutes a line on one core

Each network is scored on its own validation photos, on those of the other data, and on its own test. It appends what the table lacks.
"""

import csv
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import open_dataset
from norm import NORMS, learn, with_norm
from rurnet import PlainUNet
from scoring import evaluate, scores
from train import Config

COMPARED = "8 groups", "8 groups, of 4 or more where the photo enters"


def main(table, data, size, crop, other):
    photos = open_dataset(data, "train", int(size), augment=True, crop=int(crop))
    photos.repeat = -(-8000 // len(photos))
    known = [row[:3] for row in csv.reader(open(table, newline=""))] if Path(table).exists() else []
    for seed, name in product(range(3), COMPARED):
        line = [Path(data).name, name, str(seed)]
        if line in known:
            continue
        torch.manual_seed(seed)
        order = torch.randperm(len(photos)).tolist()
        net = with_norm(PlainUNet(), NORMS[name])
        learn(net, photos, order[:8000], batch=8)
        for folder, split in (data, "val"), (other, "val"), (data, "test"):
            matrix = evaluate(net, open_dataset(folder, split), Config(size=int(size)), torch.device("cpu"))[0][0]
            line.append(f"{scores(matrix)['IoU']:.4f}")
        with open(table, "a", newline="") as file:
            csv.writer(file).writerow(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
