"""The companion of rurnet.py and gates_triton.py: the equations, then the laws, then the kernels.

Every result is compared with something written independently: an equation in float64, an operator of PyTorch, a count.
Without a GPU the kernels run in Triton's interpreter, with one they run compiled.

    python -m pytest -q test_rurnet.py
"""

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: nothing here is large

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: afterwards the kernels fail in confusing ways

import gates_triton
import rurnet
from gates_triton import PASSES, FusedNorm, fuse, fused_reset, fused_update
from rurnet import DRU, SRU, VOID, PlainUNet, RecurrentUNet, UNet, gated_reset, gated_update, recurrent_loss

law = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)
each_unit = pytest.mark.parametrize("unit", ["dru", "sru"])
each_level = pytest.mark.parametrize("level", range(5))


@pytest.fixture(autouse=True)
def seed_of_zero():
    torch.manual_seed(0)


# ---------------------------------------------------------------- 1. the equations, in float64


@law
@given(shape=st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), seed=seeds)
def test_gates_equal_their_equations(shape, seed):
    h, a_z, a_c = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    z, c = 1 / (1 + torch.exp(-a_z)), 1 - 2 / (1 + torch.exp(2 * a_c))
    torch.testing.assert_close(gated_update(h, a_z, a_c), z * h + (1 - z) * c)  # eqs. (2), (4), (5)
    torch.testing.assert_close(gated_reset(h, a_z), z * h)  # eq. (3)


# The network a second time, without its classes. p is its state dict, `at` a prefix of names in it.


def linear(p, at, x):
    """A 1x1 convolution."""
    return torch.einsum("oi,bihw->bohw", p[f"{at}.weight"][..., 0, 0], x) + p[f"{at}.bias"][:, None, None]


def double_conv(p, at, x, groups=8, last_relu=True):
    for conv, relu in (0, True), (3, last_relu):
        x = F.conv2d(x, p[f"{at}.{conv}.weight"], padding=1)
        parts = x.unflatten(1, (groups, -1))
        mean, var = parts.mean((2, 3, 4), keepdim=True), parts.var((2, 3, 4), keepdim=True, correction=0)
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
        d = torch.einsum("iouv,bihw->bohuwv", p[f"{up}.up.weight"], d).flatten(2, 3).flatten(3, 4)
        d = (d + p[f"{up}.up.bias"][:, None, None])[..., : skip.shape[2], : skip.shape[3]]
        d = double_conv(p, f"{up}.conv", torch.cat([skip, d], 1), last_relu=last_relu or skip is not skips[0])
    return d


def whole_unet(p, at, x, last_relu):
    d, skips = encoder(p, at, x)
    d = double_conv(p, f"{at}.middle", d, last_relu=last_relu or bool(skips))
    return decoder(p, at, d, skips, last_relu)


def one_pass(p, image, mask, h):
    dru = any(name.startswith("unit.net_r") for name in p)
    e, skips = encoder(p, "outer", torch.cat([image, mask], 1))  # eq. (1)
    z = 1 / (1 + torch.exp(-whole_unet(p, "unit.net_z", e, last_relu=False)))  # eq. (2)
    r = 1 / (1 + torch.exp(-whole_unet(p, "unit.net_r", e, last_relu=False))) if dru else 1  # eq. (3)
    c = torch.tanh(whole_unet(p, "unit.net_c", r * e, last_relu=False))  # eq. (4)
    h = z * h + (1 - z) * c  # eq. (5)
    s = linear(p, "head", decoder(p, "outer", linear(p, "f_s", h), skips))  # eq. (6)
    return s, h


def away_from_ones_and_zeros(net):
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


