"""Does looking again pay, when both are trained until done? The runs behind experiments/README.md, "The evidence".

    python -m experiments.evidence run DATA                     train and test what results/long.csv lacks
    python -m experiments.evidence again DATA hgr "DRU(4)" 0    train a run once more, and print its row
    python -m experiments.evidence list                         all runs, as commands of train.py

DATA holds DRIVE/ as published, and hgr/ and roads/, each with images/, masks/ and the lists of results/splits.csv.
You may stop `run` at any time: started again, it resumes. Start it once for every core: no two train the same.
"""

import itertools
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

import train
from data import open_dataset, survey
from evaluate import Segmenter, confusion, load, scores, segment
from experiments import tables
from support.checkpoints import read_checkpoint

DATA = {  # what the systems have in common
    "DRIVE": dict(size=565, rotate=180.0),
    "hgr": dict(size=96),
    "roads": dict(size=400, rotate=180.0),
}
SMALL, LARGE = dict(crop=160), dict(crop=320, batch=2)  # a step sees as many pixels
EPOCHS = {"DRIVE": 44, "hgr": 40, "roads": 50}  # of DRU(4) at eight crops a step
BEST = "runs/evidence/{data}_%s_seed_{seed}/best.pt"
SYSTEMS = {  # sets; seeds; epochs in the same time, as a multiple; crops on DRIVE; more
    "U-Net-G": (DATA, range(3), 1.5, SMALL, dict(model="unet-g")),
    "DRU(4)": (DATA, range(3), 1, LARGE, {}),
    "DRU(4), one pass first": (DATA, [0], 0.5, LARGE, dict(lr=2e-3, start=BEST % "DRU_4_one_pass")),
    "U-Net-G, 5 x steps": (["DRIVE"], [0], 7.5, SMALL, dict(model="unet-g")),
    "SRU(0)": (["roads"], [0], 0.5, SMALL, dict(model="sru", level=0)),
    "DRU(4), one pass": (DATA, range(3), 1.4, LARGE, dict(passes=1)),
    "DRU(4), 2 x steps": (["roads"], [2], 1, SMALL, dict(lr=2e-3, start=BEST % "DRU_4")),
    "U-Net-G, 2 x steps": (["roads"], [2], 1.5, SMALL, dict(model="unet-g", lr=2e-3, start=BEST % "U_Net_G")),
    "U-Net-G, width 7": (DATA, [0], 1.7, SMALL, dict(model="unet-g", width=7)),
    "DRU(4), all passes": (DATA, [0], 0.5, LARGE, dict(teach="all")),
    "U-Net-G, 3 x steps": (["DRIVE"], [0], 4.5, SMALL, dict(model="unet-g")),
    "DRU(4), 3 x steps": (["DRIVE"], [0], 3, LARGE, {}),
    "DRU(4), 5 x steps": (["DRIVE"], [0], 2, LARGE, dict(lr=2e-3, start="weights/drive.pt")),  # of commit a101bba
    "DRU(4), 6 x steps": (["DRIVE"], [0], 1, LARGE, dict(lr=2e-3, start="weights/drive.pt")),  # of commit 668ffca
    "U-Net-G, half the rate": (DATA, range(3), 1.5, SMALL, dict(model="unet-g", lr=2e-3)),
    "DRU(4), half the rate": (DATA, range(3), 1, LARGE, dict(lr=2e-3)),
    "U-Net-G, other crops": (["DRIVE"], [0], 1.5, LARGE, dict(model="unet-g")),
    "DRU(4), other crops": (["DRIVE"], [0], 1, SMALL, {}),
    "DRU(4), even draw": (DATA, [0], 1, LARGE, dict(alpha=1.0)),
}


@dataclass
class Run:
    data: str
    system: str
    seed: int
    config: train.Config = field(repr=False)

    @property
    def key(self):
        return self.data, self.system, str(self.seed)


def all_runs():
    for system, (sets, seeds, times, crops, flags) in SYSTEMS.items():
        for seed, data in itertools.product(seeds, sets):
            here = {"DRIVE": crops, "hgr": {}, "roads": SMALL}[data]
            epochs = round(EPOCHS[data] * times * here.get("batch", 8) / 8)
            out = "runs/evidence/" + re.sub(r"\W+", "_", f"{data}, {system}, seed {seed}")
            config = train.Config(data=data, seed=seed, out=out, epochs=epochs, **DATA[data], **here, **flags)
            yield Run(data, system, seed, replace(config, start=config.start.format(data=data, seed=seed)))


