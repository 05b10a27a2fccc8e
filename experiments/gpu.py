"""Everything that needs a GPU: `python -m experiments.bench --gpu OUT` and `--gpu-train OUT`, 9 minutes each at most.

Each step is a process with a time limit, which writes a file into OUT. Times are of CUDA events over shuffled rounds,
after half a second of warm-up. A ratio is the median of the ratios within rounds.
"""

import contextlib
import functools
import itertools
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import cuda
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gates_triton import TRANSFERS, FusedNorm, fuse, fused_reset, fused_update
from rurnet import LastPass, RecurrentUNet, gated_reset, gated_update, recurrent_loss
from support.runtime import Graphed, Replayed

ROOT = Path(__file__).parent.parent
DEVICE, WARM, ROUNDS = torch.device("cuda"), 0.5, 101
SIZES = (1, 3, 230, 306), (8, 3, 240, 320)
MEGABYTES, MEGABYTE = (1, 4, 16, 64, 256, 512), 2**20
BOTH = torch.float32, torch.bfloat16


def shuffled_rounds(names, rounds):
    for k in range(rounds):
        yield from random.Random(k).sample(names, len(names))


def times_faster(plain, ms):
    """Than plain: the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(plain, ms))


def event():
    recorded = cuda.Event(enable_timing=True)
    recorded.record()
    return recorded


def time_forms(forms):
    """{form: milliseconds of every round}."""
    for call in forms.values():
        began = time.perf_counter()
        while time.perf_counter() - began < WARM:
            call()
            cuda.synchronize()
    spans = {name: [] for name in forms}
    for name in shuffled_rounds(list(forms), ROUNDS):
        start = event()
        forms[name]()
        spans[name].append((start, event()))
    cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in spans.items()}


def print_forms(title, forms):
    """A row for each form: time, how many times as fast as plain, and the memory that a call adds."""
    memory = {}
    for name, call in forms.items():
        call(), call(), call()  # compiled and recorded
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        memory[name] = (cuda.max_memory_allocated() - before) / 2**20
    times = time_forms(forms)
    for name, ms in times.items():
        ratio = times_faster(times["plain"], ms)
        low, mid, high = statistics.quantiles(ms, n=4)
        print(f"{title:44}{name:26}{mid:9.3f} ms ({low:.3f} to {high:.3f}){ratio:8.3f}x{memory[name]:9.1f} MB")


def autocast_to(dtype):
    return torch.autocast("cuda", dtype) if dtype != torch.float32 else contextlib.nullcontext()


def training_step(net, size, device, dtype=torch.float32):
    image, truth = torch.rand(size, device=device), torch.randint(2, (size[0], *size[2:]), device=device)
    optimiser = torch.optim.AdamW(net.parameters())

    def step():
        with autocast_to(dtype):
            loss = recurrent_loss(net(image, 3), truth, 0.4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def captured(calls):
    """All calls as one CUDA graph, so that no Python is timed. Each call writes to memory of its own."""
    side = cuda.Stream()
    with cuda.stream(side):
        for call in calls:
            call()  # compiles now
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=side):
            kept = [call() for call in calls]
    return lambda: (graph.replay(), kept)[0]


# ---------------------------------------------------------------- the steps of --gpu
def describe_device():
    print(sys.version, torch.__version__, torch.version.cuda, torch.backends.cudnn.version())
    print(cuda.get_device_properties(DEVICE))
    print(f"TF32: convolutions {torch.backends.cudnn.allow_tf32}, products {torch.backends.cuda.matmul.allow_tf32}")


def run_tests(*before, only="gate or norm or network"):
    """The kernels' tests, which run compiled where there is a GPU."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "test_rurnet.py", "-k", only]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{done.stdout[-6000:]}\nstatus {done.returncode}")


def check_memory():
    if sanitizer := shutil.which("compute-sanitizer"):
        run_tests(sanitizer, "--tool", "memcheck", only="edges_of_a_block and reset")
    else:
        print("compute-sanitizer is not installed")


def dru():
    torch.manual_seed(0)
    return RecurrentUNet().to(DEVICE)


