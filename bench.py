"""What every system costs.

    python bench.py --table     parameters, GFLOP, milliseconds and memory of one frame, for each system of baselines.py

One frame of 230x306 pixels, as in the paper, batch 1, three passes where a system has passes. The times are medians over
rounds that visit all systems in shuffled order, so that whatever slows the machine slows them all.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from baselines import SYSTEMS, build
from gates_triton import fuse

FRAME = 1, 3, 230, 306
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name):
    net = build(name, 2).eval().to(DEVICE)
    return fuse(net) if DEVICE.type == "cuda" else net


@torch.no_grad()
def milliseconds(net, image):
    began = time.perf_counter()
    net(image)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


@torch.no_grad()
def peak_memory(name):
    """MB that one frame adds at its highest, weights included; run in a process of its own, since a peak never falls."""
    if DEVICE.type == "cuda":
        load(name)(torch.rand(FRAME, device=DEVICE))
        return torch.cuda.max_memory_allocated() / 2**20
    before = high_water()
    load(name)(torch.rand(FRAME))
    return high_water() - before


def high_water():
    """The most memory that this process has had, in MB."""
    if Path("/proc/self/status").exists():  # Linux; getrusage there would count the parent's peak as well
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(rounds):
    run = [sys.executable, __file__, "--memory"]
    memory = {name: float(subprocess.run([*run, name], capture_output=True, text=True, check=True).stdout) for name in SYSTEMS}
    image, nets, times = torch.rand(FRAME, device=DEVICE), {name: load(name) for name in SYSTEMS}, {name: [] for name in SYSTEMS}
    for k in range(rounds + 2):  # two to warm up
        for name in random.Random(k).sample(list(nets), len(nets)):
            times[name].append(milliseconds(nets[name], image))
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; one frame of {FRAME[2]}x{FRAME[3]}, {rounds} rounds\n")
    print(f"{'system':15}{'parameters':>12}{'GFLOP':>8}{'ms':>9}{'quartiles':>20}{'frames/s':>10}{'MB':>7}")
    for name, net in nets.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(image)
        low, ms, high = statistics.quantiles(times[name][2:], n=4)
        print(
            f"{name:15}{sum(p.numel() for p in net.parameters()):12,}{counter.get_total_flops() / 1e9:8.2f}{ms:9.1f}"
            f"{f'{low:.1f} to {high:.1f}':>20}{1000 / ms:10.1f}{memory[name]:7.0f}"
        )


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--table", action="store_true", help="what every system costs")
    cli.add_argument("--rounds", type=int, default=9, help="timed frames of each system")
    cli.add_argument("--memory", choices=list(SYSTEMS), help="the peak memory of one system alone, in MB")
    args = cli.parse_args()
    if args.memory:
        print(peak_memory(args.memory))
    elif args.table:
        table(args.rounds)
    else:
        cli.error("say what to measure: --table")


if __name__ == "__main__":
    main()
