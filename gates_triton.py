"""The gates and norms of rurnet.py as fused Triton kernels: same functions, same gradients, less memory traffic.

    from gates_triton import fuse
    net = fuse(RecurrentUNet())            # in place; on a CPU it computes what it did before

Why fuse. Memory traffic alone decides the time of a gate. Count it in *transfers*, one tensor read or written once:
eager PyTorch runs h_t = z * h + (1 - z) * c as six kernels with 15 of them. One kernel that keeps z and c in registers
reads h, a_z, a_c and writes h_t: 4. TRANSFERS has every such count, section 11 of tutorial.md the reasons, and
`python -m experiments.bench --gpu OUT` measures on a GPU what comes of it.
The backward kernel computes z and c again. Saving them would cost two more writes: 6 transfers in place of 4.
CPU tensors and traced calls take the plain expression: torch.compile fuses it with its neighbours, and exported models
must not need Triton. A launch from Python takes long, so support/runtime.py replays CUDA graphs.
"""

from __future__ import annotations  # so that `BLOCK: tl.constexpr` is not looked up where triton is missing

import functools
import os
import sys

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

# TRITON_INTERPRET=1, set before triton is imported, runs kernels in numpy, line by line: how a CPU tests them
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024  # elements of one program: 8 for each thread, so a thread loads 16 bytes at once
ONCE, SPAN = 16384, 4096  # elements that a program of a norm holds: a whole group, or a block of a larger one

TRANSFERS = {  # fused, eager, and eager with torch.lerp(c, h, z) for eq. (5); tests count them
    "update": {"forward": (4, 15, 8), "backward": (7, 23, 22)},
    "reset": {"forward": (3, 5, None), "backward": (5, 9, None)},
    "norm": {"forward": (3, 5, None), "backward": (5, 8, None)},  # with ReLU; _group_fwd takes 2, _group_bwd 3
}
jit = triton.jit if triton is not None else lambda kernel: kernel