@each_unit
@each_level
def test_network_equals_its_equations(unit, level):
    net = away_from_ones_and_zeros(RecurrentUNet(3, unit, level).double())
    image = torch.randn(2, 3, 37, 48).double()
    mask = torch.zeros(2, 3, 37, 48).double()
    h = torch.zeros(2, 8 if level == 0 else 16, -(-37 // 2**level), 48 // 2**level).double()
    for got in net(image, 3):
        s, h = one_pass(net.state_dict(), image, mask, h)
        mask = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
        torch.testing.assert_close(got, s)


def test_plain_unet_equals_its_equations():
    net, image = away_from_ones_and_zeros(PlainUNet(3).double()), torch.randn(2, 3, 37, 48).double()
    p = net.state_dict()
    torch.testing.assert_close(net(image), [linear(p, "head", whole_unet(p, "unet", image, last_relu=True))])


@law
@given(passes=st.integers(1, 4), alpha=st.floats(0.1, 1), seed=seeds)
def test_loss_equals_its_equation(passes, alpha, seed):
    rng = torch.Generator().manual_seed(seed)
    masks = torch.randn(passes, 2, 3, 5, 7, dtype=torch.float64, generator=rng)
    truth = torch.randint(3, (2, 5, 7), generator=rng)
    truth[0, :2] = VOID
    want = 0.0
    for t, s in enumerate(masks, 1):  # eq. (7)
        p = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
        entropies = [-torch.log(p[b, truth[b, y, x], y, x]) for b, y, x in (truth != VOID).nonzero().tolist()]
        want += alpha ** (passes - t) * sum(entropies) / len(entropies)
    torch.testing.assert_close(recurrent_loss(list(masks), truth, alpha), want)
    shared = recurrent_loss(list(masks), truth, alpha, pixels=torch.tensor(2 * len(entropies)))
    torch.testing.assert_close(shared, want / 2)


def test_a_batch_of_void_alone_has_no_loss_and_no_gradient():
    s = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = recurrent_loss([s, s], torch.full((1, 4, 4), VOID), 0.4)
    loss.backward()
    assert loss == 0 and not s.grad.any()


# ---------------------------------------------------------------- 2. the laws


def size_of(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameter_counts():
    dru = [size_of(RecurrentUNet(level=level)) for level in range(5)]
    sru = [size_of(RecurrentUNet(unit="sru", level=level)) for level in range(5)]
    assert dru == [1_459_359, 1_449_794, 1_380_434, 1_084_914, 364_338]
    assert sru == [973_466, 970_418, 925_746, 728_626, 290_354]
    assert [size_of(RecurrentUNet(level=level, width=16)) for level in (0, 4)] == [5_823_559, 1_398_498]
    assert size_of(PlainUNet()) == 486_562


@each_level
def test_gates_have_the_architecture_of_the_part_that_they_replace(level):
    def convolutions(net):
        return [(type(m), m.weight.shape) for m in net.modules() if hasattr(m, "kernel_size")]

    widths = (8, 16, 32, 64, 128)
    replaced = convolutions(UNet(widths[level - 1] if level else 5, widths[level:]))
    for net in RecurrentUNet(level=level).unit.children():
        gate = convolutions(net)
        assert [kind for kind, _ in gate] == [kind for kind, _ in replaced]
        assert gate[:-2] == replaced[:-2]  # the last DoubleConv ends in the channels of h or e


@law
@given(
    batch=st.integers(1, 3), classes=st.integers(2, 6), size=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    level=st.integers(0, 4), unit=st.sampled_from(["dru", "sru"]), passes=st.integers(1, 3), channels=st.integers(1, 4),
)  # fmt: skip
def test_any_size_any_batch_any_classes(batch, classes, size, level, unit, passes, channels):
    image = torch.randn(batch, channels, *size)
    masks = RecurrentUNet(classes, unit, level, width=4, image_channels=channels, passes=passes)(image)
    assert [tuple(s.shape) for s in masks] == [(batch, classes, *size)] * passes
    assert all(s.isfinite().all() for s in masks)
    (s,) = PlainUNet(classes, 4, channels)(image, passes)
    assert s.shape == masks[0].shape


@each_unit
@each_level
def test_one_more_pass_changes_no_earlier_mask_and_step_is_forward(unit, level):
    net, image = RecurrentUNet(unit=unit, level=level, width=4), torch.randn(2, 3, 33, 40)
    masks, longer, state = net(image, 2), net(image, 3), net.start(image)
    assert len(masks) == 2 and len(longer) == 3
    for a, b in zip(masks, longer):
        s, state = net.step(image, state)
        assert torch.equal(a, b) and torch.equal(a, s) and torch.equal(s.softmax(1), state[0])
    assert not torch.equal(longer[1], longer[2])  # the state does reach the next mask


@each_unit
@each_level
def test_a_mask_does_not_depend_on_its_batch_mates(unit, level):
    net, images = RecurrentUNet(unit=unit, level=level, width=4).double(), torch.randn(3, 3, 32, 35).double()
    for together, alone in zip(net(images)[-1], images):
        torch.testing.assert_close(together, net(alone[None])[-1][0])


@each_unit
@each_level
def test_gradients_reach_every_parameter(unit, level):
    net = RecurrentUNet(unit=unit, level=level)
    recurrent_loss(net(torch.randn(2, 3, 48, 40)), torch.randint(2, (2, 48, 40)), 0.4).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("build", [RecurrentUNet, lambda: RecurrentUNet(unit="sru", level=2, width=4), PlainUNet])
def test_training_makes_the_loss_fall(build):
    net, truth = build(), torch.zeros(2, 32, 32, dtype=torch.long)
    truth[0, 5:20, 8:30] = truth[1, 12:28, 3:17] = 1
    image = torch.randn(2, 3, 32, 32) + truth[:, None]
    optimiser, losses = torch.optim.AdamW(net.parameters(), lr=4e-3), []
    for _ in range(25):
        losses.append(recurrent_loss(net(image), truth, 0.4))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_takes_images_in_half_precision():
    net, image = RecurrentUNet(), torch.randn(1, 3, 32, 32).bfloat16()
    want = net(image.float())[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(image)[-1]
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()


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
        (lambda: net(image, 2.5), "passes is 2.5"),
        (lambda: net.step(torch.zeros(1, 3, 48, 32), (mask, h)), r"state.*call start"),
        (lambda: net.step(image, (image, h)), r"state is \(\(1, 3, 32, 32\), .*needs \(\(1, 2, 32, 32\)"),
        (lambda: net.step(image, (mask, h[..., :1])), r"\(1, 16, 2, 1\)\), .*\(1, 16, 2, 2\)\)"),
        (lambda: PlainUNet()(image[0]), r"\(3, 32, 32\)"),
        (lambda: PlainUNet(classes=1), "classes is 1.*at least 2"),
        (lambda: PlainUNet(width=0), "width is 0"),
        (lambda: PlainUNet(image_channels=0), "image_channels is 0"),
        (lambda: RecurrentUNet(unit="gru"), "'gru'.*dru, sru"),
        (lambda: RecurrentUNet(level=5), "level is 5.*0 to 4"),
        (lambda: RecurrentUNet(level=-1), "level is -1"),
        (lambda: RecurrentUNet(level=2.0), "level is 2.0"),
        (lambda: RecurrentUNet(passes=True), "passes is True"),
        (lambda: RecurrentUNet(classes=1), "classes is 1.*at least 2"),
        (lambda: RecurrentUNet(width=0), "width is 0"),
        (lambda: RecurrentUNet(hidden=0), "hidden is 0"),
        (lambda: RecurrentUNet(passes=0), "passes is 0"),
        (lambda: RecurrentUNet(image_channels=0), "image_channels is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()


HERE = Path(__file__).parent


def run_python(code, at):
    """In a new process outside of Triton's interpreter, which imports from the folder `at` and from no other of ours."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(at)!r})\n" + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, cwd=at, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_copying_rurnet_alone_works(tmp_path):
    shutil.copy(HERE / "rurnet.py", tmp_path)
    use = "import torch; from rurnet import RecurrentUNet; print(*RecurrentUNet()(torch.zeros(1, 3, 20, 30))[-1].shape)"
    assert run_python(use, tmp_path) == "1 2 20 30"


def test_both_files_work_in_a_package_and_without_triton(tmp_path):
    (tmp_path / "package").mkdir()
    for name in "rurnet.py", "gates_triton.py":
        shutil.copy(HERE / name, tmp_path / "package")
    use = """
        sys.modules["triton"] = None  # makes `import triton` fail
        import torch
        from package.gates_triton import FusedNorm, fuse, fused_reset, fused_update, triton
        from package.rurnet import RecurrentUNet, gated_reset, gated_update
        assert triton is None
        x = torch.linspace(-3, 3, 7)
        assert torch.equal(fused_update(x, 2 * x, -x), gated_update(x, 2 * x, -x))
        assert torch.equal(fused_reset(x, 2 * x), gated_reset(x, 2 * x))
        net, image = RecurrentUNet(), torch.randn(1, 3, 16, 16)
        want = net(image)
        fuse(net)
        assert net.unit.update is fused_update and net.unit.reset is fused_reset
        assert any(isinstance(m, FusedNorm) for m in net.modules())
        print(all(map(torch.equal, net(image), want)))
    """
    assert run_python(use, tmp_path) == "True"


# ---------------------------------------------------------------- 3. the kernels: the gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # its rounding would be larger than every difference that is looked for here
needs_triton = pytest.mark.skipif(gates_triton.triton is None, reason="triton is not installed: nothing is fused")

GATES = {  # the fused function, the same from PyTorch's operators, and the names of its inputs
    "update": (fused_update, lambda h, a_z, a_c: torch.lerp(torch.tanh(a_c), h, torch.sigmoid(a_z)), ("h", "a_z", "a_c")),
    "reset": (fused_reset, lambda e, a_r: e * torch.sigmoid(a_r), ("e", "a_r")),
}
each_gate = pytest.mark.parametrize("gate", GATES)

# Errors are relative to 1 + |result|, because z h + (1 - z) c and h - c cancel.
# float32: 1 - z has z's rounding error of 6e-8, however small 1 - z is, and multiplies g (h - c), up to 25 here.
# Half precision is rounded once, at the store, by half a unit: 2^-11 in float16, 2^-8 in bfloat16. The interpreter
# truncates bfloat16 instead, by up to 2^-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 1.1 * 2**-11,
             torch.bfloat16: 1.1 * 2**(-8 if DEVICE == "cuda" else -7)}  # fmt: skip
LAYOUTS = ["contiguous", "channels_last", "transposed", "chunk", "sliced", "shifted", "expanded"]


def lay(x, layout):
    """The values of x in another memory layout. An expanded tensor has those of the first sample alone."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "chunk":  # the first half of the channels of a wider tensor, the other half NaN
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1).chunk(2, dim=1)[0]
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if layout == "shifted":  # dense, but its address is no multiple of 16
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    return x


def check_gate(gate, inputs, g, needed):
    """The fused gate and its gradients, by name, against float64. `needed` says which inputs require a gradient."""
    fused, oracle, names = GATES[gate]
    inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
    exact = [x.detach().double().requires_grad_(need) for x, need in zip(inputs, needed)]
    empty_like = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:  # new memory holds NaN, so an element that no kernel writes shows
        patch.setattr(torch, "empty_like", lambda *args, **more: empty_like(*args, **more).fill_(torch.nan))
        got, want = fused(*inputs), oracle(*exact)
        if any(needed):
            got.backward(g)
            want.backward(g.double())
    assert got.dtype == inputs[0].dtype and got.shape == inputs[0].shape
    assert all(need or x.grad is None for x, need in zip(inputs, needed))
    pairs = zip(names, inputs, exact, needed)
    results = [("result", got, want), *((f"d{name}", x.grad, y.grad) for name, x, y, need in pairs if need)]
    tol = TOLERANCE[got.dtype]
    for name, x, y in results:
        torch.testing.assert_close(x.double(), y, rtol=tol, atol=tol, msg=lambda m, name=name: f"{gate}, {name}: {m}")


@needs_triton
@each_gate
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fused_gate_is_the_gate(gate, data):
    """For any shape, dtype and choice of gradients, and any mixture of layouts among inputs and gradient."""
    count = len(GATES[gate][2])
    shape = data.draw(st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), label="shape")
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    layouts = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=count + 1, max_size=count + 1), label="layouts")
    needed = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label="needed")
    scale = data.draw(st.sampled_from([1e-3, 1, 4]), label="scale")  # of the arguments of sigmoid and tanh
    rng = torch.Generator().manual_seed(data.draw(seeds, label="seed"))
    values = [torch.randn(shape, generator=rng) * s for s in (1, *[scale] * (count - 1), 1)]
    *inputs, g = [lay(x.to(DEVICE, dtype), layout) for x, layout in zip(values, layouts)]
    check_gate(gate, inputs, g, needed)


