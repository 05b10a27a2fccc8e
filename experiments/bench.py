"""What every system costs, and what makes the network fast.

    python -m experiments.bench --table       parameters, GFLOP, time and memory of one frame, for every system
    python -m experiments.bench --infer       DRU(4), three passes: plain, as predict.py runs it, other runtimes
    python -m experiments.bench --train       a training step of 8 photos: plain, as train.py runs it, recomputed
    python -m experiments.bench --traffic     bytes and launches that the fused kernels save, counted
    python -m experiments.bench --kernels     time and bandwidth of every kernel; needs a GPU and triton
    python -m experiments.bench --grow CSV    time and memory against passes, image side and batch

A frame has 230x306 pixels, as in the paper. Times are medians over rounds. A round runs every form once, in
shuffled order, so whatever slows the machine slows all forms. A ratio is the median of the ratios within rounds.
The plain form runs twice, as "plain" and "plain, again": how far their ratio is from 1 is the measurement error.
"""

import argparse
import csv
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import onnxruntime
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments.kernels import print_kernels
from gates_triton import TRANSFERS, FusedNorm, fuse
from paper.baselines import SYSTEMS, build
from rurnet import PlainUNet, RecurrentUNet, recurrent_loss
from support.export import to_onnx
from support.runtime import Recomputed, Replayed, autocast, for_device, keep_memory

ROOT = Path(__file__).parent.parent
FRAME = 1, 3, 230, 306
BATCH = 8, 3, 240, 320
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---------------------------------------------------------------- measuring


def describe_machine():
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


def timed(call):
    """Milliseconds of one call."""
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def shuffled_rounds(names, rounds):
    for k in range(rounds):
        yield from random.Random(k).sample(names, len(names))


def compare(forms, rounds, warm=3):
    """Time the forms {name: call} in shuffled rounds; print a row for each, with its ratio to the first."""
    times = {name: [] for name in forms}
    for call in forms.values():
        for _ in range(warm):
            call()
    began, used, faults = time.perf_counter(), time.process_time(), page_faults()
    for name in shuffled_rounds(list(forms), rounds):
        times[name].append(timed(forms[name]))
    cores = (time.process_time() - used) / (time.perf_counter() - began)
    print(f"{'':34}{'ms':>9}{'quartiles':>20}{'times faster':>14}  (median of the rounds' ratios)")
    plain = next(iter(times.values()))
    for name, ms in times.items():
        low, mid, high = statistics.quantiles(ms, n=4)
        ratio = statistics.median(a / b for a, b in zip(plain, ms))
        print(f"{name!s:34}{mid:9.1f}{f'{low:.1f} to {high:.1f}':>20}{ratio:14.2f}")
    faults = (page_faults() - faults) / rounds / len(forms)
    print(f"{rounds} rounds, {cores:.2f} cores busy, {faults:.0f} page faults a call\n")
    return {name: statistics.median(ms) for name, ms in times.items()}


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else float("nan")