def profile_network():
    for size, dtype in itertools.product(SIZES, BOTH):
        x, plain, fused = torch.rand(size, device=DEVICE), dru().eval(), fuse(dru().eval())
        forms = {"plain": plain, "plain, replayed": Replayed(plain), "fused": fused, "fused, replayed": Replayed(fused)}
        for name, net in forms.items():
            with torch.no_grad(), autocast_to(dtype):
                time_forms({name: lambda net=net: net(x)})
                began = time.perf_counter()
                for _ in range(20):
                    net(x)
                host = time.perf_counter() - began
                cuda.synchronize()
                wall = time.perf_counter() - began
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    net(x)
                    cuda.synchronize()
            found = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            busy, count = sum(e.self_device_time_total for e in found) / 1000, sum(e.count for e in found)
            print(f"{size} {dtype} {name}: host {50 * host:.3f} ms, wall {50 * wall:.3f} ms, "
                  f"busy {busy:.3f} ms, {count} kernels")  # fmt: skip
            for e in sorted(found, key=lambda e: -e.self_device_time_total)[:10]:
                print(f"    {e.count:5} {e.self_device_time_total:9.1f} us  {e.key[:80]}")


def norm_forms(groups, channels):
    module = FusedNorm(torch.nn.GroupNorm(groups, channels), relu=True)  # the calls bring weight and bias
    plain = lambda x, w, b: F.group_norm(x, groups, w, b).relu_()
    return (lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, x)), plain


