"""What every system costs, and what makes the network fast.

    python -m experiments.bench --table       parameters, GFLOP, time and memory of one frame, for every system
    python -m experiments.bench --infer       DRU(4), three passes: plain, as predict.py runs it, other runtimes
    python -m experiments.bench --train       a training step of 8 photos: all passes, and the last alone
    python -m experiments.bench --traffic     bytes and launches that the fused kernels save, counted
    python -m experiments.bench --gpu OUT     all that a GPU is needed for, in 9 minutes; gpu.py has the steps
    python -m experiments.bench --gpu-train OUT

A frame has 230x306 pixels, as in the paper. Times are medians over rounds. A round runs every form once, in
shuffled order, so whatever slows the machine slows all forms. A ratio is the median of the ratios within rounds.
The plain form runs twice, as "plain" and "plain, again": how far their ratio is from 1 is the measurement error.
"""

import argparse
import multiprocessing
import re
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import gates_triton
from experiments.gpu import shuffled_rounds, spend_gpu_hour, times_faster, training_step
from paper.baselines import SYSTEMS, build
from rurnet import LastPass, PlainUNet, RecurrentUNet
from support.export import to_onnx
from support.runtime import for_device, keep_memory

FRAME = 1, 3, 230, 306
BATCH = 8, 3, 240, 320


def describe_machine():
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def timed(call):
    """Milliseconds of one call."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def time_rounds(forms, rounds, warm):
    """{form: milliseconds of every round}."""
    times = {name: [] for name in forms}
    for name in [*list(forms) * warm, *shuffled_rounds(list(forms), rounds)]:
        times[name].append(timed(forms[name]))
    return {name: ms[warm:] for name, ms in times.items()}


def quartiles(ms):
    low, mid, high = statistics.quantiles(ms, n=4)
    return f"{mid:9.1f}{f'{low:.1f} to {high:.1f}':>20}"


def compare(title, forms, rounds, warm=3):
    """Print a row for each form, with its ratio to plain, and return the medians."""
    times = time_rounds(forms, rounds, warm)
    print(f"{describe_machine()}; {title}\n{'':34}{'ms':>9}{'quartiles':>20}{'times faster':>14}"
          "  (median of the rounds' ratios)")  # fmt: skip
    for name, ms in times.items():
        print(f"{name:34}{quartiles(ms)}{times_faster(times['plain'], ms):14.2f}")
    print(f"{rounds} rounds\n")
    return {name: statistics.median(ms) for name, ms in times.items()}


def highest_memory():
    """The most memory that this process has had, in MB; Linux alone tells."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10 if status.exists() else float("nan")


def memory_of(kind, name):
    """MB that two calls of a kind add at most, in a process of its own: its peak never falls."""
    if kind == "system":
        keep_memory()
    before = highest_memory()
    call = system_on_frame(name)[1] if kind == "system" else step_of(name)
    call(), call()
    return highest_memory() - before


