"""Several processes (of torchrun) that share a batch, signals, and how a run ends. One process is rank 0 of 1."""

import importlib
import math
import os
import shlex
import signal
import sys
from contextlib import contextmanager, suppress

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from support.checkpoints import first_line, refuse_taken

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None
held = []  # the descriptor of the folder that this process holds


def rank_and_world():
    """Which process this is, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def join():
    """The device of this process, once all processes have found each other: gloo links CPUs, nccl GPUs."""
    gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < gpus <= gpu:
        raise ValueError(f"torchrun --nproc_per_node: at most {gpus} here, one for each GPU")
    if gpus:
        torch.cuda.set_device(gpu)
    if "RANK" in os.environ and not distributed.is_initialized():  # torchrun sets it
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    return torch.device("cuda", gpu) if gpus else torch.device("cpu")


@contextmanager
def exclusive(out, resume):
    """Hold a run's folder against other runs. What is made for it is removed where nothing is written into it."""
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, or a link to none; it must be a folder")
    made = []
    try:
        if rank_and_world()[0] == 0:
            missing = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            hold(out)
            made = missing
        refuse_taken(out, resume)
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()  # OSError where it is not empty
        release()


def hold(out):
    """The system frees a folder when this process ends, even killed. Windows has no such locks."""
    try:
        if fcntl:
            held.append(os.open(out, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(out), os.fstat(held[0])):
                raise FileNotFoundError  # its run has just removed it
    except (BlockingIOError, FileNotFoundError):
        raise ValueError(f"{out}: another run is writing there; wait for its end, or name another --out") from None
    except OSError as error:  # as on a network's disk
        print_once(f"{out}: cannot be held against a second run ({error.strerror}); start none there")


def release():
    while held:
        os.close(held.pop())


def share(net, batch):
    """The network for training; with several processes its `backward` averages their gradients."""
    if batch < (world := rank_and_world()[1]):
        raise ValueError(f"--batch {batch}: is shared between {world} processes; it must be at least {world}")
    return DistributedDataParallel(net) if world > 1 else net


def share_of_batches(n, batch, seed, epoch, epochs, done):
    """This process's part of every batch of n photos, from step `done` of `epoch` to the end: (epoch, photo)."""
    rank, world = rank_and_world()
    for epoch in range(epoch, epochs + 1):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
        for i in range(done, n // batch or 1):
            yield [(epoch, k) for k in order[i * batch : (i + 1) * batch][rank::world]]
        done = 0


def sum_over_processes(tensor):
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def gather_from_processes(part=None):
    """A list of every process's part, once all have come here."""
    parts = [part] * rank_and_world()[1]
    if distributed.is_initialized():
        distributed.all_gather_object(parts, part)
    return parts


def copy_buffers_from_first(net):
    for buffer in net.buffers() if distributed.is_initialized() else ():
        distributed.broadcast(buffer, 0)


def print_once(*words, **how):
    if rank_and_world()[0] == 0:
        print(*words, **how, flush=True)


def finite_sum(loss, net, where):
    """The processes' loss and the norm of its gradient. ValueError in all of them where one is not finite."""
    loss = sum_over_processes(loss.detach().double()).item()
    gradient = torch.nn.utils.get_total_norm(p.grad for p in net.parameters() if p.grad is not None).item()
    if math.isfinite(loss) and math.isfinite(gradient):
        return loss, gradient
    raise ValueError(f"the loss is {loss:.3g}, its gradient {gradient:.3g} in {where}; "
                     "last.pt holds an earlier state. Try a smaller --lr")  # fmt: skip


class Interrupts:
    """While training, Ctrl-C and `kill` wait for the end of the step, or of the validation."""

    def __init__(self, device, data, out):
        self.device, self.seen, self.best = device, 0, out / "best.pt"
        self.again = shlex.join(["python", sys.argv[0], "--data", data, "--out", str(out), "--resume"])

    def __enter__(self):
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, number, frame):
        self.seen = number
        if rank_and_world()[1] == 1:  # a second Ctrl-C does not wait; torchrun sends two itself
            signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def obey(self, where, save=lambda: None):
        """End the run where any process was told to stop, so that all stop after the same step."""
        if not sum_over_processes(torch.tensor(self.seen, device=self.device)).item():
            return
        save()
        gather_from_processes()  # wait until the first has saved: torchrun ends all processes when one ends
        again = self.again if rank_and_world()[1] == 1 else "the same torchrun command with --resume"
        use = f"; {shlex.join(['python', 'predict.py', str(self.best)])} PHOTOS uses what is best so far"
        print_once(f"stopped after {where}, all is saved; {again} goes on{use * self.best.exists()}", file=sys.stderr)
        sys.exit(128 + (self.seen or signal.SIGTERM))


def begin_worker(_):
    """Of loading photos. The training process finishes its step with its workers and ends them itself, by SIGTERM."""
    release()  # the workers of a killed run live on for seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # in a group of their own they get no SIGTERM from anybody else
        os.setpgrp()


def is_out_of_memory(error):
    words = "allocate memory", "not enough memory", "out of memory", "could not create a primitive"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def status_of(error, script):
    """How a script ends after an exception: a number, a sentence, or None where the traceback should be seen."""
    text, first = str(error), f"{script}: {first_line(error)}"
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return getattr(error, "code", 130)
    if isinstance(error, (ValueError, OSError)):  # OSError: a full disk, a folder that may not be read or written
        return f"{script}: " + (text.splitlines()[-1] if text.startswith("Caught") else text)  # a worker's traceback
    if is_out_of_memory(error):
        advice = "; a smaller --batch, --crop or --size takes less"
        return first + advice * (script == "train.py")
    if text.startswith("DataLoader worker"):
        return f"{first}; --resume goes on"
    if rank_and_world()[1] > 1 and ("gloo" in text or isinstance(error, distributed.DistError)):
        return f"{first}; did another process end?"


@contextmanager
def one_ending(script):
    """Around a script: ValueError, OSError and short memory end it with a sentence, other faults with a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by support/terminal.py while torch loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        yield
    except BaseException as error:
        if (status := status_of(error, script)) is None:
            raise
    if distributed.is_initialized() and status in (0, 130, 143):  # otherwise the others may be waiting
        distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # DDP leaves gloo threads, which may abort while Python ends: pytorch#179291
    sys.exit(status)