def kernel_cases(n):
    """Name: forms fused, plain and of lerp where there is one; the shapes of the inputs. All have about n elements."""
    lerp = lambda h, a_z, a_c: torch.lerp(torch.tanh(a_c), h, torch.sigmoid(a_z))  # the best of eager PyTorch
    yield "update", (fused_update, gated_update, lerp), [(n,)] * 3
    yield "reset", (fused_reset, gated_reset), [(n,)] * 2
    yield "norm, 16 groups", norm_forms(2, 8), [(8, 8, n // 64), (8,), (8,)]
    yield "norm, 8 groups, odd", norm_forms(8, 64), [(1, 64, n // 64 - 1 | 1), (64,), (64,)]


def time_kernels():
    for mb, dtype, way in itertools.product(MEGABYTES, BOTH, ("forward", "backward")):
        n, sets = mb * MEGABYTE // dtype.itemsize, max(2, 512 // mb)  # in turn, through more memory than a cache has
        for name, (fused, plain, *lerp), shapes in kernel_cases(n):
            forms = {"fused": fused, "eager": plain} | {"lerp": form for form in lerp}
            for mode in ("default", "max-autotune-no-cudagraphs") if mb == 64 else ():  # compiling takes seconds
                forms[f"compile, {mode}"] = torch.compile(plain, dynamic=False, mode=mode)
            new = functools.partial(torch.randn, dtype=dtype, device=DEVICE, requires_grad=way == "backward")
            inputs = [[new(shape) for shape in shapes] for _ in range(sets)]
            calls = {form: [functools.partial(f, *xs) for xs in inputs] for form, f in forms.items()}
            if way == "backward":
                back = lambda call, xs: functools.partial(
                    torch.autograd.grad, y := call(), xs, torch.ones_like(y), retain_graph=True)  # fmt: skip
                calls = {form: [*map(back, row, inputs)] for form, row in calls.items()}
            calls["copy"] = [xs[0].detach().clone for xs in inputs]
            times = time_forms({form: captured(row) for form, row in calls.items()})
            transfers = TRANSFERS[name.split(",")[0]][way][0]
            for form, ms in times.items():
                share, ratio = transfers / 2 * times_faster(times["copy"], ms), times_faster(ms, times["fused"])
                print(f"{name:20} {way:9}{str(dtype)[6:]:9}{mb:4} MB  {form:36}{statistics.median(ms) / sets:9.4f} ms"
                      f"{share:9.1%} of a copy's speed{ratio:8.3f} of fused's time")  # fmt: skip
        torch.compiler.reset()


def time_network():
    """Before that, how far the masks are from the plain ones: TF32 and bf16 round to about three digits."""
    for size, dtype in itertools.product(SIZES, BOTH):
        x, plain, fused = torch.rand(size, device=DEVICE), dru().eval(), fuse(dru().eval())
        last = lambda net: Replayed(net.eval().to(DEVICE, memory_format=torch.channels_last))
        light, wide = last(dru().to(dtype)), last(RecurrentUNet(image_channels=6))
        nets = {"plain": plain, "plain, again": plain, "plain, replayed": Replayed(plain), "fused": fused,
                "fused, replayed": Replayed(fused), "channels last, replayed": last(dru()),
                "the same, weights cast once": lambda x: light(x.to(dtype)),
                "the same, 6 + 2 channels in": lambda x: wide(F.pad(x, (0, 0, 0, 0, 0, 3)))}  # fmt: skip
        for name, mode in ("compile", "default"), ("compile, CUDA graphs", "reduce-overhead"):
            nets[name] = torch.compile(dru().eval(), dynamic=False, mode=mode)
        with torch.no_grad(), autocast_to(dtype):
            want = plain(x)[-1].float()
            for name, net in nets.items():
                off = (net(x)[-1].float() - want).abs().max() / want.abs().max()
                print(f"{size} {dtype}, {name}: logits differ by {off:.1e} of the largest")
            print_forms(f"{size} {dtype}", {name: lambda net=net: net(x) for name, net in nets.items()})
        torch.compiler.reset()


def time_training():
    for dtype in BOTH:
        nets = {"plain": dru(), "plain, again": dru(), "channels last": dru().to(memory_format=torch.channels_last),
                "plain, graphs": Graphed(dru()), "fused": fuse(dru()), "fused, graphs": Graphed(fuse(dru())),
                "fused, graphs, pass 3 alone": Graphed(LastPass(fuse(dru()))),
                "compile": torch.compile(dru(), dynamic=False)}  # fmt: skip
        forms = {name: training_step(net, SIZES[-1], DEVICE, dtype) for name, net in nets.items()}
        print_forms(f"training step, {dtype}", forms)


STEPS = {  # seconds, what it does; together less than 9 minutes
    "device": (15, describe_device), "tests": (120, run_tests), "memcheck": (40, check_memory),
    "profile": (60, profile_network), "kernels": (130, time_kernels), "network": (100, time_network),
    "training": (70, time_training),
}  # fmt: skip
DRIVE = "--data DRIVE/ --size 565 --crop 160 --rotate 180 --epochs 28 --views 2".split()
RUNS = "command,commit,seed,threads,minutes,views,pass,mIoU,mPrec,mRec,mF1,IoU,F1,BEP"


def run_limited(command, seconds, path):
    """Run a command; its lines are in the file as soon as they are printed. Return the minutes that it took."""
    began = time.monotonic()
    with path.open("w") as file:
        try:
            how = dict(cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
            status = subprocess.run([sys.executable, "-u", *command], **how).returncode
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        took = time.monotonic() - began
        print(f"{path.name}: status {status}, {took:.0f} s", file=file)
    print(path.read_text().splitlines()[-1], flush=True)
    return took / 60


def train_on_drive(out, model):
    """Train and test. The table that train.py prints becomes rows of out/runs.csv, in the columns of results/."""
    command = ["train.py", *DRIVE, "--model", model]
    minutes = run_limited([*command, "--out", str(out.resolve() / model)], 265, out / f"{model}.txt")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout[:7]
    with (out / "runs.csv").open("a") as file:
        if not file.tell():
            print(RUNS, file=file)
        for row in re.findall(r"^ +\d+(?:  \d\.\d{4})+$", (out / f"{model}.txt").read_text(), re.M):
            print(" ".join(command), commit, 0, "GPU", f"{minutes:.1f}", 2, *row.split(), sep=",", file=file)


def spend_gpu_hour(out, training=False):
    if not cuda.is_available():
        raise ValueError("--gpu and --gpu-train need a CUDA GPU, which this machine lacks")
    out.mkdir(parents=True, exist_ok=True)
    for model in ("dru", "unet-g") if training else ():
        train_on_drive(out, model)
    for name, (seconds, _) in STEPS.items() if not training else ():
        run_limited(["-m", "experiments.gpu", name], seconds, out / f"{name}.txt")


if __name__ == "__main__":
    STEPS[sys.argv[1]][1]()