# ---------------------------------------------------------------- what the kernels are made of
@jit
def _span(n, BLOCK: tl.constexpr):
    """The elements of this program, and which of them exist: the last block is ragged."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # 64 bits: the product may exceed 2**31
    return i, i < n


@jit
def _load(ptr, i, inside):
    x = tl.load(ptr + i, inside)
    return x if x.dtype == tl.float64 else x.to(tl.float32)  # half precision is for memory alone


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
    # Near 0, y would lose a tanh of 1e-8. There use x + x^3 p(x^2), with p fitted for the least relative error.
    # Beyond 1.05 the errors of exp and / (each up to two units in the last place) shrink with t to two in all.
    x = tl.where(a < 1.05, x, 0.0)
    s = x * x
    p = 0.0021589163 - 0.00031634075 * s
    p = -0.053840677 + s * (0.021365796 + s * (-0.0077585335 + s * p))
    p = -0.33333267 + s * (0.13331767 + s * p)
    return tl.where(a < 1.05, x + x * (s * p), y)


# ---------------------------------------------------------------- update: h_t = z * h + (1 - z) * c
@jit
def _update_fwd(h_ptr, az_ptr, ac_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, inside = _span(n, BLOCK)
    h = _load(h_ptr, i, inside)
    z = _sigmoid(_load(az_ptr, i, inside))
    c = _tanh(_load(ac_ptr, i, inside))
    tl.store(out_ptr + i, z * h + (1 - z) * c, inside)  # rounds to the dtype of out


@jit
def _update_bwd(g_ptr, h_ptr, az_ptr, ac_ptr, dh_ptr, daz_ptr, dac_ptr, n, BLOCK: tl.constexpr):
    """g is the gradient of h_t."""
    i, inside = _span(n, BLOCK)
    g = _load(g_ptr, i, inside)  # all loads come before the first store, so they wait for memory together
    h = _load(h_ptr, i, inside)
    z = _sigmoid(_load(az_ptr, i, inside))
    c = _tanh(_load(ac_ptr, i, inside))
    tl.store(daz_ptr + i, g * (h - c) * (z * (1 - z)), inside)  # sigmoid' = z (1 - z)
    tl.store(dac_ptr + i, g * (1 - z) * (1 - c * c), inside)  # tanh' = 1 - c^2
    tl.store(dh_ptr + i, g * z, inside)


def fused_update(h, a_z, a_c):
    """rurnet.gated_update: z * h + (1 - z) * c, z = sigmoid(a_z), c = tanh(a_c), of equal shapes and dtypes."""
    h, a_z, a_c = _agreeing("fused_update", h=h, a_z=a_z, a_c=a_c)
    if _runs_triton(h):
        return _Fused.apply(_update_fwd, _update_bwd, h, a_z, a_c)
    z, c = torch.sigmoid(a_z), torch.tanh(a_c)  # a copy of rurnet's gate, so that this file can stand alone
    return z * h + (1 - z) * c


# ---------------------------------------------------------------- reset: r * e
@jit
def _reset_fwd(e_ptr, ar_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, inside = _span(n, BLOCK)
    tl.store(out_ptr + i, _sigmoid(_load(ar_ptr, i, inside)) * _load(e_ptr, i, inside), inside)


@jit
def _reset_bwd(g_ptr, e_ptr, ar_ptr, de_ptr, dar_ptr, n, BLOCK: tl.constexpr):
    i, inside = _span(n, BLOCK)
    g = _load(g_ptr, i, inside)
    e = _load(e_ptr, i, inside)
    r = _sigmoid(_load(ar_ptr, i, inside))
    tl.store(dar_ptr + i, g * e * (r * (1 - r)), inside)
    tl.store(de_ptr + i, g * r, inside)


def fused_reset(e, a_r):
    """rurnet.gated_reset: sigmoid(a_r) * e, of equal shapes and dtypes."""
    e, a_r = _agreeing("fused_reset", e=e, a_r=a_r)
    if _runs_triton(e):
        return _Fused.apply(_reset_fwd, _reset_bwd, e, a_r)
    return torch.sigmoid(a_r) * e


# ---------------------------------------------------------------- norm and ReLU: max(0, (x - mean) * rstd * w + b)
@jit
def _group(x_ptr, w_ptr, b_ptr, groups, width, HW, EPS, WIDTH: tl.constexpr, PIXELS: tl.constexpr):
    """A sample's group, whole in one program, as a block of channels by pixels: where it starts, the places in it,
    which of them exist, xhat = (x - mean) * rstd, rstd = 1 / standard deviation, and each channel's w and b."""
    row, M = tl.program_id(0), width * HW
    k, pixel = tl.arange(0, WIDTH)[:, None], tl.arange(0, PIXELS)[None, :]
    start, i, here = row.to(tl.int64) * M, k * HW + pixel, (k < width) & (pixel < HW)
    x = tl.where(here, _load(x_ptr + start, i, here), 0.0)
    d = tl.where(here, x - tl.sum(x) / M, 0.0)  # subtracted first, so that the squares' sum does not cancel
    rstd = 1 / tl.sqrt(tl.sum(d * d) / M + EPS)
    channel = row % groups * width + k
    w, b = tl.where(k < width, _load(w_ptr, channel, k < width), 0.0), _load(b_ptr, channel, k < width)
    return start, i, here, d * rstd, rstd, w, b


