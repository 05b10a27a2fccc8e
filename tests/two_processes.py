"""train.py for torchrun, in test_train.py: with SGD, or with a second process that dies in its sixth step (DIES=1)."""

import os
import signal
from itertools import count

import torch

import train

steps, loss = count(), train.recurrent_loss


def fragile_loss(*args):
    if os.environ["RANK"] == os.environ.get("DIES") and next(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args)


if __name__ == "__main__":
    train.recurrent_loss = fragile_loss
    if "DIES" not in os.environ:
        torch.optim.AdamW = lambda groups, weight_decay: torch.optim.SGD(groups)
    train.main()