def highest_memory():
    """The most memory that this process has had, in MB; on a GPU, the most of the GPU's."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage would count the parent's peak as well
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else float("nan")


def memory_of(kind, *at):
    """MB that two calls of a kind add at most, in a process of its own: its peak never falls."""
    if kind != "training":
        keep_memory()
    before = highest_memory()
    call = CALLS[kind](*at)
    call(), call()
    return highest_memory() - before


def alone(*words):
    """`memory_of(*words)` of a new process."""
    command = [sys.executable, "-m", "experiments.bench", "--memory", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{words}: {(done.stderr.strip().splitlines() or ['was killed; is memory short?'])[-1]}")
    return float(done.stdout)


# ---------------------------------------------------------------- --table

ROWS = [*SYSTEMS, "sru(0)", "dru(0)"]


def system_on_frame(name):
    """A system of paper.baselines, and a call of it on one frame."""
    options = {"level": 0} if name.endswith("(0)") else {}
    net = for_device(build(name.removesuffix("(0)"), 2, **options).eval(), DEVICE)
    image = torch.rand(FRAME, device=DEVICE)
    return net, torch.no_grad()(lambda: net(image))


def print_systems(rounds):
    keep_memory()
    memory = {name: alone("system", name) for name in ROWS}
    systems, times = {name: system_on_frame(name) for name in ROWS}, {name: [] for name in ROWS}
    for name in shuffled_rounds(ROWS, rounds + 2):
        times[name].append(timed(systems[name][1]))
    print(f"{describe_machine()}; one frame of {FRAME[2]}x{FRAME[3]}, {rounds} rounds\n")
    print(f"{'system':15}{'parameters':>12}{'GFLOP':>8}{'ms':>9}{'quartiles':>20}{'frames/s':>10}{'MB':>7}")
    for name, (net, call) in systems.items():
        with FlopCounterMode(display=False) as counter:
            call()
        low, ms, high = statistics.quantiles(times[name][2:], n=4)  # the first two warm up
        size = sum(p.numel() for p in net.parameters())
        row = f"{name:15}{size:12,}{counter.get_total_flops() / 1e9:8.2f}{ms:9.1f}{f'{low:.1f} to {high:.1f}':>20}"
        print(row + f"{1000 / ms:10.1f}{memory[name]:7.0f}")


# ---------------------------------------------------------------- --infer


def plain_dru():
    torch.manual_seed(0)
    return RecurrentUNet().to(DEVICE)


def inference_forms(image):
    """{name: call} of DRU(4) with the same weights."""
    plain = plain_dru().eval()
    forms = {"plain": lambda: plain(image), "plain, again": lambda: plain(image)}
    if DEVICE.type == "cuda":
        fused = fuse(plain_dru().eval())
        replayed = Replayed(fused)
        compiled = torch.compile(plain_dru().eval(), mode="reduce-overhead", dynamic=False)
        forms |= {"fused": lambda: fused(image), "fused, replayed": lambda: replayed(image)}
        forms["torch.compile, reduce-overhead"] = lambda: [s.clone() for s in compiled(image)]
        half = torch.autocast("cuda", torch.bfloat16)
        return forms | {f"{name}, bf16": half(forms[name]) for name in ("plain", "fused, replayed")}
    last = for_device(plain_dru().eval(), DEVICE)
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


def compare_cases(cases, rounds, keep=True):
    """Compare the forms of every case {title: forms}; on a CPU once more with memory as predict.py keeps it."""
    medians, twice = {}, keep and DEVICE.type == "cpu"
    for kept in (False, True) if twice else (False,):
        if kept:
            keep_memory()  # the process cannot undo this
        state = "; memory kept, as by predict.py" if kept else "; memory as the C library handles it"
        for title, forms in cases.items():
            print(f"{describe_machine()}; {title}{state * (DEVICE.type == 'cpu')}")
            medians[title] = *medians.get(title, ()), compare(forms, rounds)
    for title, (found, kept) in medians.items() if twice else ():
        ratio = found["plain"] / kept["channels last"]
        print(f"{title}: predict.py is {ratio:.2f} times faster than plain with memory as found")
    return medians


@torch.inference_mode()
def compare_inference(rounds):
    cases, sizes = {}, [(1, 230, 306), (1, 240, 320)] + [(8, 240, 320)] * (DEVICE.type == "cuda")
    for batch, *size in sizes:
        torch.manual_seed(0)
        image = torch.rand(batch, 3, *size, device=DEVICE)
        title, forms = f"{batch} x {size[0]}x{size[1]}, three passes", inference_forms(image)
        cases[title] = forms
        want = forms["plain"]()[-1]
        tie = want.topk(2, 1).values.diff(dim=1)[:, 0].abs() < 2e-4
        for name in list(forms)[2:]:
            s = forms[name]()[-1].to(DEVICE)
            off, flipped = (s - want).abs().max(), ((s.argmax(1) != want.argmax(1)) & ~tie).sum()
            print(f"{title}, {name}: logits differ by at most {off:.1e}; {flipped} pixels change class")
    print()
    medians = compare_cases(cases, rounds)
    for (title, (times,)), size in zip(medians.items(), sizes) if DEVICE.type == "cuda" else ():
        least = least_milliseconds(*size)
        shares = ", ".join(f"{name} {least / ms:.0%}" for name, ms in times.items())
        print(f"{title}: the fused form needs {least:.3f} ms at least in float32. Share of each form's time: {shares}")


def least_milliseconds(batch, *size):
    """What the fused form's bytes take at the speed of a copy, or its operations at that of a matrix product."""
    forward = count_traffic(True, batch, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        RecurrentUNet()(torch.rand(batch, 3, *size))
    x, m = torch.rand(2**28, device=DEVICE), torch.rand(8192, 8192, device=DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions may
    copy, product = (statistics.median(timed(f) for _ in range(9)) for f in (x.clone, lambda: m @ m))
    return max(forward.bytes / (2 * x.nbytes) * copy, counter.get_total_flops() / (2 * 8192**3) * product)


# ---------------------------------------------------------------- --train

TRAINING = {  # form: the network as it is trained
    "plain": lambda: plain_dru(),
    "plain, again": lambda: plain_dru(),
    "channels last": lambda: plain_dru().to(memory_format=torch.channels_last),
    "channels last, recomputed": lambda: Recomputed(plain_dru().to(memory_format=torch.channels_last)),
    "U-Net-G, channels last": lambda: PlainUNet().to(DEVICE, memory_format=torch.channels_last),
}
if DEVICE.type == "cuda":
    TRAINING["fused"] = lambda: fuse(plain_dru())
    TRAINING["fused, recomputed"] = lambda: Recomputed(fuse(plain_dru()))


def training_step(form):
    torch.manual_seed(0)
    net, image = TRAINING[form](), torch.rand(BATCH, device=DEVICE)
    truth = torch.randint(2, (BATCH[0], *BATCH[2:]), device=DEVICE)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step():
        with autocast(DEVICE):
            loss = recurrent_loss(net(image, 3), truth, 0.4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def compare_training(rounds):
    most = {form: alone("training", form) for form in TRAINING if form != "plain, again"}
    title = f"a training step of {BATCH[0]} photos of {BATCH[2]}x{BATCH[3]}"
    compare_cases({title: {form: training_step(form) for form in TRAINING}}, rounds, keep=False)
    for form, megabytes in most.items():
        print(f"{form}: {megabytes:.0f} MB at most, {megabytes / most['plain']:.0%} of plain")


# ---------------------------------------------------------------- --traffic


class Traffic(TorchDispatchMode):
    """Bytes that the operators of a forward pass read and write, and the kernels that a GPU launches for them."""

    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0
        self.counting = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.counting and not func.is_view:
            self.add(sum(x.nbytes for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)), 1)
            if func is torch.ops.aten.native_group_norm.default:
                self.add(args[0].nbytes, 2)  # sums, mean and deviation, result: three kernels, two of which read x
        return out

    def add(self, nbytes, launches):
        self.bytes, self.launches = self.bytes + nbytes, self.launches + launches

    def as_one(self, f, passes, launches):
        """f, counted as a fused kernel that makes so many transfers over what it returns."""

        def run(*args):
            self.counting = False
            out = f(*args)
            self.counting = True
            self.add(passes * out.nbytes, launches)
            return out

        return run


@torch.inference_mode(False)  # inside it the norm's operator would be hidden in a larger one
@torch.no_grad()
def count_traffic(fused, batch, size):
    """The traffic of DRU(4)'s three passes. A CPU counts it, where the operators are the same."""
    net, counter = RecurrentUNet(), Traffic()
    for module in fuse(net).modules() if fused else ():
        if isinstance(module, FusedNorm):
            module.forward = counter.as_one(module.forward, TRANSFERS["norm", "forward"][0], 2)
        if hasattr(module, "update"):
            module.update = counter.as_one(module.update, TRANSFERS["update", "forward"][0], 1)
            module.reset = counter.as_one(module.reset, TRANSFERS["reset", "forward"][0], 1)
    with counter:
        net(torch.rand(batch, 3, *size))
    return counter


def print_traffic():
    print(f"{'DRU(4), three passes':24}{'form':8}{'MB':>8}{'of plain':>10}{'launches':>10}{'of plain':>10}")
    for batch, *size in (1, 230, 306), (8, 240, 320):
        plain, fused = (count_traffic(form, batch, size) for form in (False, True))
        for form, c in ("plain", plain), ("fused", fused):
            row = f"{f'{batch} x {size[0]}x{size[1]}':24}{form:8}{c.bytes / 1e6:8.0f}{c.bytes / plain.bytes:10.0%}"
            print(row + f"{c.launches:10}{c.launches / plain.launches:10.0%}")


# ---------------------------------------------------------------- --grow

GROW = {"passes": (1, 2, 3, 4, 6, 8), "side": (128, 192, 256, 384, 512, 768, 1024), "batch": (1, 2, 4, 8, 16, 32)}


def call_of(passes, side, batch):
    """A call as predict.py makes it on a CPU."""
    net, image = for_device(plain_dru().eval(), DEVICE), torch.rand(batch, 3, side, side, device=DEVICE)
    return torch.inference_mode()(lambda: net(image, passes))


CALLS = {  # kind: what memory_of calls
    "system": lambda name: system_on_frame(name)[1],
    "training": training_step,
    "growth": lambda *at: call_of(*map(int, at)),
}


def measure_growth(path, rounds):
    """One axis at a time, from 3 passes over one photo of 256x256."""
    middle = {"passes": 3, "side": 256, "batch": 1}
    axes = [(axis, value, tuple((middle | {axis: value}).values())) for axis in GROW for value in GROW[axis]]
    points = sorted({at for *_, at in axes})
    memory = {at: alone("growth", *at) for at in points}
    keep_memory()
    times = compare({at: call_of(*at) for at in points}, rounds, warm=1)
    where = describe_machine()
    rows = [[axis, value, f"{times[at]:.1f}", f"{memory[at]:.0f}", where] for axis, value, at in axes]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["axis", "value", "ms", "MB", "where"], *rows])


