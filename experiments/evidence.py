"""What recurrence buys: every run behind README's results, one line each in evidence.csv.

    python results/evidence.py run DATA     train and test what the csv lacks; DATA holds DRIVE/ as published, and hgr/ desks/ roads/ camvid/,
                                            each with images/, masks/ and the three lists (CamVid's ids 0 to 11 in its masks)
    python results/evidence.py list         all runs, as commands of train.py; results/tables.py makes the tables

`run` may be stopped at any time and started again, and as often at once as there are cores: it resumes, and no two do the same.
"""

import csv
import fcntl
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train
from data import open_dataset
from rurnet import DRU, DoubleConv, RecurrentUNet
from scoring import evaluate, scores

CSV = HERE / "evidence.csv"
DATA = {  # what a step sees is the same for every system
    "DRIVE": dict(size=565, crop=80, rotate=180.0, epochs=16),
    "hgr": dict(size=64, epochs=12),
    "desks": dict(size=64, epochs=12),
    "roads": dict(size=200, crop=80, rotate=180.0, epochs=12),
    "camvid": dict(size=120, crop=80, epochs=7, void=11),
}
SYSTEMS = {  # in the order of README's table
    "U-Net-B": dict(model="unet-b"),
    "U-Net-G": dict(model="unet-g"),
    "U-Net-G, 3 x steps": dict(model="unet-g"),  # about the time of DRU(4)
    "Rec-Simple": dict(model="rec-simple"),
    "Rec-Middle": dict(model="rec-middle"),
    "Rec-Last": dict(model="rec-last"),
    "SRU(4)": dict(model="sru"),
    "DRU(4)": dict(),
    "SRU(0)": dict(model="sru", level=0),
    "DRU(0)": dict(level=0),
}
ABLATIONS = {  # of DRU(4), on DRIVE and hgr
    **{f"N = {n}": dict(passes=n) for n in (1, 2, 4, 5)},
    "alpha = 0.7": dict(alpha=0.7),
    "alpha = 1": dict(alpha=1.0),
    **{f"l = {level}": dict(level=level) for level in (3, 2, 1)},  # 0 is DRU(0)
    "width 16": dict(width=16),
    "hidden 128": dict(hidden=128),
    "gates end in ReLU": dict(),
    "logits fed back": dict(),
    "nothing fed back": dict(),
    "no norm in the decoder": dict(),
    "candidate of e and r * h": dict(),
}


class Fed(RecurrentUNet):
    """DRU(4) that feeds back something else than probabilities."""

    what = staticmethod(lambda s: s)

    def step(self, image, state):
        s, (_, h) = super().step(image, state)
        return s, (self.what(s), h)


class Nothing(Fed):
    what = staticmethod(torch.zeros_like)


def relu_gates(classes):
    net = RecurrentUNet(classes)
    for module in net.unit.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Identity):
            module[-1] = nn.ReLU()
    return net


def bare_decoder(classes):
    """Its convolutions have a bias in place of the norm, as in the official code."""
    net = RecurrentUNet(classes)
    for up in net.outer.up:
        for i in 0, 3:
            up.conv[i].bias, up.conv[i + 1] = nn.Parameter(torch.zeros(up.conv[i].out_channels)), nn.Identity()
    return net


class Reset(DRU):
    """The official code's other unit: the candidate sees all of e, and the state through the reset gate."""

    def __init__(self, c_e, c_h):
        super().__init__(c_e, c_h)
        self.net_r, self.net_c = DoubleConv(c_e, c_h, nn.Identity), DoubleConv(c_e + c_h, c_h, nn.Identity)

    def forward(self, e, h):
        seen = torch.cat([e, self.reset(h, self.net_r(e))], dim=1)
        return self.update(h, self.net_z(e), self.net_c(seen))


def reset_state(classes):
    net = RecurrentUNet(classes)
    net.unit = Reset(64, net.hidden)
    return net


BUILD = {"gates end in ReLU": relu_gates, "logits fed back": Fed, "nothing fed back": Nothing, "no norm in the decoder": bare_decoder,
         "candidate of e and r * h": reset_state}  # fmt: skip


