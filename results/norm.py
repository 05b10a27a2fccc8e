"""How many channels a group of the group norm should hold: U-Net on the toy set, short side 84, 400 steps of 4 photos.

    python results/norm.py hands/ results/norm.csv        half a minute a line on one core

With as many groups as channels, group norm takes every photo's own mean off every channel, and with it its colour.
"""

import csv
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import open_dataset
from rurnet import PlainUNet
from train import confusion, recurrent_loss, scores

NORMS = {
    "8 groups": lambda c: nn.GroupNorm(8, c),
    "4 groups": lambda c: nn.GroupNorm(4, c),
    "2 groups": lambda c: nn.GroupNorm(2, c),
    "1 group": lambda c: nn.GroupNorm(1, c),
    "8 channels a group": lambda c: nn.GroupNorm(c // 8, c),
    "batch norm": nn.BatchNorm2d,
}


def with_norm(net, norm):
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, norm(child.num_channels))
    return net


def main(data, table):
    (x, y), (val_x, val_y) = (
        [torch.stack(column) for column in zip(*open_dataset(data, split, 84))] for split in ("train", "val")
    )
    for name, norm in NORMS.items():
        torch.manual_seed(0)
        net = with_norm(PlainUNet(), norm)
        optimiser = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=400)
        for _ in range(400):
            i = torch.randint(len(x), (4,))
            optimiser.zero_grad()
            recurrent_loss(net(x[i]), y[i], 1).backward()
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            iou = scores(confusion(net(val_x)[0].argmax(1), val_y, 2))["IoU"]
        with open(table, "a", newline="") as file:
            csv.writer(file).writerow([name, f"{iou:.4f}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