def command_of(run):
    chosen = {name: value for name, value in vars(run.config).items() if value != getattr(train.Config, name)}
    return " ".join(["python train.py", *(f"--{name} {value}".removesuffix(".0") for name, value in chosen.items())])


class ThreeViews(Segmenter):
    """One pass over each of three views costs what three passes cost: the photo, its mirror image, and the photo
    upside down, or where hands have an up, shifted by half of the deepest pooling."""

    def __init__(self, model, upside_down):
        super().__init__(model.net, model.size, 1, 1)
        self.upside_down, self.classes = upside_down, model.classes

    def forward(self, image):
        views = [(lambda x: x.flip(-1),) * 2, (lambda x: x.flip(-2),) * 2]
        if not self.upside_down:
            views[1] = lambda x: x.roll((8, 8), (-2, -1)), lambda x: x.roll((-8, -8), (-2, -1))
        masks = [self.net(image, 1)[0], *(back(self.net(there(image), 1)[0]) for there, back in views)]
        return [torch.stack(masks).log_softmax(2).logsumexp(0)]


def train_and_test(run, root):
    """Train, or go on; test the best checkpoint; return the rows for the csv."""
    out = Path(run.config.out)
    c = replace(run.config, data=str(Path(root) / run.data))
    if (out / "last.pt").exists():
        c = replace(c, resume=True, start="")
    else:
        out.mkdir(parents=True, exist_ok=True)
        (out / "commit").write_text(tables.commit())
    folder = survey(c.data, c.void)
    train.train(c, folder=folder)
    model, photos = load(out / "best.pt"), open_dataset(folder, "test")
    forms = {run.system: model}
    if run.system == "U-Net-G":
        forms["U-Net-G, three views"] = ThreeViews(model, c.rotate == 180)
    if run.system.endswith(" x steps"):
        forms[f"{run.system}, eight views"] = Segmenter(model.net, model.size, model.passes, 8)
    log = read_checkpoint(out / "last.pt")["log"]
    last = max(name for name in log[0] if name.startswith("mIoU"))
    best = max(log, key=lambda row: row[last])
    return [row_of(run, system, form, photos, c, log, best) for system, form in forms.items()]


def row_of(run, system, model, photos, c, log, best):
    matrices = []  # of each photo (N, K, K)
    for photo, mask in map(photos.pictures, range(len(photos))):
        truth = torch.from_numpy(np.array(mask, np.int64))
        matrices.append(torch.stack([confusion(p.argmax(0), truth, photos.classes) for p in segment(model, photo)]))
    tested, n = [scores(matrix) for matrix in sum(matrices)], len(photos.found.pairs["train"])
    return dict(
        data=run.data, system=system, seed=run.seed,
        commit=(Path(c.out) / "commit").read_text(), parameters=sum(p.numel() for p in model.parameters()),
        steps=c.epochs * (n * -(-400 // n) // c.batch), minutes=f"{sum(row['seconds'] for row in log) / 60:.1f}",
        epoch=f"{best['epoch']} of {c.epochs}",
        val_mIoU=" ".join(f"{value:.4f}" for name, value in best.items() if name.startswith("mIoU")),
        **{name: " ".join(f"{row[name]:.4f}" for row in tested) for name in ("mIoU", "IoU", "F1")},
        photos=" ".join(f"{m[-1, 1, 1]}/{m[-1, 0, 1]}/{m[-1, 1, 0]}" for m in matrices),  # TP/FP/FN, last pass
    )  # fmt: skip


def run_all(root):
    torch.set_num_threads(1)
    for run in all_runs():
        Path(run.config.out).mkdir(parents=True, exist_ok=True)
        with suppress(Timeout), FileLock(f"{run.config.out}/lock", timeout=0):  # or another process trains it
            if run.key in {(row["data"], row["system"], row["seed"]) for row in tables.read_rows("long.csv")}:
                continue
            began, rows = time.monotonic(), train_and_test(run, root)
            with FileLock("runs/evidence/csv.lock"):
                tables.add_rows("long.csv", rows)
            print(f"== {', '.join(run.key)}: {time.monotonic() - began:.0f} s", flush=True)


def main():
    match sys.argv[1:]:
        case ["run", root]:
            run_all(root)
        case ["again", root, *key]:
            (run,) = (run for run in all_runs() if run.key == tuple(key))
            run.config.out += "_again"
            for row in train_and_test(run, root):
                print(*row.items(), sep="\n")
        case ["list"]:
            if hasattr(signal, "SIGPIPE"):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it quietly
            for run in all_runs():
                print(f"{', '.join(run.key)}: {command_of(run)}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
