"""The gates and norms of rurnet.py as fused Triton kernels: the same functions and gradients for a quarter to two thirds of the traffic.

    from gates_triton import fuse
    net = fuse(RecurrentUNet())            # in place; on a CPU it computes what it did before

Why fuse. A GPU computes faster than its memory delivers: an H200 issues some 33e12 float32 instructions a second and
moves 4.8e12 bytes, 7 instructions a byte. An update gate is about 50 instructions for the 16 bytes that it must read
and write, 3 a byte: the arithmetic is free, and time is traffic. (In half precision it is 6 a byte, and little to
spare.) The unit to count in is the *memory pass*, one tensor read or written once. Eager PyTorch runs the update,
h_t = z * h + (1 - z) * c, as six kernels, each of which sends its result through memory to the next:

    z = sigmoid(a_z) 2    c = tanh(a_c) 2    z * h 3    1 - z 2    (1 - z) * c 3    their sum 3      = 15 passes

One kernel that keeps z and c in registers reads h, a_z, a_c and writes h_t: 4. So the best that we can hope for is 3.75
times faster. PASSES has every such count; `python gates_triton.py` measures, on a GPU, how much of it comes true.

The backward pass reads the inputs and computes z and c once more. To save them instead would cost two more writes on the
way forward, 6 passes in place of 4; to recompute them costs operations, which are free.

The gates are few, and at level 4 small. What a GPU waits for in this network, besides the convolutions, is the group norm and
ReLU after each of them: these are one kernel too, after a first one that sums up. See FusedNorm.

CPU tensors take the plain expression, and so does every tensor where triton is not installed, and all that is traced:
torch.compile fuses the plain gate itself, and with its neighbours too, which a ready-made kernel would forbid; a model
that leaves PyTorch (torch.export, ONNX, jit.trace) leaves without Triton. To launch a kernel from Python takes longer
than a small tensor's traffic: at batch 1 replay the network from a CUDA graph. Equation numbers are rurnet.py's.
"""

from __future__ import annotations  # so that `BLOCK: tl.constexpr` is not looked up where triton is missing

import functools
import os
import statistics

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

# TRITON_INTERPRET=1, set before triton is imported, runs kernels in numpy, line by line: how a CPU tests them
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024  # elements a program: 8 a thread, so a thread asks for one or two 16-byte pieces of each input at once
SPAN = 4096  # elements that a program sums up, or up to eight times as many: see _span_of

PASSES = {  # memory passes: fused, eager, and with torch.lerp(c, h, z) for eq. (5). The tests count them.
    ("update", "forward"): (4, 15, 8),
    ("update", "backward"): (7, 23, 22),
    ("reset", "forward"): (3, 5, None),
    ("reset", "backward"): (5, 9, None),
    ("norm", "forward"): (3, 5, None),  # group norm and ReLU. Mean and variance come first, so x is read twice either way
    ("norm", "backward"): (5, 8, None),
}


def jit(kernel):
    return triton.jit(kernel) if triton is not None else kernel


# ---------------------------------------------------------------- what the kernels are made of


