"""Train, evaluate, resume.

    python train.py --data hands/                                  train, then print the table on the test split
    python train.py --data hands/ --resume                         go on where runs/hands/last.pt stopped
    python train.py --data hands/ --evaluate runs/hands/best.pt    the table alone

Writes to --out: best.pt (best on validation), last.pt, log.csv, curves.png and samples.png.
"""

import argparse
import csv
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import baselines
from data import open_dataset
from gates_triton import fuse
from layouts import VOID
from scoring import autocast, draw_samples, evaluate, print_table, scores

matplotlib.use("Agg")  # draw to files: a server has no screen
import matplotlib.pyplot as plt  # noqa: E402


def knob(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    data: str = knob("hands/", "folder of photos and masks; data.py tells the layouts")
    out: str = knob("", "folder of this run; empty: runs/ and the name of the data")
    model: str = knob("dru", "the system, as in baselines.py", choices=list(baselines.SYSTEMS))
    weights: str = knob("", "file of torchvision's weights for a VGG-16 or ResNet encoder")
    level: int = knob(4, "l, poolings above the recurrent unit, 0 to 4")
    width: int = knob(8, "channels at level 0")
    hidden: int = knob(16, "channels of the hidden state")
    passes: int = knob(3, "N, how often the network sees each photo")
    alpha: float = knob(0.4, "pass t weighs alpha**(N - t) in the loss; 1 weighs all alike")
    size: int = knob(0, "short side of the photos in pixels; 0: 128, or less where most photos are smaller")
    crop: int = knob(0, "side of the training crops; 0: as --size")
    rotate: float = knob(15.0, "largest turn in augmentation, degrees; 180 where a photo has no up")
    layout: str = knob("", "how --data is laid out, where two layouts fit; layouts.py has their names")
    void: int = knob(VOID, "class id in the masks that neither trains nor counts, besides 255")
    views: int = knob(1, "2 averages every photo with its mirror image when scoring, as the official code does", choices=[1, 2])
    epochs: int = knob(30, "one shows every photo once, or as many times as make 400")
    batch: int = knob(8, "photos a step")
    lr: float = knob(4e-3, "peak learning rate of AdamW, one cycle")
    seed: int = knob(0, "of weights, order and augmentation")
    workers: int = knob(-1, "processes that load photos; -1: none on a CPU, 4 for a GPU")


def checked(c):
    """The Config, or a ValueError for a value that no run can have."""
    for name, least in dict(level=0, width=1, hidden=1, passes=1, size=0, crop=0, epochs=1, batch=1, seed=0, workers=-1).items():
        if getattr(c, name) < least:
            raise ValueError(f"--{name} {getattr(c, name)}: wanted a whole number from {least}")
    for name, low, high in ("alpha", 0, 1), ("lr", 0, 1):
        if not low < getattr(c, name) <= high:
            raise ValueError(f"--{name} {getattr(c, name)}: wanted a number above {low}, at most {high}")
    if 0 < c.size < 16 or 0 < c.crop < 16:
        raise ValueError("--size and --crop: wanted at least 16, as the network halves a photo four times")
    return c


def build(c, classes):
    """The network that a Config names. A setting that it does not have is refused, unless it was left as it is."""
    takes = baselines.options(c.model) | {name for name in ("level", "width", "hidden") if getattr(c, name) != getattr(Config, name)}
    return baselines.build(c.model, classes, c.weights, **{name: getattr(c, name) for name in takes - {"image_channels"}})


def on(device, net):
    """The network on its device, with fused gates where there is a GPU to run them."""
    return fuse(net.to(device)) if device.type == "cuda" else net.to(device)


def recurrent_loss(masks, truth, alpha):
    """sum_t alpha^(N-t) CE(s_t, truth), eq. (7): every pass is taught, the last one most. Void pixels do not count."""
    seen = (truth != VOID).sum().clamp(min=1)  # crops may be void all over: then the loss is 0, not 0/0
    losses = [F.cross_entropy(s, truth, ignore_index=VOID, reduction="sum") / seen for s in masks]
    return sum(alpha ** (len(masks) - t) * loss for t, loss in enumerate(losses, 1))


# ---------------------------------------------------------------- checkpoints


def save(path, content):
    """Written under a temporary name and renamed: whoever kills the run leaves the old checkpoint or the new, never half."""
    part = path.with_suffix(".part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError where the disk is full
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error}); what was there before is intact") from None


