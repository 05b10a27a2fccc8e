"""How much of their saved traffic the fused kernels turn into time: `python -m experiments.bench --kernels`.

On a GPU every kernel is compared with eager PyTorch, with torch.compile, and with a copy of as many bytes, which is
the fastest that memory allows. Elsewhere the table of transfers is printed.
"""

import functools
import statistics

import torch

from gates_triton import TRANSFERS, FusedNorm, fused_reset, fused_update, plain_reset, plain_update, triton


def lerp_update(h, a_z, a_c):
    return torch.lerp(torch.tanh(a_c), h, torch.sigmoid(a_z))  # eq. (5) in one operator: the best of eager PyTorch


def microseconds(calls):
    """Median time of a call. A CUDA graph holds all calls, so the GPU is timed and not the Python that launches."""
    for call in calls:
        call()  # compiles now: a graph only records
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [call() for call in calls]  # kept, so that each call writes to memory of its own
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(kept))
    return statistics.median(times[5:])


FUSED_NORM = FusedNorm(torch.nn.GroupNorm(2, 8), relu=True)  # the calls bring weight and bias
KERNELS = {  # gate: its fused form, the plain one, and the best of eager PyTorch where that is another
    "update": (fused_update, plain_update, lerp_update),
    "reset": (fused_reset, plain_reset),
    "norm": (
        lambda x, w, b: torch.func.functional_call(FUSED_NORM, {"weight": w, "bias": b}, x),
        lambda x, w, b: torch.nn.functional.group_norm(x, 2, w, b).relu_(),
    ),
}


def time_kernels(dtype, megabytes):
    """Print a row for each gate and direction, for tensors of that size."""
    sets = max(2, 512 // megabytes)  # of inputs, in turn: more than 1 GB passes before one returns, past any cache
    new, n = functools.partial(torch.randn, dtype=dtype, device="cuda"), megabytes * 2**20 // dtype.itemsize
    one_pass = microseconds([new(n).clone for _ in range(sets)]) / 2  # at the speed of a copy
    for gate, (fused, plain, *lerp) in KERNELS.items():
        shapes = {"update": [n] * 3, "reset": [n] * 2, "norm": [(8, 8, n // 64), 8, 8]}[gate]
        inputs = [[new(shape, requires_grad=True) for shape in shapes] for _ in range(sets)]
        times = {"forward": [], "backward": []}
        gradients = [new(shapes[0]) for _ in range(sets)]
        for form in fused, plain, torch.compile(plain, dynamic=False), *lerp:
            with torch.no_grad():
                times["forward"].append(microseconds([functools.partial(form, *xs) for xs in inputs]))
            back = functools.partial(torch.autograd.grad, retain_graph=True)
            calls = [functools.partial(back, form(*xs), xs, g) for xs, g in zip(inputs, gradients)]
            times["backward"].append(microseconds(calls))
        for way, (us, *others) in times.items():
            passes = TRANSFERS[gate, way][0]
            row = f"{gate:8}{way:10}{str(dtype)[6:]:9}{megabytes:4} MB{us:10.1f} us"
            row += f"{passes * megabytes * 2**20 / us / 1000:7.0f} GB/s{passes * one_pass / us:8.0%}"
            print(row + "".join(f"{other / us:8.2f}x" for other in others))
    torch.compiler.reset()  # or the next size counts as a recompilation, of which only eight are allowed


def print_kernels(machine):
    if torch.cuda.is_available() and triton is not None:
        print(f"{machine}, triton {triton.__version__}\n")
        print(f"{'the fused gate':34}{'time':>13}{'traffic':>12} of copy    eager  compile     lerp, over fused")
        with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
            for dtype in torch.float32, torch.bfloat16:
                for megabytes in 1, 4, 16, 64, 256, 512:
                    time_kernels(dtype, megabytes)
    else:
        print("Timing the kernels needs a GPU and triton. This is the traffic that they save, in transfers:\n")
        print(f"{'':18}{'fused':>6}{'eager':>7}{'lerp':>6}{'eager / fused':>15}")
        for (gate, way), (fused, eager, lerp) in TRANSFERS.items():
            print(f"{gate:8}{way:10}{fused:6}{eager:7}{lerp or '-':>6}{eager / fused:15.2f}")