@needs_triton
@each_gate
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1023,), (1024,), (1025,), (2048,), (3, 1, 683)], ids=str)
def test_fused_gate_at_the_edges_of_a_block(gate, shape):
    *inputs, g = [torch.randn(shape, device=DEVICE) for _ in (*GATES[gate][2], "g")]
    check_gate(gate, inputs, g, [True] * len(inputs))


@needs_triton
@each_gate
def test_fused_gate_writes_its_n_elements_and_no_other(gate):
    """Without its mask a kernel has the right result and overwrites what follows in memory."""
    count, n = len(GATES[gate][2]), 1000
    for way, reads, writes in ("fwd", count, 1), ("bwd", count + 1, count):
        room = [torch.full((gates_triton.BLOCK,), 7.0, device=DEVICE) for _ in range(reads + writes)]
        getattr(gates_triton, f"_{gate}_{way}")[(1,)](*room, n, BLOCK=gates_triton.BLOCK)
        for x in room[reads:]:
            assert (x[n:] == 7).all() and (x[:n] != 7).all()


@needs_triton
@each_gate
def test_fused_gate_passes_gradcheck(gate):
    """Numerical differentiation needs float64 throughout: a single float32 inside the kernel fails it."""
    inputs = [torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in GATES[gate][2]]
    assert torch.autograd.gradcheck(GATES[gate][0], inputs)
    with pytest.raises(RuntimeError, match="differentiated once"):  # and not a second derivative of zero
        torch.autograd.grad(GATES[gate][0](*inputs).sum(), inputs, create_graph=True)


