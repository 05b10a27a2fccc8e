"""The companion of rurnet.py and gates_triton.py: the equations, then the laws, then the kernels.

Each part compares with something independent: equations in float64, PyTorch's operators, counts.
Without a GPU the kernels run in Triton's interpreter. With one they run compiled.

    python -m pytest -q test_rurnet.py
"""

import contextlib
import inspect
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from math import gcd
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: nothing here is large

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once

import gates_triton
import rurnet
from gates_triton import TRANSFERS, FusedNorm, fuse, fused_reset, fused_update
from rurnet import (DRU, SRU, UNITS, VOID, LastPass, PlainUNet, RecurrentUNet, gated_reset, gated_update,
                    recurrent_loss)  # fmt: skip

settings.register_profile("laws", deadline=None, max_examples=25)
settings.load_profile("laws")
seeds = st.integers(0, 2**31 - 1)
each_network = pytest.mark.parametrize("unit, level", [*itertools.product(["dru", "sru"], range(5))])
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seed_of_zero():
    torch.manual_seed(0)


# ---------------------------------------------------------------- 1. the equations, in float64
@given(shape=st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), seed=seeds)
def test_gates_equal_their_equations(shape, seed):
    torch.manual_seed(seed)
    h, a_z, a_c = 3 * torch.randn(3, *shape, dtype=torch.float64)
    z, c = 1 / (1 + torch.exp(-a_z)), 1 - 2 / (1 + torch.exp(2 * a_c))
    torch.testing.assert_close(gated_update(h, a_z, a_c), z * h + (1 - z) * c)  # eqs. (2), (4), (5)
    torch.testing.assert_close(gated_reset(h, a_z), z * h)  # eq. (3)


