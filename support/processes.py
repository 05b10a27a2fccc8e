"""Several processes that share a batch, signals, and how a run ends.

torchrun starts the processes. A process alone is rank 0 in a world of 1, and these calls return at once.
"""

import math
import os
import shlex
import signal
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def rank_and_world():
    """Which process this is, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def join():
    """The device of this process. The processes of torchrun find each other: gloo links CPUs, nccl GPUs."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"torchrun --nproc_per_node: at most {torch.cuda.device_count()} here, one for each GPU")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not distributed.is_initialized():  # torchrun sets it
        distributed.init_process_group(backend)
    return device


def share(net):
    """The network for training; with several processes its `backward` averages their gradients."""
    return DistributedDataParallel(net) if rank_and_world()[1] > 1 else net


def share_of_batches(n, batch, seed, epoch, epochs, done):
    """This process's part of every batch of n photos, from step `done` of that epoch to the last: (epoch, photo)."""
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


def gather_from_processes(part):
    parts = [part] * rank_and_world()[1]
    if distributed.is_initialized():
        distributed.all_gather_object(parts, part)
    return parts


def copy_buffers_from_first(net):
    for buffer in net.buffers() if distributed.is_initialized() else ():
        distributed.broadcast(buffer, 0)


def wait_for_all():
    if distributed.is_initialized():
        distributed.barrier()


def print_once(*words, **how):
    if rank_and_world()[0] == 0:
        print(*words, **how, flush=True)


# ---------------------------------------------------------------- while training


def finite_sum(loss, net, masks, where):
    """The processes' loss. ValueError in all of them where the loss or the gradient is not finite."""
    loss = sum_over_processes(loss.detach().double()).item()
    gradient = torch.nn.utils.get_total_norm(p.grad for p in net.parameters()).item()
    if math.isfinite(loss) and math.isfinite(gradient):
        return loss
    bad = [t for t, s in enumerate(masks, 1) if not s.isfinite().all()] or [len(masks)]
    what = f"the loss is {loss:.3g}, its gradient {gradient:.3g} in {where}, since pass {bad[0]}"
    raise ValueError(f"{what}; last.pt holds an earlier state. Try a smaller --lr")


class Interrupts:
    """While training, Ctrl-C and `kill` wait for the end of the step."""

    def __enter__(self):
        self.seen = 0
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def notice(self, number, frame):
        self.seen = number
        if rank_and_world()[1] == 1:  # torchrun may send it twice
            signal.signal(number, self.before[number])  # a second Ctrl-C does not wait

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def anywhere(self, device):
        """Whether any process was told to stop, so that all stop after the same step."""
        return sum_over_processes(torch.tensor(self.seen, device=device)).item() > 0

    def leave(self, where, data, out):
        wait_for_all()  # until the first has saved: torchrun ends the others as soon as one is gone
        again = shlex.join(["python", "train.py", "--data", data, "--out", str(out), "--resume"])
        print_once(f"stopped after {where}, all is saved; {again} goes on", file=sys.stderr)
        sys.exit(128 + (self.seen or signal.SIGTERM))


def ignore_signals(_):
    """For loading workers: the training process finishes its step with them and ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # its own group keeps away the SIGTERM of others; training still sends its own
        os.setpgrp()


# ---------------------------------------------------------------- the end


def is_out_of_memory(error):
    words = "allocate memory", "not enough memory", "out of memory"  # on CPUs torch has no class for it
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def status_of(error):
    """How train.py ends after an exception: a number, a sentence, or None where the traceback should be seen."""
    text = str(error)
    first = (text.splitlines() or ["out of memory"])[0]
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, KeyboardInterrupt):  # outside of training, or for the second time
        return 130
    if isinstance(error, (ValueError, OSError)):  # OSError: a full disk, a folder that may not be written
        return "train.py: " + (text.splitlines()[-1] if text.startswith("Caught") else text)  # a worker's traceback
    if is_out_of_memory(error):
        return f"train.py: {first}; a smaller --batch, --crop or --size takes less, and so does --recompute 1"
    if rank_and_world()[1] > 1 and ("gloo" in text or isinstance(error, distributed.DistError)):
        return f"train.py: {first}; did another process end?"


def leave(status):
    if distributed.is_initialized() and status in (0, 130, 143):  # otherwise the others may be waiting
        distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # DDP leaves gloo threads, which may abort while Python ends: pytorch#179291
    sys.exit(status)
