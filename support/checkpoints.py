"""Files that are never half written, checkpoints that never run code, and the log of a run."""

import json
import os
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure

PARTS = {"network": dict, "input": dict, "classes": int, "model": dict, "ema": dict}  # of every checkpoint
PROGRESS = dict(optimiser=dict, schedule=dict, photos=dict, log=list, best=float, done=int, total=float, norms=float)
FILES = "best.pt", "last.pt", "log.csv", "curves.png", "config.json", "samples.png"  # what a run writes


@contextmanager
def new_file(path):
    """A file under a temporary name, renamed once it is complete: a kill or a full disk leaves the old one."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # or a link of that name would be written through
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch's writer hides a full disk behind a RuntimeError
            error = error.__context__
        raise ValueError(f"{path}: could not be written ({error}); its previous content is intact") from None
    finally:
        with suppress(OSError):
            part.unlink()


def save(path, content):
    with new_file(path) as file:
        torch.save(content, file)


def first_line(error):
    return (str(error).splitlines() or ["out of memory" if isinstance(error, MemoryError) else type(error).__name__])[0]


def read_tensors(path, kind):
    """The tensors and plain values of a file, never code. ValueError where it is not of that kind."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; it must be {kind}")
    try:
        if not path.is_file():
            raise ValueError("not a file")  # reading a named pipe would wait forever
        if zipfile.is_zipfile(path):  # as torch.save writes today; torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                    raise ValueError("compressed")  # to read it might take any amount of memory
                if damaged := file.testzip():
                    raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises any of half a dozen kinds of exception in torch.load
        what = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: is not {kind}, or is damaged ({what})") from None


def read_checkpoint(path, parts=PARTS):
    content = read_tensors(path, "a checkpoint of train.py")
    keys = content.keys() if isinstance(content, dict) else set()
    if {"net", "config"} <= keys:
        raise ValueError(f"{path}: is a checkpoint of the first edition, which this one cannot read; train again")
    if missing := PARTS.keys() - keys:
        raise ValueError(f"{path}: is not a checkpoint of train.py; it lacks {', '.join(sorted(missing))}")
    if lacks := ", ".join(sorted(parts.keys() - keys)):
        raise ValueError(f"{path}: is no last.pt; it lacks {lacks}. --start {path} begins a new run")
    if wrong := [name for name, kind in parts.items() if not isinstance(content[name], kind)]:
        raise ValueError(f"{path}: is damaged; its {wrong[0]} is of the wrong type")
    return content


@contextmanager
def one_sentence(path):
    """Around what a damaged or foreign checkpoint may break in any way."""
    try:
        yield
    except Exception as error:
        what = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        about = "it is damaged, or another version wrote it"
        raise ValueError(f"{path}: does not hold what it describes ({what}); {about}") from None


def load_parts(parts, state):
    """Fill each part. An optimiser takes moments of any shape, and would fail at its first step."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for p, moments in parts["optimiser"].state.items():
        if wrong := [name for name, x in moments.items() if x.dim() and x.shape != p.shape]:
            raise ValueError(f"the optimiser's {wrong[0]} has not the shape of its weight")


def refuse_taken(out, resume):
    """A new run never replaces the files of another, unless that one ended before its first step."""
    taken = [] if resume else [name for name in FILES if os.path.lexists(out / name)]
    if taken == ["last.pt"]:
        content = read_checkpoint(out / "last.pt", PARTS | PROGRESS)
        taken *= bool(content["log"] or content["done"])
    if taken:
        more = "--resume goes on with it, another --out starts a new one"
        raise ValueError(f"{out}: holds a run already ({taken[0]}); {more}")


def write_log(log, config, out):
    """log.csv and curves.png, complete from the first epoch, so a resumed run has no gap; and config.json."""
    with new_file(out / "log.csv") as file:
        file.write("".join(",".join(map(str, row)) + "\n" for row in [log[0], *(row.values() for row in log)]).encode())
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, kind in (left, "CE"), (right, "mIoU"):
        for name in (name for name in log[0] if name.startswith(f"{kind}_")):
            axis.plot(*zip(*((row["epoch"], row[name]) for row in log)), label=name.replace(f"{kind}_", "pass "))
        axis.set(xlabel="epoch", ylabel=f"validation {kind}")
    left.plot(*zip(*((row["epoch"], row["loss"]) for row in log)), "k", lw=1, label="training loss")
    left.set(yscale="log", ylabel="loss; cross-entropy in validation")
    left.legend()
    with new_file(out / "curves.png") as file:
        figure.savefig(file, dpi=80)
    with new_file(out / "config.json") as file:
        file.write(json.dumps(config, indent=1).encode())
