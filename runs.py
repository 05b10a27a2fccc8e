"""What keeps a run safe: several processes, checkpoints that are never half written, signals, a log without gaps, and an end in one sentence."""

import csv
import os
import shlex
import signal
import sys
import zipfile

import matplotlib
import torch
from torch import distributed

matplotlib.use("Agg")  # draw to files: a server has no screen
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------- processes


def place():
    """(rank, world): which of how many processes this is."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def join():
    """The device of this process. Where torchrun started several, they find each other: gloo links CPUs, nccl GPUs."""
    if not torch.cuda.is_available():
        device, backend = torch.device("cpu"), "gloo"
    else:
        gpu = int(os.environ.get("LOCAL_RANK", 0))
        if gpu >= torch.cuda.device_count():
            raise ValueError(f"torchrun --nproc_per_node: wanted at most {torch.cuda.device_count()} here, a process for each GPU")
        torch.cuda.set_device(gpu)
        device, backend = torch.device("cuda", gpu), "nccl"
    if "RANK" in os.environ and not distributed.is_initialized():  # torchrun sets it
        distributed.init_process_group(backend)
    return device


def summed(tensor):
    """Over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def wait_for_all():
    if distributed.is_initialized():
        distributed.barrier()


def memory_is_short(error):
    """Whether an exception says so: torch has a class for it on GPUs, and words on CPUs."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in ("allocate memory", "not enough memory", "out of memory"))


def say(*words, **how):
    """Print, once for all processes."""
    if place()[0] == 0:
        print(*words, **how, flush=True)


# ---------------------------------------------------------------- checkpoints


def save(path, content):
    """Written under a temporary name and renamed: whoever kills the run leaves the old checkpoint or the new, never half."""
    if place()[0] > 0:
        return  # all processes hold the same; the first writes
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError where the disk is full
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error}); what was there before is intact") from None


def read(path):
    """The tensors and plain values of a checkpoint, never code."""
    try:
        with zipfile.ZipFile(path) as file:  # as torch.save writes
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train.py writes best.pt and last.pt into --out") from None
    except Exception as error:  # torch.load answers a broken file with half a dozen kinds of exception
        raise foreign(path, error) from None


def foreign(path, error):
    return ValueError(f"{path}: is not a checkpoint of train.py, or is damaged ({type(error).__name__})")


# ---------------------------------------------------------------- signals


class Interrupts:
    """While training, Ctrl-C and `kill` wait for the end of the step."""

    def __enter__(self):
        self.seen = 0
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, number, frame):
        self.seen = number
        if place()[1] == 1:  # torchrun may say it twice
            signal.signal(number, self.before[number])  # a second Ctrl-C does not wait

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, where, c, out):
        wait_for_all()  # until the first has saved: torchrun ends the others as soon as one is gone
        again = shlex.join(["python", "train.py", "--data", c.data, "--out", str(out), "--resume"])
        say(f"stopped after {where}, all is saved; {again} goes on", file=sys.stderr)
        sys.exit(128 + (self.seen or signal.SIGTERM))


def leave_signals(_):
    """For the workers: the process that trains finishes its step with them, then ends them. So Ctrl-C, `timeout` and torchrun must not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # SIGTERM cannot be ignored: it is what ends them. A group of their own keeps others' away
        os.setpgrp()


# ---------------------------------------------------------------- the log


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


# ---------------------------------------------------------------- the end


def status_of(error):
    """How train.py ends after an exception: a number, a sentence, or None where the traceback should be seen."""
    text = str(error)
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, KeyboardInterrupt):  # outside of training, or for the second time
        return 130
    if isinstance(error, (ValueError, OSError)):  # OSError: a full disk, a folder that may not be written
        return f"train.py: {text.splitlines()[-1] if text.startswith('Caught') else text}"  # a worker's comes with its traceback
    first = (text.splitlines() or ["out of memory"])[0]
    if memory_is_short(error):
        return f"train.py: {first}; a smaller --batch, --crop or --size takes less, and so does --recompute 1"
    if place()[1] > 1 and ("gloo" in text or isinstance(error, distributed.DistError)):
        return f"train.py: {first}; did another process end?"


def leave(status):
    """End this process with that number, or that sentence."""
    if distributed.is_initialized() and status in (0, 130, 143):  # otherwise the others may be waiting
        distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # gloo's threads outlive it (DDP keeps the group); one that drops a tensor while Python ends would abort: pytorch#179291
    sys.exit(status)
