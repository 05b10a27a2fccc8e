"""Train a network on a folder of photos and masks, then print its scores on the test split.

    python train.py --data hands/                                  train and test
    python train.py --data hands/ --resume                         go on where runs/hands/last.pt stopped
    python train.py --data hands/ --start runs/other/best.pt       begin with the weights of another run
    python train.py --data hands/ --evaluate runs/hands/best.pt    print the table alone

Writes best.pt (best on validation), last.pt, log.csv, curves.png, config.json and samples.png into --out.
GPUs, machines, or processes on CPUs (set OMP_NUM_THREADS) can share each batch of --batch photos:

    torchrun --standalone --nproc_per_node=2 train.py --data hands/
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=FIRST:29400 train.py --data hands/

Run the second command on both machines. FIRST is the host name of one of them; --data and --out are on a shared disk.
"""

if __name__ == "__main__":
    from support import terminal  # noqa: F401  (before torch)

import argparse
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data import differences, open_dataset, survey
from evaluate import Segmenter, draw_samples, evaluate_split, load, print_table, read_matching, start_from, summary
from paper import baselines
from rurnet import VOID, LastPass, recurrent_loss
from support import processes
from support.checkpoints import PARTS, PROGRESS, load_parts, one_sentence, read_checkpoint, save, write_log
from support.runtime import Graphed, autocast, for_device, replayed

# ---------------------------------------------------------------- 1. configuration
def knob(default, help, within=None, choices=None):
    return field(default=default, metadata={"help": help, "within": within, "choices": choices})


@dataclass
class Config:
    data: str = knob("hands/", "folder of photos and masks; data.py lists the layouts")
    out: str = knob("", "folder of this run; empty: runs/ and the name of the data")
    model: str = knob("dru", "the system, see paper/README.md", choices=list(baselines.SYSTEMS))
    weights: str = knob("", "torchvision's weights file for a VGG-16 or ResNet encoder")
    level: int = knob(4, "l, poolings above the recurrent unit", (0, 4))
    width: int = knob(8, "channels at level 0", (1, 1024))
    hidden: int = knob(16, "channels of the hidden state", (1, 1024))
    passes: int = knob(3, "N, how often the network sees each photo", (1, 1000))
    teach: str = knob("one", "a step teaches one drawn pass or all (rec-*: always all)", choices=["one", "all"])
    alpha: float = knob(0.4, "alpha**(N - t) is how often pass t is drawn, or with --teach all its weight", (1e-6, 1))
    dice: float = knob(0.0, "adds this times 1 - Dice to the loss; 1 where few pixels are foreground", (0, 100))
    size: int = knob(0, "short side of the photos in pixels; 0: 128, or less where most are smaller", (16, 4096))
    crop: int = knob(0, "side of the training crops; 0: as --size", (16, 4096))
    rotate: float = knob(15.0, "largest turn in augmentation, degrees; 180 where a photo has no up", (0, 180))
    void: int = knob(VOID, "class id that neither trains nor counts, besides 255", (0, 255))
    views: int = knob(1, "2 scores the mean of a photo and its mirror image, 8 of all its turns too", choices=[1, 2, 8])
    epochs: int = knob(50, "one shows each photo once, or so often that it has 400", (1, 10**9))
    batch: int = knob(8, "photos a step, over all processes", (1, 10_000))
    lr: float = knob(4e-3, "peak learning rate of AdamW, one cycle", (1e-12, 1))
    seed: int = knob(0, "of weights, order, augmentation and drawn passes", (0, 10**9))
    workers: int = knob(-1, "processes that load photos; -1: none on a CPU, 4 for a GPU", (0, 256))
    start: str = knob("", "checkpoint whose weights a new run begins with")
    resume: bool = knob(False, "go on from last.pt in --out; with other settings, --start it in a new run")
    evaluate: str = knob("", "print the table of this checkpoint; train nothing")

    def __post_init__(self):
        for f in fields(self):
            value, within = getattr(self, f.name), f.metadata["within"]
            if value != f.default and within and not within[0] <= value <= within[1]:
                raise ValueError(f"--{f.name} {value}: must be from {within[0]} to {within[1]}")
        if sum(map(bool, (self.start, self.resume, self.evaluate))) > 1:
            raise ValueError("--start begins a run, --resume goes on with one, --evaluate trains nothing; choose one")
        self.out = self.out or f"runs/{Path(self.data).resolve().name}"