def load(path):
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
        return content, Config(**content["config"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train.py writes best.pt and last.pt into --out") from None
    except Exception as error:  # torch.load answers a broken file with half a dozen kinds of exception
        raise ValueError(f"{path}: is not a checkpoint of train.py, or is damaged ({type(error).__name__})") from None


def load_net(path, device):
    """The network of a checkpoint, with the Config it was trained by."""
    content, config = load(path)
    net = build(replace(config, weights=""), content["classes"])  # its encoder is in the checkpoint
    net.load_state_dict(content["net"])
    return on(device, net).eval(), config, content["classes"]


# ---------------------------------------------------------------- training


def train(c, resume=False):
    out, device = Path(c.out), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = load(out / "last.pt")[0] if resume else None
    if not resume and (out / "last.pt").exists():
        raise ValueError(f"{out}: holds a run already; --resume goes on with it, another --out starts a new one")

    options = dict(void=c.void, layout=c.layout, rotate=c.rotate, seed=c.seed)
    photos = open_dataset(c.data, "train", c.size, augment=True, crop=c.crop, **options)
    held_out = open_dataset(c.data, "val", **options)
    photos.repeat = -(-400 // len(photos))
    workers = c.workers if c.workers >= 0 else 4 * (device.type == "cuda")

    torch.manual_seed(c.seed)
    net = on(device, build(c, photos.classes))
    steps = len(photos) // c.batch or 1
    # AdamW, one cycle: the same for every dataset here
    optimiser = torch.optim.AdamW(net.parameters(), lr=c.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, c.lr, total_steps=c.epochs * steps)
    # on small sets the weights of single steps swing by ten points of validation IoU, their running mean does not
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    parts = {"raw": net, "mean": mean, "optimiser": optimiser, "schedule": schedule}
    log, best, done, total = [], 0.0, 0, 0.0  # done: steps of the epoch under way; total: their losses
    if state:
        if state["classes"] != photos.classes:
            raise ValueError(f"{out / 'last.pt'}: knows {state['classes']} classes, {c.data} has {photos.classes}; start a new run")
        if state["photos"] != len(photos):
            raise ValueError(f"{c.data}: its photos have changed since {out / 'last.pt'} was written; start a new run")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log, best, done, total = (state[name] for name in ("log", "best", "done", "total"))

    def checkpoint():
        return {"net": mean.module.state_dict(), "config": asdict(c), "classes": photos.classes, "log": log}

    def save_last():
        more = {name: part.state_dict() for name, part in parts.items()}
        save(out / "last.pt", checkpoint() | more | {"best": best, "done": done, "total": total, "photos": len(photos)})

    out.mkdir(parents=True, exist_ok=True)
    save_last()  # a second run into this folder now meets a first
    size = sum(p.numel() for p in net.parameters())
    print(
        f"{c.model}, {size:,} parameters, on {device}; {c.data} ({photos.layout}): {len(photos.pairs)} photos to train, "
        f"{len(held_out)} to validate, {photos.classes} classes; short side {c.size}, crops {photos.crop}; to {out}/"
    )

    with Interrupts() as interrupts:
        for epoch in range(len(log) + 1, c.epochs + 1):
            net.train()
            photos.epoch, began, first = epoch, time.time(), done
            order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(c.seed * 100_003 + epoch)).tolist()
            batches = [order[i * c.batch : (i + 1) * c.batch] for i in range(done, steps)]
            loader = torch.utils.data.DataLoader(
                photos, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda"
            )
            for image, truth in tqdm(loader, desc=f"epoch {epoch}/{c.epochs}", leave=False, disable=None):
                with autocast(device):
                    masks = net(image.to(device, non_blocking=True), c.passes)
                loss = recurrent_loss([s.float() for s in masks], truth.to(device, non_blocking=True), c.alpha)
                if not loss.isfinite():
                    bad = next((t for t, s in enumerate(masks, 1) if not s.isfinite().all()), len(masks))
                    raise ValueError(
                        f"the loss is {loss.item()} in epoch {epoch}, step {done + 1}, since pass {bad}, at learning rate "
                        f"{schedule.get_last_lr()[0]:.2g}; {out}/ keeps an earlier state. Try a smaller --lr"
                    )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                mean.update_parameters(net)
                total, done = total + loss.item(), done + 1
                if interrupts.seen:
                    save_last()
                    interrupts.leave(f"epoch {epoch}, step {done}", c, out)
            speed = (steps - first) * c.batch / (time.time() - began)
            rows = [scores(matrix) for matrix in evaluate(mean.module, held_out, c, device)[0]]
            seconds, score = time.time() - began, rows[-1]["mIoU"]
            row = {"epoch": epoch, "loss": total / steps, "lr": schedule.get_last_lr()[0], "seconds": seconds}
            log.append(row | {f"{name}_{t}": value for t, scored in enumerate(rows, 1) for name, value in scored.items()})
            done, total = 0, 0.0
            if score >= best:
                best = score
                save(out / "best.pt", checkpoint())
            save_last()
            write_log(log, out)
            print(
                f"epoch {epoch:3}/{c.epochs}  loss {row['loss']:.4f}  val mIoU {score:.4f}  best {best:.4f}  "
                f"{speed:5.1f} photos/s  {(c.epochs - epoch) * seconds / 60:.0f} min left",
                flush=True,
            )
            if interrupts.seen:
                interrupts.leave(f"epoch {epoch}", c, out)


class Interrupts:
    """While training, Ctrl-C and `kill` wait for the end of the step."""

    def __enter__(self):
        self.seen = 0
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, number, frame):
        self.seen = number
        signal.signal(number, self.before[number])  # a second Ctrl-C does not wait

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, where, c, out):
        print(f"stopped after {where}, all is saved; python train.py --data {c.data} --out {out} --resume goes on", file=sys.stderr)
        sys.exit(128 + self.seen)


