"""What to feed back and where to start: the measured comparison behind RecurrentUNet.start and .step.

    python results/start.py DATA OUT SEED [SEED ...]    6 epochs each, short side 60; appends a line a run to OUT
"""

import csv
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from rurnet import RecurrentUNet

VARIANTS = {  # name: (what is fed back, what stands for it before the first pass, h_0)
    "softmax, s_0 uniform, h_0 zero": ("softmax", 0.5, 0.0),
    "softmax, s_0 uniform, h_0 one": ("softmax", 0.5, 1.0),
    "softmax, s_0 zero, h_0 zero": ("softmax", 0.0, 0.0),
    "softmax, s_0 zero, h_0 one": ("softmax", 0.0, 1.0),
    "logits, s_0 zero, h_0 zero": ("logits", 0.0, 0.0),
    "logits, s_0 one, h_0 one": ("logits", 1.0, 1.0),  # as the official code
}


class Variant(RecurrentUNet):
    def __init__(self, fed, s_0, h_0):
        super().__init__()
        self.fed, self.s_0, self.h_0 = fed, s_0, h_0

    def start(self, image):
        s, h = super().start(image)
        return s + self.s_0, h + self.h_0

    def step(self, image, state):  # here s is what is fed back, whatever that is
        s, h = state
        e, skips = self.outer.encode(torch.cat([image, s], dim=1))
        h = self.unit(e, h)
        s = self.head(self.outer.decode(self.f_s(h), skips))
        return s, (s.softmax(1) if self.fed == "softmax" else s, h)


if __name__ == "__main__":
    data, table, *seeds = sys.argv[1:]
    for seed in map(int, seeds):
        for name, how in VARIANTS.items():
            train.build = lambda c, classes, how=how: Variant(*how)
            with TemporaryDirectory() as out:
                train.train(train.Config(data=data, out=out, size=60, epochs=6, seed=seed))
                last = list(csv.DictReader(open(f"{out}/log.csv")))[-1]
            with open(table, "a", newline="") as file:
                csv.writer(file).writerow([Path(data).name, name, seed, *(f"{float(last[f'IoU_{t}']):.4f}" for t in (1, 2, 3))])
