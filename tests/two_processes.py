"""train.py with SGD in place of AdamW: what test_train.py starts with torchrun."""

import torch

import train

if __name__ == "__main__":
    torch.optim.AdamW = lambda groups, weight_decay: torch.optim.SGD(groups)
    train.main()
