"""What every system costs, and what makes the network fast.

    python bench.py --table                     parameters, GFLOP, milliseconds and memory of one frame, for each system of baselines.py, and l = 0
    python bench.py --infer [--official PATH]   DRU(4), three passes: plain, as predict.py runs it, and what else there is to run it with
    python bench.py --train                     a training step of 8 photos: plain, as train.py runs it, recomputed; and its memory
    python bench.py --traffic                   bytes and launches that the fused kernels save
    python bench.py --grow growth.csv           time and memory against passes, image side and batch; figures.py draws the file

One frame of 230x306 pixels, as in the paper, and batch 1, unless it says otherwise. Times are medians over rounds that visit all
forms in shuffled order, so that whatever slows the machine slows them all; a ratio is the median of the ratios within rounds. The
plain form runs twice, as "plain" and "plain, again": by how much that ratio misses 1, no other can be trusted either.
"""

import argparse
import csv
import importlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from baselines import SYSTEMS, build
from fast import Recomputed, Replayed, keep_memory, on
from gates_triton import PASSES, FusedNorm, fuse
from predict import to_onnx
from rurnet import PlainUNet, RecurrentUNet
from scoring import autocast
from train import recurrent_loss

FRAME = 1, 3, 230, 306
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


ROWS = [*SYSTEMS, "sru(0)", "dru(0)"]


def load(name):
    name, deep = name.removesuffix("(0)"), {"level": 0} if name.endswith("(0)") else {}
    return on(DEVICE, build(name, 2, **deep).eval())


@torch.no_grad()
def milliseconds(net, image):
    return timed(lambda: net(image))


def timed(call):
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def where():
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


@torch.no_grad()
def peak_memory(name):
    """MB that one frame adds at its highest, weights included; run in a process of its own, since a peak never falls."""
    if DEVICE.type == "cuda":
        load(name)(torch.rand(FRAME, device=DEVICE))
        return torch.cuda.max_memory_allocated() / 2**20
    keep_memory()
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
    keep_memory()
    memory = {name: alone("--memory", name) for name in ROWS}
    image, nets, times = torch.rand(FRAME, device=DEVICE), {name: load(name) for name in ROWS}, {name: [] for name in ROWS}
    for k in range(rounds + 2):  # two to warm up
        for name in random.Random(k).sample(list(nets), len(nets)):
            times[name].append(milliseconds(nets[name], image))
    print(f"{where()}; one frame of {FRAME[2]}x{FRAME[3]}, {rounds} rounds\n")
    print(f"{'system':15}{'parameters':>12}{'GFLOP':>8}{'ms':>9}{'quartiles':>20}{'frames/s':>10}{'MB':>7}")
    for name, net in nets.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(image)
        low, ms, high = statistics.quantiles(times[name][2:], n=4)
        print(
            f"{name:15}{sum(p.numel() for p in net.parameters()):12,}{counter.get_total_flops() / 1e9:8.2f}{ms:9.1f}"
            f"{f'{low:.1f} to {high:.1f}':>20}{1000 / ms:10.1f}{memory[name]:7.0f}"
        )


# ---------------------------------------------------------------- what makes it fast


def compare(forms, rounds, warm=3):
    """Time the forms {name: call} in shuffled rounds; print a row each, with its ratio to the first."""
    times = {name: [] for name in forms}
    for call in forms.values():
        for _ in range(warm):
            call()
    began, used, faults = time.perf_counter(), time.process_time(), page_faults()
    for k in range(rounds):
        for name in random.Random(k).sample(list(forms), len(forms)):
            times[name].append(timed(forms[name]))
    cores = (time.process_time() - used) / (time.perf_counter() - began)
    print(f"{'':34}{'ms':>9}{'quartiles':>20}{'times faster':>14}  (median of the rounds' ratios)")
    plain = next(iter(times.values()))
    for name, ms in times.items():
        low, mid, high = statistics.quantiles(ms, n=4)
        ratio = statistics.median(a / b for a, b in zip(plain, ms))
        print(f"{name!s:34}{mid:9.1f}{f'{low:.1f} to {high:.1f}':>20}{ratio:14.2f}")
    print(f"{rounds} rounds, {cores:.2f} cores busy, {(page_faults() - faults) / rounds / len(forms):.0f} page faults a call\n")
    return {name: statistics.median(ms) for name, ms in times.items()}


def page_faults():
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def plain_dru():
    torch.manual_seed(0)
    return RecurrentUNet().to(DEVICE)