@needs_triton
def test_fused_tanh_is_within_two_units_in_the_last_place():
    """For a_z = -inf the gate is tanh(a_c) alone. The points are densest at 1.05, where the polynomial ends."""
    x = torch.cat([torch.linspace(-12, 12, 30001), torch.linspace(1.04, 1.06, 9001), torch.logspace(-37, 2, 9001)])
    x = torch.cat([x, -x, torch.tensor([0.0, 88.8, 1e4, 1e38])]).to(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in the interpreter, numpy warns of an overflow
        got = fused_update(torch.zeros_like(x), torch.full_like(x, -torch.inf), x).cpu().numpy()
        fused_update(torch.zeros_like(x), x, x)
        fused_reset(x, x)
    exact = np.tanh(x.cpu().double().numpy())
    off = np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert off.max() <= 2, f"{off.max():.2f} units at {x[off.argmax()]}"
    assert ((got == 0) == (x.cpu().numpy() == 0)).all()  # nothing small is lost


@needs_triton
@each_gate
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")  # in the interpreter, numpy warns of inf * 0
def test_fused_gate_treats_inf_and_nan_as_pytorch(gate, dtype):
    special = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, torch.inf, torch.nan], dtype=dtype, device=DEVICE)
    fused, _, names = GATES[gate]
    plain = {"update": gated_update, "reset": gated_reset}[gate]
    results = []
    for function in fused, plain:
        inputs = [x.clone().requires_grad_() for x in torch.cartesian_prod(*[special] * len(names)).unbind(1)]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for name, got, want in zip(("result", *names), *results):
        torch.testing.assert_close(got.float(), want.float(), equal_nan=True, rtol=1e-2, atol=1e-2,
                                   msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip


@each_gate
@pytest.mark.parametrize("other, message", [
    (torch.zeros(3), r"one shape, .*: torch.Size\(\[2, 3\]\), .*: torch.Size\(\[3\]\)"),
    (torch.zeros(2, 3).half(), r"one dtype, .*: torch.float32, .*: torch.float16"),
    (torch.zeros(2, 3, device="meta"), r"one device, .*: cpu, .*: meta"),
])  # fmt: skip
def test_fused_gate_names_what_does_not_agree(gate, other, message):
    fused, _, names = GATES[gate]
    x = torch.zeros(2, 3)
    for i in range(1, len(names)):
        with pytest.raises(ValueError, match=f"fused_{gate} .*{message}") as error:
            fused(*(other if i == j else x for j in range(len(names))))
        assert all(f"{name}: " in str(error.value) for name in names)
    with pytest.raises(ValueError, match="not torch.int32"):
        fused(*[x.int()] * len(names))


def test_fused_gate_under_autocast_takes_what_the_plain_one_takes():
    """There a gate network that ends in a convolution returns half precision, and the state is float32."""
    h, a = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = fused_update(h, a, a)
    torch.testing.assert_close(got, gated_update(h, a.float(), a.float()), rtol=1e-6, atol=1e-6)  # also the dtype


class Traffic(TorchDispatchMode):
    """Counts the elements that PyTorch's operators read and write, and the copies among the operators."""

    def __init__(self):
        super().__init__()
        self.elements = self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.copies += func is torch.ops.aten.copy_.default
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
    ("transposed transposed transposed transposed", 0, (1, 8, 2, 24)),
    ("shifted contiguous shifted contiguous", 0, (60, 20, 5, 1)),
    ("expanded channels_last channels_last channels_last", 2, (60, 1, 15, 3)),  # forward and backward
    ("contiguous channels_last channels_last channels_last", 2, (60, 1, 15, 3)),
    ("contiguous contiguous contiguous channels_last", 1, (60, 20, 5, 1)),  # the gradient
    ("chunk chunk chunk contiguous", 6, (60, 20, 5, 1)),
])  # fmt: skip
def test_fused_gate_copies_only_what_is_laid_out_otherwise(layouts, copies, strides, monkeypatch):
    monkeypatch.setattr(gates_triton, "_launch", lambda *args: None)  # the interpreter makes copies of its own
    *inputs, g = [lay(torch.randn(2, 3, 4, 5, device=DEVICE), layout) for layout in layouts.split()]
    inputs = [x.detach().requires_grad_() for x in inputs]
    with Traffic() as traffic:
        out = fused_update(*inputs)
        grads = torch.autograd.grad(out, inputs, g)
    assert traffic.copies == copies and all(x.stride() == strides for x in (out, *grads))
    halves = torch.randn(1, 6, 4, 4, device=DEVICE).chunk(2, dim=1)  # dense, because the batch is of one
    with Traffic() as traffic:
        fused_update(*halves, torch.randn(1, 3, 4, 4, device=DEVICE))
    assert traffic.copies == 0