def parse(argv=None):
    """The defaults; over them the checkpoint's settings, of --start a few; over them typed flags that may differ."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        cli.add_argument("--" + f.name, default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{f.default!r}]", **kind)
    typed = vars(cli.parse_args(argv))
    c = Config(**typed)
    if not (c.start or c.evaluate or c.resume):
        return c
    path = Path(c.start or c.evaluate or f"{c.out}/last.pt")
    content = read_checkpoint(path)
    with one_sentence(path):
        content.get("config", {}).pop("recompute", None)  # a flag that is gone
        saved = asdict(Config(**content.get("config", {}))) | {"start": "", "resume": False}
    fixed = saved.keys() - {"data", "out", "workers", "start", "resume", "evaluate"}
    if c.start:
        fixed = {"model", "level", "width", "hidden"}
        saved = {name: saved[name] for name in fixed | {"size", "crop", "weights"}}
    if c.evaluate:
        fixed -= {"size", "passes", "views", "void"}
    for name in sorted(fixed & typed.keys()):
        if typed[name] != saved[name]:
            raise ValueError(f"--{name} {typed[name]}: {path} has {saved[name]}; leave it out, or begin a new run")
    return Config(**saved | {"out": c.out} | typed)


def train(config, net=None, folder=None, criterion=None):
    """Train by a Config and write best.pt and last.pt into its --out; return what `data.survey` finds in its data, or
    `folder`. `net` is a network of your own, which `evaluate.load` then needs too; `criterion` is described in
    paper/README.md."""
    device = processes.join()
    with processes.exclusive(Path(config.out), config.resume):
        folder = folder or survey(config.data, config.void)
        criterion = criterion or (lambda *batch: recurrent_loss(*batch, dice=config.dice))
        learn(config, net, folder, criterion, device, Path(config.out), *processes.rank_and_world())
    return folder


def learn(c, net, folder, criterion, device, out, rank, world):
    # 2. data
    held_out = open_dataset(folder, "val")
    c = replace(c, size=c.size or min(128, folder.short_side("train")))
    photos = open_dataset(folder, "train", c.size, augment=True, crop=c.crop, rotate=c.rotate, seed=c.seed)
    photos.repeat = -(-400 // len(photos))

    # 3. network
    torch.manual_seed(c.seed)
    network = {"name": "", "options": {}} if net else baselines.describe(c.model, vars(c), vars(Config))
    if c.resume:
        state, _ = read_matching(out / "last.pt", PARTS | PROGRESS, net)
        if state["network"] != network:
            raise ValueError(f"{out}/last.pt: holds {state['network']}, but its settings build {network}")
    weights = c.weights * (not c.resume and not c.start)  # otherwise the checkpoint has them
    net = net or baselines.build(c.model, folder.classes, weights, **network["options"])
    if c.start:
        start_from(net, c.start, network, folder)
    net = for_device(net, device)
    drawn = c.teach == "one" and hasattr(net, "step")
    learner = processes.share(Graphed(LastPass(net) if drawn else net), c.batch)
    odds = {n: c.alpha ** (c.passes - n) for n in range(1, c.passes + 1)}  # of pass n, as eq. (7) weighs it
    # On small sets the weights of single steps swing by ten points of validation IoU; their running mean does not.
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    model = Segmenter(replayed(ema.module, device), c.size, c.passes, c.views)

    # 4. optimiser: AdamW and one cycle for every dataset
    optimiser = torch.optim.AdamW(baselines.parameter_groups(net, c.lr, bool(c.weights)), weight_decay=1e-2)
    steps, peaks = len(photos) // c.batch or 1, [group["lr"] for group in optimiser.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peaks, total_steps=c.epochs * steps)
    log, best, done, total, norms = [], 0.0, 0, 0.0, 0.0  # the last three: steps of this epoch, their losses, gradients
    about = {"network": network, "input": {name: getattr(c, name) for name in ("size", "passes", "views")}}
    about |= {"classes": folder.classes, "config": asdict(c), "photos": folder.fingerprint("train", "val")}
    weights = {"model": net, "ema": ema.module}
    everything = weights | {"optimiser": optimiser, "schedule": schedule}
    if c.resume:
        if state["classes"] != folder.classes or [*state["photos"].items()] != [*about["photos"].items()]:  # order too
            found, last = differences(state["photos"], about["photos"]), f"{out}/last.pt"
            raise ValueError(f"{c.data}: changed since {last} ({found}); undo that, or begin a new run: --start {last}")
        with one_sentence(out / "last.pt"):
            load_parts(everything, state)
            log, best, done, total, norms = (state[name] for name in ("log", "best", "done", "total", "norms"))
            ema.n_averaged.fill_(schedule.last_epoch)
            if sum(row["epoch"] > 0 for row in log) * steps + done != schedule.last_epoch:
                raise ValueError("log, done and schedule disagree")

    def save_as(name, parts):
        if rank == 0:  # all processes hold the same
            progress = {"log": log, "best": best, "done": done, "total": total, "norms": norms}
            save(out / name, about | progress | {name: part.state_dict() for name, part in parts.items()})

    save_as("last.pt", everything)
    size, more = sum(p.numel() for p in net.parameters()), f" and {world - 1} more" * (world > 1)
    facts = f"{c.model}, {size:,} parameters, on {device}{more}; side {c.size}, crops {photos.crop}; to {out}/"
    counts = f"{len(photos.pairs)} photos to train, {len(held_out)} to validate, {folder.classes} classes"
    processes.print_once(*folder.notes, facts, f"{c.data} ({folder.layout}): {counts}", sep="\n")

    # 5. the loop
    with processes.Interrupts(device, c.data, out) as interrupts:
        gpu, begin = device.type == "cuda", processes.begin_worker
        how = dict(num_workers=4 * gpu if c.workers < 0 else c.workers, pin_memory=gpu, worker_init_fn=begin)
        shares = processes.share_of_batches(len(photos), c.batch, c.seed, len(log) + 1, c.epochs, done)
        loader = iter(torch.utils.data.DataLoader(photos, batch_sampler=shares, **how))  # one for the whole run
        for epoch in range(len(log) + 1, c.epochs + 1):
            began = time.monotonic()
            for _ in tqdm(range(done, steps), f"epoch {epoch}", leave=False, disable=rank > 0 or None):
                image, truth = (x.to(device, non_blocking=True) for x in next(loader))
                pixels = processes.sum_over_processes((truth != VOID).sum())
                n = Random(f"{c.seed} {schedule.last_epoch}").choices([*odds], odds.values())[0] if drawn else c.passes
                with autocast(device):
                    masks = learner(image, n)  # logits of the drawn pass n alone, or of all N
                    loss = criterion(masks, truth, c.alpha, pixels)  # that term of eq. (7), or all of it
                optimiser.zero_grad()
                (loss * world).backward()  # processes average their gradients; their losses are parts of one sum
                loss, norm = processes.finite_sum(loss, net, f"epoch {epoch}, step {done + 1}")
                optimiser.step()
                schedule.step()
                ema.update_parameters(net)
                total, norms, done = total + loss, norms + norm, done + 1
                interrupts.obey(f"step {done} of epoch {epoch}", lambda: save_as("last.pt", everything))

            save_as("last.pt", everything)  # a long validation may be killed
            processes.copy_buffers_from_first(ema.module)
            score, columns = summary(*evaluate_split(model, held_out))
            seconds, loss, lr = time.monotonic() - began, total / steps, schedule.get_last_lr()[0]
            log.append(dict(epoch=epoch, loss=loss, gradient=norms / steps, lr=lr, seconds=seconds) | columns)
            best, done, total, norms = max(best, score), 0, 0.0, 0.0
            if score == best:
                save_as("best.pt", weights)
            if rank == 0:
                write_log(log, asdict(c), out)
            save_as("last.pt", everything)
            reached = f"loss {loss:.4f}  val mIoU {score:.4f}  best {best:.4f}  {seconds:.1f} s"
            left = (c.epochs - epoch) * seconds / 60
            processes.print_once(f"epoch {epoch:3}/{c.epochs}  {reached}, {left:.0f} min left")
            interrupts.obey(f"epoch {epoch}")


# ---------------------------------------------------------------- 6. test
def test(c, folder=None):
    """Print the closing table of best.pt, or of --evaluate, and draw samples.png beside it."""
    path = Path(c.evaluate or f"{c.out}/best.pt")
    model = load(path, processes.join())
    photos = open_dataset(folder or survey(c.data, c.void, ["test"], model.classes), "test")
    if photos.classes != model.classes:
        raise ValueError(f"{path}: has {model.classes} classes, {c.data} {photos.classes}; use data of its kind")
    model.size, model.passes, model.views = c.size or model.size, c.passes, c.views
    matrices, curves, _ = evaluate_split(model, photos)
    if processes.rank_and_world()[0] == 0:
        print_table(matrices, curves, f"{c.data}, {len(photos)} test photos, {path}", photos.found.names)
        if not (c.evaluate and (path.parent / "samples.png").exists()):  # there it is the run's own
            draw_samples(model, photos, path.parent / "samples.png")


def main():
    with processes.one_ending("train.py"):
        c = parse()
        folder = None if c.evaluate else train(c)
        processes.gather_from_processes()  # wait until the first has written best.pt
        test(c, folder)


if __name__ == "__main__":
    main()
