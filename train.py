"""Train, evaluate, resume.

    python train.py --data hands/                                  train, then print the table on the test split
    python train.py --data hands/ --resume                         go on where runs/hands/last.pt stopped
    python train.py --data hands/ --evaluate runs/hands/best.pt    the table alone
    torchrun --nproc_per_node=2 train.py --data hands/             several GPUs, machines, or processes on CPUs

Writes to --out: best.pt (best on validation), last.pt, log.csv, curves.png; and samples.png, beside the checkpoint that the table is of.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import baselines
from data import open_dataset
from fast import Recomputed, on
from layouts import VOID
from runs import Interrupts, foreign, join, leave, leave_signals, place, read, save, say, status_of, summed, wait_for_all, write_log
from scoring import autocast, draw_samples, evaluate, print_table, scores


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
    epochs: int = knob(30, "one shows every photo once, or as many times as make 400, in whole batches")
    batch: int = knob(8, "photos a step")
    recompute: int = knob(0, "1 trains in 0.55 of the memory, for 1.3 times the time", choices=[0, 1])
    lr: float = knob(4e-3, "peak learning rate of AdamW, one cycle")
    seed: int = knob(0, "of weights, order and augmentation")
    workers: int = knob(-1, "processes that load photos; -1: none on a CPU, 4 for a GPU")


def checked(c):
    """The Config, or a ValueError for a value that no run can have. The upper ends are far beyond what any machine can hold."""
    least = dict(level=0, width=1, hidden=1, passes=1, size=0, crop=0, void=0, epochs=1, batch=1, seed=0, workers=-1)
    most = dict(level=4, width=1024, hidden=1024, passes=1000, size=8192, crop=8192, void=255, batch=10_000, workers=256)
    for name, low in least.items():
        high = most.get(name, 10**9)
        if not low <= getattr(c, name) <= high:
            raise ValueError(f"--{name} {getattr(c, name)}: wanted a whole number from {low} to {high}")
    for name in "alpha", "lr":
        if not 0 < getattr(c, name) <= 1:
            raise ValueError(f"--{name} {getattr(c, name)}: wanted a number above 0, at most 1")
    if not 0 <= c.rotate <= 180:
        raise ValueError(f"--rotate {c.rotate}: wanted degrees from 0 to 180")
    if c.recompute and c.model not in ("dru", "sru", "dru-vgg16"):
        raise ValueError(f"--recompute 1: works with dru, sru and dru-vgg16, and not with {c.model}; leave it out")
    if 0 < c.size < 16 or 0 < c.crop < 16:
        raise ValueError("--size and --crop: wanted at least 16, as the network halves a photo four times")
    return c


def build(c, classes):
    """The network that a Config names. A setting that it does not have is refused, unless it was left as it is."""
    takes = baselines.options(c.model) | {name for name in ("level", "width", "hidden", "passes") if getattr(c, name) != getattr(Config, name)}
    return baselines.build(c.model, classes, c.weights, **{name: getattr(c, name) for name in takes - {"image_channels"}})


def recurrent_loss(masks, truth, alpha, seen=None):
    """sum_t alpha^(N-t) CE(s_t, truth), eq. (7): every pass is taught, the last one most. Void pixels do not count.

    seen: by how many pixels to divide, where the batch is shared between processes; by default by those that truth shows."""
    seen = (truth != VOID).sum() if seen is None else seen
    seen = seen.clamp(min=1)  # crops may be void all over: then the loss is 0, not 0/0
    losses = [F.cross_entropy(s, truth, ignore_index=VOID, reduction="sum") / seen for s in masks]
    return sum(alpha ** (len(masks) - t) * loss for t, loss in enumerate(losses, 1))


# ---------------------------------------------------------------- checkpoints


def load(path):
    """What a checkpoint holds, and the Config of its run."""
    content = read(path)
    try:
        return content, checked(Config(**content["config"]))
    except Exception as error:  # whatever a foreign file can hold
        raise foreign(path, error) from None


def load_net(path, device):
    """The network of a checkpoint, with the Config it was trained by."""
    content, config = load(path)
    try:
        net = build(replace(config, weights=""), content["classes"])  # its encoder is in the checkpoint
        net.load_state_dict(content["net"])
    except Exception as error:  # whatever a foreign file can hold
        raise misfit(path, config, error) from None
    return on(device, net).eval(), config, content["classes"]


def misfit(path, config, error):
    what = (str(error).splitlines() or [type(error).__name__])[-1].strip()
    return ValueError(f"{path}: does not hold the {config.model} that it names ({what}); it was made by another version, train anew")


# ---------------------------------------------------------------- training


def batches(n, c, epoch, done):
    """What this process sees of every batch from here to the end of the run, as (epoch, photo)."""
    rank, world = place()
    for epoch in range(epoch, c.epochs + 1):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(c.seed * 100_003 + epoch)).tolist()
        for i in range(done, n // c.batch or 1):
            yield [(epoch, k) for k in order[i * c.batch : (i + 1) * c.batch][rank::world]]
        done = 0


def train(c, resume=False):
    out, device, (rank, world) = Path(c.out), join(), place()
    if c.batch < world:
        raise ValueError(f"--batch {c.batch}: is shared between {world} processes; wanted at least {world}")
    state = load(out / "last.pt")[0] if resume else None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; wanted the name of a folder")
    if not resume and (out / "last.pt").exists():
        raise ValueError(f"{out}: holds a run already; --resume goes on with it, another --out starts a new one")

    options = dict(void=c.void, layout=c.layout, rotate=c.rotate, seed=c.seed)
    photos = open_dataset(c.data, "train", c.size, augment=True, crop=c.crop, **options)
    held_out = open_dataset(c.data, "val", **options)
    names = [name for name, *_ in photos.pairs + held_out.pairs]
    photos.repeat = -(-400 // len(photos))
    workers = c.workers if c.workers >= 0 else 4 * (device.type == "cuda")

    torch.manual_seed(c.seed)
    net = on(device, build(replace(c, weights="") if resume else c, photos.classes))
    steps = len(photos) // c.batch or 1
    # AdamW, one cycle: the same for every dataset here. What is pretrained learns at a fiftieth: the full rate would unlearn it
    pretrained = list(baselines.encoder_of(net).parameters()) if c.weights else []
    rates = {c.lr: [p for p in net.parameters() if p not in set(pretrained)]} | ({c.lr / 50: pretrained} if pretrained else {})
    optimiser = torch.optim.AdamW([{"params": group} for group in rates.values()], lr=c.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, list(rates), total_steps=c.epochs * steps)
    # on small sets the weights of single steps swing by ten points of validation IoU, their running mean does not
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    shared = Recomputed(net) if c.recompute else net
    shared = DistributedDataParallel(shared) if world > 1 else shared  # waits until all processes are here
    parts = {"raw": net, "mean": mean, "optimiser": optimiser, "schedule": schedule}
    log, best, done, total = [], 0.0, 0, 0.0  # done: steps of the epoch under way; total: their losses
    if state:
        if state.get("classes") != photos.classes:
            raise ValueError(f"{out / 'last.pt'}: knows {state.get('classes')} classes, {c.data} has {photos.classes}; start a new run")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            log, best, done, total, before = (state[name] for name in ("log", "best", "done", "total", "photos"))
        except Exception as error:
            raise misfit(out / "last.pt", c, error) from None
        if before != names:
            raise ValueError(f"{c.data}: its photos have changed since {out / 'last.pt'} was written; start a new run")

    def checkpoint():
        return {"net": mean.module.state_dict(), "config": asdict(c), "classes": photos.classes, "log": log}

    def save_last():
        more = {name: part.state_dict() for name, part in parts.items()}
        save(out / "last.pt", checkpoint() | more | {"best": best, "done": done, "total": total, "photos": names})

    out.mkdir(parents=True, exist_ok=True)
    save_last()  # a second run into this folder now meets a first
    size = sum(p.numel() for p in net.parameters())
    say(
        f"{c.model}, {size:,} parameters, on {device}{f' and {world - 1} more' * (world > 1)}; {c.data} ({photos.layout}): {len(photos.pairs)} photos to train, "
        f"{len(held_out)} to validate, {photos.classes} classes; short side {c.size}, crops {photos.crop}; to {out}/"
    )

    with Interrupts() as interrupts:
        # one loader for the whole run: its workers stay, and a small set is decoded once
        share = batches(len(photos), c, len(log) + 1, done)
        pinned = device.type == "cuda"
        loader = iter(
            torch.utils.data.DataLoader(photos, batch_sampler=share, num_workers=workers, pin_memory=pinned, worker_init_fn=leave_signals)
        )
        for epoch in range(len(log) + 1, c.epochs + 1):
            shared.train()
            began, first = time.time(), done
            left = islice(loader, steps - done)
            for image, truth in tqdm(left, f"epoch {epoch}/{c.epochs}", steps, initial=done, leave=False, disable=rank > 0 or None):
                image, truth = image.to(device, non_blocking=True), truth.to(device, non_blocking=True)
                with autocast(device):
                    masks = shared(image, c.passes)
                seen = summed((truth != VOID).sum())
                loss = recurrent_loss([s.float() for s in masks], truth, c.alpha, seen)
                optimiser.zero_grad()
                (loss * world).backward()  # the processes' gradients are averaged, their losses are parts of a sum
                gradient = torch.nn.utils.get_total_norm(p.grad for p in net.parameters())
                loss, stop = summed(torch.tensor([loss.item(), interrupts.seen], dtype=torch.float64, device=device)).tolist()
                if not math.isfinite(loss) or not gradient.isfinite():  # of all processes, so that all stop here
                    bad = next((t for t, s in enumerate(masks, 1) if not s.isfinite().all()), len(masks))
                    raise ValueError(
                        f"the loss is {loss:.3g}, its gradient {gradient:.3g} in epoch {epoch}, step {done + 1}, since pass {bad}, at learning rate "
                        f"{schedule.get_last_lr()[0]:.2g}; {out}/ keeps an earlier state. Try a smaller --lr"
                    )
                optimiser.step()
                schedule.step()
                mean.update_parameters(net)
                total, done = total + loss, done + 1
                if stop:
                    save_last()
                    interrupts.leave(f"epoch {epoch}, step {done}", c, out)
            speed = (steps - first) * c.batch / (time.time() - began)
            save_last()  # a long validation may be killed
            if world > 1:  # batch norm counts in each process by itself
                for buffer in mean.buffers():
                    distributed.broadcast(buffer, 0)
            rows = [scores(matrix) for matrix in evaluate(mean.module, held_out, c, device)[0]]
            seconds, score = time.time() - began, rows[-1]["mIoU"]
            row = {"epoch": epoch, "loss": total / steps, "lr": schedule.get_last_lr()[0], "seconds": seconds}
            log.append(row | {f"{name}_{t}": value for t, scored in enumerate(rows, 1) for name, value in scored.items()})
            done, total = 0, 0.0
            if score >= best:
                best = score
                save(out / "best.pt", checkpoint())
            if rank == 0:
                write_log(log, out)
            save_last()
            say(
                f"epoch {epoch:3}/{c.epochs}  loss {row['loss']:.4f}  val mIoU {score:.4f}  best {best:.4f}  "
                f"{speed:5.1f} photos/s  {(c.epochs - epoch) * seconds / 60:.0f} min left"
            )
            if summed(torch.tensor(interrupts.seen, device=device)):
                interrupts.leave(f"epoch {epoch}", c, out)


def test(c, checkpoint):
    """The closing table, from the checkpoint that was best on validation."""
    device = join()
    net, _, classes = load_net(checkpoint, device)
    photos = open_dataset(c.data, "test", void=c.void, layout=c.layout)
    if photos.classes != classes:
        raise ValueError(f"{checkpoint}: knows {classes} classes, {c.data} has {photos.classes}; evaluate on data of the same kind")
    matrices, curves = evaluate(net, photos, c, device)
    if place()[0] == 0:
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
    if first.evaluate and first.resume:
        raise ValueError("--evaluate and --resume: the one trains nothing, the other goes on training; choose one")
    first.out = first.out or f"runs/{Path(first.data).resolve().name}"
    start = first.evaluate or (Path(first.out) / "last.pt" if first.resume else None)
    saved = asdict(load(start)[1]) if start else {}
    cli.set_defaults(**saved)
    args = vars(cli.parse_args(argv)) | {"out": first.out}
    resume, checkpoint = args.pop("resume"), args.pop("evaluate")
    c = checked(Config(**args))
    kept = {"model", "level", "width", "hidden"} if checkpoint else saved.keys() - {"data", "out", "workers", "recompute"}
    for name in sorted(kept & saved.keys()):
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
            wait_for_all()  # until best.pt is there
        test(c, checkpoint or Path(c.out) / "best.pt")
        status = 0
    except BaseException as error:
        if (status := status_of(error)) is None:
            raise
    leave(status)  # only here, when train() and the workers it loads with are gone


if __name__ == "__main__":
    main()