@pytest.mark.parametrize("name, column, gate", [
    ("update", 1, gated_update), ("update", 2, GATES["update"][1]), ("reset", 1, gated_reset),
])  # fmt: skip
def test_memory_passes_of_eager_gates_are_those_of_the_table(name, column, gate):
    """Eager PyTorch sends the inputs and the output of every operator through memory."""
    inputs = [torch.randn(100, requires_grad=True) for _ in GATES[name][2]]
    with Traffic() as forward:
        out = gate(*inputs)
    g = torch.ones_like(out)
    with Traffic() as backward:
        torch.autograd.grad(out, inputs, g)
    assert forward.elements == 100 * PASSES[name, "forward"][column]
    assert backward.elements == 100 * PASSES[name, "backward"][column]


def test_memory_passes_of_the_eager_norm_are_those_of_the_table():
    """Group norm is one operator, whose inputs count once here. It reads them a second time after the mean."""
    x, w = torch.randn(100, 8, 16, 16, requires_grad=True), torch.ones(8)
    with Traffic() as forward:
        y = F.group_norm(x, 2, w, w).relu_()
    g = torch.ones_like(y)
    with Traffic() as backward:
        torch.autograd.grad(y, x, g)
    assert round(forward.elements / x.numel()) + 1 == PASSES["norm", "forward"][1]  # x again
    assert round(backward.elements / x.numel()) + 2 == PASSES["norm", "backward"][1]  # g and x again


