"""How many groups the group norm should have: plain U-Net, 300 steps of 4 augmented crops, one seed.

    python results/norm.py results/norm.csv hands/ 84 84         table to append to, data, short side, crop;
    python results/norm.py results/norm.csv DRIVE/ 565 112       about a minute a line on one core

With as many groups as channels, group norm takes every photo's own mean off every channel, and with it its colour.
It appends what the table lacks.
"""

import csv
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import open_dataset
from rurnet import PlainUNet
from scoring import evaluate, scores
from train import Config, recurrent_loss

NORMS = {  # from the name of the layer, such as unet.down.0.1, and its channels
    "8 groups": lambda name, c: nn.GroupNorm(8, c),
    "8 groups of 2 channels or more": lambda name, c: nn.GroupNorm(min(8, c // 2), c),
    "8 groups of 4 channels or more": lambda name, c: nn.GroupNorm(min(8, c // 4), c),
    "8 groups, of 4 or more where the photo enters": lambda name, c: nn.GroupNorm(2 if name.startswith("unet.down.0.") else 8, c),
    "groups of 8 channels": lambda name, c: nn.GroupNorm(c // 8, c),
    "batch norm": lambda name, c: nn.BatchNorm2d(c),
}


def with_norm(net, norm):
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.GroupNorm):
            net.set_submodule(name, norm(name, layer.num_channels))
    return net


def learn(net, photos, order, batch):
    """Look once at every photo of the order."""
    optimiser = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=len(order) // batch)
    for step in range(len(order) // batch):
        image, truth = (torch.stack(part) for part in zip(*(photos[k] for k in order[batch * step : batch * (step + 1)])))
        optimiser.zero_grad()
        recurrent_loss(net(image), truth, 1).backward()
        optimiser.step()
        schedule.step()


def main(table, data, size, crop):
    photos = open_dataset(data, "train", int(size), augment=True, crop=int(crop), rotate=15 if size == crop else 180)
    photos.repeat = -(-1200 // len(photos))
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0)).tolist()
    known = [row[:2] for row in csv.reader(open(table, newline=""))] if Path(table).exists() else []
    for name, norm in NORMS.items():
        if [Path(data).name, name] in known:
            continue
        torch.manual_seed(0)
        net = with_norm(PlainUNet(), norm)
        learn(net, photos, order[:1200], batch=4)
        matrix = evaluate(net, open_dataset(data, "val"), Config(size=int(size)), torch.device("cpu"))[0][0]
        with open(table, "a", newline="") as file:
            csv.writer(file).writerow([Path(data).name, name, f"{scores(matrix)['IoU']:.4f}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