@jit
def _span(n, BLOCK: tl.constexpr):
    """The elements of this program, and which of them exist: the last block is ragged."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # 64 bits before the product, which passes 2**31
    return i, i < n


@jit
def _load(ptr, i, mask):
    x = tl.load(ptr + i, mask)
    return x if x.dtype == tl.float64 else x.to(tl.float32)  # half precision is for memory; arithmetic is float32


@jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))  # in (0, 1] for every x, where exp(-x) could overflow
    return tl.where(x < 0, t, 1.0) / (1 + t)


@jit
def _tanh(x):
    a = tl.abs(x)
    t = tl.exp(-2 * a)
    y = 1 - 2 * t / (1 + t)
    y = tl.where(x < 0, -y, y)
    if x.dtype == tl.float64:
        return y
    # Near 0 that subtracts nearly equal numbers: right to 1e-7, but nothing is left of a tanh of 1e-8. So there it is
    # x + x^3 p(x^2), p fitted for the least relative error. Up to 1.05, as exp and / on a GPU are each off by up to two
    # units in the last place, of which 1 - 2t / (1 + t) hands on less the smaller t is: beyond 1.05, two in all.
    x = tl.where(a < 1.05, x, 0.0)
    s = x * x
    p = 0.0021589163 - 0.00031634075 * s
    p = -0.053840677 + s * (0.021365796 + s * (-0.0077585335 + s * p))
    p = -0.33333267 + s * (0.13331767 + s * p)
    return tl.where(a < 1.05, x + x * (s * p), y)


# ---------------------------------------------------------------- update: h_t = z * h + (1 - z) * c


@jit
def _update_fwd(h_ptr, az_ptr, ac_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, mask = _span(n, BLOCK)
    h = _load(h_ptr, i, mask)
    z = _sigmoid(_load(az_ptr, i, mask))
    c = _tanh(_load(ac_ptr, i, mask))
    tl.store(out_ptr + i, z * h + (1 - z) * c, mask)  # rounds to the dtype of out


@jit
def _update_bwd(g_ptr, h_ptr, az_ptr, ac_ptr, dh_ptr, daz_ptr, dac_ptr, n, BLOCK: tl.constexpr):
    """g is the gradient of h_t. A gradient that nobody needs has None for a pointer: no store, no load for its sake."""
    i, mask = _span(n, BLOCK)
    g = _load(g_ptr, i, mask)  # all loads before the first store: they then wait for memory together, not in turn
    h = _load(h_ptr, i, mask)  # the compiler drops what no store depends on
    z = _sigmoid(_load(az_ptr, i, mask))
    c = _tanh(_load(ac_ptr, i, mask))
    if daz_ptr is not None:
        tl.store(daz_ptr + i, g * (h - c) * (z * (1 - z)), mask)  # sigmoid' = z (1 - z)
    if dac_ptr is not None:
        tl.store(dac_ptr + i, g * (1 - z) * (1 - c * c), mask)  # tanh' = 1 - c^2
    if dh_ptr is not None:
        tl.store(dh_ptr + i, g * z, mask)


def fused_update(h, a_z, a_c):
    """rurnet.gated_update: z * h + (1 - z) * c, z = sigmoid(a_z), c = tanh(a_c), equal shapes. Eqs. (2), (4), (5)."""
    h, a_z, a_c = _agreeing("fused_update", h=h, a_z=a_z, a_c=a_c)
    if _runs_triton(h):
        return _Fused.apply(_update_fwd, _update_bwd, h, a_z, a_c)
    return plain_update(h, a_z, a_c)


def plain_update(h, a_z, a_c):
    """What runs where no kernel does. The copy makes this file stand alone."""
    z, c = torch.sigmoid(a_z), torch.tanh(a_c)
    return z * h + (1 - z) * c


# ---------------------------------------------------------------- reset: r * e


@jit
def _reset_fwd(e_ptr, ar_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, mask = _span(n, BLOCK)
    tl.store(out_ptr + i, _sigmoid(_load(ar_ptr, i, mask)) * _load(e_ptr, i, mask), mask)


@jit
def _reset_bwd(g_ptr, e_ptr, ar_ptr, de_ptr, dar_ptr, n, BLOCK: tl.constexpr):
    i, mask = _span(n, BLOCK)
    g = _load(g_ptr, i, mask)
    e = _load(e_ptr, i, mask)
    r = _sigmoid(_load(ar_ptr, i, mask))
    if dar_ptr is not None:
        tl.store(dar_ptr + i, g * e * (r * (1 - r)), mask)
    if de_ptr is not None:
        tl.store(de_ptr + i, g * r, mask)


def fused_reset(e, a_r):
    """sigmoid(a_r) * e, of equal shapes: rurnet.gated_reset. Eq. (3)."""
    e, a_r = _agreeing("fused_reset", e=e, a_r=a_r)
    if _runs_triton(e):
        return _Fused.apply(_reset_fwd, _reset_bwd, e, a_r)
    return plain_reset(e, a_r)


def plain_reset(e, a_r):
    return torch.sigmoid(a_r) * e


# ---------------------------------------------------------------- group norm and ReLU: max(0, (x - mean) * rstd * w + b)


@jit
def _moments(mean_ptr, m2_ptr, row, M, SPLITS: tl.constexpr, SPAN: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / standard deviation of a group from those of its parts: some 256 numbers, from the cache."""
    k = tl.arange(0, SPLITS)
    n = tl.minimum(tl.maximum(M - k * SPAN, 0), SPAN)  # elements in part k
    here = n > 0
    at = row * tl.cdiv(M, SPAN) + k
    part, m2 = tl.load(mean_ptr + at, here, 0.0), tl.load(m2_ptr + at, here, 0.0)
    n = n.to(part.dtype)
    mean = tl.sum(n * part) / M
    var = tl.sum(m2 + n * (part - mean) * (part - mean)) / M
    return mean, 1 / tl.sqrt(var + EPS)