@needs_triton
def test_fused_gates_save_their_inputs_for_backward_and_nothing_else():
    shape, saved = (2, 3, 4, 5), []
    inputs = [torch.randn(n, 3, 4, 5, device=DEVICE).expand(shape).requires_grad_() for n in (1, 2, 2)]  # nor a copy
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_update(*inputs)
        fused_reset(*inputs[:2])
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs} and len(saved) == 5


@needs_triton
@each_gate
def test_a_gradient_that_nobody_needs_gets_no_memory(gate, monkeypatch):
    launched = []
    monkeypatch.setattr(gates_triton, "_launch", lambda kernel, *tensors: launched.append(tensors))
    fused, _, names = GATES[gate]
    for needed in itertools.product([True, False], repeat=len(names)):
        if any(needed):
            fused(*(torch.randn(5, device=DEVICE, requires_grad=need) for need in needed)).sum().backward()
            assert [x is not None for x in launched[-1][-len(names):]] == list(needed)


@pytest.mark.skipif(not gates_triton.INTERPRETED, reason="only the interpreter can be told which program it is")
def test_offsets_do_not_wrap_at_2_to_the_31():
    """The first programs past 2^31 elements, without the elements."""
    from triton.runtime.interpreter import interpreter_builder

    for program in 2**21 - 1, 2**21, 2**23:
        interpreter_builder.set_grid_dim(2**24, 1, 1)
        interpreter_builder.set_grid_idx(program, 0, 0)
        i, mask = gates_triton._span(2**31 + 5, 1024)
        assert (i.handle.data == program * 1024 + np.arange(1024)).all()
        assert mask.handle.data.sum() == {2**21 - 1: 1024, 2**21: 5, 2**23: 0}[program]


# ---------------------------------------------------------------- 3. the kernels: the norm