# ---------------------------------------------------------------- the command line

JOBS = {
    "table": ("what every system costs", lambda c: print_systems(c.rounds)),
    "infer": ("ways to run DRU(4)", lambda c: compare_inference(c.rounds)),
    "train": ("ways to train DRU(4)", lambda c: compare_training(c.rounds)),
    "traffic": ("what the fused kernels save", lambda c: print_traffic()),
    "kernels": ("what every kernel takes on a GPU", lambda c: print_kernels(describe_machine())),
    "grow": ("how time and memory grow", lambda c: measure_growth(c.grow, c.rounds)),
    "memory": (argparse.SUPPRESS, lambda c: print(memory_of(*c.memory))),  # `alone` passes it
}
TAKES = {"grow": {"type": Path, "metavar": "CSV"}, "memory": {"nargs": "+"}}


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = cli.add_mutually_exclusive_group(required=True)
    for name, (help, _) in JOBS.items():
        what.add_argument(f"--{name}", help=help, **TAKES.get(name, {"action": "store_true"}))
    cli.add_argument("--rounds", type=int, default=9, help="timed calls of each form, at least 2")
    c = cli.parse_args()
    if c.rounds < 2:
        cli.error(f"--rounds {c.rounds}: must be at least 2")
    try:
        next(job for name, (_, job) in JOBS.items() if getattr(c, name))(c)
    except (ValueError, OSError) as error:  # OSError: a table that may not be written
        sys.exit(f"experiments.bench: {error}")


if __name__ == "__main__":
    main()