def half(call):
    def run():
        with autocast(DEVICE):
            return call()

    return run


def inference_forms(image, official):
    """{name: call} of DRU(4) with the same weights, and of the official models with their own."""
    plain = plain_dru().eval()
    forms = {"plain": lambda: plain(image), "plain, again": lambda: plain(image)}
    if DEVICE.type == "cuda":
        fused = fuse(plain_dru().eval())
        replayed, compiled = Replayed(fused), torch.compile(plain_dru().eval(), mode="reduce-overhead", dynamic=False)
        forms |= {"fused": lambda: fused(image), "fused, replayed": lambda: replayed(image)}
        forms |= {"torch.compile, reduce-overhead": lambda: [s.clone() for s in compiled(image)]}
        forms |= {f"{name}, bf16": half(call) for name, call in forms.items() if name in ("plain", "fused, replayed")}
    else:
        last = on(DEVICE, plain_dru().eval())
        forms["channels last"] = lambda: last(image)
        if shutil.which("g++") or shutil.which("clang++"):
            compiled = torch.compile(plain_dru().eval(), dynamic=False)  # or the second size is compiled for any, and slower
            forms["torch.compile"] = lambda: compiled(image)
        forms |= other_runtimes(plain, image)
    for name, net in official.items():
        forms[f"official {name}"] = lambda net=net: net(image)
    return forms


@cache
def say(text):
    """Once, and beside the tables."""
    print(text, file=sys.stderr)