@needs_triton
@law
@given(
    shape=st.tuples(*[st.integers(*ends) for ends in ((0, 2), (1, 4), (1, 9), (1, 9))]), groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(list(TOLERANCE)), relu=st.booleans(), span=st.sampled_from([16, 64, 4096]),
    layouts=st.tuples(*2 * [st.sampled_from(["contiguous", "channels_last", "shifted", "chunk", "transposed"])]), seed=seeds,
)  # fmt: skip
def test_fused_norm_is_group_norm_and_relu(shape, groups, dtype, relu, span, layouts, seed):
    b, width, *size = shape
    rng = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(b, groups * width, *size, generator=rng).to(DEVICE, dtype) for _ in range(2))
    norm = nn.GroupNorm(groups, groups * width, device=DEVICE)
    norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for p in norm.parameters():
        p.data = torch.randn(p.shape, generator=rng).to(p)
    if width * size[0] * size[1] < 4:
        norm.eps = 0.1  # the deviation of two nearly equal numbers is all rounding error: no tolerance covers it

    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    want = torch.group_norm(exact[0], groups, *exact[1:], norm.eps)  # nn.GroupNorm refuses a group of one number
    if relu:
        g = g * (want.abs() > 1e-2)  # at the corner of the ReLU, rounding decides what the gradient is
        want = want.relu()
    x, g = lay(x, layouts[0]).detach().requires_grad_(), lay(g, layouts[1])
    with pytest.MonkeyPatch.context() as patch:  # cut small tensors into many parts
        patch.setattr(gates_triton, "SPAN", span)
        patch.setattr(gates_triton, "BLOCK", span)
        got = FusedNorm(norm, relu)(x)
        got_grads = torch.autograd.grad(got, [x, norm.weight, norm.bias], g)
    assert got.dtype == x.dtype and got.shape == x.shape
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2)
    want_grads = torch.autograd.grad(want, exact, g.double())
    for name, a, b in zip(("result", "dx", "dweight", "dbias"), (got, *got_grads), (want, *want_grads)):
        scale = 1 + (b.abs().max().item() if b.numel() else 0)  # the terms of a sum that cancels are as large as this
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


@needs_triton
def test_fused_norm_sees_what_is_small_beside_its_mean():
    """Around 1e4 a plain sum of squares loses a spread of 1, because 1e8 has seven digits in float32."""
    x = torch.randn(2, 8, 40, 33, device=DEVICE) + 1e4
    norm = nn.GroupNorm(2, 8, device=DEVICE)
    want = F.group_norm(x.double(), 2)
    assert (FusedNorm(norm, False)(x) - want).abs().max() < 1e-3  # x itself is rounded to 1e-3 there