@dataclass
class Run:
    data: str
    system: str
    seed: int
    config: train.Config = field(repr=False)

    @property
    def name(self):
        return f"{self.data}, {self.system}, seed {self.seed}"


def all_runs():
    """In the order in which they are worth having."""
    cheap = [name for name in SYSTEMS if not name.endswith("(0)")] + ["N = 1"]
    order = [(0, name, data) for name in cheap for data in DATA]
    order += [(0, name, "hgr") for name in (*ABLATIONS, "SRU(0)", "DRU(0)")]
    order += [(seed, name, data) for seed in (1, 2) for name in cheap for data in DATA]
    order += [(0, name, "DRIVE") for name in ABLATIONS] + [(0, name, data) for name in ("SRU(0)", "DRU(0)") for data in DATA if data != "hgr"]
    order += [(seed, name, data) for seed in (1, 2) for name in ("SRU(0)", "DRU(0)") for data in DATA]
    order += [(seed, name, data) for seed in (1, 2) for name in ABLATIONS for data in ("hgr", "DRIVE")]
    for seed, name, data in dict.fromkeys(order):  # N = 1 is in twice
        flags = DATA[data] | (SYSTEMS | ABLATIONS)[name]
        flags["epochs"] *= 3 if "3 x" in name else 1
        out = f"runs/evidence/{data}, {name}, seed {seed}".replace(" ", "_").replace(",", "")
        yield Run(data, name, seed, replace(train.Config(), data=data, seed=seed, out=out, **flags))


def command(run):
    flags = {name: value for name, value in vars(run.config).items() if value != getattr(train.Config, name) and name != "out"}
    built = f" with {BUILD[run.system].__name__} of evidence.py for a network" if run.system in BUILD else ""
    return "python train.py " + " ".join(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in flags.items()) + built


def rows():
    return list(csv.DictReader(CSV.open())) if CSV.exists() else []


def do(run, root):
    """Train, go on if it had begun, test the best checkpoint, and append a line."""
    c = replace(run.config, data=str(Path(root) / run.data), crop=run.config.crop or run.config.size)
    known = train.build
    if run.system in BUILD:
        train.build = lambda c, classes: BUILD[run.system](classes)
    try:
        if (Path(c.out) / "last.pt").exists():  # resumed with the settings that it began with
            c = replace(train.load(Path(c.out) / "last.pt")[1], data=c.data, out=c.out)
        train.train(c, resume=(Path(c.out) / "last.pt").exists())
        net, *_ = train.load_net(Path(c.out) / "best.pt", torch.device("cpu"))
    finally:
        train.build = known
    log = train.load(Path(c.out) / "last.pt")[0]["log"]
    photos = open_dataset(c.data, "test", void=c.void)
    passes = 5 if run.config.model == "dru" and (run.system in ABLATIONS or run.system == "DRU(4)") else 3
    matrices, _ = evaluate(net, photos, replace(c, passes=passes), torch.device("cpu"))
    tested = [scores(matrix) for matrix in matrices]
    batches = len(open_dataset(c.data, "train", void=c.void).pairs)
    row = {
        "data": run.data,
        "system": run.system,
        "seed": run.seed,
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": c.epochs * (batches * -(-400 // batches) // c.batch),
        "minutes": f"{sum(row['seconds'] for row in log) / 60:.1f}",
        "val_mIoU": f"{max(row[max(k for k in row if k.startswith('mIoU'))] for row in log):.4f}",
        **{name: " ".join(f"{t[name]:.4f}" for t in tested if name in t) for name in ("mIoU", "mPrec", "mRec", "mF1", "IoU", "F1")},
    }
    with CSV.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, row)
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerow(row)


def run_all(root):
    torch.set_num_threads(1)
    for run in all_runs():
        Path(run.config.out).mkdir(parents=True, exist_ok=True)
        with open(Path(run.config.out) / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # another process is at it
            if any((row["data"], row["system"], row["seed"]) == (run.data, run.system, str(run.seed)) for row in rows()):
                continue
            began = time.time()
            do(run, root)
            print(f"== {run.name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", root]:
            run_all(root)
        case ["list"]:
            for run in all_runs():
                print(f"{run.name}: {command(run)}")
        case _:
            sys.exit(__doc__)