class Last(torch.nn.Module):
    """The logits of the last pass alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        return self.net(image)[-1]


def other_runtimes(net, image):
    """ONNX Runtime and OpenVINO, where they are installed, on this very size."""
    forms, threads = {}, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "dru.onnx")
        try:
            import onnxruntime

            to_onnx(Last(net), image, path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it slows down whoever comes next
            session = onnxruntime.InferenceSession(path, options)
            forms["ONNX Runtime"] = lambda: [torch.from_numpy(s) for s in session.run(None, {"image": image.numpy()})]
        except ImportError:
            say("ONNX Runtime is not installed (pip install onnx onnxruntime)")
        try:
            import openvino

            run = openvino.compile_model(openvino.convert_model(Last(net), example_input=image), "CPU", {"INFERENCE_NUM_THREADS": threads})
            forms["OpenVINO"] = lambda: [torch.from_numpy(s) for s in run([image.numpy()]).values()]
        except ImportError:
            say("OpenVINO is not installed (pip install openvino)")
    return forms


def official_nets(path):
    """The models of a checkout of github.com/kcyu2014/recurrent-unet, imported from there, past packages that they do not need."""
    root = Path(path) / "ptsemseg"
    if not (root / "models/recurrent_unet.py").exists():
        raise ValueError(f"{path}: holds no ptsemseg/models/recurrent_unet.py; wanted a checkout of github.com/kcyu2014/recurrent-unet")
    for name, folder in ("ptsemseg", root), ("ptsemseg.models", root / "models"):  # in place of __init__.py, which imports everything
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(folder)]
    sys.modules.setdefault("IPython", types.ModuleType("IPython"))
    recurrent, dru = (importlib.import_module(f"ptsemseg.models.{name}") for name in ("recurrent_unet", "dru"))
    args = argparse.Namespace(device=DEVICE, initial=1, steps=3, hidden_size=32, gate=3, structure="ours", recurrent_level=-1,
                              unet_level=4, feature_scale=4)  # fmt: skip
    runet = recurrent.GeneralRecurrentUnet(args, n_classes=2).to(DEVICE).eval()
    plain = dru.dru(args, n_classes=2, hidden_size=128, feature_scale=4).to(DEVICE).eval()

    def run_dru(image):
        h = torch.ones(len(image), 128, *(n // 16 for n in image.shape[2:]), device=DEVICE)
        return plain(image, h, torch.ones(len(image), 2, *image.shape[2:], device=DEVICE))

    return {"runet": runet, "dru": run_dru}


def compare_all(cases, rounds, keep=True):
    """Compare the forms of every case {title: forms}; on a CPU with memory as the C library handles it, and then as predict.py keeps it."""
    medians = {}
    for kept in (False, True) if keep and DEVICE.type == "cpu" else (False,):
        if kept:
            keep_memory()  # which cannot be taken back
        state = "" if DEVICE.type == "cuda" else "; memory kept, as by predict.py" if kept else "; memory as the C library handles it"
        for title, forms in cases.items():
            print(f"{where()}; {title}{state}")
            medians[title] = *medians.get(title, ()), compare(forms, rounds)
    for title, found in medians.items() if keep and DEVICE.type == "cpu" else ():
        print(f"{title}: predict.py is {found[0]['plain'] / found[1]['channels last']:.2f} times faster than plain with memory as found")
    return medians


@torch.inference_mode()
def infer(rounds, official):
    official = official_nets(official) if official else {}
    cases, sizes = {}, [(1, 230, 306), (1, 240, 320)] + [(8, 240, 320)] * (DEVICE.type == "cuda")
    for batch, *size in sizes:
        torch.manual_seed(0)
        image = torch.rand(batch, 3, *size, device=DEVICE)
        title, forms = f"{batch} x {size[0]}x{size[1]}, three passes", inference_forms(image, official)
        cases[title] = forms
        want = forms["plain"]()[-1]
        for name, call in forms.items():
            if name in ("plain", "plain, again") or "official" in name:
                continue
            s = call()[-1].to(DEVICE)
            tie = want.topk(2, 1).values.diff(dim=1)[:, 0].abs() < 2e-4
            flipped = ((s.argmax(1) != want.argmax(1)) & ~tie).sum()
            print(f"{title}, {name}: logits differ by at most {(s - want).abs().max():.1e}; {flipped} pixels change class")
    print()
    medians = compare_all(cases, rounds)
    for title, (batch, *size) in zip(cases, sizes) if DEVICE.type == "cuda" else ():
        least = least_ms(batch, size)
        shares = ", ".join(f"{name} {least / ms:.0%}" for name, ms in medians[title][0].items())
        print(f"{title}: the fused form's bytes and operations alone need {least:.3f} ms in float32; of each form's time that is: {shares}")


def least_ms(batch, size):
    """What the fused forward pass must take on this GPU: its bytes at the speed of a copy, or its operations at that of a product."""
    forward = counted(True, batch, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        RecurrentUNet()(torch.rand(batch, 3, *size))
    x, m = torch.rand(2**28, device=DEVICE), torch.rand(8192, 8192, device=DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions may
    copy, product = (statistics.median(timed(f) for _ in range(9)) for f in (x.clone, lambda: m @ m))
    return max(forward.bytes / (2 * x.nbytes) * copy, counter.get_total_flops() / (2 * 8192**3) * product)


# ---------------------------------------------------------------- training

BATCH = 8, 3, 240, 320
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
    net, image, truth = TRAINING[form](), torch.rand(BATCH, device=DEVICE), torch.randint(2, (BATCH[0], *BATCH[2:]), device=DEVICE)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step():
        with autocast(DEVICE):
            masks = net(image, 3)
        loss = recurrent_loss([s.float() for s in masks], truth, 0.4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def training_memory(form):
    """MB that two steps add at their highest."""
    if DEVICE.type == "cuda":
        step = training_step(form)
        step(), step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = high_water()
    step = training_step(form)
    step(), step()
    return high_water() - before


def train_steps(rounds):
    most = {form: alone("--training-memory", form) for form in TRAINING if form != "plain, again"}
    title = f"a training step of {BATCH[0]} photos of {BATCH[2]}x{BATCH[3]}"
    compare_all({title: {form: training_step(form) for form in TRAINING}}, rounds, keep=False)
    for form, megabytes in most.items():
        print(f"{form}: {megabytes:.0f} MB at most, {megabytes / most['plain']:.0%} of plain")


# ---------------------------------------------------------------- what the fused kernels save


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
            if func is torch.ops.aten.native_group_norm.default:  # the sums, what follows from them, the result: x is read twice
                self.add(args[0].nbytes, 2)
        return out

    def add(self, nbytes, launches):
        self.bytes, self.launches = self.bytes + nbytes, self.launches + launches

    def as_one(self, f, passes, launches):
        """f, counted as a fused kernel that makes so many memory passes over what it returns."""

        def run(*args):
            self.counting = False
            out = f(*args)
            self.counting = True
            self.add(passes * out.nbytes, launches)
            return out

        return run


@torch.inference_mode(False)  # which would hide the norm's operator within a larger one
@torch.no_grad()
def counted(fused, batch, size):
    """The traffic of DRU(4)'s three passes. Counted on a CPU, where the operators are the same."""
    net, counter = RecurrentUNet(), Traffic()
    for module in fuse(net).modules() if fused else ():
        if isinstance(module, FusedNorm):
            module.forward = counter.as_one(module.forward, PASSES["norm", "forward"][0], 2)
        if hasattr(module, "update"):
            module.update = counter.as_one(module.update, PASSES["update", "forward"][0], 1)
            module.reset = counter.as_one(module.reset, PASSES["reset", "forward"][0], 1)
    with counter:
        net(torch.rand(batch, 3, *size))
    return counter


