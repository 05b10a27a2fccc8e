"""Networks with one thing changed, which experiments/evidence.py trains, and a choice measured on validation photos.

    python -m experiments.ablations norm CSV DATA SIDE CROP SEED ...    which groups the group norm should have

It appends what CSV lacks, such as results/norm.csv. A line takes about a minute on one core.
"""

import csv
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import open_dataset
from evaluate import Segmenter, evaluate_split, scores
from rurnet import DRU, DoubleConv, PlainUNet, RecurrentUNet, recurrent_loss

# ---------------------------------------------------------------- DRU(4) with one thing changed


class FedBack(RecurrentUNet):
    """DRU(4) that feeds back another function of its logits."""

    def __init__(self, classes, feed):
        super().__init__(classes)
        self.feed = feed

    def step(self, image, state):
        s, (_, h) = super().step(image, state)
        return s, (self.feed(s), h)


def relu_gates(classes):
    """Gate networks that end in a ReLU, as in the official code."""
    net = RecurrentUNet(classes)
    for module in net.unit.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Identity):
            module[-1] = nn.ReLU()
    return net


def bare_decoder(classes):
    """A decoder whose convolutions have a bias in place of the norm, as in the official code."""
    net = RecurrentUNet(classes)
    for up in net.outer.up:
        for i in 0, 3:
            up.conv[i].bias, up.conv[i + 1] = nn.Parameter(torch.zeros(up.conv[i].out_channels)), nn.Identity()
    return net


class MaskedStateDRU(DRU):
    """The official code's other unit: the candidate sees all of e, and the state through the reset gate."""

    def __init__(self, c_e, c_h):
        super().__init__(c_e, c_h)
        self.net_r, self.net_c = DoubleConv(c_e, c_h, nn.Identity), DoubleConv(c_e + c_h, c_h, nn.Identity)

    def forward(self, e, h):
        seen = torch.cat([e, self.reset(h, self.net_r(e))], dim=1)
        return self.update(h, self.net_z(e), self.net_c(seen))


def masked_state(classes):
    net = RecurrentUNet(classes)
    net.unit = MaskedStateDRU(64, net.hidden)
    return net


class Detached(RecurrentUNet):
    """Every pass is taught, none through the passes before it."""

    def step(self, image, state):
        return super().step(image, tuple(x.detach() for x in state))


class OneDrawn(RecurrentUNet):
    """In training, only the last of 1 to `passes` passes is taught: how many is drawn for every batch."""

    def forward(self, image, passes=None):
        if not self.training:
            return super().forward(image, passes)
        state = self.start(image)
        with torch.no_grad():
            for _ in range(torch.randint(passes or self.passes, ())):
                _, state = self.step(image, state)
        return [self.step(image, state)[0]]


ABLATIONS = {  # name: what changes in the Config
    **{f"N = {n}": dict(passes=n) for n in (1, 2, 4, 5)},
    "alpha = 0.7": dict(alpha=0.7), "alpha = 1": dict(alpha=1.0),
    **{f"l = {level}": dict(level=level) for level in (3, 2, 1)},  # 0 is DRU(0)
    "width 16": dict(width=16), "hidden 128": dict(hidden=128),
}  # fmt: skip
BUILD = {  # name: its network, which a Config cannot describe, from the number of classes
    "gates end in ReLU": relu_gates,
    "logits fed back": partial(FedBack, feed=lambda s: s),
    "nothing fed back": partial(FedBack, feed=torch.zeros_like),
    "no norm in the decoder": bare_decoder,
    "candidate of e and r * h": masked_state,
}
ABLATIONS |= {name: {} for name in BUILD}
WAYS = {"detached": Detached, "one drawn": OneDrawn, "one drawn, 2 x steps": OneDrawn}  # of training DRU(4)
BUILD |= WAYS

# ---------------------------------------------------------------- norm: the plain U-Net, 300 steps of 4 crops

NORMS = {  # of a layer's name, such as unet.down.0.1, and its channels
    "8 groups": lambda name, c: nn.GroupNorm(8, c),
    "of 4 channels where the photo enters": lambda name, c: nn.GroupNorm(2 if "down.0." in name else 8, c),
    "and where the decoder ends": lambda name, c: nn.GroupNorm(2 if c == 8 else 8, c),
    "of 4 channels or more everywhere": lambda name, c: nn.GroupNorm(min(8, c // 4), c),
    "batch norm": lambda name, c: nn.BatchNorm2d(c),
}


def with_norm(net, norm):
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.GroupNorm):
            net.set_submodule(name, norm(name, layer.num_channels))
    return net


def compare_norms(table, data, side, crop, seeds, steps=300):
    photos = open_dataset(data, "train", side, augment=True, crop=crop, rotate=15 if side == crop else 180)
    photos.repeat = -(-4 * steps // len(photos))
    known = [row[:3] for row in csv.reader(open(table, newline=""))] if Path(table).exists() else []
    for seed, (name, norm) in itertools.product(seeds, NORMS.items()):
        if [Path(data).name, name, str(seed)] in known:
            continue
        torch.manual_seed(seed)
        photos.seed, order = seed, torch.randperm(len(photos)).tolist()
        net = with_norm(PlainUNet(), norm)
        optimiser = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for step in range(steps):
            image, truth = (torch.stack(part) for part in zip(*(photos[k] for k in order[4 * step : 4 * step + 4])))
            optimiser.zero_grad()
            recurrent_loss(net(image), truth, 1).backward()
            optimiser.step()
            schedule.step()
        (matrix,), *_ = evaluate_split(Segmenter(net, side, 1, 1), open_dataset(data, "val"))
        with open(table, "a", newline="") as file:
            csv.writer(file).writerow([Path(data).name, name, seed, f"{scores(matrix)['IoU']:.4f}"])


def main():
    if len(sys.argv) < 7 or sys.argv[1] != "norm":
        sys.exit(__doc__)
    compare_norms(*sys.argv[2:4], *map(int, sys.argv[4:6]), map(int, sys.argv[6:]))


if __name__ == "__main__":
    main()