@jit
def _norm_sums(x_ptr, mean_ptr, m2_ptr, M, SPAN: tl.constexpr):
    """Mean and sum of squared distances from it, of one part of a group. About its own mean, so nothing cancels."""
    at, parts = tl.program_id(0), tl.cdiv(M, SPAN)
    row, part = at // parts, at % parts  # a sample's group, and which of its parts: a grid may be long along one axis alone
    i = part * SPAN + tl.arange(0, SPAN)
    x = _load(x_ptr + row.to(tl.int64) * M, i, i < M)
    x = tl.where(i < M, x, 0.0)
    mean = tl.sum(x) / tl.minimum(M - part * SPAN, SPAN)
    d = tl.where(i < M, x - mean, 0.0)
    tl.store(mean_ptr + at, mean)
    tl.store(m2_ptr + at, tl.sum(d * d))


@jit
def _norm_fwd(
    x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, out_ptr, groups, width, HW, M,
    RELU: tl.constexpr, EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    mean, rstd = _moments(mean_ptr, m2_ptr, row, M, SPLITS, SPAN, EPS)
    i = block * BLOCK + tl.arange(0, BLOCK)
    c = row % groups * width + i // HW
    w, b = _load(w_ptr, c, i < M), _load(b_ptr, c, i < M)
    start = row.to(tl.int64) * M
    y = (_load(x_ptr + start, i, i < M) - mean) * rstd * w + b
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # and NaN stays NaN
    tl.store(out_ptr + start + i, y, i < M)


@jit
def _norm_bwd_sums(
    g_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, db_ptr, dw_ptr, groups, width, HW, M,
    RELU: tl.constexpr, EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of one part of one channel: the sums of g and of g * xhat, where g has passed the ReLU and xhat = (x - mean) * rstd."""
    at, parts = tl.program_id(0), tl.cdiv(HW, SPAN)
    channel, part = at // parts, at % parts
    mean, rstd = _moments(mean_ptr, m2_ptr, channel // width, M, SPLITS, SPAN, EPS)
    i = part * SPAN + tl.arange(0, SPAN)
    start, c = channel.to(tl.int64) * HW, channel % (groups * width)
    xhat = tl.where(i < HW, (_load(x_ptr + start, i, i < HW) - mean) * rstd, 0.0)
    g = tl.where(i < HW, _load(g_ptr + start, i, i < HW), 0.0)
    if RELU:
        g = tl.where(xhat * _load(w_ptr, c, None) + _load(b_ptr, c, None) <= 0, 0.0, g)
    tl.store(db_ptr + at, tl.sum(g))
    tl.store(dw_ptr + at, tl.sum(g * xhat))


@jit
def _norm_bwd(
    g_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, db_ptr, dw_ptr, dx_ptr, groups, width, HW, M,
    RELU: tl.constexpr, EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w g - mean(w g) - xhat * mean(w g xhat)), the means over the group."""
    blocks = tl.cdiv(M, BLOCK)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    mean, rstd = _moments(mean_ptr, m2_ptr, row, M, SPLITS, SPAN, EPS)
    first = row % groups * width
    k, parts = tl.arange(0, PARTS), tl.cdiv(HW, SPAN)
    here, at = k < width * parts, row * width * parts + k
    w = _load(w_ptr, first + k // parts, here)
    wg = tl.sum(tl.where(here, w * tl.load(db_ptr + at, here, 0.0), 0.0)) / M
    wgx = tl.sum(tl.where(here, w * tl.load(dw_ptr + at, here, 0.0), 0.0)) / M
    i = block * BLOCK + tl.arange(0, BLOCK)
    c, start = first + i // HW, row.to(tl.int64) * M
    w, b = _load(w_ptr, c, i < M), _load(b_ptr, c, i < M)
    xhat = (_load(x_ptr + start, i, i < M) - mean) * rstd
    g = _load(g_ptr + start, i, i < M)
    if RELU:
        g = tl.where(xhat * w + b <= 0, 0.0, g)
    tl.store(dx_ptr + start + i, rstd * (w * g - wg - xhat * wgx), i < M)


class FusedNorm(torch.nn.GroupNorm):
    """nn.GroupNorm, followed by a ReLU if `relu`: (B, C, H, W) -> the same. Same parameters (weight and bias are a must), names, gradients.

    Under autocast PyTorch's norm answers in float32; this one computes in float32, and answers in half precision if x is. Of channels last it makes a contiguous copy.

    PyTorch reads x twice and writes y, then the ReLU reads and writes y: 5 memory passes, and 8 backward. Here it is 3 and 5. Eight
    groups of one photo would keep eight programs of a GPU's hundreds busy: so each group is cut into parts of SPAN elements.
    """

    def __init__(self, norm, relu):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias, self.relu = norm.weight, norm.bias, relu
        self.train(norm.training)

    def extra_repr(self):
        return f"{super().extra_repr()}, relu={self.relu}"

    def forward(self, x):
        if _runs_triton(x):
            if x.shape[1] != self.num_channels or x.device != self.weight.device:
                raise ValueError(f"the norm has {self.num_channels} channels on {self.weight.device}, and got {tuple(x.shape)} on {x.device}")
            return _Norm.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.relu)
        y = super().forward(x)
        return y.relu_() if self.relu else y  # its own result, so nobody misses it


def _span_of(M):
    """How many elements a program sums up, and with how many warps: so many that a group of a megapixel photo has 256 parts at most."""
    span = min(max(SPAN, triton.next_power_of_2(triton.cdiv(M, 256))), 8 * SPAN)
    return span, max(4, span // 1024)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, groups, eps, relu):
        x = x.contiguous()
        width, HW = x.shape[1] // groups, x.shape[2:].numel()
        M, rows = width * HW, len(x) * groups
        span, warps = _span_of(M)
        splits = triton.cdiv(M, span)
        precise = torch.promote_types(x.dtype, torch.float32)
        mean, m2 = torch.empty(2, rows, splits, dtype=precise, device=x.device)
        out = torch.empty_like(x)
        ctx.shape, ctx.how = (groups, width, HW, M), dict(RELU=relu, EPS=eps, SPLITS=triton.next_power_of_2(splits), SPAN=span)
        _launch_grid(_norm_sums, (rows * splits,), x, mean, m2, M, SPAN=span, num_warps=warps)
        _launch_grid(_norm_fwd, (rows * triton.cdiv(M, BLOCK),), x, w, b, mean, m2, out, *ctx.shape, BLOCK=BLOCK, **ctx.how)
        ctx.save_for_backward(x, w, b, mean, m2)
        return out

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused norm can be differentiated once; for second derivatives use torch.nn.GroupNorm")
        x, w, b, mean, m2 = ctx.saved_tensors
        g, (groups, width, HW, M) = g.contiguous(), ctx.shape
        span, warps = _span_of(M)
        rows, parts = len(x) * groups, triton.cdiv(HW, span)
        sums = torch.empty(2, len(x), groups * width, parts, dtype=mean.dtype, device=x.device)
        args = g, x, w, b, mean, m2, *sums
        _launch_grid(_norm_bwd_sums, (rows * width * parts,), *args, *ctx.shape, num_warps=warps, **ctx.how)
        dx = None
        if ctx.needs_input_grad[0]:
            dx, most = torch.empty_like(x), triton.next_power_of_2(width * parts)
            _launch_grid(_norm_bwd, (rows * triton.cdiv(M, BLOCK),), *args, dx, *ctx.shape, PARTS=most, BLOCK=BLOCK, **ctx.how)
        db, dw = sums.sum((1, 3)).to(w.dtype)
        return dx, dw, db, None, None, None


# ---------------------------------------------------------------- from tensors to kernels


class _Fused(torch.autograd.Function):
    """A gate from its two kernels: fwd(inputs, out) and bwd(g, inputs, gradients), where g is the gradient of out."""

    @staticmethod
    def forward(ctx, fwd, bwd, *inputs):
        ctx.bwd = bwd
        ctx.save_for_backward(*inputs)  # and no z or c: see above
        inputs = _lay_out(*inputs)
        out = torch.empty_like(inputs[0])
        _launch(fwd, *inputs, out)
        return out

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph=True. Left alone, a second derivative would silently be zero
            raise RuntimeError("fused gates can be differentiated once; for second derivatives use those of rurnet.py")
        g, *inputs = _lay_out(g, *ctx.saved_tensors)
        grads = [torch.empty_like(g) if need else None for need in ctx.needs_input_grad[2:]]
        _launch(ctx.bwd, g, *inputs, *grads)
        return None, None, *grads


def _launch(kernel, x, *others):
    n = x.numel()
    _launch_grid(kernel, (triton.cdiv(n, BLOCK),), x, *others, n, BLOCK=BLOCK)


def _launch_grid(kernel, grid, x, *others, **constants):
    if 0 not in grid:  # or there is nothing to launch
        with torch.cuda.device(x.get_device()):  # Triton launches on the current GPU; -1, the CPU's, changes nothing
            kernel[grid](x, *others, **constants)


def _lay_out(*tensors):
    """The same tensors, so laid out that element i of one lies where element i of every other does.

    An elementwise kernel need not know in which order dimensions lie, if all agree: it walks memory from 0 to n. So
    contiguous and channels_last tensors are taken as they are. A slice, an expanded tensor, and the odd one out are
    copied to the layout that most of the others have.
    """
    orders = [_order(x) for x in tensors]
    common = max((order for order in orders if order is not None), key=orders.count, default=None)
    like = tensors[orders.index(common)]  # empty_like takes over its order, and closes gaps and undoes overlaps if any
    return [x if order == common is not None else torch.empty_like(like).copy_(x) for x, order in zip(tensors, orders)]


def _order(x):
    """The dimensions of x from the fastest in memory to the slowest, or None if x has gaps there or overlaps itself."""
    size, dims = 1, sorted((stride, dim) for dim, stride in enumerate(x.stride()) if x.shape[dim] > 1)
    for stride, dim in dims:
        if stride != size:
            return None
        size *= x.shape[dim]
    return [dim for _, dim in dims]


def _agreeing(name, **inputs):
    """The inputs, once they are seen to agree in shape, device and dtype."""
    first, *others = inputs.values()
    if any(x.dtype != first.dtype for x in others) and torch.is_autocast_enabled(first.device.type):
        widest = functools.reduce(torch.promote_types, (x.dtype for x in inputs.values()))  # as + and * would do
        inputs = {k: x.to(widest) for k, x in inputs.items()}
        first, *others = inputs.values()
    for what in "shape", "device", "dtype":
        if any(getattr(x, what) != getattr(first, what) for x in others):
            found = ", ".join(f"{k}: {getattr(x, what)}" for k, x in inputs.items())
            raise ValueError(f"{name} takes tensors of one {what}, and got {found}")
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} takes float16, bfloat16, float32 or float64, not {first.dtype}")
    return inputs.values()


def _runs_triton(x):
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return triton is not None and (x.is_cuda or INTERPRETED) and not traced


def fuse(model):
    """Swap the fused gates and norms into every unit and Sequential of the model, in place. Returns the model."""
    for layers in [m for m in model.modules() if isinstance(m, torch.nn.Sequential)]:
        for i, norm in enumerate(layers):
            if type(norm) is torch.nn.GroupNorm and norm.affine:
                relu = i + 1 < len(layers) and isinstance(layers[i + 1], torch.nn.ReLU)
                layers[i] = FusedNorm(norm, relu)
                if relu:
                    layers[i + 1] = torch.nn.Identity()  # the others keep their places, and their names in a checkpoint
    fused = {"gated_update": fused_update, "gated_reset": fused_reset}
    for unit in model.modules():
        for name in "update", "reset":
            plain = getattr(getattr(unit, name, None), "__name__", None)
            if plain in fused:
                setattr(unit, name, fused[plain])
    return model


# ---------------------------------------------------------------- how much of it comes true


def _lerp_update(h, a_z, a_c):
    return torch.lerp(torch.tanh(a_c), h, torch.sigmoid(a_z))  # eq. (5) in one operator: the best of eager PyTorch


def _microseconds(calls):
    """Median time of a call. A CUDA graph holds them all, so that the GPU is timed and not the Python that launches."""
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


def _measure(dtype, megabytes):
    """Print a row for each gate and direction, for tensors of that size."""
    sets = max(2, 512 // megabytes)  # of inputs, taken in turn: 1 GB and more pass before one returns, past any cache

    def tensors(count, grad=False, shapes=()):
        n = megabytes * 2**20 // dtype.itemsize
        new = functools.partial(torch.randn, dtype=dtype, device="cuda", requires_grad=grad)
        return [[new(shape) for shape in shapes or [n] * count] for _ in range(sets)]

    def gradients(out, xs, g):
        return torch.autograd.grad(out, xs, g, retain_graph=True)

    one_pass = _microseconds([x.clone for (x,) in tensors(1)]) / 2  # at the speed of a copy
    updates = fused_update, plain_update, torch.compile(plain_update, dynamic=False), _lerp_update
    resets = fused_reset, plain_reset, torch.compile(plain_reset, dynamic=False)
    plain_norm = lambda x, w, b: torch.nn.functional.group_norm(x, 2, w, b).relu_()
    norms = (lambda x, w, b: _Norm.apply(x, w, b, 2, 1e-5, True)), plain_norm, torch.compile(plain_norm, dynamic=False)
    photos = 8, 8, megabytes * 2**20 // dtype.itemsize // 64
    for gate, count, forms, *shapes in ("update", 3, updates), ("reset", 2, resets), ("norm", 3, norms, photos, 8, 8):
        inputs, times = tensors(count, grad=True, shapes=shapes), {"forward": [], "backward": []}
        gs = tensors(1, shapes=shapes[:1])
        for form in forms:
            with torch.no_grad():
                times["forward"].append(_microseconds([functools.partial(form, *xs) for xs in inputs]))
            outs = [form(*xs) for xs in inputs]
            calls = [functools.partial(gradients, out, xs, g) for out, xs, g in zip(outs, inputs, gs)]
            times["backward"].append(_microseconds(calls))
        for way, (fused, *rest) in times.items():
            passes = PASSES[gate, way][0]
            row = f"{gate:8}{way:10}{str(dtype)[6:]:9}{megabytes:4} MB{fused:10.1f} us"
            row += f"{passes * megabytes * 2**20 / fused / 1000:7.0f} GB/s{passes * one_pass / fused:8.0%}"
            print(row + "".join(f"{other / fused:8.2f}x" for other in rest))
    torch.compiler.reset()  # or the next size counts as a recompilation, of which only eight are allowed


if __name__ == "__main__":
    if torch.cuda.is_available() and triton is not None:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
        print(f"{'the fused gate':34}{'time':>13}{'traffic':>12} of copy    eager  compile     lerp, in fused times")
        with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
            for dtype in torch.float32, torch.bfloat16:
                for megabytes in 1, 4, 16, 64, 256, 512:
                    _measure(dtype, megabytes)
    else:
        print("Timing the kernels takes a GPU and triton. This is the traffic that they save, in memory passes:\n")
        print(f"{'':18}{'fused':>6}{'eager':>7}{'lerp':>6}{'eager / fused':>15}")
        for (gate, way), (fused, eager, lerp) in PASSES.items():
            print(f"{gate:8}{way:10}{fused:6}{eager:7}{lerp or '-':>6}{eager / fused:15.2f}")
