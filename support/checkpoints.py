"""Checkpoints, which are never half written and never run code, and the log of a run."""

import csv
import os
import zipfile
from contextlib import contextmanager

import torch
from matplotlib.figure import Figure

PARTS = {"network", "input", "classes", "model", "ema"}  # what every checkpoint holds: see train.py


def save(path, content):
    """Write under a temporary name, then rename: a killed run leaves the old checkpoint or the new one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error}); its previous content is intact") from None


def read_tensors(path, kind):
    """The tensors and plain values of a file, never code. ValueError where it is not of that kind."""
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes today; torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it must be {kind}") from None
    except Exception as error:  # a broken file raises any of half a dozen kinds of exception in torch.load
        raise ValueError(f"{path}: is not {kind}, or is damaged ({type(error).__name__})") from None


def read_checkpoint(path):
    content = read_tensors(path, "a checkpoint of train.py")
    keys = set(content if isinstance(content, dict) else ())
    if {"net", "config"} <= keys:
        raise ValueError(f"{path}: is a checkpoint of the first edition, which this one cannot read; train again")
    if missing := PARTS - keys:
        raise ValueError(f"{path}: is not a checkpoint of train.py; it lacks {', '.join(sorted(missing))}")
    return content


@contextmanager
def one_sentence(path):
    """Around what a damaged or foreign checkpoint may break in any way."""
    try:
        yield
    except Exception as error:
        what = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{path}: does not hold what it describes ({what}); another version wrote it") from None


def refuse_taken(out, resume):
    if out.is_file():
        raise ValueError(f"--out {out}: is a file; it must be a folder")
    if not resume and (out / "last.pt").exists():
        raise ValueError(f"{out}: holds a run already; --resume goes on with it, another --out starts a new one")


def write_log(log, out):
    """log.csv and curves.png, complete from the first epoch, so a resumed run has neither a gap nor a repetition."""
    with open(out / "log.part", "w", newline="") as file:
        table = csv.DictWriter(file, log[0])
        table.writeheader()
        table.writerows(log)
    os.replace(out / "log.part", out / "log.csv")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*((row["epoch"], row["loss"]) for row in log)))
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for name in (name for name in log[0] if name.startswith("mIoU_")):
        right.plot(*zip(*((row["epoch"], row[name]) for row in log)), label=name.replace("mIoU_", "pass "))
    right.set(xlabel="epoch", ylabel="validation mIoU")
    right.legend()
    figure.savefig(out / "curves.png", dpi=80)