# The network a second time, without its classes. p holds its parameters by name, `at` is the name of a part.
def double_conv(p, at, x, groups=8, last_relu=True):
    for conv, relu in (0, True), (3, last_relu):
        x = F.conv2d(x, p[f"{at}.{conv}.weight"], padding=1)
        parts = x.unflatten(1, (gcd(groups, x.shape[1]), -1))
        var, mean = torch.var_mean(parts, (2, 3, 4), keepdim=True, correction=0)
        x = ((parts - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        x = x * p[f"{at}.{conv + 1}.weight"][:, None, None] + p[f"{at}.{conv + 1}.bias"][:, None, None]
        x = x.clamp(min=0) if relu else x
    return x


def encoder(p, at, x):
    skips = []
    while (name := f"{at}.down.{len(skips)}") + ".0.weight" in p:
        groups = 8 if skips else min(8, len(p[f"{name}.0.weight"]) // 4)
        skips.append(double_conv(p, name, x, groups))
        height, width = x.shape[2:]
        x = F.max_pool2d(F.pad(skips[-1], (0, width % 2, 0, height % 2), value=-torch.inf), 2)
    return x, skips


def decoder(p, at, d, skips, last_relu=True):
    for i, skip in enumerate(reversed(skips)):
        up = f"{at}.up.{i}"
        d = F.conv_transpose2d(d, p[f"{up}.up.weight"], p[f"{up}.up.bias"], stride=2)
        d = torch.cat([skip, d[..., : skip.shape[2], : skip.shape[3]]], 1)
        d = double_conv(p, f"{up}.conv", d, last_relu=last_relu or skip is not skips[0])
    return d


def whole_unet(p, at, x, last_relu):
    d, skips = encoder(p, at, x)
    d = double_conv(p, f"{at}.middle", d, last_relu=last_relu or bool(skips))
    return decoder(p, at, d, skips, last_relu)


def one_pass(p, image, mask, h):
    dru = "unit.net_r.middle.0.weight" in p
    e, skips = encoder(p, "outer", torch.cat([image, mask], 1))  # eq. (1)
    z = 1 / (1 + torch.exp(-whole_unet(p, "unit.net_z", e, last_relu=False)))  # eq. (2)
    r = 1 / (1 + torch.exp(-whole_unet(p, "unit.net_r", e, last_relu=False))) if dru else 1  # eq. (3)
    c = torch.tanh(whole_unet(p, "unit.net_c", r * e, last_relu=False))  # eq. (4)
    h = z * h + (1 - z) * c  # eq. (5)
    d = decoder(p, "outer", F.conv2d(h, p["f_s.weight"], p["f_s.bias"]), skips)
    return F.conv2d(d, p["head.weight"], p["head.bias"]), h  # eq. (6)


def away_from_ones_and_zeros(net):
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


@each_network
def test_network_equals_its_equations(unit, level):
    net = away_from_ones_and_zeros(RecurrentUNet(3, unit, level).double())
    for gate in net.unit.children():  # the architecture of the part that it replaces
        assert [conv[0].out_channels for conv in gate.down] == [8, 16, 32, 64][level:]
        assert [part.up.out_channels for part in gate.up] == [64, 32, 16, 8][: 4 - level]
    image, mask = torch.randn(2, 3, 37, 48).double().requires_grad_(), torch.zeros(2, 3, 37, 48).double()
    h = torch.zeros(2, 8 if level == 0 else 16, -(-37 // 2**level), 48 // 2**level).double()
    for got in net(image, 3):
        s, h = one_pass(dict(net.named_parameters()), image, mask, h)
        mask = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
        torch.testing.assert_close(got, s)
    inputs = [image, *net.parameters()]  # the gradient goes through masks and states, and reaches every parameter
    grads = [torch.autograd.grad(last.square().sum(), inputs) for last in (got, s)]
    torch.testing.assert_close(*grads)
    assert all(g.any() for g in grads[0])


def test_plain_unet_equals_its_equations():
    net, image = away_from_ones_and_zeros(PlainUNet(3).double()), torch.randn(2, 3, 37, 48).double()
    d = whole_unet(net.state_dict(), "unet", image, last_relu=True)
    torch.testing.assert_close(net(image), [F.conv2d(d, net.head.weight, net.head.bias)])


@given(passes=st.integers(1, 4), alpha=st.floats(0.1, 1), dice=st.none() | st.floats(0.1, 5), seed=seeds)
def test_loss_equals_its_equation(passes, alpha, dice, seed):
    torch.manual_seed(seed)
    masks, truth = torch.randn(passes, 2, 3, 5, 7, dtype=torch.float64), torch.randint(3, (2, 5, 7))
    truth[0, :2] = VOID
    seen, foreground, want = truth != VOID, (truth != VOID) & (truth > 0), 0.0
    for t, s in enumerate(masks, 1):  # eq. (7), and beside each term dice times 1 - Dice of its definition
        p = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
        terms = [-torch.log(p[b, truth[b, y, x], y, x]) for b, y, x in seen.nonzero().tolist()]
        p = p[:, 1:].sum(1)
        overlap = (2 * p[foreground].sum() + 1) / (p[seen].sum() + foreground.sum() + 1)
        want += alpha ** (passes - t) * (sum(terms) / len(terms) + (dice or 0) * (1 - overlap))
    more = {} if dice is None else {"dice": dice}
    torch.testing.assert_close(recurrent_loss(list(masks), truth, alpha, **more), want)
    shared = recurrent_loss(list(masks), truth, alpha, torch.tensor(2 * len(terms)), **more)  # as of two processes
    torch.testing.assert_close(shared, want / 2)
    void = recurrent_loss(list(masks.requires_grad_()), torch.full_like(truth, VOID), alpha, **more)
    assert void == 0 and not torch.autograd.grad(void, masks)[0].any()


@given(passes=st.integers(1, 4), alpha=st.floats(0.1, 1), seed=seeds)
def test_a_last_pass_is_one_term_of_the_loss_and_its_gradient_stays_there(passes, alpha, seed):
    torch.manual_seed(seed)
    net, image = RecurrentUNet(3, width=2, hidden=3).double(), torch.randn(2, 3, 17, 22, dtype=torch.float64)
    truth, state = torch.randint(3, (2, 17, 22)), net.start(image)
    terms = [alpha ** (passes - n) * recurrent_loss(LastPass(net)(image, n), truth, 1) for n in range(1, passes + 1)]
    torch.testing.assert_close(sum(terms), recurrent_loss(net(image, passes), truth, alpha))
    for _ in range(passes):
        s, state = net.step(image, [x.detach() for x in state])
    names, parameters = zip(*net.named_parameters())
    (got,) = LastPass(net)(image, passes)
    grads = [dict(zip(names, torch.autograd.grad(x.square().sum(), parameters))) for x in (got, s)]
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------- 2. the laws
def test_parameter_counts():
    count = lambda net: sum(parameter.numel() for parameter in net.parameters())
    dru, sru = ([count(RecurrentUNet(2, unit, level)) for level in range(5)] for unit in ("dru", "sru"))
    assert dru == [1_459_359, 1_449_794, 1_380_434, 1_084_914, 364_338]
    assert sru == [973_466, 970_418, 925_746, 728_626, 290_354]
    assert [count(RecurrentUNet(level=level, width=16)) for level in (0, 4)] == [5_823_559, 1_398_498]
    assert count(PlainUNet()) == 486_562


@given(classes=st.integers(2, 6), unit=st.sampled_from(list(UNITS)), level=st.integers(0, 4), batch=st.integers(1, 3),
       passes=st.integers(1, 3), colours=st.integers(1, 4), size=st.tuples(*2 * [st.integers(16, 70)]))  # fmt: skip
def test_any_size_any_batch_any_classes(classes, unit, level, batch, passes, colours, size):
    image = torch.randn(batch, colours, *size)
    masks = RecurrentUNet(classes, unit, level, width=4, image_channels=colours, passes=passes)(image)
    (plain,) = PlainUNet(classes, 4, colours)(image, passes)
    assert len(masks) == passes
    assert all(s.shape == (batch, classes, *size) and s.isfinite().all() for s in (*masks, plain))


@each_network
def test_one_more_pass_changes_no_earlier_mask_and_step_is_forward(unit, level):
    net, image = RecurrentUNet(unit=unit, level=level, width=4), torch.randn(2, 3, 33, 40)
    masks, longer, state = net(image, 2), net(image, 3), net.start(image)
    assert len(masks) == 2 and len(longer) == 3
    for a, b in zip(masks, longer):
        s, state = net.step(image, state)
        assert torch.equal(a, b) and torch.equal(a, s) and torch.equal(s.softmax(1), state[0])
    assert not torch.equal(longer[1], longer[2])  # the state does reach the next mask


def test_autocast_takes_images_in_half_precision():
    net, image = RecurrentUNet(), torch.randn(1, 3, 32, 32).bfloat16()
    want = net(image.float())[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(image)[-1]
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()
    assert recurrent_loss([torch.zeros(1, 2, 400, 400).half()], torch.zeros(1, 400, 400).long(), 1) < 1


def test_bad_calls_say_what_came_and_what_it_must_be():
    net, image = RecurrentUNet(), torch.zeros(1, 3, 32, 32)
    mask, h = net.start(image)
    for wrong, words in [
        (lambda: net(image[0]), r"\(3, 32, 32\).*image\[None\]"),
        (lambda: net(image[:, :2]), r"\(1, 2, 32, 32\).*must be \(B, 3, H, W\)"),
        (lambda: net(image[..., :15]), r"\(1, 3, 32, 15\).*at least 16"),
        (lambda: net(image[:, :, :15]), r"\(1, 3, 15, 32\).*at least 16"),
        (lambda: net(image.byte()), "uint8.*floating point"),
        (lambda: net(image.double()), r"float64.*float32.*image\.to"),
        (lambda: net.start(image[0]), r"\(3, 32, 32\)"),
        (lambda: net(image, 0), "passes is 0.*whole number, at least 1"),
        (lambda: net.step(torch.zeros(1, 3, 48, 32), (mask, h)), r"state.*call start"),
        (lambda: net.step(image.byte(), (mask, h)), "uint8.*floating point"),
        (lambda: net.step(image, (image, h)), r"state is \(\(1, 3, 32, 32\), .*needs \(\(1, 2, 32, 32\)"),
        (lambda: net.step(image, (mask, h[..., :1])), r"\(1, 16, 2, 1\)\), .*\(1, 16, 2, 2\)\)"),
        (lambda: PlainUNet()(image[0]), r"\(3, 32, 32\)"),
        (lambda: recurrent_loss(mask, mask[:, 0].long(), 0.4), r"masks is a tensor \(1, 2, 32, 32\).*a list of logits"),
        (lambda: recurrent_loss([mask], mask[:, :1].long(), 1), r"int64 \(1, 1, 32, 32\).*ids, int64 \(1, 32, 32\)"),
        (lambda: recurrent_loss([mask], mask[:, 0].byte(), 1), "truth is torch.uint8"),
        (lambda: LastPass(net)(image, 0), "n is 0.*at least 1"),
        (lambda: RecurrentUNet(classes=1), "classes is 1.*at least 2"),
        (lambda: RecurrentUNet(unit="gru"), "'gru'.*dru, sru"),
        (lambda: RecurrentUNet(level=5), "level is 5.*0 to 4"),
        (lambda: RecurrentUNet(level=-1), "level is -1"),
        (lambda: RecurrentUNet(level=2.0), "level is 2.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()
    counts = ["classes", "width", "image_channels", "hidden", "passes"]
    for build, name, n in itertools.product((PlainUNet, RecurrentUNet), counts, (0, 2.0, True)):
        if build is RecurrentUNet or name in counts[:3]:
            with pytest.raises(ValueError, match=f"{name} is {n}; it must be a whole number, at least"):
                build(**{name: n})


def test_copies_work_alone_and_in_a_package_and_without_triton(tmp_path):
    (tmp_path / "package").mkdir()
    for name in "rurnet.py", "package/rurnet.py", "package/gates_triton.py":
        shutil.copy(HERE / Path(name).name, tmp_path / name)
    code = """if True:
        import sys
        sys.path.insert(0, "")
        sys.modules["triton"] = None  # makes `import triton` fail
        import rurnet, torch
        image = torch.randn(1, 3, 20, 30)
        assert rurnet.RecurrentUNet()(image)[-1].shape == (1, 2, 20, 30)
        from package import gates_triton, rurnet
        net = rurnet.RecurrentUNet()
        want = net(image)
        gates_triton.fuse(net)
        assert net.unit.update is gates_triton.fused_update and net.unit.reset is gates_triton.fused_reset
        assert isinstance(net.outer.down[0][1], gates_triton.FusedNorm) and gates_triton.triton is None
        assert all(map(torch.equal, net(image), want))"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- 3. the kernels: the gates
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # its rounding is larger than these tolerances
needs_triton = pytest.mark.skipif(gates_triton.triton is None, reason="triton is not installed")

GATES = {"update": (fused_update, gated_update), "reset": (fused_reset, gated_reset)}  # fused, plain
each_gate = pytest.mark.parametrize("fused, plain", [pytest.param(*gate, id=name, marks=needs_triton)
                                                     for name, gate in GATES.items()])  # fmt: skip

# Errors are relative to 1 + |result|, because z h + (1 - z) c and h - c cancel.
# float32: 1 - z has z's rounding error of 6e-8, however small it is, and multiplies g (h - c), up to 25 here.
# Half precision is rounded once, at the store, by half a unit: 2^-11 in float16, 2^-8 in bfloat16.
# The interpreter truncates bfloat16 instead, by up to 2^-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 1.1 * 2**-11,
             torch.bfloat16: 1.1 * 2 ** (-8 if DEVICE == "cuda" else -7)}  # fmt: skip
LAYOUTS = {  # the values of x, laid out in memory in another way
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "chunk": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1).chunk(2, dim=1)[0],
    "sliced": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "shifted": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),  # in its address
    "expanded": lambda x: x[:1].clone().expand(x.shape),  # the values of the first sample alone
}


@contextlib.contextmanager
def watched_memory():
    """New tensors hold NaN, so an element that no kernel writes shows. The sevens after them must stay."""
    buffers = []

    def watched(x):
        buffer = torch.full((x.numel() + 4096,), 7.0, dtype=x.dtype, device=x.device)
        buffers.append(buffer[x.numel() :])
        return x.set_(buffer.untyped_storage(), 0, x.shape, x.stride()).fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        for make in torch.empty, torch.empty_like:
            patch.setattr(torch, make.__name__, lambda *a, make=make, **more: watched(make(*a, **more)))
        yield
    assert all((after == 7).all() for after in buffers)


def assert_all_close(names, got, want, rtol, atol, **more):
    """Names what differs. `want` may be more precise."""
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}", **more)


def inputs_of(plain):
    return list(inspect.signature(plain).parameters)


def check_gate(fused, plain, inputs=None, g=None):
    """The fused gate and its gradients, by name, against the plain gate in float64: `check_gate(mine, plain)`.

    inputs, g    of any one shape and dtype; by default random, with a ragged last block
    """
    names = inputs_of(plain)
    if inputs is None:
        g, *inputs = torch.randn(1 + len(names), 3, 683, device=DEVICE)
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = plain(*exact)
    with watched_memory(), mock.patch.object(gates_triton, "_launch", wraps=gates_triton._launch) as launch:
        got = fused(*inputs)
        assert launch.called, "no kernel ran"
        got.backward(g)
        want.backward(g.double())
    assert got.dtype == g.dtype and got.shape == g.shape
    got, want = [got, *(x.grad for x in inputs)], [want, *(x.grad for x in exact)]
    assert_all_close(["result", *names], got, want, rtol=TOLERANCE[g.dtype], atol=TOLERANCE[g.dtype])


@each_gate
@settings(max_examples=60)
@given(shape=st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), dtype=st.sampled_from(list(TOLERANCE)), seed=seeds,
       layouts=st.tuples(*9 * [st.sampled_from(list(LAYOUTS))]), scale=st.sampled_from([1e-3, 1, 4]))  # fmt: skip
def test_fused_gate_is_the_gate(fused, plain, shape, dtype, layouts, scale, seed):
    """For any shape and dtype, and any mixture of layouts among inputs and gradient."""
    torch.manual_seed(seed)
    scales = (1, 1, *[scale] * len(layouts))  # scale: of the arguments of sigmoid and tanh
    new = [LAYOUTS[lay]((torch.randn(shape) * s).to(DEVICE, dtype)) for s, lay in zip(scales, layouts)]
    g, *inputs = new[: 1 + len(inputs_of(plain))]
    check_gate(fused, plain, inputs, g)


@each_gate
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1023,), (1024,), (1025,)], ids=str)
def test_fused_gate_at_the_edges_of_a_block(fused, plain, shape):
    g, *inputs = torch.randn(1 + len(inputs_of(plain)), *shape, device=DEVICE)
    check_gate(fused, plain, inputs, g)


@needs_triton
def test_fused_tanh_is_within_two_units_in_the_last_place():
    """For a_z = -inf the gate is tanh(a_c) alone. Points are densest at 1.05, where the polynomial ends."""
    dense = torch.linspace(0, 12, 20001), torch.linspace(1.04, 1.06, 9001), torch.logspace(-37, 2, 9001)
    x = torch.cat([*dense, torch.tensor([0.0, 88.8, 1e4, 1e38])])
    x = torch.cat([x, -x]).to(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in the interpreter, numpy warns of an overflow
        got = fused_update(torch.zeros_like(x), torch.full_like(x, -torch.inf), x).cpu().numpy()
        fused_update(torch.zeros_like(x), x, x)
        fused_reset(x, x)
    exact = np.tanh(x.cpu().double().numpy())
    off = np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))
    most = 2 if DEVICE == "cpu" else 3  # a GPU's ex2.approx has up to two units of its own
    assert off.max() <= most, f"{off.max():.2f} units at {x[off.argmax()]}"
    assert ((got == 0) == (x.cpu().numpy() == 0)).all()  # nothing small is lost


@each_gate
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")  # in the interpreter, numpy warns of inf * 0
def test_fused_gate_treats_inf_and_nan_as_pytorch(fused, plain, dtype):
    special = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, torch.inf, torch.nan], dtype=dtype, device=DEVICE)
    names, results = inputs_of(plain), []
    for function in fused, plain:
        inputs = [x.requires_grad_() for x in torch.cartesian_prod(*[special] * len(names)).unbind(1)]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    assert_all_close(["result", *names], *results, rtol=1e-2, atol=1e-2, equal_nan=True)


@each_gate
@pytest.mark.parametrize("other, message", [
    (torch.zeros(3), r"one shape, .*: torch.Size\(\[2, 3\]\), .*: torch.Size\(\[3\]\)"),
    (torch.zeros(2, 3).half(), r"one dtype, .*: torch.float32, .*: torch.float16"),
    (torch.zeros(2, 3, device="meta"), r"one device, .*: cpu, .*: meta"),
])  # fmt: skip
def test_fused_gate_names_what_does_not_agree(fused, plain, other, message):
    x, names = torch.zeros(2, 3), inputs_of(plain)
    with pytest.raises(ValueError, match=f"{fused.__name__} .*{message}") as error:
        fused(*[x] * (len(names) - 1), other)
    assert all(f"{name}: " in str(error.value) for name in names)
    with pytest.raises(ValueError, match="not torch.int32"):
        fused(*[x.int()] * len(names))


def test_fused_gate_under_autocast_takes_what_the_plain_one_takes():
    """There a gate network that ends in a convolution returns half precision, and the state is float32."""
    h, a = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = fused_update(h, a, a)
    torch.testing.assert_close(got, gated_update(h, a.float(), a.float()), rtol=1e-6, atol=1e-6)


class CountedOperators(TorchDispatchMode):
    """Counts the elements that PyTorch's operators read and write, and the copies among the operators."""

    elements = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.copies += func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default)
        if func is torch.ops.aten.fill_.Scalar:
            self.elements += out.numel()  # written, not read
        elif not func.is_view and func is not torch.ops.aten.empty_like.default:
            results = out if isinstance(out, tuple) else (out,)
            self.elements += sum(x.numel() for x in (*args, *results) if isinstance(x, torch.Tensor))
        return out


@needs_triton
@pytest.mark.parametrize("layouts, copies, strides", [
    ("contiguous contiguous contiguous contiguous", 0, (60, 20, 5, 1)),
    ("channels_last channels_last channels_last channels_last", 0, (60, 1, 15, 3)),
    ("contiguous contiguous contiguous channels_last", 1, (60, 20, 5, 1)),  # the gradient
    ("chunk contiguous contiguous contiguous", 2, (60, 20, 5, 1)),  # forward and backward
])  # fmt: skip
def test_fused_gate_copies_only_what_is_laid_out_otherwise(layouts, copies, strides, monkeypatch):
    monkeypatch.setattr(gates_triton, "_launch", lambda *args: None)  # the interpreter makes its own copies
    *inputs, g = [LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=DEVICE)) for layout in layouts.split()]
    inputs = [x.detach().requires_grad_() for x in inputs]
    with CountedOperators() as counter:
        out = fused_update(*inputs)
        grads = torch.autograd.grad(out, inputs, g)
    assert counter.copies == copies and all(x.stride() == strides for x in (out, *grads))


@pytest.mark.parametrize("name, column, function", [
    *((name, 1, plain) for name, (_, plain) in GATES.items()),
    ("update", 2, lambda h, a_z, a_c: a_c.tanh().lerp(h, a_z.sigmoid())),
    ("norm", 1, lambda x: F.group_norm(x, 2, torch.ones(8), torch.ones(8)).relu_()),
])  # fmt: skip
def test_transfers_of_eager_pytorch_are_those_of_the_table(name, column, function):
    """Eager PyTorch sends the inputs and the output of every operator through memory."""
    inputs = [torch.randn(100, 8, 16, 16, requires_grad=True) for _ in inputs_of(function)]
    with CountedOperators() as forward:
        out = function(*inputs)
    g = torch.ones_like(out)
    with CountedOperators() as backward:
        torch.autograd.grad(out, inputs, g)
    # Group norm counts once, as one operator. But after its sums it reads x again, and backward g and x.
    again = (1, 2) if name == "norm" else (0, 0)
    assert round(forward.elements / g.numel()) + again[0] == TRANSFERS[name]["forward"][column]
    assert round(backward.elements / g.numel()) + again[1] == TRANSFERS[name]["backward"][column]


@each_gate
def test_fused_gate_saves_its_inputs_for_backward_and_nothing_else(fused, plain):
    saved, inputs = [], [torch.randn(1 + k % 2, 3, device=DEVICE) for k in range(len(inputs_of(plain)))]
    inputs = [x.expand(2, 3).requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = fused(*inputs)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in inputs]  # no copies
    with pytest.raises(RuntimeError, match="differentiated once"):  # and not a second derivative of zero
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


# ---------------------------------------------------------------- 3. the kernels: the norm
@needs_triton
@given(batch=st.integers(0, 2), groups=st.integers(1, 3), width=st.integers(1, 4), relu=st.booleans(), seed=seeds,
       size=st.tuples(*2 * [st.integers(1, 7)]), layouts=st.tuples(*2 * [st.sampled_from(list(LAYOUTS)[:-1])]),
       once=st.sampled_from([0, 64, 16384]), dtype=st.sampled_from(list(TOLERANCE)))  # fmt: skip
def test_fused_norm_is_group_norm_and_relu(batch, groups, width, relu, seed, size, dtype, once, layouts):
    torch.manual_seed(seed)
    x, g = torch.randn(2, batch, groups * width, *size).to(DEVICE, dtype)
    norm = nn.GroupNorm(groups, groups * width, eps=0.1)  # where numbers are equal, their deviation is an error
    for p in norm.to(DEVICE, torch.promote_types(dtype, torch.float32)).parameters():
        nn.init.normal_(p)
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    want = torch.group_norm(exact[0], groups, *exact[1:], norm.eps)  # F.group_norm refuses a group of one
    if relu:
        g = g * (want.abs() > 1e-2)  # at the corner of the ReLU, rounding decides what the gradient is
        want = want.relu()
    want = want, *torch.autograd.grad(want, exact, g.double())
    x, g = (LAYOUTS[layout](v).detach() for layout, v in zip(layouts, (x, g)))
    x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch, watched_memory():
        patch.setattr(gates_triton, "ONCE", once)  # 0: never a group in one program
        patch.setattr(gates_triton, "SPAN", 16)  # many parts of small channels
        got = FusedNorm(norm, relu)(x)
        got = got, *torch.autograd.grad(got, [x, norm.weight, norm.bias], g)
    assert got[0].dtype == dtype and got[0].shape == x.shape
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2)
    for name, a, b in zip(["result", "dx", "dweight", "dbias"], got, want):
        scale = 1 + max(b.abs().flatten().tolist(), default=0)  # as large are the terms of a sum that cancels
        assert_all_close([name], [a], [b], rtol=rtol, atol=rtol * scale)


@needs_triton
@pytest.mark.parametrize("once", [0, 16384])  # in parts of nine blocks, or a group in one program
def test_fused_norm_sees_what_is_small_beside_its_mean(once, monkeypatch):
    """Around 1e4 a plain sum of squares loses a spread of 1, because 1e8 has seven digits in float32."""
    many = 2, 9, dict(SPLITS=4, SPAN=512, BLOCK=64)
    monkeypatch.setattr(gates_triton, "_plan", lambda *at, plan=gates_triton._plan: plan(*at) if once else many)
    x = torch.randn(1, 2, 1, 570).to(DEVICE) + 1e4
    x[..., :64] += 30  # the first block of each part is far from the mean of the rest
    want = F.group_norm(x.double(), 1)
    assert (FusedNorm(nn.GroupNorm(1, 2, device=DEVICE), False)(x) - want).abs().max() < 1e-3  # x is rounded so


@needs_triton
def test_fused_norm_passes_nan_on_and_refuses_what_it_cannot_do():
    fused = FusedNorm(nn.GroupNorm(2, 4, device=DEVICE), relu=True)
    x = torch.randn(2, 4, 3, 5, device=DEVICE)
    x[0, 1, 2, 3] = torch.nan
    assert fused(x).isnan().flatten(1).sum(1).tolist() == [30, 0]  # its group, and no other
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(fused(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"4 channels on .*, and got \(2, 6, 3, 5\)"):
        fused(torch.zeros(2, 6, 3, 5, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("shape, kernels", [
    ((3, 4, 64, 128), "_group_fwd 6, _group_bwd 6"),  # 2 x 8192 elements: as much as one program holds
    ((3, 4, 64, 129), "_norm_sums 36, _norm_fwd 36, _norm_bwd_sums 36, _norm_bwd 36"),  # 3 parts of 12 channels
    ((1, 4, 1024, 1024), "_norm_sums 512, _norm_fwd 1024, _norm_bwd_sums 512, _norm_bwd 1024"),  # 2 x 128 parts
])  # fmt: skip
def test_a_norms_grid_has_one_axis_and_few_parts(shape, kernels, monkeypatch):
    """CUDA takes 65,535 programs along the other axes: 512 photos of 128 channels would be one too many."""
    grids = []
    add = lambda kernel, grid, *args, **how: grids.append(f"{kernel.fn.__name__} {', '.join(map(str, grid))}")
    monkeypatch.setattr(gates_triton, "_launch_grid", add)
    x = torch.empty(1, device=DEVICE).expand(shape).requires_grad_()
    FusedNorm(nn.GroupNorm(2, 4, device=DEVICE), True)(x).sum().backward()
    assert ", ".join(grids) == kernels


# ---------------------------------------------------------------- 3. the kernels: units and networks
def test_a_fused_network_is_the_network():
    plain, fused = (RecurrentUNet(level=3, width=2, hidden=4).to(DEVICE) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    assert fuse(fused) is fused
    norms = [m for m in fused.modules() if isinstance(m, nn.GroupNorm)]
    relus = [sum(isinstance(m, nn.ReLU) for m in net.modules()) for net in (plain, fused)]
    assert {type(m) for m in norms} == {FusedNorm} and relus == [sum(m.relu for m in norms), 0]
    image, results = torch.randn(1, 3, 18, 21, device=DEVICE, requires_grad=True), []
    state = [torch.randn_like(x) for x in plain.start(image)]  # of a pass in the middle
    for net in fused, plain:
        s, (_, h) = net.step(image, state)
        inputs = {"image": image} | dict(net.named_parameters())
        results.append([s, h, *torch.autograd.grad(s.square().sum(), inputs.values())])
    assert_all_close(["s", "h", *inputs], *results, rtol=1e-4, atol=1e-4)


def test_fuse_swaps_what_it_knows_and_leaves_the_rest(monkeypatch):
    def gated_update(h, a_z, a_c):
        return h

    net = fuse(fuse(RecurrentUNet()))  # a second time changes nothing
    assert net.unit.update is fused_update and net.unit.reset is fused_reset
    own = fuse(DRU(2, 4, update=gated_update))  # the same name, but not rurnet's function
    assert own.update is gated_update and own.reset is fused_reset
    bare = fuse(nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.ReLU()))  # has no weight to read
    assert [type(layer) for layer in bare] == [nn.GroupNorm, nn.ReLU]
    sums = fuse(type("Sums", (nn.Sequential,), {"forward": None})(nn.GroupNorm(2, 4), nn.ReLU()))  # has its own order
    assert [type(layer) for layer in sums] == [nn.GroupNorm, nn.ReLU]
    frozen = fuse(nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()).eval())
    assert not frozen[0].relu and not frozen[0].training and isinstance(frozen[1], nn.Tanh)
    monkeypatch.delitem(sys.modules, "rurnet")  # a project without rurnet.py can fuse its norms
    other = fuse(SRU(2, 4))
    assert other.update is rurnet.gated_update and isinstance(other.net_z[1], FusedNorm)


def test_a_fused_network_on_a_cpu_is_exported_traced_and_compiled():
    plain, image = RecurrentUNet(passes=1, width=2).eval(), torch.randn(1, 3, 16, 16)
    model = fuse(RecurrentUNet(passes=1, width=2)).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of rurnet's checks, and that it is deprecated
        exported = torch.export.export(model, (image,))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        traced = torch.jit.trace(model, image, check_trace=False)
        assert not any("triton" in str(node.target) for node in exported.graph.nodes)
        for form in exported.module(), compiled, traced:
            torch.testing.assert_close(form(image)[-1], plain(image)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_fused_network_on_a_gpu_runs_compiled_and_from_a_cuda_graph():
    model, image = fuse(RecurrentUNet()).cuda(), torch.randn(2, 3, 48, 64, device="cuda")
    with torch.no_grad():
        want = model(image)[-1]
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(image)[-1], want, rtol=1e-3, atol=1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(image)[-1]
        graph.replay()
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