def traffic():
    print(f"{'DRU(4), three passes':24}{'form':8}{'MB':>8}{'of plain':>10}{'launches':>10}{'of plain':>10}")
    for batch, *size in (1, 230, 306), (8, 240, 320):
        plain, fused = (counted(form, batch, size) for form in (False, True))
        for form, c in ("plain", plain), ("fused", fused):
            title = f"{batch} x {size[0]}x{size[1]}"
            print(f"{title:24}{form:8}{c.bytes / 1e6:8.0f}{c.bytes / plain.bytes:10.0%}{c.launches:10}{c.launches / plain.launches:10.0%}")


# ---------------------------------------------------------------- how it grows

GROW = {"passes": (1, 2, 3, 4, 6, 8), "side": (128, 192, 256, 384, 512, 768, 1024), "batch": (1, 2, 4, 8, 16, 32)}


@torch.inference_mode()
def call_of(passes, side, batch):
    """A call as predict.py makes it on a CPU."""
    net, image = on(DEVICE, plain_dru().eval()), torch.rand(batch, 3, side, side, device=DEVICE)
    return torch.inference_mode()(lambda: net(image, passes))


def point_memory(*at):
    """MB that a few calls add at their highest."""
    keep_memory()
    before = high_water()
    call = call_of(*at)
    call(), call()
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else high_water() - before


def grow(path, rounds):
    """One axis at a time, from 3 passes over one photo of 256x256. Times in shuffled rounds, memory in processes of their own."""
    axes = [(axis, value, {"passes": 3, "side": 256, "batch": 1} | {axis: value}) for axis, values in GROW.items() for value in values]
    points = {tuple(at.values()) for _, _, at in axes}
    memory = {at: alone("--point", *map(str, at)) for at in points}
    keep_memory()
    times = compare({at: call_of(*at) for at in sorted(points)}, rounds, warm=1)
    rows = [[axis, value, f"{times[tuple(at.values())]:.1f}", f"{memory[tuple(at.values())]:.0f}", where()] for axis, value, at in axes]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["axis", "value", "ms", "MB", "where"], *rows])


def alone(*flags):
    """The number that this script prints with these flags, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(flags)}: {(done.stderr.strip().splitlines() or ['was killed; is memory short?'])[-1]}")
    return float(done.stdout)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = cli.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", action="store_true", help="what every system costs")
    what.add_argument("--infer", action="store_true", help="ways to run DRU(4)")
    what.add_argument("--train", action="store_true", help="ways to train DRU(4)")
    what.add_argument("--traffic", action="store_true", help="what the fused kernels save")
    what.add_argument("--grow", type=Path, metavar="CSV", help="how time and memory grow")
    what.add_argument("--memory", choices=ROWS, help=argparse.SUPPRESS)  # this and the next two are for processes of their own
    what.add_argument("--training-memory", choices=list(TRAINING), help=argparse.SUPPRESS)
    what.add_argument("--point", type=int, nargs=3, help=argparse.SUPPRESS)
    cli.add_argument("--official", metavar="PATH", help="a checkout of the official code, to be timed by --infer")
    cli.add_argument("--rounds", type=int, default=9, help="timed calls of each form, at least 2")
    args = cli.parse_args()
    if args.official and not args.infer:
        cli.error("--official: is timed by --infer alone; say both")
    if args.rounds < 2:
        cli.error(f"--rounds {args.rounds}: wanted at least 2")
    try:
        if args.memory:
            print(peak_memory(args.memory))
        elif args.training_memory:
            print(training_memory(args.training_memory))
        elif args.point:
            print(point_memory(*args.point))
        elif args.table:
            table(args.rounds)
        elif args.infer:
            infer(args.rounds, args.official)
        elif args.train:
            train_steps(args.rounds)
        elif args.traffic:
            traffic()
        else:
            grow(args.grow, args.rounds)
    except (ValueError, OSError) as error:  # OSError: a table that may not be written
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