@needs_triton
def test_fused_norm_passes_gradcheck_and_nan():
    norm = nn.GroupNorm(1, 2, dtype=torch.float64, device=DEVICE)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for relu in True, False:
        fused = FusedNorm(norm, relu)
        assert torch.autograd.gradcheck(lambda x, w, b: fused(x), (x, norm.weight, norm.bias), fast_mode=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    bad = x.detach().clone()
    bad[0, 1, 2, 1] = torch.nan
    assert FusedNorm(norm, True)(bad).isnan().flatten(1).sum(1).tolist() == [18, 0]  # its group, and no other
    with pytest.raises(ValueError, match=r"2 channels on .*, and got \(2, 6, 3, 5\)"):
        fused(torch.zeros(2, 6, 3, 5, dtype=torch.float64, device=DEVICE))


@needs_triton
def test_the_norms_grids_have_one_axis_and_groups_few_parts(monkeypatch):
    """CUDA takes 65,535 programs along the other axes: 512 photos of 128 channels would be one too many."""
    grids = []
    monkeypatch.setattr(gates_triton, "_launch_grid", lambda kernel, grid, *args, **how: grids.append(grid))
    x = torch.randn(3, 4, 70, 70, device=DEVICE, requires_grad=True)
    FusedNorm(nn.GroupNorm(2, 4, device=DEVICE), True)(x).sum().backward()
    blocks = -(-2 * 70 * 70 // gates_triton.BLOCK)
    assert grids == [(6 * 3,), (6 * blocks,), (12 * 2,), (6 * blocks,)]
    assert [gates_triton._span_of(n)[0] for n in (1, 2**20, 2**21, 2**23, 2**24)] == [4096, 4096, 8192, 32768, 32768]


@needs_triton
def test_fused_norm_writes_its_elements_and_no_other():
    groups, width, hw, M = 2, 3, 77, 231
    full = lambda *shape: torch.full(shape, 7.0, device=DEVICE)
    x, w, b, m = torch.randn(groups * M + 2048, device=DEVICE), full(6), full(6), (full(groups + 9), full(groups + 9))
    sums, out, dx, how = (full(15), full(15)), full(2048), full(2048), dict(RELU=False, EPS=1e-5, SPLITS=1, SPAN=256)
    gates_triton._norm_sums[(groups,)](x, *m, M, SPAN=256)
    gates_triton._norm_fwd[(groups,)](x, w, b, *m, out, groups, width, hw, M, BLOCK=512, **how)
    gates_triton._norm_bwd_sums[(6,)](x, x, w, b, *m, *sums, groups, width, hw, M, **how)
    gates_triton._norm_bwd[(groups,)](x, x, w, b, *m, *sums, dx, groups, width, hw, M, PARTS=4, BLOCK=512, **how)
    for buffer, n in (m[0], groups), (m[1], groups), (out, 2 * M), (sums[0], 6), (sums[1], 6), (dx, 2 * M):
        assert (buffer[n:] == 7).all() and (buffer[:n] != 7).all()


# ---------------------------------------------------------------- 3. the kernels: units and networks


@needs_triton
@pytest.mark.parametrize("unit, layout", [(DRU, torch.channels_last), (SRU, torch.contiguous_format)], ids=str)
def test_a_fused_unit_is_the_unit(unit, layout):
    plain, fused = unit(2, 6).to(DEVICE), fuse(unit(2, 6).to(DEVICE))
    fused.load_state_dict(plain.state_dict())
    e = torch.randn(2, 2, 9, 11, device=DEVICE).contiguous(memory_format=layout)
    h = torch.randn(2, 6, 1, 1, device=DEVICE)  # one state for all pixels: expanded
    g = torch.randn(2, 6, 9, 11, device=DEVICE)
    results = []
    for model in plain, fused:
        inputs = e.clone().requires_grad_(), h.clone().requires_grad_()
        out = model(inputs[0], inputs[1].expand(2, 6, 9, 11))
        out.backward(g)
        parameters = {name: p.grad for name, p in model.named_parameters()}
        results.append({"h_t": out, "de": inputs[0].grad, "dh": inputs[1].grad, **parameters})
    for name, want in results[0].items():
        # float32 through five convolutions: the gate's 1e-7 grows with the sums over 200 pixels that a gradient is
        message = lambda m, name=name: f"{name}: {m}"
        torch.testing.assert_close(results[1][name], want, rtol=1e-4, atol=1e-5, msg=message)


@pytest.mark.parametrize("unit, level", [("dru", 4), ("sru", 0)])
def test_a_fused_network_is_the_network(unit, level):
    plain, fused = (RecurrentUNet(unit=unit, level=level, width=2, hidden=4).to(DEVICE) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    assert fuse(fused) is fused
    norms = [m for m in fused.modules() if isinstance(m, nn.GroupNorm)]
    assert {type(m) for m in norms} == {FusedNorm} and not any(isinstance(m, nn.ReLU) for m in fused.modules())
    assert sum(m.relu for m in norms) == sum(isinstance(m, nn.ReLU) for m in plain.modules())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(1, 3, 18, 21, device=DEVICE)
    state = [torch.randn_like(x) for x in plain.start(image)]  # of a pass in the middle
    (got, (_, got_h)), (want, (_, want_h)) = fused.step(image, state), plain.step(image, state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_h, want_h, rtol=1e-4, atol=1e-4)


def test_fuse_swaps_what_it_knows_and_leaves_the_rest(monkeypatch):
    def gated_update(h, a_z, a_c):
        return h

    net = fuse(RecurrentUNet())
    assert net.unit.update is fused_update and net.unit.reset is fused_reset
    assert fuse(net).unit.update is fused_update  # a second time changes nothing
    own = fuse(DRU(2, 4, update=gated_update))  # the same name, but not rurnet's function
    assert own.update is gated_update and own.reset is fused_reset
    assert isinstance(fuse(nn.Linear(1, 1)), nn.Linear)
    bare = fuse(nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.ReLU()))  # has no weight for the kernel to read
    assert [type(layer) for layer in bare] == [nn.GroupNorm, nn.ReLU]
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


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_fused_gate_compiles_for_a_cpu():
    """With the compiler that users have, and outside of the interpreter."""
    use = """
        import torch
        from gates_triton import fused_update
        x = [torch.randn(9) for _ in range(3)]
        torch.testing.assert_close(torch.compile(fused_update, fullgraph=True)(*x), fused_update(*x))
        print("equal")
    """
    assert run_python(use, HERE) == "equal"


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