@jit
def _group_fwd(x_ptr, w_ptr, b_ptr, out_ptr, groups, width, HW,
               RELU: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    start, i, here, xhat, _, w, b = _group(x_ptr, w_ptr, b_ptr, groups, width, HW, EPS, WIDTH, PIXELS)
    y = xhat * w + b
    tl.store(out_ptr + start + i, tl.where(y < 0, 0.0, y) if RELU else y, here)  # NaN stays NaN


@jit
def _group_bwd(g_ptr, x_ptr, w_ptr, b_ptr, db_ptr, dw_ptr, dx_ptr, groups, width, HW,
               RELU: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    """dx = rstd * (w g - mean(w g) - xhat * mean(w g xhat)), the means over the group. g has passed the ReLU."""
    start, i, here, xhat, rstd, w, b = _group(x_ptr, w_ptr, b_ptr, groups, width, HW, EPS, WIDTH, PIXELS)
    g = tl.where(here, _load(g_ptr + start, i, here), 0.0)
    g = tl.where(xhat * w + b <= 0, 0.0, g) if RELU else g
    db, dw = tl.sum(g, 1, keep_dims=True), tl.sum(g * xhat, 1, keep_dims=True)
    k = tl.arange(0, WIDTH)[:, None]
    tl.store(db_ptr + tl.program_id(0) * width + k, db, k < width)
    tl.store(dw_ptr + tl.program_id(0) * width + k, dw, k < width)
    wg, wgx = tl.sum(w * db) / (width * HW), tl.sum(w * dw) / (width * HW)
    tl.store(dx_ptr + start + i, rstd * (w * g - wg - xhat * wgx), here)


@jit
def _norm_sums(x_ptr, mean_ptr, m2_ptr, HW, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Larger groups take two kernels, and each channel of theirs several programs, as a GPU has room for hundreds.
    This one finds, of one part of a channel, the mean and the sum of squares about that mean."""
    at, parts = tl.program_id(0), tl.cdiv(HW, SPAN)
    plane, begin = at // parts, at % parts * SPAN  # a channel of a sample; only a grid's first axis may be long
    x_ptr += plane.to(tl.int64) * HW
    i = begin + tl.arange(0, BLOCK)
    x = tl.where(i < HW, _load(x_ptr, i, i < HW), 0.0)
    near = tl.sum(x) / tl.minimum(HW - begin, BLOCK)  # the mean of the first block is near enough to the part's
    d = tl.where(i < HW, x - near, 0.0)
    sums, squares = d, d * d
    for _ in range(1, SPAN // BLOCK):
        i += BLOCK
        d = tl.where(i < HW, _load(x_ptr, i, i < HW) - near, 0.0)
        sums += d
        squares += d * d
    n = tl.minimum(HW - begin, SPAN)
    off = tl.sum(sums) / n  # how far `near` is from the mean
    tl.store(mean_ptr + at, near + off)
    tl.store(m2_ptr + at, tl.sum(squares) - n * off * off)


@jit
def _moments(mean_ptr, m2_ptr, group, width, HW, SPLITS: tl.constexpr, SPAN: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / standard deviation of a group, merged from its parts (some 256 numbers in the cache)."""
    k, parts = tl.arange(0, SPLITS), tl.cdiv(HW, SPAN)
    here, at = k < width * parts, group * width * parts + k
    part, m2 = tl.load(mean_ptr + at, here, 0.0), tl.load(m2_ptr + at, here, 0.0)
    n = tl.where(here, tl.minimum(HW - k % parts * SPAN, SPAN), 0).to(part.dtype)  # elements in part k
    mean = tl.sum(n * part) / (width * HW)
    var = tl.sum(m2 + n * (part - mean) * (part - mean)) / (width * HW)
    return mean, 1 / tl.sqrt(var + EPS)


@jit
def _norm_fwd(x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, out_ptr, groups, width, HW, RELU: tl.constexpr,
              EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of one channel, whose weight and bias are two numbers."""
    blocks = tl.cdiv(HW, BLOCK)
    plane, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start, channel = plane.to(tl.int64) * HW, plane % (groups * width)
    x = _load(x_ptr + start, i, i < HW)  # before the statistics, so that both wait for memory together
    mean, rstd = _moments(mean_ptr, m2_ptr, plane // width, width, HW, SPLITS, SPAN, EPS)
    y = (x - mean) * (rstd * _load(w_ptr, channel, None)) + _load(b_ptr, channel, None)
    tl.store(out_ptr + start + i, tl.where(y < 0, 0.0, y) if RELU else y, i < HW)


@jit
def _norm_bwd_sums(g_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, db_ptr, dw_ptr, groups, width, HW,
                   RELU: tl.constexpr, EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """Of a part: the sums of g and g * xhat."""
    at, parts = tl.program_id(0), tl.cdiv(HW, SPAN)
    plane, i = at // parts, at % parts * SPAN + tl.arange(0, BLOCK)
    start, channel = plane.to(tl.int64) * HW, plane % (groups * width)
    mean, rstd = _moments(mean_ptr, m2_ptr, plane // width, width, HW, SPLITS, SPAN, EPS)
    w, b = _load(w_ptr, channel, None), _load(b_ptr, channel, None)
    db, dw = tl.zeros([BLOCK], mean.dtype), tl.zeros([BLOCK], mean.dtype)
    for _ in range(SPAN // BLOCK):
        xhat = (_load(x_ptr + start, i, i < HW) - mean) * rstd
        g = tl.where(i < HW, _load(g_ptr + start, i, i < HW), 0.0)
        g = tl.where(xhat * w + b <= 0, 0.0, g) if RELU else g
        db += g
        dw += tl.where(i < HW, g * xhat, 0.0)
        i += BLOCK
    tl.store(db_ptr + at, tl.sum(db))
    tl.store(dw_ptr + at, tl.sum(dw))


@jit
def _norm_bwd(g_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, m2_ptr, db_ptr, dw_ptr, dx_ptr, groups, width, HW,
              RELU: tl.constexpr, EPS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """dx, by the formula of _group_bwd, for one block of one channel."""
    blocks = tl.cdiv(HW, BLOCK)
    plane, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start, channel, group = plane.to(tl.int64) * HW, plane % (groups * width), plane // width
    x, g = _load(x_ptr + start, i, i < HW), _load(g_ptr + start, i, i < HW)
    mean, rstd = _moments(mean_ptr, m2_ptr, group, width, HW, SPLITS, SPAN, EPS)
    k, parts = tl.arange(0, SPLITS), tl.cdiv(HW, SPAN)
    here, at = k < width * parts, group * width * parts + k
    w = _load(w_ptr, group % groups * width + k // parts, here)
    wg = tl.sum(tl.where(here, w * tl.load(db_ptr + at, here, 0.0), 0.0)) / (width * HW)
    wgx = tl.sum(tl.where(here, w * tl.load(dw_ptr + at, here, 0.0), 0.0)) / (width * HW)
    w, b, xhat = _load(w_ptr, channel, None), _load(b_ptr, channel, None), (x - mean) * rstd
    g = tl.where(xhat * w + b <= 0, 0.0, g) if RELU else g
    tl.store(dx_ptr + start + i, rstd * (w * g - wg - xhat * wgx), i < HW)


class FusedNorm(torch.nn.GroupNorm):
    """nn.GroupNorm with weight and bias, then a ReLU if `relu`: (B, C, H, W) -> the same. It keeps their names,
    and x's dtype, where PyTorch's returns float32 under autocast. A channels-last x is copied to be contiguous."""

    def __init__(self, norm, relu):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias, self.relu = norm.weight, norm.bias, relu
        self.train(norm.training)

    def forward(self, x):
        if _runs_triton(x):
            if x.shape[1] != self.num_channels or x.device != self.weight.device:
                raise ValueError(f"the norm has {self.num_channels} channels on {self.weight.device}, "
                                 f"and got {tuple(x.shape)} on {x.device}")  # fmt: skip
            return _Norm.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.relu)
        y = super().forward(x)
        return y.relu_() if self.relu else y


@functools.lru_cache
def _plan(width, HW, once, span):
    """Parts and blocks of a channel, and the constants of its kernels. 0 parts: a program holds a whole group."""
    channels, pixels = triton.next_power_of_2(width), triton.next_power_of_2(HW)
    if channels * pixels <= once:
        return 0, 0, dict(WIDTH=channels, PIXELS=pixels, num_warps=max(4, 16 * channels * pixels // once))
    block = span = min(span, pixels)
    while width * triton.cdiv(HW, span) > 256 and span < HW:  # or merging the parts of a large photo takes long
        span *= 2
    parts = triton.cdiv(HW, span)
    return parts, triton.cdiv(HW, block), dict(SPLITS=triton.next_power_of_2(width * parts), SPAN=span, BLOCK=block)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, groups, eps, relu):
        x = x.contiguous()
        B, C, HW, precise = *x.shape[:2], x.shape[2:].numel(), torch.promote_types(x.dtype, torch.float32)
        ctx.plan = parts, blocks, how = _plan(C // groups, HW, ONCE * 4 // precise.itemsize, SPAN)
        ctx.sizes, ctx.how = sizes, how = (groups, C // groups, HW), dict(RELU=relu, EPS=eps) | how
        out, moments = torch.empty_like(x), []
        if parts == 0:
            _launch_grid(_group_fwd, (B * groups,), x, w, b, out, *sizes, **how)
        else:
            moments = [torch.empty(B * C * parts, dtype=precise, device=x.device) for _ in range(2)]
            _launch_grid(_norm_sums, (B * C * parts,), x, *moments, HW, SPAN=how["SPAN"], BLOCK=how["BLOCK"])
            _launch_grid(_norm_fwd, (B * C * blocks,), x, w, b, *moments, out, *sizes, **how)
        ctx.save_for_backward(x, w, b, *moments)
        return out

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused norm can be differentiated once; torch.nn.GroupNorm can more often")
        x, w, b, *moments = ctx.saved_tensors
        (B, C), (parts, blocks, _), sizes, how = x.shape[:2], ctx.plan, ctx.sizes, ctx.how
        sums = torch.empty(2, B, C, max(1, parts), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx, args = torch.empty_like(x), (g.contiguous(), x, w, b, *moments, *sums)
        if parts == 0:
            _launch_grid(_group_bwd, (B * sizes[0],), *args, dx, *sizes, **how)
        else:
            _launch_grid(_norm_bwd_sums, (B * C * parts,), *args, *sizes, **how)
            _launch_grid(_norm_bwd, (B * C * blocks,), *args, dx, *sizes, **how)
        db, dw = sums.sum((1, 3)).to(w.dtype)
        return dx, dw, db, None, None, None


# ---------------------------------------------------------------- from tensors to kernels
class _Fused(torch.autograd.Function):
    """A gate from its two kernels: fwd(inputs, out) and bwd(g, inputs, gradients); g is the gradient of out."""

    @staticmethod
    def forward(ctx, fwd, bwd, *inputs):
        ctx.bwd = bwd
        ctx.save_for_backward(*inputs)  # not z and c: see the top of this file
        inputs = _lay_out(*inputs)
        out = torch.empty_like(inputs[0])
        _launch(fwd, *inputs, out)
        return out

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph=True; a second derivative would silently be zero
            raise RuntimeError("fused gates can be differentiated once; those of rurnet.py can more often")
        g, *inputs = _lay_out(g, *ctx.saved_tensors)
        grads = [torch.empty_like(g) for _ in inputs]
        _launch(ctx.bwd, g, *inputs, *grads)
        return None, None, *grads


def _launch(kernel, x, *others):
    n = x.numel()
    _launch_grid(kernel, (triton.cdiv(n, BLOCK),), x, *others, n, BLOCK=BLOCK)


def _launch_grid(kernel, grid, x, *others, **constants):
    if 0 not in grid:  # or there is nothing to launch
        with torch.cuda.device(x.get_device()):  # Triton launches on the current GPU; a CPU's -1 changes nothing
            kernel[grid](x, *others, **constants)


def _lay_out(*tensors):
    """The same tensors in one memory layout, as an elementwise kernel walks memory from 0 to n: channels last where
    all of them are, else contiguous."""
    last = all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    return [x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) for x in tensors]


def _agreeing(name, **inputs):
    """The inputs, checked to agree in shape, device and dtype; under autocast the widest dtype wins."""
    first, *others = inputs.values()
    if any(x.dtype != first.dtype for x in others) and torch.is_autocast_enabled(first.device.type):
        widest = functools.reduce(torch.promote_types, (x.dtype for x in inputs.values()))  # as + and * do
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
    """Swap the fused gates and norms into every unit and Sequential of the model, in place. Returns the model. A norm
    then computes the ReLU after it. The gates are found where this file lies beside rurnet.py."""
    for layers in [m for m in model.modules() if type(m).forward is torch.nn.Sequential.forward]:
        for i, norm in enumerate(layers):
            if type(norm) is torch.nn.GroupNorm and norm.affine:
                relu = i + 1 < len(layers) and isinstance(layers[i + 1], torch.nn.ReLU)
                layers[i] = FusedNorm(norm, relu)
                if relu:
                    layers[i + 1] = torch.nn.Identity()  # keeps the other layers' names in a checkpoint
    rurnet = sys.modules.get(f"{__package__ or ''}.rurnet".lstrip("."))  # the file beside this one, if in use
    for unit in model.modules() if rurnet else ():
        if getattr(unit, "update", None) is rurnet.gated_update:
            unit.update = fused_update
        if getattr(unit, "reset", None) is rurnet.gated_reset:
            unit.reset = fused_reset
    return model
