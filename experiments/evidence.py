"""What recurrence gains: every run behind the tables of experiments/README.md, a line each in results/evidence.csv.

    python -m experiments.evidence run DATA                     train and test what the csv lacks
    python -m experiments.evidence again DATA hgr "DRU(4)" 0    train a run once more, and print its row
    python -m experiments.evidence list                         all runs, as commands of train.py

DATA holds DRIVE/ as published, and hgr/ roads/ camvid/, each with images/, masks/ and the three lists. The masks of
CamVid are its ids 0 to 11. The lists of hgr and roads are in results/splits.csv.
You may stop `run` at any time: started again, it resumes. Start it once for every core: no two train the same.
"""

import csv
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import train
from data import open_dataset, survey
from evaluate import evaluate_split, load, scores
from experiments import tables
from rurnet import RecurrentUNet
from support.checkpoints import read_checkpoint

DATA = {  # what a step sees is the same for every system
    "DRIVE": dict(size=565, crop=80, rotate=180.0, epochs=16),
    "hgr": dict(size=64, epochs=12),
    "roads": dict(size=200, crop=80, rotate=180.0, epochs=12),
    "camvid": dict(size=120, crop=80, epochs=7, void=11),
}
SYSTEMS = {system: dict(model=name.removesuffix("(0)"), level=0 if name.endswith("(0)") else 4)
           for system, name in tables.BENCH.items()}  # fmt: skip


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


WAYS = {"detached": Detached, "one drawn": OneDrawn, "one drawn, 2 x steps": OneDrawn}  # of training DRU(4)


@dataclass
class Run:
    data: str
    system: str
    seed: int
    config: train.Config = field(repr=False)

    @property
    def key(self):
        return self.data, self.system, str(self.seed)

    @property
    def net(self):
        """A network that a Config cannot describe, or None."""
        torch.manual_seed(self.seed)
        return WAYS[self.system](2) if self.system in WAYS else None


def all_runs():
    """By seed, the systems on all datasets before the ways of training."""
    systems = SYSTEMS | {"N = 1": dict(passes=1)}
    for seed in 0, 1, 2:
        order = [(name, data) for name in systems for data in DATA]
        for name, data in order + [(name, data) for name in WAYS for data in DATA if data != "camvid"]:
            flags = DATA[data] | systems.get(name, {})
            flags["epochs"] *= int(times[1]) if (times := re.search(r"(\d) x steps", name)) else 1
            out = "runs/evidence/" + re.sub(r"\W+", "_", f"{data}, {name}, seed {seed}")
            yield Run(data, name, seed, train.Config(data=data, seed=seed, out=out, **flags))


def command_of(run):
    chosen = {name: value for name, value in vars(run.config).items() if value != getattr(train.Config, name)}
    words = [f"--{name} {value}".removesuffix(".0") for name, value in chosen.items()]
    note = f"    (its network: WAYS[{run.system!r}] of experiments/evidence.py)" * (run.system in WAYS)
    return " ".join(["python train.py", *words]) + note


def commit():
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def train_and_test(run, root):
    """Train, or go on; test the best checkpoint; return the row for the csv."""
    out = Path(run.config.out)
    c = replace(run.config, data=str(Path(root) / run.data), resume=(out / "last.pt").exists())
    folder = survey(c.data, c.void)
    train.train(c, run.net, folder)
    model, photos = load(out / "best.pt", net=run.net), open_dataset(folder, "test")
    model.passes = 5 if run.system in (*WAYS, "N = 1", "DRU(4)") else 3
    tested = [scores(matrix) for matrix in evaluate_split(model, photos)[0]]
    log, n = read_checkpoint(out / "last.pt")["log"], len(folder.pairs["train"])
    best = max(row[max(k for k in row if k.startswith("mIoU"))] for row in log)
    names = "mIoU", "mPrec", "mRec", "mF1", "IoU", "F1"
    return dict(
        data=run.data, system=run.system, seed=run.seed,
        commit=commit(), parameters=sum(p.numel() for p in model.parameters()),
        steps=c.epochs * (n * -(-400 // n) // c.batch),
        minutes=f"{sum(row['seconds'] for row in log) / 60:.1f}", val_mIoU=f"{best:.4f}",
        **{name: " ".join(f"{row[name]:.4f}" for row in tested if name in row) for name in names},
    )  # fmt: skip


def run_all(root):
    torch.set_num_threads(1)
    for run in all_runs():
        Path(run.config.out).mkdir(parents=True, exist_ok=True)
        with suppress(Timeout), FileLock(f"{run.config.out}/lock", timeout=0):  # or another process trains it
            if run.key in {(row["data"], row["system"], row["seed"]) for row in tables.read_rows("evidence.csv")}:
                continue
            began, row = time.monotonic(), train_and_test(run, root)
            with FileLock("runs/evidence/csv.lock"), (tables.RESULTS / "evidence.csv").open("a", newline="") as file:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            print(f"== {', '.join(run.key)}: {time.monotonic() - began:.0f} s", flush=True)


def main():
    match sys.argv[1:]:
        case ["run", root]:
            run_all(root)
        case ["again", root, *key]:
            (run,) = (run for run in all_runs() if run.key == tuple(key))
            run.config.out += "_again"
            print(*train_and_test(run, root).items(), sep="\n")
        case ["list"]:
            if hasattr(signal, "SIGPIPE"):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it quietly
            for run in all_runs():
                print(f"{', '.join(run.key)}: {command_of(run)}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