def alone(kind, name):
    """`memory_of(kind, name)` of a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_of, kind, name).result()


# ---------------------------------------------------------------- --table
ROWS = [*SYSTEMS, "sru(0)", "dru(0)"]


def system_on_frame(name):
    """A system of paper.baselines, and a call of it on one frame."""
    options = {"level": 0} if name.endswith("(0)") else {}
    net = for_device(build(name.removesuffix("(0)"), 2, **options).eval(), torch.device("cpu"))
    image = torch.rand(FRAME)
    return net, torch.no_grad()(lambda: net(image))


def print_systems(rounds):
    keep_memory()
    memory = {name: alone("system", name) for name in ROWS}
    systems = {name: system_on_frame(name) for name in ROWS}
    times = time_rounds({name: call for name, (_, call) in systems.items()}, rounds, warm=2)
    print(f"{describe_machine()}; one frame of {FRAME[2]}x{FRAME[3]}, {rounds} rounds\n")
    print(f"{'system':15}{'parameters':>12}{'GFLOP':>8}{'ms':>9}{'quartiles':>20}{'frames/s':>10}{'MB':>7}")
    for name, (net, call) in systems.items():
        with FlopCounterMode(display=False) as counter:
            call()
        size, gflop = sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 1e9
        print(f"{name:15}{size:12,}{gflop:8.2f}{quartiles(times[name])}"
              f"{1000 / statistics.median(times[name]):10.1f}{memory[name]:7.0f}")  # fmt: skip


# ---------------------------------------------------------------- --infer
def plain_dru():
    torch.manual_seed(0)
    return RecurrentUNet()


def inference_forms(image):
    """{name: call} of DRU(4) with the same weights."""
    plain = plain_dru().eval()
    forms = {"plain": lambda: plain(image), "plain, again": lambda: plain(image)}
    last = for_device(plain_dru().eval(), torch.device("cpu"))
    forms["channels last"] = lambda: last(image)
    if shutil.which("g++") or shutil.which("clang++"):
        compiled = torch.compile(plain_dru().eval(), dynamic=False)  # or the second size is compiled for any size
        forms["torch.compile"] = lambda: compiled(image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dru.onnx"
        to_onnx(plain, image, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it slows down the next form
        session = onnxruntime.InferenceSession(path, options)
    forms["ONNX Runtime"] = lambda: [torch.from_numpy(s) for s in session.run(None, {"image": image.numpy()})]
    return forms


@torch.inference_mode()
def compare_inference(rounds):
    cases = {}
    for size in (230, 306), (240, 320):
        torch.manual_seed(0)
        title = f"1 x {size[0]}x{size[1]}, three passes"
        forms = cases[title] = inference_forms(torch.rand(1, 3, *size))
        want = forms["plain"]()[-1]
        tie = want.topk(2, 1).values.diff(dim=1)[:, 0].abs() < 2e-4
        for name in list(forms)[2:]:
            s = forms[name]()[-1]
            off, flipped = (s - want).abs().max(), ((s.argmax(1) != want.argmax(1)) & ~tie).sum()
            print(f"{title}, {name}: logits differ by at most {off:.1e}; {flipped} pixels change class")
    print()
    states = ("memory as the C library handles it", lambda: None), ("memory kept, as by predict.py", keep_memory)
    medians = []
    for state, begin in states:
        begin()  # the process cannot undo it
        medians.append({title: compare(f"{title}; {state}", forms, rounds) for title, forms in cases.items()})
    for title in cases:
        ratio = medians[0][title]["plain"] / medians[1][title]["channels last"]
        print(f"{title}: predict.py is {ratio:.2f} times faster than plain with memory as found")


# ---------------------------------------------------------------- --train
TRAINING = {  # form: the network as it is trained
    "plain": plain_dru,
    "plain, again": plain_dru,
    "channels last": lambda: plain_dru().to(memory_format=torch.channels_last),
    "channels last, pass 3 alone": lambda: LastPass(plain_dru().to(memory_format=torch.channels_last)),
    "U-Net-G, channels last": lambda: PlainUNet().to(memory_format=torch.channels_last),
}


def step_of(form):
    torch.manual_seed(0)
    return training_step(TRAINING[form](), BATCH, "cpu")


def compare_training(rounds):
    most = {form: alone("training", form) for form in TRAINING if form != "plain, again"}
    title = f"a training step of {BATCH[0]} photos of {BATCH[2]}x{BATCH[3]}; memory as the C library handles it"
    compare(title, {form: step_of(form) for form in TRAINING}, rounds)
    for form, megabytes in most.items():
        print(f"{form}: {megabytes:.0f} MB at most, {megabytes / most['plain']:.0%} of plain")


# ---------------------------------------------------------------- --traffic
class Traffic(TorchDispatchMode):
    """Bytes that a forward pass reads and writes, those of norms and ReLUs, and the kernels a GPU launches for it."""

    bytes = norms = launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            again = [args[0]] if func is torch.ops.aten.native_group_norm.default else []
            self.launch(func, None, *tree_leaves((args, out)), *again)  # three kernels; sums and result both read x
            self.launches += 2 * len(again)
        return out

    def launch(self, kernel, grid, *args, **constants):
        """In place of gates_triton's launcher: counts what it would launch."""
        nbytes = sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
        self.bytes += nbytes
        self.norms += nbytes * bool(re.search("norm|group|relu", getattr(kernel, "__name__", str(kernel))))
        self.launches += nbytes > 0


@torch.inference_mode(False)  # inside it the norm's operator would be hidden in a larger one
@torch.no_grad()
def count_traffic(fused, batch, size):
    """The traffic of DRU(4)'s three passes. A CPU counts it, where operators and tensors are the same."""
    if gates_triton.triton is None:
        raise ValueError("--traffic needs triton, by which the kernels plan their launches")
    net, image, counter = RecurrentUNet(), torch.rand(batch, 3, *size), Traffic()
    if fused:
        gates_triton.fuse(net)
    with mock.patch.multiple(gates_triton, _runs_triton=lambda x: True, _launch_grid=counter.launch), counter:
        net(image)
    return counter


def print_traffic(_):
    print("DRU(4), 3 passes  form          MB  of plain  norm, ReLU  launches  of plain")
    plain, fused = (count_traffic(form, 1, (230, 306)) for form in (False, True))
    for form, c in ("plain", plain), ("fused", fused):
        row = f"{'1 x 230x306':18}{form:8}{c.bytes / 1e6:8.0f}{c.bytes / plain.bytes:10.0%}"
        print(row + f"{c.norms / c.bytes:12.0%}{c.launches:10}{c.launches / plain.launches:10.0%}")


JOBS = {"table": print_systems, "infer": compare_inference, "train": compare_training, "traffic": print_traffic}


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = cli.add_mutually_exclusive_group(required=True)
    for name, job in JOBS.items():
        what.add_argument(f"--{name}", dest="job", action="store_const", const=job)
    for name in "--gpu", "--gpu-train":
        what.add_argument(name, type=Path, metavar="OUT")
    cli.add_argument("--rounds", type=int, default=9, help="timed calls of each form, at least 2")
    c = cli.parse_args()
    if c.rounds < 2:
        cli.error(f"--rounds {c.rounds}: must be at least 2")
    try:
        c.job(c.rounds) if c.job else spend_gpu_hour(c.gpu or c.gpu_train, training=c.gpu is None)
    except (ValueError, OSError, BrokenProcessPool) as error:  # the last: a process was killed, so memory is short
        sys.exit(f"experiments.bench: {error}")


if __name__ == "__main__":
    main()