# ---------------------------------------------------------------- what the run leaves to look at


def write_log(log, out):
    """log.csv and curves.png, whole from the first epoch on: a resumed run has neither gap nor double."""
    with open(out / "log.part", "w", newline="") as file:
        table = csv.DictWriter(file, log[0])
        table.writeheader()
        table.writerows(log)
    os.replace(out / "log.part", out / "log.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in log]
    left.plot(epochs, [row["loss"] for row in log])
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for t in range(1, 1 + sum(name.startswith("mIoU") for name in log[0])):
        right.plot(epochs, [row[f"mIoU_{t}"] for row in log], label=f"pass {t}")
    right.set(xlabel="epoch", ylabel="validation mIoU")
    right.legend()
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


def test(c, checkpoint):
    """The closing table, from the checkpoint that was best on validation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, _, classes = load_net(checkpoint, device)
    photos = open_dataset(c.data, "test", void=c.void, layout=c.layout)
    if photos.classes != classes:
        raise ValueError(f"{checkpoint}: knows {classes} classes, {c.data} has {photos.classes}; evaluate on data of the same kind")
    matrices, curves = evaluate(net, photos, c, device)
    print_table(matrices, curves, f"{c.data}, {len(photos)} test photos, {checkpoint}", photos.names)
    draw_samples(net, photos, c, device, checkpoint.parent / "samples.png")


# ---------------------------------------------------------------- main


def parse(argv=None):
    """Flags over the checkpoint's own settings, where one is named, over the defaults."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        help = f"{f.metadata['help']} [{f.default!r}]"
        cli.add_argument("--" + f.name, type=f.type, default=f.default, **f.metadata | {"help": help})
    cli.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    cli.add_argument("--evaluate", type=Path, metavar="CKPT", help="print the table of this checkpoint; train nothing")
    first = cli.parse_args(argv)
    first.out = first.out or f"runs/{Path(first.data).resolve().name}"
    start = first.evaluate or (Path(first.out) / "last.pt" if first.resume else None)
    saved = asdict(load(start)[1]) if start else {}
    cli.set_defaults(**saved)
    args = vars(cli.parse_args(argv)) | {"out": first.out}
    resume, checkpoint = args.pop("resume"), args.pop("evaluate")
    c = checked(Config(**args))
    kept = {"model", "level", "width", "hidden"} if checkpoint else saved.keys() - {"data", "out", "workers"}
    for name in sorted(kept) if saved else ():
        if args[name] != saved[name]:
            raise ValueError(f"--{name} {args[name]}: {start} was made with {saved[name]}; leave it out, or start a new run")
    if not c.size:
        c.size = min(128, open_dataset(c.data, "train", void=c.void, layout=c.layout).typical)
    c.crop = c.crop or c.size
    return c, resume, checkpoint


def main():
    try:
        c, resume, checkpoint = parse()
        if not checkpoint:
            train(c, resume)
        test(c, checkpoint or Path(c.out) / "best.pt")
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
