"""The tests, in the order of the files: the model, the kernels, the data, training, masks; then the pages, and at last whole processes.

python -m pytest -q      one and a half to four minutes on two cores, no GPU, no download
"""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: nothing here is large, and Ahead has work for a second core

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: afterwards the kernels fail in confusing ways

import baselines
import bench
import data
import fast
import figures
import gates_triton
import layouts
import predict
import runs
import scoring
import train
from data import open_dataset, read_photo
from gates_triton import PASSES, FusedNorm, fuse, fused_reset, fused_update
from rurnet import DRU, SRU, PlainUNet, RecurrentUNet, UNet, gated_reset, gated_update
from toy import draw_clips, draw_hand_photo

torch.backends.cudnn.allow_tf32 = False  # on a GPU: its 10 bits would drown what is compared
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photographs in ../shared/data")
law = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Ahead:
    """A process that a test will want to have seen, run by a second core while the first is at other tests.

        @Ahead
        def masks_printed(at):        at is an empty folder
            return subprocess.run(...)

        def test_masks_are_printed():
            assert "mask" in masks_printed().stdout
    """

    jobs, pool = {}, ThreadPoolExecutor(1)

    def __init__(self, work):
        self.work, self.folder, self.seen, self.lock = work, None, Future(), Lock()
        self.jobs[work.__name__] = self

    def __call__(self):
        with self.lock:  # who asks first does it, be it the second core or the test
            if not self.seen.done():
                self.folder = tempfile.TemporaryDirectory()
                try:
                    self.seen.set_result(self.work(Path(self.folder.name)))
                except BaseException as error:
                    self.seen.set_exception(error)
        return self.seen.result()


@pytest.fixture(autouse=True, scope="session")
def second_core(request):
    """Begins with what the chosen tests ask for last, so that the two cores meet in the middle of this file."""
    wanted = {name for item in request.session.items for name in item.function.__code__.co_names}
    for name, job in reversed(Ahead.jobs.items()):
        wanted |= set(job.work.__code__.co_names) if name in wanted else set()
    for name, job in reversed(Ahead.jobs.items()):
        if name in wanted:
            Ahead.pool.submit(job)
    yield
    Ahead.pool.shutdown(cancel_futures=True)
    for job in Ahead.jobs.values():
        if job.folder:
            job.folder.cleanup()


def size(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------- rurnet.py: against the equations, in float64


@law
@given(shape=st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), seed=seeds)
def test_gates_equal_their_equations(shape, seed):
    h, a_z, a_c = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    z, c = 1 / (1 + torch.exp(-a_z)), 1 - 2 / (1 + torch.exp(2 * a_c))
    torch.testing.assert_close(gated_update(h, a_z, a_c), z * h + (1 - z) * c)
    torch.testing.assert_close(gated_reset(h, a_z), h / (1 + torch.exp(-a_z)))


def norm(x, weight, bias, groups):
    """Group normalisation from its definition."""
    groups = x.unflatten(1, (groups, -1))
    mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
    return ((groups - mean) / (var + 1e-5).sqrt()).flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def double_conv(p, at, x, last_relu=True):
    groups = 2 if at == "outer.down.0" else 8
    x = norm(F.conv2d(x, p[f"{at}.0.weight"], padding=1), p[f"{at}.1.weight"], p[f"{at}.1.bias"], groups).clamp(min=0)
    x = norm(F.conv2d(x, p[f"{at}.3.weight"], padding=1), p[f"{at}.4.weight"], p[f"{at}.4.bias"], groups)
    return x.clamp(min=0) if last_relu else x


def one_pass(p, unit, image, mask, h):
    """Eqs. (1)-(6) at level 4, written out on the numbers of a state dict: the network a second time, without its classes."""
    x, skips = torch.cat([image, mask], 1), []
    for level in range(4):
        skips.append(double_conv(p, f"outer.down.{level}", x))
        x = F.max_pool2d(F.pad(skips[-1], (0, -skips[-1].shape[3] % 2, 0, -skips[-1].shape[2] % 2), value=-torch.inf), 2)
    z = 1 / (1 + torch.exp(-double_conv(p, "unit.net_z.middle", x, False)))
    seen = x if unit == "sru" else x / (1 + torch.exp(-double_conv(p, "unit.net_r.middle", x, False)))
    h = z * h + (1 - z) * torch.tanh(double_conv(p, "unit.net_c.middle", seen, False))
    d = torch.einsum("oi,bihw->bohw", p["f_s.weight"][..., 0, 0], h) + p["f_s.bias"][:, None, None]
    for level in reversed(range(4)):
        up, skip = f"outer.up.{3 - level}", skips[level]
        d = torch.einsum("iouv,bihw->bohuwv", p[f"{up}.up.weight"], d).flatten(2, 3).flatten(3, 4)
        d = (d + p[f"{up}.up.bias"][:, None, None])[..., : skip.shape[2], : skip.shape[3]]
        d = double_conv(p, f"{up}.conv", torch.cat([skip, d], 1))
    return torch.einsum("oi,bihw->bohw", p["head.weight"][..., 0, 0], d) + p["head.bias"][:, None, None], h


@pytest.mark.parametrize("unit", ["dru", "sru"])
@pytest.mark.parametrize("shape", [(2, 3, 48, 64), (1, 3, 37, 51)])
def test_network_equals_its_equations(unit, shape):
    net, image = RecurrentUNet(3, unit).double(), torch.randn(shape, dtype=torch.float64)
    for parameter in net.parameters():  # away from the ones and zeros of a fresh network
        parameter.data += 0.1 * torch.randn_like(parameter)
    p = net.state_dict()
    mask, h = torch.zeros(shape[0], 3, *shape[2:]).double(), torch.zeros(shape[0], 16, *(-(-n // 16) for n in shape[2:])).double()
    for got in net(image, 3):
        s, h = one_pass(p, unit, image, mask, h)
        mask = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
        torch.testing.assert_close(got, s)


@pytest.mark.parametrize("level", range(5))
def test_units_equal_their_equations_at_every_level(level):
    for unit in "dru", "sru":
        net = RecurrentUNet(unit=unit, level=level).double().unit
        e = torch.randn(2, net.net_z.middle[0].in_channels if level == 4 else net.net_z.down[0][0].in_channels, 19, 22).double()
        h = torch.randn_like(net.net_z(e))
        z = 1 / (1 + torch.exp(-net.net_z(e)))
        seen = e / (1 + torch.exp(-net.net_r(e))) if unit == "dru" else e
        c = 1 - 2 / (1 + torch.exp(2 * net.net_c(seen)))
        torch.testing.assert_close(net(e, h), z * h + (1 - z) * c)
        assert z.min() < 0.5 < z.max() and c.min() < 0 < c.max()  # a ReLU at the end of f would forbid it


@pytest.mark.parametrize("level", range(5))
def test_gates_have_the_architecture_of_what_they_replace(level):
    def convolutions(net):
        return [(type(m), m.weight.shape) for m in net.modules() if hasattr(m, "kernel_size")]

    widths = (8, 16, 32, 64, 128)
    replaced = convolutions(UNet(widths[level - 1] if level else 5, widths[level:]))
    for net in RecurrentUNet(level=level).unit.children():
        gate = convolutions(net)
        assert [kind for kind, _ in gate] == [kind for kind, _ in replaced]
        assert gate[:-2] == replaced[:-2]  # the last DoubleConv ends in the channels of h or e


# ---------------------------------------------------------------- rurnet.py: laws


def test_parameter_counts():
    assert [size(RecurrentUNet(level=level)) for level in range(5)] == [1_459_359, 1_449_794, 1_380_434, 1_084_914, 364_338]
    assert [size(RecurrentUNet(unit="sru", level=level)) for level in range(5)] == [973_466, 970_418, 925_746, 728_626, 290_354]
    assert size(PlainUNet()) == 486_562
    assert [size(RecurrentUNet(level=level, width=16)) for level in (0, 4)] == [5_823_559, 1_398_498]


@law
@given(
    batch=st.integers(1, 3), classes=st.integers(2, 6), shape=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    level=st.integers(0, 4), unit=st.sampled_from(["dru", "sru"]), passes=st.integers(1, 3), channels=st.integers(1, 4),
)  # fmt: skip
def test_any_size_any_batch_any_classes(batch, classes, shape, level, unit, passes, channels):
    net = RecurrentUNet(classes, unit, level, width=4, image_channels=channels, passes=passes)
    masks = net(torch.randn(batch, channels, *shape))
    assert [tuple(s.shape) for s in masks] == [(batch, classes, *shape)] * passes
    assert all(s.isfinite().all() for s in masks)
    assert [s.shape for s in PlainUNet(classes, 4, channels)(torch.randn(batch, channels, *shape), passes)] == [masks[0].shape]


@law
@given(passes=st.integers(1, 4), level=st.integers(0, 4), unit=st.sampled_from(["dru", "sru"]), seed=seeds)
def test_one_more_pass_changes_no_earlier_mask_and_step_is_forward(passes, level, unit, seed):
    torch.manual_seed(seed)
    net, image = RecurrentUNet(unit=unit, level=level, width=4).eval(), torch.randn(2, 3, 33, 40)
    masks, longer, state = net(image, passes), net(image, passes + 1), net.start(image)
    assert len(masks) == passes and len(longer) == passes + 1
    for a, b in zip(masks, longer):
        s, state = net.step(image, state)
        assert torch.equal(a, b) and torch.equal(a, s) and torch.equal(s.softmax(1), state[0])
    assert not torch.equal(longer[-2], longer[-1])  # the state does reach the next mask


@law
@given(level=st.integers(0, 4), unit=st.sampled_from(["dru", "sru"]), seed=seeds)
def test_a_mask_does_not_depend_on_its_batch_mates(level, unit, seed):
    torch.manual_seed(seed)
    net, images = RecurrentUNet(unit=unit, level=level, width=4).double(), torch.randn(3, 3, 32, 35).double()
    for together, alone in zip(net(images)[-1], images):
        torch.testing.assert_close(together, net(alone[None])[-1][0])


@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("unit", ["dru", "sru"])
@pytest.mark.parametrize("level", range(5))
def test_gradients_reach_every_parameter(unit, level, alpha):
    net = RecurrentUNet(unit=unit, level=level)
    train.recurrent_loss(net(torch.randn(2, 3, 48, 40)), torch.randint(2, (2, 48, 40)), alpha).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_training_makes_the_loss_fall():
    for net in RecurrentUNet(), RecurrentUNet(unit="sru", level=2), PlainUNet():
        truth = torch.zeros(2, 32, 32, dtype=torch.long)
        truth[0, 5:20, 8:30] = truth[1, 12:28, 3:17] = 1
        image = torch.randn(2, 3, 32, 32) + truth[:, None]
        optimiser, losses = torch.optim.AdamW(net.parameters(), lr=4e-3), []
        for _ in range(25):
            losses.append(train.recurrent_loss(net(image), truth, 0.4))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < 0.5 * losses[0]


def test_bad_calls_say_what_came_and_what_is_wanted():
    net, image = RecurrentUNet(), torch.zeros(1, 3, 32, 32)
    for wrong, words in [
        (lambda: net(image[0]), r"\(3, 32, 32\).*image\[None\]"),
        (lambda: net(torch.zeros(1, 4, 32, 32)), r"\(1, 4, 32, 32\).*3, H, W"),
        (lambda: net(torch.zeros(1, 3, 15, 32)), r"\(1, 3, 15, 32\).*from 16"),
        (lambda: net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8.*floating"),
        (lambda: net(image.double()), r"float64.*float32.*image\.to"),
        (lambda: net(image, 0), "passes is 0"),
        (lambda: net(image, 2.5), "passes is 2.5"),
        (lambda: net.step(torch.zeros(1, 3, 48, 32), net.start(image)), r"state.*call start"),
        (lambda: net.step(image, (torch.zeros(1, 3, 32, 32), net.start(image)[1])), r"the state is \[\(1, 3, 32, 32\), .*belongs \[\(1, 2, 32, 32\)"),
        (lambda: net.step(image, (net.start(image)[0], torch.zeros(1, 16, 1, 1))), r"the state is .*\(1, 16, 1, 1\)\].*\(1, 16, 2, 2\)\]"),
        (lambda: PlainUNet()(image[0]), r"\(3, 32, 32\)"),
        (lambda: PlainUNet(classes=1), "classes is 1.*from 2"),
        (lambda: baselines.build("refinenet", 1), "classes is 1.*from 2"),
        (lambda: baselines.build("rec-last", 2, image_channels=0), "image_channels is 0"),
        (lambda: RecurrentUNet(unit="gru"), "'gru'.*dru, sru"),
        (lambda: RecurrentUNet(level=5), "level is 5.*0 to 4"),
        (lambda: RecurrentUNet(level=-1), "level is -1"),
        (lambda: RecurrentUNet(level=2.0), "level is 2.0"),
        (lambda: RecurrentUNet(passes=True), "passes is True"),
        (lambda: RecurrentUNet(classes=1), "classes is 1.*from 2"),
        (lambda: RecurrentUNet(width=0), "width is 0"),
        (lambda: RecurrentUNet(hidden=0), "hidden is 0"),
        (lambda: RecurrentUNet(passes=0), "passes is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()


def test_copying_rurnet_alone_works(tmp_path):
    shutil.copy(HERE / "rurnet.py", tmp_path)
    use = "import torch; from rurnet import RecurrentUNet; print(RecurrentUNet()(torch.zeros(1, 3, 20, 30))[-1].shape)"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {use}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 2, 20, 30])", done.stderr


# ---------------------------------------------------------------- gates_triton.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(gates_triton.triton is None, reason="triton is not installed: nothing is fused")

GATES = {  # the fused function, the same in PyTorch's own operators for the float64 oracle, and the names of its inputs
    "update": (fused_update, lambda h, a_z, a_c: torch.lerp(a_c.tanh(), h, a_z.sigmoid()), ("h", "a_z", "a_c")),
    "reset": (fused_reset, lambda e, a_r: e * a_r.sigmoid(), ("e", "a_r")),
}
# Relative to 1 + |result|, since z h + (1 - z) c and h - c cancel. float32: 1 - z carries z's rounding of 6e-8 however
# small it is, and meets g (h - c), up to 25 here. Half precision: one rounding, at the store, of half a unit: 2^-11 in
# float16, 2^-8 in bfloat16, where the interpreter truncates: 2^-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 1.1 * 2**-11, torch.bfloat16: 1.1 * 2**-7}
TOLERANCE[torch.bfloat16] /= 2 if DEVICE == "cuda" else 1


def lay(x, layout):
    """The values of x (of the first sample alone, where that is expanded), laid out so in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "chunk":  # the first half of the channels of a wider tensor, the other half NaN
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1).chunk(2, dim=1)[0]
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if layout == "shifted":  # dense, but not at an address that is a multiple of 16
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    return x


LAYOUTS = ["contiguous", "channels_last", "transposed", "chunk", "sliced", "shifted", "expanded"]


def check(gate, inputs, g, needed):
    """The fused gate and its gradients, by name, against float64. `needed` says which inputs require a gradient."""
    fused, oracle, names = GATES[gate]
    inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
    exact = [x.detach().double().requires_grad_(need) for x, need in zip(inputs, needed)]
    empty_like = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:  # poison new memory: an element that no kernel writes stays NaN
        patch.setattr(torch, "empty_like", lambda *args, **more: empty_like(*args, **more).fill_(torch.nan))
        got, want = fused(*inputs), oracle(*exact)
        if any(needed):
            got.backward(g)
            want.backward(g.double())
    assert got.dtype == inputs[0].dtype and got.shape == inputs[0].shape
    results = [("result", got, want)]
    if any(needed):
        results += [(f"d{name}", x.grad, y.grad) for name, x, y, need in zip(names, inputs, exact, needed) if need]
    for name, x, need in zip(names, inputs, needed):
        assert need or x.grad is None, f"{name} got a gradient that it did not ask for"
    tol = TOLERANCE[got.dtype]
    for name, x, y in results:
        torch.testing.assert_close(x.double(), y, rtol=tol, atol=tol, msg=lambda m, name=name: f"{gate}, {name}: {m}")


@needs_triton
@pytest.mark.parametrize("gate", GATES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fused_gate_is_the_gate(gate, data):
    """Any shape, dtype, mixture of layouts, and choice of gradients, those laid out as they like too."""
    count = len(GATES[gate][2])
    shape = data.draw(st.tuples(*[st.integers(1, n) for n in (2, 5, 7, 33)]), label="shape")
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    layouts = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=count + 1, max_size=count + 1), label="layouts")
    needed = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label="needed")
    scale = data.draw(st.sampled_from([1e-3, 1, 4]), label="scale")  # of what the sigmoid and the tanh get
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    values = [torch.randn(shape, generator=rng) * s for s in (1, *[scale] * (count - 1), 1)]
    *inputs, g = [lay(x.to(DEVICE, dtype), layout) for x, layout in zip(values, layouts)]
    check(gate, inputs, g, needed)


@needs_triton
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1023,), (1024,), (1025,), (2048,), (3, 1, 683)], ids=str)
def test_fused_gate_at_the_edges_of_a_block(gate, shape):
    count, rng = len(GATES[gate][2]), torch.Generator().manual_seed(0)
    *inputs, g = [torch.randn(shape, generator=rng).to(DEVICE) for _ in range(count + 1)]
    check(gate, inputs, g, [True] * count)


@needs_triton
@pytest.mark.parametrize("gate", GATES)
def test_fused_gate_writes_its_n_elements_and_no_other(gate):
    """A missing mask goes unseen in the result: it spoils what lies behind it. So look behind every output."""
    fwd, bwd = (getattr(gates_triton, f"_{gate}_{way}") for way in ("fwd", "bwd"))
    count, n = len(GATES[gate][2]), 1000
    for kernel, reads, writes in (fwd, count, 1), (bwd, count + 1, count):
        room = [torch.full((gates_triton.BLOCK,), 7.0, device=DEVICE) for _ in range(reads + writes)]
        kernel[(1,)](*room, n, BLOCK=gates_triton.BLOCK)
        for x in room[reads:]:
            assert (x[n:] == 7).all() and (x[:n] != 7).all()


@needs_triton
@pytest.mark.parametrize("gate", GATES)
def test_fused_gate_passes_gradcheck(gate):
    """Numerical differentiation needs float64 all through: one float32 inside, and it fails."""
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 5, generator=rng).double().to(DEVICE).requires_grad_() for _ in GATES[gate][2]]
    assert torch.autograd.gradcheck(GATES[gate][0], inputs)
    with pytest.raises(RuntimeError, match="differentiated once"):  # and not a second derivative of zero
        torch.autograd.grad(GATES[gate][0](*inputs).sum(), inputs, create_graph=True)


@needs_triton
def test_fused_tanh_is_within_two_units_in_the_last_place():
    """For a_z = -inf the gate is tanh(a_c) alone. Dense about 1.05, where the polynomial ends, and far out too."""
    x = torch.cat([torch.linspace(-12, 12, 30001), torch.linspace(1.04, 1.06, 9001), torch.logspace(-37, 2, 9001)])
    x = torch.cat([x, -x, torch.tensor([0.0, 88.8, 1e4, 1e38])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy, in the interpreter, would tell of an overflow
        got = fused_update(*(v.to(DEVICE) for v in (torch.zeros_like(x), torch.full_like(x, -torch.inf), x))).cpu()
        fused_update(*(v.to(DEVICE) for v in (torch.zeros_like(x), x, x)))
        fused_reset(x.to(DEVICE), x.to(DEVICE))
    exact = np.tanh(x.double().numpy())
    off = np.abs(got.numpy() - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert off.max() <= 2, f"{off.max():.2f} units at {x[off.argmax()]}"
    assert ((got == 0) == (x == 0)).all()  # nothing small is lost


@needs_triton
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter, at inf * 0
def test_fused_gate_treats_inf_and_nan_as_pytorch(gate, dtype):
    special = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, torch.inf, torch.nan], dtype=dtype, device=DEVICE)
    fused, _, names = GATES[gate]
    plain = {"update": gated_update, "reset": gated_reset}[gate]
    every = torch.cartesian_prod(*[special] * len(names)).unbind(1)
    results = {}
    for f in fused, plain:
        inputs = [x.clone().requires_grad_() for x in every]
        out = f(*inputs)
        results[f] = dict(zip(("result", *names), (out, *torch.autograd.grad(out.sum(), inputs))))
    for name in results[fused]:
        torch.testing.assert_close(*(results[f][name].float() for f in (fused, plain)), equal_nan=True,
                                   rtol=1e-2, atol=1e-2, msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("other, message", [
    (torch.zeros(3), r"one shape, .*: torch.Size\(\[2, 3\]\), .*: torch.Size\(\[3\]\)"),
    (torch.zeros(2, 3).half(), r"one dtype, .*: torch.float32, .*: torch.float16"),
    (torch.zeros(2, 3, device="meta"), r"one device, .*: cpu, .*: meta"),
])  # fmt: skip
def test_fused_gate_names_what_does_not_agree(gate, other, message):
    fused, _, names = GATES[gate]
    x = torch.zeros(2, 3)
    for i, name in enumerate(names[1:], 1):
        with pytest.raises(ValueError, match=f"fused_{gate} .*{message}") as error:
            fused(*(other if i == j else x for j in range(len(names))))
        assert all(f"{n}: " in str(error.value) for n in names)
    with pytest.raises(ValueError, match="not torch.int32"):
        fused(*[x.int()] * len(names))


def test_fused_gate_under_autocast_takes_what_the_plain_one_takes():
    """A gate network that ends in a convolution answers in half precision there; the state is float32."""
    h, a = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, want = fused_update(h, a, a), gated_update(h.double(), a.double(), a.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert got.dtype == torch.float32


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
    monkeypatch.setattr(gates_triton, "_launch", lambda *args: None)  # the interpreter copies tensors for itself
    *inputs, g = [lay(torch.randn(2, 3, 4, 5, device=DEVICE), layout) for layout in layouts.split()]
    inputs = [x.detach().requires_grad_() for x in inputs]
    with Counter() as counter:
        out = fused_update(*inputs)
        grads = torch.autograd.grad(out, inputs, g)
    assert counter.copies == copies and all(x.stride() == strides for x in (out, *grads))
    halves = torch.randn(1, 6, 4, 4, device=DEVICE).chunk(2, dim=1)  # of a batch of one: dense, in spite of stride(0)
    with Counter() as counter:
        fused_update(*halves, torch.randn(1, 3, 4, 4, device=DEVICE))
    assert counter.copies == 0


class Counter(TorchDispatchMode):
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


@pytest.mark.parametrize("gate", ["update", "reset"])
def test_memory_passes_of_eager_pytorch_are_as_the_table_says(gate):
    """On a CPU and on a GPU alike eager PyTorch sends every operator's inputs and output through memory."""
    lerp = gates_triton._lerp_update if gate == "update" else None
    for column, form in (1, gated_update if gate == "update" else gated_reset), (2, lerp):
        if form:
            inputs = [torch.randn(100, requires_grad=True) for _ in GATES[gate][2]]
            with Counter() as forward:
                out = form(*inputs)
            g = torch.ones_like(out)
            with Counter() as backward:
                torch.autograd.grad(out, inputs, g)
            assert forward.elements == 100 * PASSES[gate, "forward"][column]
            assert backward.elements == 100 * PASSES[gate, "backward"][column]


def test_memory_passes_of_the_eager_norm_are_as_the_table_says():
    """PyTorch's norm is one operator, whose inputs count once here; but it needs the mean before the first result."""
    x, w = torch.randn(100, 8, 16, 16, requires_grad=True), torch.ones(8)
    with Counter() as forward:
        y = F.group_norm(x, 2, w, w).relu_()
    g = torch.ones_like(y)
    with Counter() as backward:
        torch.autograd.grad(y, x, g)
    again = {"forward": 1, "backward": 2}  # x; g and x
    for way, counter in ("forward", forward), ("backward", backward):
        assert round(counter.elements / x.numel()) + again[way] == PASSES["norm", way][1]


@needs_triton
def test_nothing_is_saved_for_backward_but_the_inputs():
    shape, saved = (2, 3, 4, 5), []
    inputs = [torch.randn(n, 3, 4, 5, device=DEVICE).expand(shape).requires_grad_() for n in (1, 2, 2)]  # nor a copy
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_update(*inputs)
        fused_reset(*inputs[:2])
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs} and len(saved) == 5


@needs_triton
@pytest.mark.parametrize("gate", GATES)
def test_a_gradient_that_nobody_needs_gets_no_memory(gate, monkeypatch):
    launched = []
    monkeypatch.setattr(gates_triton, "_launch", lambda kernel, *tensors: launched.append(tensors))
    fused, _, names = GATES[gate]
    for needed in itertools.product([True, False], repeat=len(names)):
        if any(needed):
            fused(*(torch.randn(5, device=DEVICE, requires_grad=need) for need in needed)).sum().backward()
            assert [x is not None for x in launched[-1][-len(names):]] == list(needed)


NORMS = st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 12), st.integers(1, 17))


def check_norm(x, g, layout, norm, relu, rtol):
    """FusedNorm against PyTorch's own group norm, in float64: result and gradients."""
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    want = torch.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps)  # F.group_norm refuses a group of one
    inside = want.abs() > 1e-2 if relu else torch.ones_like(want, dtype=torch.bool)  # at the corner of the ReLU rounding decides
    g = lay(g * inside, layout)
    want = want.relu() if relu else want
    x = x.detach().requires_grad_()
    got = FusedNorm(norm, relu)(x)
    assert got.dtype == x.dtype and got.shape == x.shape
    grads = torch.autograd.grad(got, [x, norm.weight, norm.bias], g)
    names = "result", "dx", "dweight", "dbias"
    for name, a, b in zip(names, (got, *grads), (want, *torch.autograd.grad(want, exact, g.double()))):
        scale = 1 + (b.abs().max().item() if b.numel() else 0)  # what cancels in a sum is as large as its terms
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


@needs_triton
@law
@given(shape=NORMS, dtype=st.sampled_from(list(TOLERANCE)), relu=st.booleans(), span=st.sampled_from([16, 64, 4096]),
       layouts=st.tuples(*2 * [st.sampled_from(["contiguous", "channels_last", "shifted", "chunk", "transposed"])]), seed=seeds)  # fmt: skip
def test_fused_norm_equals_group_norm_and_relu(shape, dtype, relu, span, layouts, seed):
    b, groups, width, h, w = shape
    rng = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(b, groups * width, h, w, generator=rng).to(DEVICE, dtype) for _ in range(2))
    norm = torch.nn.GroupNorm(groups, groups * width, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else None)
    for p in norm.parameters():
        p.data = torch.randn(p.shape, generator=rng).to(p)
    if x[0:1].numel() // groups < 4:
        norm.eps = 0.1  # of two or three nearly equal numbers the standard deviation is a small difference: no tolerance covers it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates_triton, "SPAN", span)  # many parts of small tensors
        check_norm(lay(x, layouts[0]), g, layouts[1], norm, relu, {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2))


@needs_triton
def test_fused_norm_sees_what_is_small_beside_its_mean():
    """Of numbers around 1e4 with a spread of 1 a plain sum of squares keeps nothing: 1e8 has seven digits in float32."""
    x = torch.randn(2, 8, 40, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1e4
    norm = torch.nn.GroupNorm(2, 8, device=DEVICE)
    want = F.group_norm(x.double(), 2)
    assert (FusedNorm(norm, False)(x) - want).abs().max() < 1e-3  # x itself is rounded to 1e-3 there


@needs_triton
def test_fused_norm_passes_gradcheck_and_hands_on_nan():
    norm = torch.nn.GroupNorm(2, 4, dtype=torch.float64, device=DEVICE)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for relu in True, False:
        fused = FusedNorm(norm, relu)
        assert torch.autograd.gradcheck(lambda x, w, b: fused(x), (x, norm.weight, norm.bias), fast_mode=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(FusedNorm(norm, True)(x).sum(), x, create_graph=True)
    bad = x.detach().clone()
    bad[0, 1, 2, 3] = torch.nan
    assert FusedNorm(norm, True)(bad).isnan().flatten(1).sum(1).tolist() == [30, 0]  # its group, and no other
    with pytest.raises(ValueError, match=r"4 channels on .*, and got \(2, 6, 3, 5\)"):
        fused(torch.zeros(2, 6, 3, 5, dtype=torch.float64, device=DEVICE))


@needs_triton
def test_the_norms_grids_have_one_axis(monkeypatch):
    """CUDA takes 65,535 programs along the others: 512 photos of 128 channels would be one too many."""
    grids, launch = [], gates_triton._launch_grid
    monkeypatch.setattr(gates_triton, "_launch_grid", lambda kernel, grid, *args, **how: grids.append(grid) or launch(kernel, grid, *args, **how))
    x = torch.randn(3, 4, 70, 70, device=DEVICE, requires_grad=True)
    FusedNorm(torch.nn.GroupNorm(2, 4, device=DEVICE), True)(x).sum().backward()
    blocks = -(-2 * 70 * 70 // gates_triton.BLOCK)
    assert grids == [(6 * 3,), (6 * blocks,), (12 * 2,), (6 * blocks,)]


@needs_triton
def test_fused_norm_writes_its_elements_and_no_other():
    groups, width, hw, M = 2, 3, 77, 231
    full = lambda *shape: torch.full(shape, 7.0, device=DEVICE)
    x, w, b, m = torch.randn(groups * M + 2048, device=DEVICE), full(6), full(6), (full(groups + 9), full(groups + 9))
    gates_triton._norm_sums[(groups,)](x, *m, M, SPAN=256)
    sums, out, dx, how = (full(15), full(15)), full(2048), full(2048), dict(RELU=False, EPS=1e-5, SPLITS=1, SPAN=256)
    gates_triton._norm_fwd[(groups,)](x, w, b, *m, out, groups, width, hw, M, BLOCK=512, **how)
    gates_triton._norm_bwd_sums[(6,)](x, x, w, b, *m, *sums, groups, width, hw, M, **how)
    gates_triton._norm_bwd[(groups,)](x, x, w, b, *m, *sums, dx, groups, width, hw, M, PARTS=4, BLOCK=512, **how)
    for buffer, n in (m[0], groups), (m[1], groups), (out, 2 * M), (sums[0], 6), (sums[1], 6), (dx, 2 * M):
        assert (buffer[n:] == 7).all() and (buffer[:n] != 7).all()


@needs_triton
@pytest.mark.parametrize("unit, layout", [(DRU, torch.channels_last), (SRU, torch.contiguous_format)], ids=str)
def test_a_fused_unit_is_the_unit(unit, layout):
    torch.manual_seed(0)
    plain = unit(8, 16).to(DEVICE)
    fused = fuse(unit(8, 16).to(DEVICE))
    fused.load_state_dict(plain.state_dict())
    e = torch.randn(2, 8, 9, 11, device=DEVICE).contiguous(memory_format=layout)
    h = torch.randn(2, 16, 1, 1, device=DEVICE)  # one state for all pixels: expanded
    g = torch.randn(2, 16, 9, 11, device=DEVICE)
    results = []
    for model in plain, fused:
        inputs = e.clone().requires_grad_(), h.clone().requires_grad_()
        out = model(inputs[0], inputs[1].expand(2, 16, 9, 11))
        out.backward(g)
        results.append({"h_t": out, "de": inputs[0].grad, "dh": inputs[1].grad,
                        **{name: p.grad for name, p in model.named_parameters()}})  # fmt: skip
    for name, want in results[0].items():
        # float32 through five convolutions: the gate's 1e-7 grows with the sums over 200 pixels that a gradient is
        got = results[1][name]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("unit, level", [("dru", 4), ("sru", 0)])
def test_a_fused_network_is_the_network(unit, level):
    torch.manual_seed(0)
    plain = RecurrentUNet(unit=unit, level=level).to(DEVICE)
    fused = RecurrentUNet(unit=unit, level=level).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    assert fuse(fused) is fused and fused.unit.update is fused_update and plain.unit.update is gated_update
    assert unit == "sru" or fused.unit.reset is fused_reset
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {type(m) for m in norms} == {FusedNorm} and sum(m.relu for m in norms) == sum(type(m) is torch.nn.ReLU for m in plain.modules())
    assert not any(type(m) is torch.nn.ReLU for m in fused.modules()) and fused.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(1, 3, 18, 21, device=DEVICE)
    state = [torch.randn_like(x) for x in plain.start(image)]  # of a pass in the middle
    (a, (_, h_a)), (b, (_, h_b)) = fused.step(image, state), plain.step(image, state)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h_a, h_b, rtol=1e-4, atol=1e-4)
    assert fuse(fused).unit.update is fused_update  # once more changes nothing, nor does a model without a gate
    assert isinstance(fuse(torch.nn.Linear(1, 1)), torch.nn.Linear)
    bare = torch.nn.Sequential(torch.nn.GroupNorm(2, 4, affine=False), torch.nn.ReLU())  # whose kernel has no weight to read
    assert [type(layer) for layer in fuse(bare)] == [torch.nn.GroupNorm, torch.nn.ReLU]


def test_a_fused_network_on_a_cpu_is_exported_traced_and_compiled():
    torch.manual_seed(0)
    model, image = fuse(RecurrentUNet(passes=1)).eval(), torch.randn(1, 3, 16, 16)
    want = model(image)[-1]
    with torch.no_grad():
        exported = torch.export.export(model, (image,))
        assert not any("triton" in str(node.target) for node in exported.graph.nodes)
        models = [exported.module(), torch.compile(model, fullgraph=True, backend="aot_eager")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of rurnet's checks, and that it is deprecated
            models.append(torch.jit.trace(model, image, check_trace=False))
        for form in models:
            torch.testing.assert_close(form(image)[-1], want, rtol=1e-4, atol=1e-4)


def run_python(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@Ahead
def printed_without_triton(at):
    return run_python("""
        sys.modules["triton"] = None  # what makes `import triton` fail
        import runpy, torch
        from gates_triton import fuse, fused_reset, fused_update, triton
        from rurnet import RecurrentUNet, gated_reset, gated_update
        assert triton is None
        x = torch.linspace(-3, 3, 7)
        assert torch.equal(fused_update(x, x, x), gated_update(x, x, x))
        assert torch.equal(fused_reset(x, x), gated_reset(x, x))
        assert len(fuse(RecurrentUNet())(torch.zeros(1, 3, 16, 16))) == 3
        runpy.run_module("gates_triton", run_name="__main__")
    """)


def test_the_file_works_without_triton():
    printed = printed_without_triton()
    assert "takes a GPU" in printed and "3.75" in printed


@Ahead
def compiled_gate(at):
    return run_python("""
        import torch
        from gates_triton import fused_update
        x = [torch.randn(9) for _ in range(3)]
        torch.testing.assert_close(torch.compile(fused_update, fullgraph=True)(*x), fused_update(*x))
        print("equal")
    """)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_fused_gate_compiles_for_a_cpu():
    """With the compiler that users have, and outside the interpreter."""
    assert compiled_gate() == "equal\n"


BUILD = """
    import re, subprocess, tempfile
    from pathlib import Path
    import gates_triton as gates, triton
    from triton.backends.compiler import GPUTarget

    assert not gates.INTERPRETED
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    constants = dict(BLOCK=gates.BLOCK, SPAN=gates.SPAN, RELU=True, EPS=1e-5, SPLITS=128, PARTS=128)
    wide = "x_ptr", "g_ptr", "out_ptr", "dx_ptr"  # of a norm these are as large as a photo, and its other tensors are float32

    def build(kernel, dtype, target, none=(), n_type="i32", n_even=True, warps=4):
        "As the launcher would for aligned pointers, and an n that is a multiple of 16 or is not."
        signature, constexprs, attrs = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants or name in none:
                signature[name], constexprs[i,] = "constexpr", None if name in none else constants[name]
            elif name in ("groups", "width"):
                signature[name] = "i32"
            else:
                size, small = name in ("n", "HW", "M"), kernel in norms and name not in wide and dtype != "fp64"
                signature[name] = n_type if name == "n" else "i32" if size else "*fp32" if small else "*" + dtype
                if not size or n_even:
                    attrs[i,] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        return triton.compile(source, target=target, options={"num_warps": warps})

    def tool(name, option, built):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            return subprocess.check_output([tools / name, option, file.name], text=True, stderr=subprocess.STDOUT)

    def traffic(built):
        return tuple(len(re.findall("tt.load|tt.store" if both else "tt.load", built.asm["ttir"])) for both in (0, 1))

    sm_80, sm_90, gfx942 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
    kernels = gates._update_fwd, gates._update_bwd, gates._reset_fwd, gates._reset_bwd
    norms = gates._norm_sums, gates._norm_fwd, gates._norm_bwd_sums, gates._norm_bwd
"""


@Ahead
def gates_built(at):
    return run_python(BUILD + """
    def no_spills(built):
        use = tool("cuobjdump", "-res-usage", built)
        assert " STACK:0 " in use and " LOCAL:0 " in use, use
        return built

    for kernel in kernels:
        for dtype in "fp32", "bf16":
            code = tool("nvdisasm", "-c", no_spills(build(kernel, dtype, sm_90)))
            ops = set(re.findall("(?:LDG|STG)[.][A-Z0-9.]*", code))
            assert ops == {"LDG.E.128", "STG.E.128"}, (kernel, dtype, ops)  # 16 bytes at once, and nothing else
            count = len(re.findall(r"^ +/[*][0-9a-f]{4}[*]/", code, re.M)) / 8  # a thread has 8 elements
            assert count < 70, (kernel, dtype, count)  # see the docstring: more, and bf16 waits for arithmetic
        for dtype in "fp16", "fp64":
            no_spills(build(kernel, dtype, sm_90))
        no_spills(build(kernel, "bf16", sm_80, n_even=False))
        no_spills(build(kernel, "fp32", sm_80, n_type="i64"))  # n past 2**31
        amd = build(kernel, "fp32", gfx942).asm["amdgcn"]
        assert "global_load_dwordx4" in amd and "global_store_dwordx4" in amd
        assert set(re.findall("_spill_count: +([0-9]+)", amd)) == {"0"}, kernel
        # 64-bit offsets: each address is pointer + int64, the program's number widened before it is multiplied
        ttir = build(kernel, "fp32", sm_90).asm["ttir"]
        assert len(re.findall("tt.addptr .*xi64>", ttir)) == len(re.findall("tt.addptr", ttir)) > 0
        assert re.search("arith.muli .* : i64", ttir) and not re.search("arith.muli .* : i32", ttir)
    print("all")
    """)  # fmt: skip


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compilers ship for Linux")
def test_every_kernel_builds_for_real_gpus():
    """How a machine without a GPU knows that the kernels are real: their machine code, ahead of time."""
    assert gates_built() == "all\n"


@Ahead
def norms_built(at):
    return run_python(BUILD + """
    for kernel in norms:
        for dtype in "fp32", "bf16":
            built = build(kernel, dtype, sm_90)
            use, code = tool("cuobjdump", "-res-usage", built), tool("nvdisasm", "-c", built)
            assert " STACK:0 " in use and " LOCAL:0 " in use, use
            wide = {op for op in re.findall("(?:LDG|STG)[.][A-Z0-9.]*", code) if op.endswith(".128")}
            assert wide == ({"LDG.E.128"} if "sums" in kernel.__name__ else {"LDG.E.128", "STG.E.128"}), (kernel, dtype, wide)
        assert " LOCAL:0 " in tool("cuobjdump", "-res-usage", build(kernel, "fp64", sm_80, n_even=False))
        constants |= dict(SPAN=8 * gates.SPAN, SPLITS=256, PARTS=256)  # a photo of 8 megapixels
        sums = "sums" in kernel.__name__
        assert " LOCAL:0 " in tool("cuobjdump", "-res-usage", build(kernel, "fp32", sm_90, warps=32 if sums else 4)), kernel
        constants |= dict(SPAN=gates.SPAN, SPLITS=128, PARTS=128)
        amd = build(kernel, "fp32", gfx942).asm["amdgcn"]
        assert "global_load_dwordx4" in amd and set(re.findall("_spill_count: +([0-9]+)", amd)) == {"0"}, kernel
    print("all")
    """)  # fmt: skip


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compilers ship for Linux")
def test_every_norm_kernel_builds_for_real_gpus():
    assert norms_built() == "all\n"


@Ahead
def passes_counted(at):
    return run_python(BUILD + """
    names = [("update", "forward"), ("update", "backward"), ("reset", "forward"), ("reset", "backward")]
    for kernel, name in zip(kernels, names):
        assert traffic(build(kernel, "fp32", sm_90))[1] == gates.PASSES[name][0]
    # of photo-sized tensors: x to sum up; x and y; g and x to sum up; g, x and dx. Beside them w, b, and two or four partial sums
    for kernel, loads, stores, large in zip(norms, (1, 5, 6, 9), (2, 1, 2, 1), (1, 2, 2, 3)):
        built = build(kernel, "fp16", sm_90)
        assert traffic(built) == (loads, loads + stores), kernel
        assert len(re.findall("tt.load.*<f16>|tt.store.*<f16>", built.asm["ttir"])) == large, kernel
    assert (1 + 2, 2 + 3) == (gates.PASSES["norm", "forward"][0], gates.PASSES["norm", "backward"][0])
    for none, loads, passes in [
        (("dh_ptr",), 4, 6), (("dac_ptr",), 4, 6), (("daz_ptr",), 3, 5), (("dh_ptr", "daz_ptr"), 3, 4),
        (("daz_ptr", "dac_ptr"), 2, 3), (("dh_ptr", "dac_ptr"), 4, 5),
    ]:
        assert traffic(build(gates._update_bwd, "fp32", sm_90, none)) == (loads, passes), none
    assert traffic(build(gates._reset_bwd, "fp32", sm_90, ("dar_ptr",))) == (2, 3)
    assert traffic(build(gates._reset_bwd, "fp32", sm_90, ("de_ptr",))) == (3, 4)
    print("all")
    """)  # fmt: skip


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compilers ship for Linux")
def test_memory_passes_of_the_kernels_are_as_the_table_says():
    """Loads and stores of the compiled kernels; and a gradient that nobody needs costs neither."""
    assert passes_counted() == "all\n"


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


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_fused_network_on_a_gpu_runs_compiled_and_from_a_cuda_graph():
    torch.manual_seed(0)
    model, image = fuse(RecurrentUNet()).cuda(), torch.randn(2, 3, 48, 64, device="cuda")
    with torch.no_grad():
        want = model(image)[-1]
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(image)[-1], want, rtol=1e-3, atol=1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(image)[-1]
        graph.replay()
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- data.py: folders


def blob(w=40, h=32, x=8):
    """A photo with a bright box off its middle, and the box as mask (0 and 255)."""
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).rectangle((x, 4, x + 12, 19), fill=255)
    return Image.merge("RGB", [mask.point(lambda v, c=c: v * c // 255 + 20) for c in (200, 120, 90)]), mask


def write_pair(folder, name, mask=None, photo=None):
    for kind in "images", "masks":
        (folder / kind).mkdir(parents=True, exist_ok=True)
    default, box = blob()
    (photo or default).save(folder / "images" / f"{name}.png")
    (box if mask is None else mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    """Six pairs and the three lists."""
    root = tmp_path / "photos"
    for i in range(6):
        write_pair(root, f"p{i}", blob(x=8 + i)[1])
    for split, names in ("train", "p0 p1 p2 p3"), ("val", "p4"), ("test", "p5"):
        (root / f"{split}.txt").write_text("\n".join(names.split()) + "\n")
    return root


def names(dataset):
    return [name for name, *_ in dataset.pairs]


def test_lists_split_folders_and_seeded_split(folder, tmp_path):
    assert [names(open_dataset(folder, split)) for split in data.SPLITS] == [["p0", "p1", "p2", "p3"], ["p4"], ["p5"]]
    image, mask = open_dataset(folder, "test")[0]
    assert image.dtype == torch.float32 and image.shape == (3, 32, 40) and mask.dtype == torch.int64 and mask.shape == (32, 40)
    np.testing.assert_array_equal(mask, np.asarray(blob(x=13)[1]) // 255)
    np.testing.assert_allclose(image[:, 0, 0], (np.array([20, 20, 20]) / 255 - data.MEAN) / data.STD, rtol=1e-5)

    for i, split in enumerate(data.SPLITS):
        write_pair(tmp_path / "three" / split, f"n{i}")
    assert [names(open_dataset(tmp_path / "three", split)) for split in data.SPLITS] == [["n0"], ["n1"], ["n2"]]

    for i in range(20):
        write_pair(tmp_path / "bare", f"q{i:02}")
    parts = [names(open_dataset(tmp_path / "bare", split)) for split in data.SPLITS]
    assert [len(part) for part in parts] == [14, 3, 3] and len(set(sum(parts, []))) == 20
    assert parts == [names(open_dataset(tmp_path / "bare", split)) for split in data.SPLITS]
    assert "seed 0" in open_dataset(tmp_path / "bare", "train").layout


def save(picture, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)


def write_names(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def make_eyth(root):
    for split, name in zip(data.SPLITS, ("vid4_1", "vid6_2", "vid9_3")):
        save(blob()[0], root / f"images/{name}.jpg")
        save(blob()[1], root / f"masks/{name}.png")
        write_names(root / f"train-val-test-split/{split}.txt", name)
    (root / "masks/vid4_1.png").rename(root / "masks/vid4_1")  # as in the archive
    return [["vid4_1"], ["vid6_2"], ["vid9_3"]], 2


def make_gtea(root):
    for name in "s1_tea_0000000010", "s2_cheese_0000000020", "s3_tea_0000000030", "s4_pealate_0000000040":
        save(blob()[0], root / f"Images/{name}.jpg")
        save(blob()[1], root / f"Masks/{name}.jpg", quality=60)  # and so with noise around 0 and 255
    return [["s1_tea_0000000010", "s3_tea_0000000030"], ["s4_pealate_0000000040"], ["s2_cheese_0000000020"]], 2


def make_hof(root):
    for name in "12", "7", "9":
        save(blob()[0].convert("L" if name == "7" else "RGB"), root / f"images_resized/{name}.jpg")
        save(blob()[1], root / f"masks/{name}.png")
    write_names(root / "train.txt", "12", "9")
    write_names(root / "test.txt", "7")
    return [["12", "9"], ["7"], ["7"]], 2


def make_kbh(root):
    for name, listed in ("36_1/00081", "test"), ("29_2/00033", "val"), ("1_3/00010", "train"), ("1_3/00020", "train"):
        save(blob()[0], root / f"data_split_by_seq/{name}_halfres.jpg")
        save(blob()[1], root / f"data_split_by_seq/{name}_mask.png")
        at = root / f"train_val_test_split/{listed}.txt"
        write_names(at, *(at.read_text().split() if at.exists() else ()), name)
    return [["36_1_00081"], ["29_2_00033"], ["1_3_00010", "1_3_00020"]], 2


def make_roads(root, where="{split}/{kind}/{name}.{end}", splits=("train", "valid", "test")):
    for split in splits:
        photo = blob()[0]
        ImageDraw.Draw(photo).rectangle((0, 0, 5, 40), fill=(255, 255, 255))
        for picture, kind, end in (photo, "sat", "tiff"), (blob()[1], "map", "tif"):
            save(picture, root / where.format(split=split, kind=kind, name=f"{split}1", end=end, tail="_labels" * (kind == "map")))
    return [[f"{split}1"] for split in splits], 2


def make_other_roads(root):
    return make_roads(root, "tiff/{split}{tail}/{name}.{end}", data.SPLITS)


def make_cityscapes(root):
    for part, city, name in ("train", "aachen", "a"), ("train", "ulm", "b"), ("val", "munster", "c"), ("test", "bonn", "d"):
        save(blob()[0], root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png")
        ids = np.asarray(blob()[1]) // 255 * np.uint8(19) + 7  # road, and a box of 26: car
        ids[:, :6] = 4  # of no train id
        save(Image.fromarray(ids), root / f"gtFine/{part}/{city}/{name}_gtFine_labelIds.png")
    return [["a"], ["b"], ["c"]], 19


def make_camvid(root):
    for i, split in enumerate(data.SPLITS):
        save(blob()[0], root / f"{split}/{i}.png")
        ids = np.asarray(blob()[1]) // 255 * np.uint8(8)
        ids[:, :6] = 11
        save(Image.fromarray(ids), root / f"{split}annot/{i}.png")
    return [["0"], ["1"], ["2"]], 11


def make_egohands(root):
    io = pytest.importorskip("scipy.io", reason="EgoHands needs scipy")
    parts = [], [], []
    for video, part in ("CARDS_OFFICE_T_B", 0), ("CHESS_OFFICE_B_S", 0), ("JENGA_COURTYARD_T_S", 1), ("PUZZLE_COURTYARD_H_T", 2):
        outline = np.array([[8.0, 6.0], [27.0, 6.0], [27.0, 21.0], [8.0, 21.0]])
        fields = [(name, object) for name in ("myleft", "myright", "yourleft", "yourright")]
        polygons = np.zeros((1, 2), fields)
        for i in range(2):
            for name, _ in fields:
                polygons[0, i][name] = outline if (name, i) == ("yourleft", 1) else np.zeros((1, 0))
            save(blob()[0], root / f"_LABELLED_SAMPLES/{video}/frame_{i * 100:04}.jpg")
            parts[part].append(f"{video}_frame_{i * 100:04}")
        io.savemat(root / f"_LABELLED_SAMPLES/{video}/polygons.mat", {"polygons": polygons})
    return list(parts), 2


PUBLISHED = {
    "eyth": make_eyth, "gtea": make_gtea, "hof": make_hof, "kbh": make_kbh, "massachusetts": make_roads, "tiff": make_other_roads,
    "cityscapes": make_cityscapes, "camvid": make_camvid, "egohands": make_egohands,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_datasets_are_read_as_they_are_published(name, tmp_path):
    want, classes = PUBLISHED[name](tmp_path)
    splits = [open_dataset(tmp_path, split) for split in data.SPLITS]
    assert [names(s) for s in splits] == want and {s.classes for s in splits} == {classes}
    assert all(len(s.names) == classes for s in splits)
    box = np.asarray(blob()[1]) > 0
    for i, s in enumerate(splits):
        image, mask = s[len(s) - 1]
        void, mask = mask.numpy() == 255, mask.numpy()
        if name == "egohands":
            assert mask.sum() == 20 * 16 and mask[6:22, 8:28].all() and s[0][1].sum() == 0  # the first frame shows no hand
            continue
        assert void.any() == (name in ("massachusetts", "tiff", "cityscapes", "camvid")) and void[:, 6:].sum() == 0
        front, back = {"cityscapes": (13, 0), "camvid": (8, 0)}.get(name, (1, 0))
        np.testing.assert_array_equal(mask[~void], np.where(box, front, back)[~void])


def test_a_layout_can_be_named_and_must_fit(tmp_path):
    make_hof(tmp_path)
    for name in "12", "7", "9":
        save(blob()[0], tmp_path / f"images/{name}.png")
    write_names(tmp_path / "val.txt", "3")
    with pytest.raises(ValueError, match="could be lists or hof; say which with --layout"):
        open_dataset(tmp_path, "train")
    assert names(open_dataset(tmp_path, "train", layout="hof")) == ["12", "9"]
    with pytest.raises(ValueError, match="(?s)wanted one of these:.*DRIVE: training/"):
        open_dataset(tmp_path, "train", layout="drive")
    with pytest.raises(ValueError, match="no layout 'voc'; there are lists, "):
        open_dataset(tmp_path, "train", layout="voc")


def test_broken_datasets_say_what_is_missing(tmp_path):
    make_kbh(tmp_path / "kbh")
    (tmp_path / "kbh/data_split_by_seq/1_3/00020_mask.png").unlink()
    with pytest.raises(ValueError, match="00020_mask.png: missing"):
        open_dataset(tmp_path / "kbh", "train")
    make_camvid(tmp_path / "camvid")
    blob()[0].save(tmp_path / "camvid/trainannot/0.png")
    with pytest.raises(ValueError, match="0.png: holds .* and colours; the annotations of CamVid"):
        open_dataset(tmp_path / "camvid", "train")
    make_camvid(tmp_path / "blank")
    save(Image.new("L", (40, 32), 11), tmp_path / "blank/valannot/1.png")
    with pytest.raises(ValueError, match="the masks of val are void all over"):
        open_dataset(tmp_path / "blank", "train")
    make_egohands(tmp_path / "ego")
    (tmp_path / "ego/_LABELLED_SAMPLES/CHESS_OFFICE_B_S/frame_0000.jpg").unlink()
    with pytest.raises(ValueError, match="polygons.mat: outlines 2 frames, the folder holds 1"):
        open_dataset(tmp_path / "ego", "train")
    (tmp_path / "ego/_LABELLED_SAMPLES/CHESS_OFFICE_B_S/polygons.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match="is no polygons.mat of EgoHands"):
        layouts.load_polygons.cache_clear()
        open_dataset(tmp_path / "ego", "train")


def test_drive_layout(tmp_path):
    for part, numbers in ("training", range(21, 29)), ("test", range(1, 4)):
        for kind in "images", "1st_manual", "mask":
            (tmp_path / part / kind).mkdir(parents=True)
        for n in numbers:
            photo, vessels = blob()
            view = Image.new("L", photo.size, 255)
            ImageDraw.Draw(view).rectangle((0, 0, 9, 31), fill=0)
            photo.save(tmp_path / part / "images" / f"{n:02}_{part}.tif")
            vessels.save(tmp_path / part / "1st_manual" / f"{n:02}_manual1.gif")
            view.save(tmp_path / part / "mask" / f"{n:02}_{part}_mask.gif")
    splits = [open_dataset(tmp_path, split) for split in data.SPLITS]
    assert [len(s) for s in splits] == [4, 4, 3] and names(splits[1])[0] == "25_training"
    _, mask = splits[2][0]
    assert (mask[:, :10] == 255).all() and mask[10, 12] == 1 and mask[0, 39] == 0
    shutil.rmtree(tmp_path / "test/1st_manual")  # as in copies of the data set that come without them
    with pytest.raises(ValueError, match="01_test.tif: has no vessels in 1st_manual/"):
        open_dataset(tmp_path, "train")


def test_masks_in_every_honest_encoding(tmp_path):
    box = np.asarray(blob()[1]) // 255
    palette = Image.fromarray(box.astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    ids = (box * 2 + (np.arange(40) > 30)).astype(np.uint8)  # classes 0 to 2
    void = np.where(np.arange(40) < 3, 255, ids).astype(np.uint8)
    for name, mask, wanted in [
        ("white", Image.fromarray(box * np.uint8(255)), box),
        ("ones", Image.fromarray(box), box),
        ("bits", Image.fromarray(box > 0), box),
        ("palette", palette, box),
        ("grey as RGB", Image.fromarray(box * np.uint8(255)).convert("RGB"), box),
        ("grey as RGBA", Image.fromarray(box * np.uint8(255)).convert("RGBA"), box),
        ("16 bits", Image.fromarray(box.astype(np.uint16)), box),
        ("ids", Image.fromarray(ids), ids),
        ("ids and void", Image.fromarray(void), void),
    ]:
        for i in range(3):
            write_pair(tmp_path / name, str(i), mask)
        dataset = open_dataset(tmp_path / name, "train")
        assert dataset.classes == len(set(wanted.flat) - {255}), name
        np.testing.assert_array_equal(dataset[0][1], wanted, err_msg=name)
    named = open_dataset(tmp_path / "ids", "train", void=2)
    assert named.classes == 2 and named[0][1].unique().tolist() == [0, 1, 255]


def test_photos_of_every_kind_read_alike(tmp_path):
    photo = blob()[0].convert("L").convert("RGB")  # grey, so that every mode can hold it
    pixels = np.asarray(photo)
    palette, upright = photo.quantize(64), photo
    palette.save(tmp_path / "palette.png", transparency=0)
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("LA").save(tmp_path / "grey-alpha.png")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    for turn, method in enumerate([None, 0, 3, 1, 5, 4, 6, 2], start=1):  # how a viewer would have to turn it back
        exif = Image.Exif()
        exif[0x0112] = turn
        back = {None: None, 0: 0, 3: 3, 1: 1, 5: 5, 4: 2, 6: 6, 2: 4}[method]  # quarter turns undo each other
        (upright if back is None else upright.transpose(back)).save(tmp_path / f"turned{turn}.png", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_allclose(np.asarray(read_photo(path), int), pixels, atol=1, err_msg=path.name)


def retype(folder, ending, how=None, cut=None, **options):
    """The photo p1 again in another format, changed by `how`, its file cut to a part of its length or by some bytes."""
    (folder / "images/p1.png").unlink()
    path, photo = folder / f"images/p1.{ending}", Image.open(folder / "images/p2.png").convert("RGB")
    (how(photo) if how else photo).save(path, **options)
    if cut:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * cut) if 0 < cut < 1 else cut])


def remask(folder, values, i=1):
    Image.fromarray(values).save(folder / f"masks/p{i}.png")


def turn(folder, ending):
    """The first training photo, lying on its side in the file, and upright by its EXIF."""
    photo, exif = folder / "images/p1.png", Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).transpose(Image.ROTATE_90).save(photo.with_suffix(f".{ending}"), exif=exif)
    photo.unlink()


def pairs_of_size(folder, w, h):
    Image.new("RGB", (w, h)).save(folder / "images/p1.png")
    Image.new("L", (w, h)).save(folder / "masks/p1.png")


def bomb(folder):
    """A PNG of 69 bytes that says it is 60,000 pixels wide and high."""
    png = bytearray((folder / "images/p1.png").read_bytes())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (folder / "images/p1.png").write_bytes(png)


def rename(folder, old, new):
    for kind in "images", "masks":
        (folder / kind / f"{old}.png").rename(folder / kind / f"{new}.png")
    text = (folder / "train.txt").read_text(encoding="utf-8").replace(old, new)
    (folder / "train.txt").write_text(text, encoding="utf-8")


def linked(folder):
    (folder / "elsewhere").mkdir()
    (folder / "images/p1.png").rename(folder / "elsewhere/p1.png")
    (folder / "images/p1.png").symlink_to(folder / "elsewhere/p1.png")


BOX = np.asarray(blob()[1]) // 255
NOISE = np.random.default_rng(0).choice([0, 1, 2, 3, 252, 253, 254, 255], (32, 40)).astype(np.uint8)
FOLDERS = {  # what is done to the folder: the words of the error, or None where it reads as if nothing had happened
    "photo: text": (lambda f: (f / "images/p1.png").write_text("hello"), "images/p1.png: cannot be read as a picture"),
    "photo: text named .jpg": (lambda f: [(f / "images/p1.png").unlink(), (f / "images/p1.jpg").write_text("a")], "p1.jpg: cannot be read"),
    "photo: empty": (lambda f: (f / "images/p1.png").write_bytes(b""), "images/p1.png: cannot be read"),
    "photo: a folder": (lambda f: [(f / "images/p1.png").unlink(), (f / "images/p1.png").mkdir()], "images/p1.png: cannot be read"),
    "photo: JPEG of 9 bytes": (lambda f: retype(f, "jpg", cut=9), "p1.jpg: cannot be read"),
    "photo: a tenth of a JPEG": (lambda f: retype(f, "jpg", cut=0.1), "p1.jpg: cannot be read"),
    "photo: nine tenths of a JPEG": (lambda f: retype(f, "jpg", cut=0.9), "p1.jpg: cannot be read"),
    "photo: PNG of 20 bytes": (lambda f: retype(f, "png", cut=20), "p1.png: cannot be read"),
    "photo: half a PNG": (lambda f: retype(f, "png", cut=0.5), "p1.png: cannot be read"),
    "photo: PNG without its checksum and end": (lambda f: retype(f, "png", cut=-20), None),
    "photo: half a TIFF": (lambda f: retype(f, "tif", cut=0.5), "p1.tif: cannot be read"),
    "photo: half a WebP": (lambda f: retype(f, "webp", cut=0.5), "p1.webp: cannot be read"),
    "photo: 1x1": (lambda f: pairs_of_size(f, 1, 1), "images/p1.png: is 1x1; wanted at least 16x16"),
    "photo: 1x400": (lambda f: pairs_of_size(f, 1, 400), "images/p1.png: is 1x400; wanted at least 16x16"),
    "photo: bomb": (bomb, "images/p1.png: cannot be read as a picture (Image size (3600000000 pixels) exceeds"),
    "photo: float TIFF": (lambda f: retype(f, "tif", lambda p: p.convert("F")), "p1.tif: holds floating-point values"),
    "photo: CMYK JPEG": (lambda f: retype(f, "jpg", lambda p: p.convert("CMYK")), None),
    "photo: progressive JPEG": (lambda f: retype(f, "jpg", progressive=True), None),
    "photo: two TIFF pages": (lambda f: retype(f, "tif", save_all=True, append_images=[Image.new("RGB", (9, 9))]), None),
    "photo: animated GIF": (lambda f: retype(f, "gif", save_all=True, append_images=[Image.new("RGB", (40, 32))]), None),
    "photo: colour profile": (lambda f: retype(f, "png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), None),
    "photo: broken colour profile": (lambda f: retype(f, "png", icc_profile=b"profile"), None),
    "photo: a turned TIFF": (lambda f: turn(f, "tif"), None),
    "photo: a turned WebP": (lambda f: turn(f, "webp"), None),
    "photo: broken EXIF": (lambda f: retype(f, "jpg", exif=b"Exif\0\0MM\0*\0\0\0\1"), None),
    "mask: text": (lambda f: (f / "masks/p1.png").write_text("hello"), "masks/p1.png: cannot be read as a picture"),
    "mask: empty": (lambda f: (f / "masks/p1.png").write_bytes(b""), "masks/p1.png: cannot be read"),
    "mask: half a PNG": (lambda f: (f / "masks/p1.png").write_bytes((f / "masks/p1.png").read_bytes()[:60]), "masks/p1.png: cannot be read"),
    "mask: too wide": (lambda f: remask(f, np.pad(BOX * 255, ((0, 0), (0, 10)))), "p1.png: is 50x32, its photo is 40x32"),
    "mask: turned": (lambda f: remask(f, BOX.T * 255), "p1.png: is 32x40, its photo is 40x32"),
    "mask: grey values": (lambda f: remask(f, np.tile(np.arange(40, dtype=np.uint8) * 6, (32, 1))), "p1.png: holds the values [0, 6, 12"),
    "mask: noise of JPEG": (lambda f: remask(f, NOISE), "p1.png: holds the values [0, 1, 2, 3, 252, ...]"),
    "mask: one grey pixel": (lambda f: remask(f, np.where(np.arange(40) == 3, 128, BOX * 255).astype(np.uint8)), "values [0, 128, 255]"),
    "mask: colours": (lambda f: blob()[0].save(f / "masks/p1.png"), "p1.png: holds colours ((20, 20, 20)"),
    "mask: transparency": (lambda f: Image.merge("LA", [blob()[1]] * 2).save(f / "masks/p1.png"), "or transparency"),
    "mask: an id of 300": (lambda f: remask(f, BOX.astype(np.uint16) * 300), "p1.png: holds values from 0 to 300; wanted 0 to 255"),
    "mask: floats": (lambda f: [(f / "masks/p1.png").unlink(), Image.fromarray(BOX.astype(np.float32)).save(f / "masks/p1.tif")], "p1.tif: holds floating"),
    "mask: 0 and 1 among 0 and 255": (lambda f: remask(f, BOX), "is 0 and 255"),
    "mask: id 7 among 0 and 255": (lambda f: remask(f, BOX * 7), "p1.png: holds the values [0, 7]"),
    "mask: of one class": (lambda f: remask(f, BOX * 0), None),
    "mask: bright as RGB": (lambda f: Image.fromarray(BOX * 255).convert("RGB").save(f / "masks/p1.png"), None),
    "masks: of one class": (lambda f: [Image.new("L", (40, 32)).save(p) for p in f.glob("masks/*")], "every mask holds [0] alone"),
    "masks: void all over": (lambda f: [Image.new("L", (40, 32), 255).save(p) for p in f.glob("masks/*")], "the masks of train are void all over"),
    "masks: void all over in val": (lambda f: Image.new("L", (40, 32), 255).save(f / "masks/p4.png") or [remask(f, BOX, i) for i in "01235"], "the masks of val are void"),
    "folder: a mask is missing": (lambda f: (f / "masks/p1.png").unlink(), "masks/p1.*: missing"),
    "folder: a photo is missing": (lambda f: (f / "images/p1.png").unlink(), "images/p1.*: missing"),
    "folder: a broken link": (lambda f: [(f / "images/p1.png").unlink(), (f / "images/p1.png").symlink_to(f / "gone")], "images/p1.png: cannot be read"),
    "folder: a link": (linked, None),
    "folder: two endings": (lambda f: blob()[0].save(f / "images/p1.jpg"), "p1.png: has the name of p1.jpg; two files may not share a name"),
    "folder: another case": (lambda f: (f / "masks/p1.png").rename(f / "masks/P1.png"), "masks/p1.*: missing"),
    "folder: ending in capitals": (lambda f: (f / "images/p1.png").rename(f / "images/p1.PNG"), None),
    "folder: spaces": (lambda f: rename(f, "p1", "my left hand"), None),
    "folder: not ASCII": (lambda f: rename(f, "p1", "손 日本 é"), None),
    "folder: dots": (lambda f: rename(f, "p1", "p1.v2.final"), None),
    "folder: hidden files": (lambda f: (f / "images/._p1.png").write_bytes(b"Mac"), None),
    "folder: other files": (lambda f: (f / "images/Thumbs.db").write_bytes(b"Windows"), None),
    "lists: an absent name": (lambda f: (f / "val.txt").write_text("p4\nq9\n"), "images/q9.* and"),
    "lists: a name in train and val": (lambda f: (f / "val.txt").write_text("p4\np0\n"), "val.txt: names p0, which train.txt has already"),
    "lists: a name twice, once with ending": (lambda f: (f / "val.txt").write_text("p4\np4.png\n"), "val.txt: names p4, which val.txt has"),
    "lists: one is missing": (lambda f: (f / "val.txt").unlink(), "val.txt: missing"),
    "lists: one is empty": (lambda f: (f / "val.txt").write_text("\n\n"), "has no photos for val"),
    "lists: no text": (lambda f: (f / "val.txt").write_bytes(b"\xff\xfe\0p"), "val.txt: is no UTF-8 text"),
    "lists: from Windows": (lambda f: (f / "val.txt").write_bytes(b"\xef\xbb\xbfp4.png\r\n\r\n"), None),
    "lists: with folders": (lambda f: (f / "val.txt").write_text("images/p4.png\n"), None),
}  # fmt: skip


def test_a_folder_that_changed_is_looked_at_anew(folder, monkeypatch):
    remask(folder, BOX * 9)
    with pytest.raises(ValueError, match="p1.png: holds the values"):
        open_dataset(folder, "train")
    remask(folder, BOX * 255)
    monkeypatch.chdir(folder.parent)
    assert open_dataset("photos", "train")[1][1].unique().tolist() == [0, 1]
    for i in range(6):
        remask(folder, BOX, i)
    assert open_dataset("photos", "train")[1][1].unique().tolist() == [0, 1]  # and not 0 and void
    write_pair(folder.parent / "elsewhere/photos", "only")
    monkeypatch.chdir(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="photos"):
        open_dataset("photos", "train")
    with pytest.raises(ValueError, match="size is 8; wanted a whole number from 16"):
        open_dataset(folder, "train", 8)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_reads_right_or_says_what_is_wrong(folder, name):
    how, words = FOLDERS[name]
    how(folder)
    if words is None:
        image, mask = open_dataset(folder, "train")[1]
        assert [len(open_dataset(folder, split)) for split in data.SPLITS] == [4, 1, 1]
        want, _ = open_dataset(folder, "train")[2]  # all photos are alike
        assert mask.shape == (32, 40) and (image - want).abs().mean() < 0.1
    else:
        with pytest.raises(ValueError) as caught:
            open_dataset(folder, "train")
        first, *more = str(caught.value).splitlines()
        assert words in first and first.startswith(str(folder)) and len(more) <= 1, caught.value


def test_check_lists_every_problem(folder):
    blob()[0].save(folder / "masks/p1.png")
    (folder / "masks/p2.png").unlink()
    (folder / "images/p3.png").write_bytes(b"GIF8")
    done = run("data.py", "--check", folder)
    assert done.returncode == 1 and all(f"p{i}" in done.stdout for i in (1, 2, 3)) and "3 problems" in done.stdout
    with pytest.raises(ValueError, match="no folder"):
        open_dataset(folder / "absent", "train")
    with pytest.raises(ValueError, match=r"(?s)holds p0.png.*wanted one of these.*images/ and masks/"):
        open_dataset(folder / "images", "train")
    with pytest.raises(ValueError, match="'training'"):
        open_dataset(folder, "training")


# ---------------------------------------------------------------- data.py: sizes and augmentation


@law
@given(w=st.integers(20, 90), h=st.integers(20, 90), short=st.integers(8, 64))
def test_size_is_the_short_side(w, h, short):
    found = data.Survey("", pairs={"train": [("x", None, None, None)]}, sizes={None: (w, h)})
    photos = data.Photos(found, "train", short, False, None, 0, 255, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_photo", lambda path: blob(w, h)[0])
        patch.setattr(data, "read_labels", lambda path: np.asarray(blob(w, h)[1]) // 255)
        image, mask = photos[0]
    assert min(image.shape[1:]) == short and image.shape[1:] == mask.shape
    assert abs(max(image.shape[1:]) - max(w, h) * short / min(w, h)) <= 0.5
    assert set(mask.unique().tolist()) <= {0, 1}


def letter_f():
    """No symmetry: a flip or a turn of one picture alone would show."""
    mask = Image.new("L", (90, 70))
    for box in (25, 10, 34, 60), (25, 10, 60, 19), (25, 30, 50, 39):
        ImageDraw.Draw(mask).rectangle(box, fill=1)
    return mask.point(lambda v: v * 255).convert("RGB"), mask


@law
@given(seed=seeds, crop=st.integers(24, 96), rotate=st.sampled_from([0, 15, 180]))
def test_augmentation_moves_photo_and_mask_together(seed, crop, rotate):
    image, mask = data.augment(*letter_f(), crop, rotate, np.random.default_rng(seed))
    image, mask = np.asarray(image).max(2).astype(float), np.asarray(mask)
    assert image.shape == mask.shape == (crop, crop) and set(np.unique(mask)) <= {0, 1, 255}
    for inside, dark in (mask == 1, False), (mask == 0, True):  # away from edges, the photo still shows what the mask says
        core = np.zeros_like(inside)
        core[2:-2, 2:-2] = np.lib.stride_tricks.sliding_window_view(inside, (5, 5)).all((2, 3))
        assert ((image[core] < 60) if dark else (image[core] > 60)).all()


def test_augmentation_flips_scales_turns_and_lights():
    drawn = [data.augment(*letter_f(), 70, 15, np.random.default_rng(seed)) for seed in range(40)]
    areas = [(np.asarray(mask) == 1).sum() for _, mask in drawn]
    assert max(areas) > 2 * min(areas)
    means = [np.asarray(image)[np.asarray(mask) == 1].mean(0) for image, mask in drawn]
    assert np.std(means, axis=0).min() > 3  # of 255: the light changes little, see augment
    stems = []  # the long stroke of F lies left of its arms, or right where flipped; its tilt is the turn
    for _, mask in drawn:
        y, x = np.nonzero(np.asarray(mask) == 1)
        stems.append((np.mean((x - x.mean()) ** 3), np.polyfit(y, x, 1)[0]))
    assert min(s for s, _ in stems) < 0 < max(s for s, _ in stems)
    assert len({round(tilt, 3) for _, tilt in stems}) > 30


def test_crops_depend_on_nothing_but_seed_epoch_and_index(folder):
    photos = [open_dataset(folder, "train", 24, True, seed=seed) for seed in (0, 0, 1)]
    for p in photos:
        p.repeat = 3
    first = [photos[0][k] for k in range(12)]
    assert all(torch.equal(a, b) for k in reversed(range(12)) for a, b in zip(first[k], photos[1][k]))
    workers = list(torch.utils.data.DataLoader(photos[0], batch_size=None, num_workers=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, workers)) and len(workers) == 12
    assert not torch.equal(first[0][0], photos[2][0][0]) and not torch.equal(first[0][0], first[4][0])
    assert torch.equal(first[0][0], photos[0][0, 0][0]) and not torch.equal(first[0][0], photos[0][1, 0][0])


def test_toy_photos_are_seeded_and_show_skin():
    for seed in 3, 4:
        photo, mask = draw_hand_photo(np.random.default_rng([0, seed]))
        again, same = draw_hand_photo(np.random.default_rng([0, seed]))
        assert photo.tobytes() == again.tobytes() and mask.tobytes() == same.tobytes()
        assert photo.size == mask.size == (160, 120) and set(np.unique(mask)) == {0, 255}
        assert 0.05 < (np.asarray(mask) > 0).mean() < 0.45
        skin = np.asarray(photo)[np.asarray(mask) > 0].mean(0)
        assert skin[0] > skin[2]  # under any lamp skin is redder than blue


def test_toy_folder_is_drawn_once(tmp_path):
    from toy import draw_set

    draw_set(tmp_path / "hands", count=7)
    assert [len(open_dataset(tmp_path / "hands", split)) for split in data.SPLITS] == [5, 1, 1]
    done = run("data.py", tmp_path / "hands")
    assert done.returncode == 1 and "not empty" in done.stderr and len(list(tmp_path.glob("hands/images/*"))) == 7


@needs_shared
@pytest.mark.parametrize("name, count, classes", [
    ("hgr", (116, 28, 50), 2), ("hands", (35, 11, 24), 2), ("DRIVE", (16, 4, 20), 2), ("camvid", (367, 101, 233), 11),
    ("epfl_roads", (70, 10, 20), 2), ("EgoHands", (14, 2, 4), 2),
])  # fmt: skip
def test_real_folders(name, count, classes):
    if name == "EgoHands":
        pytest.importorskip("scipy.io", reason="EgoHands needs scipy")
    void = 11 if name == "camvid" else 255
    splits = [open_dataset(SHARED / name, split, void=void) for split in data.SPLITS]
    assert tuple(map(len, splits)) == count and {s.classes for s in splits} == {classes}
    image, mask = splits[2][0]
    assert image.shape[1:] == mask.shape and set(mask.unique().tolist()) <= {*range(classes), 255}


# ---------------------------------------------------------------- baselines.py

LIGHT = [name for name in baselines.SYSTEMS if not re.search("vgg|resnet|deeplab|refine", name)]
ONE_SHOT = {"unet-b", "unet-g", "unet-vgg16", "unet-resnet50", "deeplabv3plus", "refinenet"}


@pytest.mark.parametrize("name", baselines.SYSTEMS)
def test_every_system_answers_alike(name):
    net = baselines.build(name, 3)
    image = torch.randn(2, 3, 65, 97)
    masks = net(image, 2)
    assert [s.shape for s in masks] == [(2, 3, 65, 97)] * (1 if name in ONE_SHOT else 2)
    train.recurrent_loss(masks, torch.randint(3, (2, 65, 97)), 0.4).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead
    shown = re.search(rf"^    .*\b{name}\b.*?([\d.,]+(?: and [\d.]+)? million|[\d,]+(?:, [\d,]+)?)$", baselines.__doc__, re.M)[1]
    with torch.device("meta"):
        parameters = size(baselines.build(name, 2))
    exact = {f"{parameters:,}", f"{parameters / 1e6:.2f}"}
    assert exact & set(re.split(r", | and | ", shown)), f"{exact}: the docstring says {shown}"


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("shape", [(64, 64), (16, 23), (71, 130)])
def test_systems_take_any_size_and_passes_do_not_change_the_past(name, shape):
    net, image = baselines.build(name, 2, width=4).eval(), torch.randn(1, 3, *shape)
    masks, longer = net(image), net(image, 5)
    assert all(torch.equal(a, b) for a, b in zip(masks, longer)) and masks[0].shape[2:] == shape
    assert (len(masks), len(longer)) == ((1, 1) if name in ONE_SHOT else (3, 5))


def test_batch_norm_is_where_group_norm_was():
    b, g = baselines.build("unet-b", 2), baselines.build("unet-g", 2)
    kinds = [[type(m).__name__ for m in net.modules()] for net in (b, g)]
    assert kinds[0] == [k.replace("GroupNorm", "BatchNorm2d") for k in kinds[1]] and "BatchNorm2d" in kinds[0]


def test_rec_simple_and_conv_gru_equal_their_equations():
    net, image = baselines.build("rec-simple", 2, width=4).double(), torch.randn(1, 3, 32, 40).double()
    mask = torch.zeros(1, 2, 32, 40).double()
    for s in net(image):
        torch.testing.assert_close(s, net.head(net.unet(torch.cat([image, mask], 1))))
        mask = torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
    gru, e, h = baselines.ConvGRU(6, 8).double(), torch.randn(2, 6, 5, 7).double(), torch.randn(2, 8, 5, 7).double()
    z, r = (1 / (1 + torch.exp(-f(torch.cat([e, h], 1)))) for f in (gru.net_z, gru.net_r))
    torch.testing.assert_close(gru(e, h), z * h + (1 - z) * torch.tanh(gru.net_c(torch.cat([e, r * h], 1))))
    middle = baselines.build("rec-middle", 2, width=4).double()
    e, skips = middle.unet.encode(image)
    h = torch.zeros(1, 64, 2, 3).double()
    for s in middle(image):
        h = middle.unet.middle(e, h)
        torch.testing.assert_close(s, middle.head(middle.unet.decode(h, skips)))
    last = baselines.build("rec-last", 2, width=4).double()
    e = last.unet(image)
    h = torch.zeros_like(e)
    for s in last(image):
        h = last.unit(e, h)
        torch.testing.assert_close(s, last.head(h))


def vgg16_file():
    """Random weights under torchvision's names for VGG-16, classifier included."""
    p, c = {}, 3
    for at, width in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, *[256] * 3, *[512] * 6)):
        p |= {f"features.{at}.weight": torch.randn(width, c, 3, 3) * (2 / 9 / c) ** 0.5, f"features.{at}.bias": torch.randn(width) * 0.1}
        c = width
    return p | {"classifier.6.bias": torch.zeros(1000)}


def resnet_file(depths):
    """Random weights under torchvision's names for a ResNet of bottlenecks, classifier included."""
    p = {"conv1.weight": torch.randn(64, 3, 7, 7) * 0.1, "fc.bias": torch.zeros(1000)}

    def bn(at, c):
        nonlocal p
        p |= {f"{at}.{n}": torch.rand(c) * 0.5 + 0.5 for n in ("weight", "running_var")}
        p |= {f"{at}.{n}": torch.randn(c) * 0.1 for n in ("bias", "running_mean")} | {f"{at}.num_batches_tracked": torch.tensor(7)}

    bn("bn1", 64)
    c = 64
    for i, depth in enumerate(depths, 1):
        w = 32 * 2**i
        for j in range(depth):
            for k, shape in enumerate([(w, c, 1, 1), (w, w, 3, 3), (4 * w, w, 1, 1)], 1):
                p[f"layer{i}.{j}.conv{k}.weight"] = torch.randn(shape) * (2 / shape[1] / shape[2] ** 2) ** 0.5
                bn(f"layer{i}.{j}.bn{k}", shape[0])
            if j == 0:
                p[f"layer{i}.{j}.downsample.0.weight"] = torch.randn(4 * w, c, 1, 1) * c**-0.5
                bn(f"layer{i}.{j}.downsample.1", 4 * w)
            c = 4 * w
    return p


def resnet_by_hand(p, x, depths):
    def bn(at, x):
        return F.batch_norm(x, p[f"{at}.running_mean"], p[f"{at}.running_var"], p[f"{at}.weight"], p[f"{at}.bias"])

    skips = [bn("bn1", F.conv2d(x, p["conv1.weight"], stride=2, padding=3)).relu()]
    x = F.max_pool2d(skips[0], 3, 2, 1)
    for i, depth in enumerate(depths, 1):
        for j in range(depth):
            at, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = bn(f"{at}.bn1", F.conv2d(x, p[f"{at}.conv1.weight"])).relu()
            y = bn(f"{at}.bn2", F.conv2d(y, p[f"{at}.conv2.weight"], stride=stride, padding=1)).relu()
            y = bn(f"{at}.bn3", F.conv2d(y, p[f"{at}.conv3.weight"]))
            x = (y + (x if j else bn(f"{at}.downsample.1", F.conv2d(x, p[f"{at}.downsample.0.weight"], stride=stride)))).relu()
        skips.append(x)
    return skips


def test_vgg16_is_vgg16(tmp_path):
    p, image = vgg16_file(), torch.randn(1, 3, 64, 96)
    torch.save(p, tmp_path / "vgg16.pth")
    x, skips = image, []
    for block in (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28):
        for at in block:
            x = F.conv2d(x, p[f"features.{at}.weight"], p[f"features.{at}.bias"], padding=1).relu()
        skips.append(x)
        x = F.max_pool2d(x, 2)
    for name, extra in ("unet-vgg16", 0), ("dru-vgg16", 2):  # the mask's channels start at zero: any mask gives the plain features
        net = baselines.build(name, 2, weights=tmp_path / "vgg16.pth").eval()
        seen = torch.cat([image, torch.rand(1, extra, 64, 96)], 1)
        e, mine = net.outer.encoder(seen)
        for got, want in zip([e, *mine], [x, *skips], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        e, mine = net.outer.encode(seen)  # what the decoder is given has a spread of one, whatever the weights
        for got, want in zip([e, *mine], [x, *skips], strict=True):
            grouped = want.unflatten(1, (8, -1)).flatten(2)
            want = ((grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, correction=0) + 1e-5).sqrt()).view_as(want)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, depths", [("dru-resnet50", (3, 4, 6, 3)), ("unet-resnet50", (3, 4, 6, 3)), ("refinenet", (3, 4, 23, 3))])
def test_resnet_is_resnet(tmp_path, name, depths):
    p, image = resnet_file(depths), torch.randn(1, 3, 64, 96)
    torch.save(p, tmp_path / "resnet.pth")
    net = baselines.build(name, 2, weights=tmp_path / "resnet.pth").eval()
    encoder = net.encoder if name == "refinenet" else net.outer.encoder
    with torch.no_grad():
        e, skips = encoder(torch.cat([image, torch.rand(1, 2, 64, 96)], 1) if name.startswith("dru") else image)
        for got, want in zip([*skips, e], resnet_by_hand(p, image, depths), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())  # float32, a hundred layers deep


def test_deep_dru_carries_its_state_and_deeplab_keeps_its_resolution():
    for name in "dru-vgg16", "dru-resnet50":
        net, image = baselines.build(name, 2).eval(), torch.randn(1, 3, 70, 64)
        with torch.no_grad():
            _, (mask, h) = net.step(image, net.start(image))
            after, _ = net.step(image, (mask, h))
            forgetful, _ = net.step(image, (mask, torch.zeros_like(h)))
        assert h.shape == (1, 512, 3, 2) and h.abs().max() > 0 and not torch.equal(after, forgetful)
    with torch.no_grad():
        e, skips = baselines.build("deeplabv3plus", 2).encoder(torch.randn(1, 3, 64, 96))
    assert e.shape == (1, 2048, 4, 6) and skips[1].shape == (1, 256, 16, 24)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    vgg, half = tmp_path / "vgg16.pth", tmp_path / "half.pth"
    p = vgg16_file()
    torch.save(p, vgg)
    half.write_bytes(vgg.read_bytes()[:10000])
    torch.save({k: v for k, v in p.items() if k != "features.28.bias"}, tmp_path / "short.pth")
    torch.save(p | {"features.0.weight": torch.zeros(64, 1, 3)}, tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, file, words in [
        ("dru-vgg16", "absent.pth", "absent.pth: no such file"),
        ("dru-vgg16", "half.pth", "half.pth: is not a state dict, or is damaged"),
        ("dru-vgg16", "list.pth", "list.pth: is not a state dict"),
        ("dru-vgg16", "short.pth", "short.pth: does not fit VGG16: features.28.bias is missing$"),
        ("unet-vgg16", "odd.pth", r"features.0.weight is \(64, 1, 3\), wanted \(64, 3, 3, 3\)"),
        ("dru-resnet50", "vgg16.pth", "does not fit ResNet: conv1.weight is missing; .* and [0-9]+ more"),
        ("dru", "vgg16.pth", "dru has no pretrained encoder"),
    ]:
        with pytest.raises(ValueError, match=words):
            baselines.build(name, 2, weights=tmp_path / file)
    with pytest.raises(ValueError, match="no system 'unet'; there are unet-b, unet-g"):
        baselines.build("unet", 2)
    with pytest.raises(ValueError, match="unet-g takes no level"):
        baselines.build("unet-g", 2, level=3)


# ---------------------------------------------------------------- the loss, scoring.py


@law
@given(passes=st.integers(1, 4), alpha=st.floats(0.1, 1), seed=seeds)
def test_loss_equals_its_equation(passes, alpha, seed):
    rng = torch.Generator().manual_seed(seed)
    masks = torch.randn(passes, 2, 3, 5, 7, dtype=torch.float64, generator=rng)
    truth = torch.randint(3, (2, 5, 7), generator=rng)
    truth[0, :2] = 255
    want = 0.0
    for t in range(passes):
        p = torch.exp(masks[t]) / torch.exp(masks[t]).sum(1, keepdim=True)
        at = [-torch.log(p[b, truth[b, y, x], y, x]) for b, y, x in (truth != 255).nonzero().tolist()]
        want += alpha ** (passes - 1 - t) * sum(at) / len(at)
    torch.testing.assert_close(train.recurrent_loss(list(masks), truth, alpha), want)


def test_a_batch_that_is_void_all_over_teaches_nothing():
    s = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = train.recurrent_loss([s, s], torch.full((1, 4, 4), 255), 0.4)
    loss.backward()
    assert loss == 0 and not s.grad.any()


def test_scores_by_hand():
    # truth 0: 6 right, 2 called 1; truth 1: 1 called 0, 3 right
    row = scoring.scores(torch.tensor([[6, 2], [1, 3]]))
    assert row["IoU"] == pytest.approx(3 / 6) and row["F1"] == pytest.approx(6 / 9)
    assert row["mIoU"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert row["mPrec"] == pytest.approx((6 / 7 + 3 / 5) / 2) and row["mRec"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert row["mF1"] == pytest.approx((12 / 15 + 6 / 9) / 2)
    lost = scoring.scores(torch.tensor([[4, 0, 0], [0, 4, 0], [0, 0, 0]]))  # class 2 occurs nowhere
    assert lost["mIoU"] == 1 and "IoU" not in lost
    missed = scoring.scores(torch.tensor([[4, 0], [2, 0]]))  # class 1 is never called
    assert missed["IoU"] == 0 and missed["mIoU"] == missed["mPrec"] == pytest.approx(4 / 6 / 2)


def test_break_even_is_where_precision_meets_recall():
    # probabilities of the foreground's four pixels .9 .8 .4 .1, of the background's .7 .3 .2: at .4 four are called, three of them right
    curve = torch.zeros(2, 11, dtype=torch.long)
    curve[1, [9, 8, 4, 1]] = 1
    curve[0, [7, 3, 2]] = 1
    assert scoring.break_even(curve) == pytest.approx(3 / 4)
    rng = np.random.default_rng(0)
    truth = rng.random(20000) < 0.1
    p = np.clip(truth * 0.3 + rng.random(20000) * 0.7, 0, 1).round(3)
    curve = torch.tensor([[((p * 1000).round() == b)[truth == k].sum() for b in range(1001)] for k in (0, 1)])
    points = [((truth & (p >= t)).sum() / max(1, (p >= t).sum()), (truth & (p >= t)).sum() / truth.sum()) for t in np.unique(p)]
    precision, recall = min(points, key=lambda point: abs(point[0] - point[1]))
    assert scoring.break_even(curve) == pytest.approx((precision + recall) / 2, abs=2e-3)


def test_classes_are_named_in_the_table(capsys):
    matrix = torch.tensor([[[4, 0, 1], [0, 3, 0], [1, 1, 2]]])
    scoring.print_table(matrix, torch.zeros(1, 2, 1001), "title", ("sky", "road", "car"))
    assert "sky 0.6667, road 0.7500, car 0.4000" in capsys.readouterr().out


@law
@given(classes=st.integers(2, 4), seed=seeds)
def test_scores_equal_their_definition_by_sets(classes, seed):
    rng = np.random.default_rng(seed)
    truth, called = rng.integers(0, classes, (2, 11, 13))
    truth[rng.random(truth.shape) < 0.2] = 255
    matrix = scoring.confusion(torch.tensor(called), torch.tensor(truth), classes)
    ious, f1s = [], []
    for k in range(classes):
        true = {at for at in np.ndindex(truth.shape) if truth[at] == k}
        found = {at for at in np.ndindex(truth.shape) if called[at] == k and truth[at] != 255}
        ious.append(len(true & found) / len(true | found))
        f1s.append(2 * len(true & found) / (len(true) + len(found)))
    assert scoring.scores(matrix)["mIoU"] == pytest.approx(np.mean(ious))
    assert scoring.scores(matrix)["mF1"] == pytest.approx(np.mean(f1s))


# ---------------------------------------------------------------- train.py and predict.py: runs

TINY = ["--size", "16", "--width", "4", "--epochs", "2", "--batch", "20"]


SCRIPTS = {f"{module.__name__}.py": module for module in (train, predict, data, bench)}


def run(script, *args):
    """The script as the command line calls it, within this process, which saves the seconds that torch takes to load."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            SCRIPTS[script].main()
        except SystemExit as stop:
            status = stop.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return subprocess.CompletedProcess([script, *args], status, out.getvalue(), errors.getvalue())


def process(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300)


def photos_of_fs(folder):
    for i in range(8):
        image, mask = data.augment(*letter_f(), 48, 15, np.random.default_rng(i))
        write_pair(folder, f"p{i}", mask.point(lambda v: v % 255 * 255), image)


@Ahead
def first_run(at):
    """Photos with an F on each, and a run of two epochs over them."""
    photos_of_fs(at / "photos")
    done = process(HERE / "train.py", "--data", at / "photos", "--out", at / "run", *TINY)
    assert done.returncode == 0, done.stderr
    return at, done.stdout


@pytest.fixture(scope="module")
def trained():
    return first_run()


def test_a_run_leaves_what_readme_promises(trained):
    at, printed = trained
    assert {p.name for p in (at / "run").iterdir()} == {"best.pt", "last.pt", "log.csv", "curves.png", "samples.png"}
    assert "seeded split" in printed and re.search(r"epoch +2/2  loss [\d.]+  val mIoU [\d.]+", printed)
    rows = printed.splitlines()[-4:]
    assert rows[0].split() == ["pass", "mIoU", "mPrec", "mRec", "mF1", "IoU", "F1", "BEP"]
    assert [row.split()[0] for row in rows[1:]] == ["1", "2", "3"]
    log = (at / "run/log.csv").read_text().splitlines()
    assert len(log) == 3 and log[0].startswith("epoch,loss,lr")
    assert Image.open(at / "run/samples.png").width > 5 * 160


def test_evaluate_prints_the_table_again(trained):
    at, printed = trained
    again = run("train.py", "--data", at / "photos", "--evaluate", at / "run/best.pt")
    assert again.stdout.splitlines()[-4:] == printed.splitlines()[-4:], again.stderr
    more = run("train.py", "--data", at / "photos", "--evaluate", at / "run/best.pt", "--passes", 5)
    assert more.stdout.splitlines()[-5:-2] == printed.splitlines()[-3:]  # five passes begin with the same three


def test_two_views_are_the_mean_of_photo_and_mirror(trained):
    at, _ = trained
    net, c, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    image, c.views = data.normalise(read_photo(at / "photos/images/p1.png")), 2
    once, mirrored = scoring.segment(net, image, c), scoring.segment(net, image.flip(-1), c)
    assert all(torch.equal(a.argmax(0), b.argmax(0).flip(-1)) for a, b in zip(once, mirrored))  # no left or right is preferred
    with torch.no_grad():
        small = scoring.to_size(image, c.size)
        both = [(s.softmax(1) + m.softmax(1).flip(-1)) / 2 for s, m in zip(net(small), net(small.flip(-1)))]
    for a, b in zip(once, both):
        torch.testing.assert_close(a, scoring.to_photo(b.log(), image.shape[1:]))


def test_resume_ends_in_the_same_weights_bit_for_bit(trained, tmp_path, monkeypatch):
    at, _ = trained

    def pull_the_plug(log, out):
        raise KeyboardInterrupt

    flags = ["--data", str(at / "photos"), "--out", str(tmp_path), *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_log", pull_the_plug)
        with pytest.raises(KeyboardInterrupt):
            train.train(train.parse(flags)[0])
    train.train(*train.parse([*flags, "--resume"])[:2])
    assert alike(tmp_path, at / "run") and len(train.load(tmp_path / "last.pt")[0]["log"]) == 2


def alike(run, other):
    """Whether two runs ended in the same weights, bit for bit, and the same log but for the seconds."""
    (a, _), (b, _) = (train.load(at / "last.pt") for at in (run, other))
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in content["log"]] for content in (a, b)]
    same = all(torch.equal(x, y) for kind in ("net", "raw") for x, y in zip(a[kind].values(), b[kind].values(), strict=True))
    return same and strip[0] == strip[1] and len((run / "log.csv").read_text().splitlines()) == len(a["log"]) + 1


@pytest.mark.parametrize("model, level", [("dru", 0), ("sru", 2), ("unet-b", 4), ("rec-last", 4)])
def test_a_seed_decides_the_weights(trained, tmp_path, monkeypatch, model, level):
    at, _ = trained
    monkeypatch.setattr(data.Photos, "repeat", property(lambda self: 4, lambda self, times: None), raising=False)  # four steps are enough
    shape = ["--level", str(level)] if level < 4 else []
    for name, seed in ("a", "1"), ("b", "1"), ("c", "2"):
        flags = ["--data", at / "photos", "--out", tmp_path / name, *TINY, "--epochs", "1", "--batch", "7", "--model", model, "--seed", seed]
        train.train(train.parse([*map(str, flags), *shape])[0])
    assert alike(tmp_path / "a", tmp_path / "b") and not alike(tmp_path / "a", tmp_path / "c")


def test_a_pretrained_encoder_learns_at_a_fiftieth(trained, tmp_path, monkeypatch):
    at, _ = trained
    monkeypatch.setattr(train, "build", lambda c, classes: RecurrentUNet(classes, width=4))
    monkeypatch.setattr(baselines, "encoder_of", lambda net: net.outer)
    flags = ["--data", at / "photos", "--out", tmp_path, *TINY, "--epochs", "1", "--batch", "134", "--weights", "some.pth"]
    train.train(train.parse([*map(str, flags)])[0])
    groups = train.load(tmp_path / "last.pt")[0]["optimiser"]["param_groups"]
    encoder = len(list(RecurrentUNet(width=4).outer.parameters()))
    everything = len(list(RecurrentUNet(width=4).parameters()))
    assert [(len(g["params"]), g["max_lr"]) for g in groups] == [(everything - encoder, 4e-3), (encoder, pytest.approx(8e-5))]


def test_a_signal_ends_the_step_and_resume_goes_on(trained, tmp_path, monkeypatch, capsys):
    """Ctrl-C; run_with_workers has SIGTERM."""
    at, _ = trained
    flags = ["--data", str(at / "photos"), "--out", str(tmp_path), *TINY]
    steps, loss = itertools.count(), train.recurrent_loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "recurrent_loss", lambda *a: (next(steps) == 27 and signal.raise_signal(signal.SIGINT)) or loss(*a))
        with pytest.raises(SystemExit) as stopped:
            train.train(train.parse(flags)[0])
    assert stopped.value.code == 130 and "stopped after epoch 2, step 8" in capsys.readouterr().err
    assert not alike(tmp_path, at / "run")
    train.train(*train.parse([*flags, "--resume"])[:2])
    assert alike(tmp_path, at / "run")


def test_processes_count_every_photo_once_and_the_first_writes(trained, tmp_path, monkeypatch):
    at, _ = trained
    net, c, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    photos, parts = open_dataset(at / "photos", "train"), []
    whole = scoring.evaluate(net, photos, c, torch.device("cpu"))
    for rank in range(4):
        monkeypatch.setattr(scoring, "place", lambda rank=rank: (rank, 4))
        monkeypatch.setattr(scoring.distributed, "all_gather_object", lambda gathered, part: parts.append(part))
        scoring.evaluate(net, photos, c, torch.device("cpu"))
    assert len(parts) == 4 and all(torch.equal(sum(part), want) for part, want in zip(zip(*parts), whole))
    shares = []
    for rank in range(4):
        monkeypatch.setattr(train, "place", lambda rank=rank: (rank, 4))
        shares.append(list(train.batches(402, c, 1, 3)))
    monkeypatch.setattr(train, "place", lambda: (0, 1))
    for *parts, batch in zip(*shares, train.batches(402, c, 1, 3), strict=True):
        assert sorted(sum(parts, [])) == sorted(batch) and min(map(len, parts)) == 5
    shown = sum(train.batches(402, c, 1, 0), [])
    assert len(set(shown)) == 800 and [sum(epoch == e for e, _ in shown) for epoch in (1, 2)] == [400, 400]  # whole batches of 402
    monkeypatch.setattr(runs, "place", lambda: (1, 4))
    runs.save(tmp_path / "last.pt", {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("spoil, words", [
    (lambda loss: loss * torch.nan, "loss is nan, its gradient nan"),
    (lambda loss: loss + (0 * loss).sqrt(), r"loss is 0\.\d+, its gradient nan"),
])  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run(trained, tmp_path, monkeypatch, spoil, words):
    at, _ = trained
    steps, loss = itertools.count(), train.recurrent_loss
    monkeypatch.setattr(train, "recurrent_loss", lambda *a: spoil(loss(*a)) if next(steps) == 22 else loss(*a))
    with pytest.raises(ValueError, match=words + " in epoch 2, step 3, since pass 3, at learning rate .*smaller --lr"):
        train.train(train.parse(["--data", str(at / "photos"), "--out", str(tmp_path), *TINY])[0])
    content, _ = train.load(tmp_path / "last.pt")
    assert len(content["log"]) == 1 and len(content["photos"]) == 7 and all(v.isfinite().all() for v in content["raw"].values())


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "CUDA out of memory. Tried to allocate 2 GiB; a smaller --batch, "),
    (MemoryError(), 1, "out of memory; a smaller --batch, "),
    (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\n  File\nValueError: a.png: gone"), 1, "train.py: ValueError: a.png: gone"),
    (KeyboardInterrupt(), 130, ""),
])  # fmt: skip
def test_what_else_may_stop_a_run(trained, tmp_path, monkeypatch, error, status, words):
    at, _ = trained
    monkeypatch.setattr(train, "recurrent_loss", lambda *_: (_ for _ in ()).throw(error))
    done = run("train.py", "--data", at / "photos", "--out", tmp_path, *TINY)
    assert done.returncode == status and words in done.stderr and done.stderr.count("\n") <= 1
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="illegal memory access"):
        patch.setattr(train, "recurrent_loss", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access was encountered")))
        run("train.py", "--data", at / "photos", "--out", tmp_path / "other", *TINY)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save(path, {"a": torch.ones(3)})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="last.pt: could not be written .*No space left.*intact"):
        train.save(path, {"a": torch.zeros(3)})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3)) and not path.with_suffix(".part").exists()


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"net": Bomb(), "config": {}, "classes": 2}, tmp_path / "bomb.pt")
    for load in train.load, lambda path: baselines.build("dru-vgg16", 2, weights=path):
        with pytest.raises(ValueError, match="bomb.pt: is not a"):
            load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("model", ["unet-b", "sru", "rec-middle"])
def test_every_model_trains_and_predicts(trained, tmp_path, model):
    at, _ = trained
    train.train(train.parse(["--data", str(at / "photos"), "--out", str(tmp_path / "run"), "--model", model, *TINY, "--epochs", "1"])[0])
    done = run("predict.py", tmp_path / "run/best.pt", at / "photos/images", "--out", tmp_path / "masks")
    assert "8 masks" in done.stdout and len(list((tmp_path / "masks").glob("p?.png"))) == 8


def test_masks_have_the_size_of_their_photos(trained, tmp_path):
    at, _ = trained
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    blob(61, 33)[0].save(tmp_path / "in/turned.jpg", exif=exif)
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8nothing")
    (tmp_path / "in/film.mp4").touch()
    done = run("predict.py", at / "run/best.pt", tmp_path / "in", at / "photos/images/p0.png", "--out", tmp_path / "out")
    assert "in: passed over 1 that are no pictures here (film.mp4)" in done.stderr
    assert done.returncode == 1 and "broken.jpg: cannot be read" in done.stderr and "2 masks" in done.stdout
    turned = Image.open(tmp_path / "out/turned.png")
    assert turned.size == (33, 61) and set(np.unique(turned)) <= {0, 255}
    assert Image.open(tmp_path / "out/turned_overlay.jpg").size == (33, 61)
    net, config, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    want = scoring.segment(net, data.normalise(read_photo(at / "photos/images/p0.png")), config)[-1].argmax(0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/p0.png")), want * 255)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 GB")])
def test_a_photo_too_large_for_memory_is_named_and_passed(trained, tmp_path, monkeypatch, error):
    at, _ = trained
    look = predict.look
    monkeypatch.setattr(predict, "find_inputs", lambda paths: [at / "photos/images/p0.png", at / "photos/images/p1.png"])
    calls = iter([look, lambda *_: (_ for _ in ()).throw(error)])
    monkeypatch.setattr(predict, "look", lambda *a: next(calls)(*a))
    done = run("predict.py", at / "run/best.pt", at / "photos/images", "--out", tmp_path / "out")
    assert done.returncode == 1 and "p1.png: " in done.stderr and "memory" in done.stderr and "1 masks" in done.stdout
    monkeypatch.setattr(predict, "look", lambda *_: (_ for _ in ()).throw(RuntimeError("Triton Error [CUDA]: invalid argument")))
    with pytest.raises(RuntimeError, match="invalid argument"):  # no fault of the photo's
        run("predict.py", at / "run/best.pt", at / "photos/images", "--out", tmp_path / "out")


def test_frames_carry_the_state(trained, tmp_path):
    at, _ = trained
    done = run("predict.py", at / "run/best.pt", at / "photos/images", "--frames", "--out", tmp_path)
    assert "8 masks" in done.stdout, done.stderr
    net, config, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    state = None
    for i in range(8):
        image = data.normalise(read_photo(at / f"photos/images/p{i}.png"))
        frame = scoring.to_size(image, config.size)
        with torch.no_grad():
            s, state = net.step(frame, state or net.start(frame))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"p{i}.png")), scoring.to_photo(s, image.shape[1:]).argmax(0) * 255)


MISTAKES = [  # what is typed, and words of the one line that answers; {at} is the folder of the run, {tmp} an empty one
    ("train.py --data {tmp}/absent", "absent: is no folder"),
    ("train.py --data {tmp}", "holds nothing; wanted one of these"),
    ("train.py --data {at}/photos/masks/p1.png", "p1.png: is no folder"),
    ("train.py --data {at}/photos --layout drive", "wanted one of these"),
    ("train.py --data {at}/photos --layout voc", "there is no layout 'voc'"),
    ("train.py --data {at}/photos --out {at}/run", "--resume goes on with it"),
    ("train.py --data {at}/photos --out {at}/run/log.csv", "log.csv: is a file; wanted the name of a folder"),
    ("train.py --data {at}/photos --out {tmp} --resume", "last.pt: no such checkpoint"),
    ("train.py --data {at}/photos --out {at}/run --resume --lr 0.1", "--lr 0.1: "),
    ("train.py --data {at}/photos --out {at}/run --resume --evaluate {at}/run/best.pt", "choose one"),
    ("train.py --data {at}/photos --evaluate {at}/run/best.pt --level 3", "--level 3: "),
    ("train.py --data {at}/photos --evaluate {at}/run", "run: is not a checkpoint"),
    ("train.py --data {at}/three --evaluate {at}/run/best.pt", "best.pt: knows 2 classes, {at}/three has 3"),
    ("train.py --data {at}/photos --out {tmp} --level 5", "--level 5: wanted a whole number from 0 to 4"),
    ("train.py --data {at}/photos --out {tmp} --level -1", "--level -1: "),
    ("train.py --data {at}/photos --out {tmp} --epochs 0", "--epochs 0: "),
    ("train.py --data {at}/photos --out {tmp} --batch -1", "--batch -1: "),
    ("train.py --data {at}/photos --out {tmp} --passes 0", "--passes 0: "),
    ("train.py --data {at}/photos --out {tmp} --width 100000", "--width 100000: wanted a whole number from 1 to 1024"),
    ("train.py --data {at}/photos --out {tmp} --size 1000000", "--size 1000000: "),
    ("train.py --data {at}/photos --out {tmp} --size 8", "--size and --crop: wanted at least 16"),
    ("train.py --data {at}/photos --out {tmp} --crop 4", "--size and --crop: wanted at least 16"),
    ("train.py --data {at}/photos --out {tmp} --alpha 0", "--alpha 0.0: wanted a number above 0"),
    ("train.py --data {at}/photos --out {tmp} --model unet-g --recompute 1", "works with dru, sru and dru-vgg16, and not with unet-g"),
    ("train.py --data {at}/photos --out {tmp} --alpha nan", "--alpha nan: "),
    ("train.py --data {at}/photos --out {tmp} --lr inf", "--lr inf: "),
    ("train.py --data {at}/photos --out {tmp} --rotate 400", "--rotate 400.0: wanted degrees from 0 to 180"),
    ("train.py --data {at}/photos --out {tmp} --void 256", "--void 256: "),
    ("train.py --data {at}/photos --out {tmp} --seed -5", "--seed -5: "),
    ("train.py --data {at}/photos --out {tmp} --workers -2", "--workers -2: "),
    ("train.py --data {at}/photos --out {tmp} --model unet-g --level 2", "unet-g takes no level"),
    ("train.py --data {at}/photos --out {tmp} --model unet-g --passes 2", "unet-g takes no passes"),
    ("train.py --data {at}/photos --out {tmp} --weights {at}/run/best.pt", "dru has no pretrained encoder"),
    ("train.py --data {at}/photos --out {tmp} --model dru-vgg16 --weights {tmp}/absent.pth", "absent.pth: "),
    ("predict.py {at}/run/best.pt {tmp}/absent.jpg", "absent.jpg: no such file or folder"),
    ("predict.py {at}/run/best.pt {tmp}", "holds no pictures (.bmp, .gif"),
    ("predict.py {at}/run/best.pt {at}/photos/images {at}/photos/masks --out {tmp}", "would both become p0.png"),
    ("predict.py {at}/run/best.pt {at}/photos/images --out {at}/photos/images", "p0.png: is an input and would be overwritten"),
    ("predict.py {at}/run/best.pt {at}/photos/images --out {at}/run/log.csv", "log.csv"),
    ("train.py --data {at}/fewer --out {at}/run --resume", "{at}/fewer: its photos have changed since"),
    ("train.py --data {at}/photos --out {at}/odd --resume", "last.pt: does not hold the dru that it names ('raw')"),
    ("predict.py {tmp}/absent.pt {at}/photos/images", "absent.pt: no such checkpoint"),
    ("data.py {at}/photos", "photos: exists and is not empty"),
    ("data.py {tmp}/absent --check", "absent: is no folder"),
]


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_gets_one_sentence(trained, tmp_path, command, words):
    at, _ = trained
    if not (at / "three").exists():
        shutil.copytree(at / "photos", at / "fewer")
        for kind in "images", "masks":
            (at / "fewer" / kind / "p7.png").unlink()
        (at / "odd").mkdir()
        shutil.copy(at / "run/best.pt", at / "odd/last.pt")
        write_pair(at / "three", "p0", Image.fromarray(BOX + BOX.T[:32, :1]))
        for i in "123":
            write_pair(at / "three", f"p{i}", Image.fromarray(BOX * np.uint8(2)))
    script, *args = command.format(at=at, tmp=tmp_path).split()
    before = sorted(at.rglob("*"))
    done = run(script, *args)  # any exception but SystemExit would be a traceback
    assert done.returncode == 1 and done.stderr.startswith(f"{script}: ") and words.format(at=at) in done.stderr
    assert sorted(at.rglob("*")) == before


def change(path, out, **entries):
    content = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in (content | entries).items() if v is not None}, out)


CHECKPOINTS = {  # how it comes about from a good one: the words that answer it
    "empty": (lambda best, out: out.write_bytes(b""), "is not a checkpoint of train.py, or is damaged"),
    "text": (lambda best, out: out.write_text("hello"), "is not a checkpoint"),
    "half": (lambda best, out: out.write_bytes(best.read_bytes()[:9000]), "is not a checkpoint"),
    "without its end": (lambda best, out: out.write_bytes(best.read_bytes()[:-100]), "is not a checkpoint"),
    "a bit turned among the weights": (lambda best, out: out.write_bytes(turned(best.read_bytes())), "is not a checkpoint"),
    "a picture": (lambda best, out: blob()[0].save(out, "png"), "is not a checkpoint"),
    "another zip": (lambda best, out: zipfile.ZipFile(out, "w").writestr("a", "b"), "is not a checkpoint"),
    "another program's": (lambda best, out: torch.save({"weights": torch.zeros(1)}, out), "is not a checkpoint"),
    "a bare state-dict": (lambda best, out: torch.save(RecurrentUNet().state_dict(), out), "is not a checkpoint"),
    "a list": (lambda best, out: torch.save([1, 2], out), "is not a checkpoint"),
    "a later version's settings": (lambda best, out: change(best, out, config={"model": "dru", "depth": 3}), "is not a checkpoint"),
    "settings that no run has": (lambda best, out: change(best, out, config={"level": -1}), "is not a checkpoint"),
    "settings of the wrong kind": (lambda best, out: change(best, out, config={"level": "four"}), "is not a checkpoint"),
    "without weights": (lambda best, out: change(best, out, net=None), "does not hold the dru that it names ('net')"),
    "without classes": (lambda best, out: change(best, out, classes=None), "does not hold the dru that it names ('classes')"),
    "of other classes": (lambda best, out: change(best, out, classes=5), "does not hold the dru that it names (size mismatch for"),
    "of another system": (lambda best, out: change(best, out, config={"model": "unet-g"}), "does not hold the unet-g that it names"),
    "of no system": (lambda best, out: change(best, out, config={"model": "segnet"}), "there is no system 'segnet'"),
}


def turned(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_foreign_checkpoint_gets_one_sentence(trained, tmp_path, monkeypatch, name):
    at, _ = trained
    make, words = CHECKPOINTS[name]
    make(at / "run/best.pt", tmp_path / "it.pt")
    monkeypatch.chdir(tmp_path)
    for args in ("predict.py", "it.pt", at / "photos/images"), ("train.py", "--data", at / "photos", "--evaluate", "it.pt"):
        done = run(*args)
        assert done.stderr.startswith(f"{args[0]}: it.pt: ") and words in done.stderr and done.stderr.count("\n") == 1


FUZZ = settings(law, max_examples=int(os.environ.get("FUZZ", 25)), suppress_health_check=list(HealthCheck))


@st.composite
def spoiled(draw, content):
    """The bytes cut, turned, zeroed, repeated or exchanged at random places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.booleans()):
            at = min(at, draw(st.integers(0, 200)))  # headers are where it hurts
        span = slice(at, at + draw(st.sampled_from([1, 2, 4, 30, 300])))
        match draw(st.sampled_from(["cut", "turn", "zero", "twice", "other", "gone"])):
            case "cut":
                del content[at:]
            case "turn":
                content[span] = bytes(b ^ draw(st.sampled_from([1, 128, 255])) for b in content[span])
            case "zero":
                content[span] = bytes(len(content[span]))
            case "twice":
                content[span] = content[span] * 2
            case "other":
                content[span] = draw(st.binary(min_size=len(content[span]), max_size=len(content[span])))
            case "gone":
                del content[span]
    return bytes(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
@pytest.mark.parametrize("kind", ["images/p1.jpg", "images/p1.png", "images/p1.tif", "images/p1.webp", "images/p1.gif", "images/p1.bmp", "images/p1.ppm",
                                  "masks/p1.png", "masks/p1.gif", "masks/p1.tif", "train.txt"])  # fmt: skip
def test_fuzz_folders(folder, kind):
    """FUZZ=5000 python -m pytest -k fuzz    for ten minutes and more of it; a few examples are enough for every day."""
    path = folder / kind
    if path.suffix != ".txt":
        whole = Image.open(path.with_suffix(".png"))
        whole.load()
        path.with_suffix(".png").unlink()
        whole.save(path, **({"exif": b"Exif\0\0" + exif().tobytes()[6:]} if path.suffix in (".jpg", ".webp") else {}))
    content = path.read_bytes()

    @FUZZ
    @given(spoiled(content))
    def try_it(content):
        path.write_bytes(content)
        try:
            dataset = open_dataset(folder, "train", 16, augment=True)
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            for image, mask in dataset:
                assert image.shape == (3, 16, 16) and image.isfinite().all() and set(mask.unique().tolist()) <= {0, 1, 255}

    try_it()


def exif():
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    return tags


def test_fuzz_checkpoints(trained, tmp_path):
    at, _ = trained
    content, path = (at / "run/best.pt").read_bytes(), tmp_path / "spoiled.pt"
    want = train.load_net(at / "run/best.pt", torch.device("cpu"))[0].state_dict()

    @FUZZ
    @given(spoiled(content))
    def try_it(content):
        path.write_bytes(content)
        try:
            net, _, classes = train.load_net(path, torch.device("cpu"))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:  # the damage did not reach what is read
            assert classes == 2 and all(torch.equal(a, want[name]) for name, a in net.state_dict().items())

    try_it()


def test_a_folder_that_may_not_be_read_or_written(trained, tmp_path, monkeypatch):
    at, _ = trained

    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    for method, *args in [
        ("iterdir", "train.py", "--data", at / "photos", "--out", tmp_path / "new"),
        ("mkdir", "train.py", "--data", at / "photos", "--out", tmp_path / "new"),
        ("iterdir", "predict.py", at / "run/best.pt", at / "photos/images"),
        ("mkdir", "predict.py", at / "run/best.pt", at / "photos/images", "--out", tmp_path / "new"),
        ("iterdir", "data.py", "--check", at / "photos"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refused)
            assert "Permission denied: '" in run(*args).stderr


# ---------------------------------------------------------------- fast.py


def test_a_network_on_a_cpu_is_the_plain_network_sooner():
    plain, image = RecurrentUNet().eval(), torch.randn(1, 3, 37, 51)
    with torch.no_grad():
        want = plain(image)
        quick = fast.on(torch.device("cpu"), plain)
        assert quick.head.weight.is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(quick(image), want):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("unit", ["dru", "sru"])
def test_recomputing_changes_neither_masks_nor_gradients_but_what_is_kept(unit):
    net, image = RecurrentUNet(unit=unit).double(), torch.randn(2, 3, 33, 18, dtype=torch.float64)
    gradients, kept = [], []
    for form in net, fast.Recomputed(net):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.setdefault(x.data_ptr(), x), lambda x: x):
            masks = form(image, 3)
        kept.append(sum(x.numel() for x in held.values()))
        gradients.append(torch.autograd.grad(sum(s.square().mean() for s in masks), list(net.parameters())))
        assert len(masks) == 3
    for (name, _), a, b in zip(net.named_parameters(), *gradients):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert kept[1] < kept[0] / 3


class FakeGraph:
    """A recording as Replayed keeps it, without a GPU: it reads and writes the same tensors at every replay."""

    def __init__(self, f, args):
        self.f, self.args = f, [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        self.inputs = [x for x in self.args if isinstance(x, torch.Tensor)]
        self.results = [x.clone() for x in f(*self.args)]

    def replay(self):
        for still, x in zip(self.results, self.f(*self.args)):
            still.copy_(x)


def test_a_replayed_call_is_recorded_at_its_second_sight(monkeypatch):
    """The bookkeeping alone; that a recording computes the same is a test for a GPU, below."""
    recorded = []

    def record(self, args):
        graph = FakeGraph(self.f, args)
        recorded.append(graph)
        return graph, graph.inputs, graph.results

    monkeypatch.setattr(fast.Replayed, "record", record)
    f = lambda x, times: [x * times, x + times]
    run, seen = fast.Replayed(f, most=2), []
    for k in range(5):
        x = torch.full((2, 3), float(k))
        seen.append((x, run(x, 2)))
    assert len(recorded) == 1  # the first call ran as it was, the second was recorded, the others replayed
    for x, got in seen:  # each result is the caller's own: later calls have not written over it
        assert torch.equal(got[0], x * 2) and torch.equal(got[1], x + 2)
    for other in (torch.ones(3, 2), 2), (torch.ones(2, 3), 5), (torch.ones(2, 3).double(), 2):  # a shape, a number, a dtype
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(*other), f(*other)))
    assert len(recorded) == 4 and len(run.graphs) == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("half", [False, True])
def test_a_replayed_network_is_the_network(half):
    net = fuse(RecurrentUNet()).cuda().eval()
    run = fast.Replayed(net)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        for k in range(4):
            image = torch.randn(1, 3, 40, 56, device="cuda")
            for a, b in zip(run(image, 3), net(image, 3)):
                torch.testing.assert_close(a.float(), b.float(), rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-4)


# ---------------------------------------------------------------- bench.py


def test_bench_prints_a_row_for_every_system(monkeypatch, capsys):
    alone = bench.alone  # a process of its own, which takes seconds: once is enough
    monkeypatch.setattr(bench, "alone", lambda *flags: alone(*flags) if "dru" in flags else 1.0)
    monkeypatch.setattr(bench, "ROWS", ["dru", "unet-g", "sru(0)"])
    monkeypatch.setattr(bench, "FRAME", (1, 3, 32, 48))
    bench.table(2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in rows] == [["dru", "364,338"], ["unet-g", "486,562"], ["sru(0)", "973,466"]]
    for row in rows:
        ms, low, high, per_second, memory = float(row[3]), float(row[4]), float(row[6]), float(row[7]), float(row[8])
        assert 0 < low <= ms <= high and per_second == pytest.approx(1000 / ms, rel=0.05) and memory > 0
    assert run("bench.py").returncode == 2
    assert "say both" in run("bench.py", "--train", "--official", "x").stderr


def test_bench_compares_forms_within_shuffled_rounds(capsys, monkeypatch):
    order, ms = [], {"plain": iter([4.0] * 8 + [40.0] * 2), "slow": iter([8.0] * 10)}
    forms = {name: lambda name=name: order.append(name) or next(ms[name]) for name in ms}
    monkeypatch.setattr(bench, "timed", lambda call: call())
    medians = bench.compare(forms, rounds=9, warm=1)
    rows = capsys.readouterr().out.splitlines()
    assert medians == {"plain": 4, "slow": 8}  # the two rounds that something else slowed down do not count
    assert rows[1].split() == ["plain", "4.0", "4.0", "to", "22.0", "1.00"] and rows[2].split()[-1] == "0.50"
    assert len({tuple(order[k : k + 2]) for k in range(2, 20, 2)}) == 2 and sorted(order) == 10 * ["plain"] + 10 * ["slow"]  # in either order


def test_bench_runs_every_form_and_finds_them_equal(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # compiling takes a minute
    monkeypatch.setattr(bench, "compare_all", lambda cases, rounds: [call() for forms in cases.values() for call in forms.values()])
    bench.infer(1, None)
    found = re.findall(r"differ by at most (\S+); (\d+) pixels", capsys.readouterr().out)
    assert found and all(float(off) < 3e-4 and pixels == "0" for off, pixels in found)  # PyTorch's norm over channels-last is ten times less exact than its other
    monkeypatch.setattr(bench, "BATCH", (1, 3, 32, 32))
    for form in bench.TRAINING:
        bench.training_step(form)()
    assert run("bench.py", "--infer", "--official", HERE).stderr.startswith("bench.py: ")


def test_every_form_of_bench_is_on_its_device_and_answers(monkeypatch):
    """No GPU has run bench.py yet; the meta device stands in for one here."""
    for form, make in bench.TRAINING.items():
        with monkeypatch.context() as patch:
            patch.setattr(bench, "DEVICE", torch.device("meta"))
            assert {p.device.type for p in make().parameters()} == {"meta"}, form
    assert bench.half(lambda: ["logits"])() == ["logits"]


def test_bench_counts_what_the_fused_kernels_save(monkeypatch):
    """A pass saves 2 memory passes of every ReLU, 11 and 2 of the gates, and what else a norm's operator takes and gives."""
    monkeypatch.setattr(gates_triton, "_runs_triton", lambda x: False)  # what is computed does not count
    net, seen = RecurrentUNet(passes=1), {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, i, y, name=name: seen.update({name: (m, y.nbytes)}) if torch.is_tensor(y) else None)
    with torch.no_grad():
        net(torch.rand(1, 3, 37, 51))
    norms, relus = ([(m, n) for m, n in seen.values() if isinstance(m, kind)] for kind in (torch.nn.GroupNorm, torch.nn.ReLU))
    e, h = (seen[f"unit.{name}"][1] for name in ("net_r", "net_z"))
    plain, fused = (bench.counted(form, 1, (37, 51)) for form in (False, True))
    small = sum(4 * 2 * (m.num_groups + m.num_channels) for m, _ in norms)  # mean and deviation, weight and bias
    assert plain.bytes - fused.bytes == 3 * (2 * sum(n for _, n in relus) + 11 * h + 2 * e + small)
    assert plain.launches - fused.launches == 3 * (len(norms) + len(relus) + 5 + 1)


def test_bench_writes_how_it_grows(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "alone", lambda flag, *at: 7.0)
    monkeypatch.setattr(bench, "GROW", {"passes": (1, 2), "side": (16, 32), "batch": (1,)})
    bench.grow(tmp_path / "growth.csv", 2)
    rows = [line.split(",")[:4] for line in (tmp_path / "growth.csv").read_text().splitlines()]
    assert rows[0] == ["axis", "value", "ms", "MB"] and [row[:2] for row in rows[1:]] == [*map(list, (("passes", "1"), ("passes", "2"), ("side", "16"), ("side", "32"), ("batch", "1")))]
    assert all(float(ms) > 0 and mb == "7" for _, _, ms, mb in rows[1:])
    assert bench.point_memory(1, 16, 1) >= 0


# ---------------------------------------------------------------- predict.py --export


def test_an_exported_network_gives_the_same_masks_at_any_size(trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    at, _ = trained
    done = run("predict.py", at / "run/best.pt", "--export", tmp_path / "dru.onnx")
    assert done.returncode == 0 and "RGB from 0 to 1" in done.stdout, done.stderr
    session = runtime.InferenceSession(tmp_path / "dru.onnx")
    net, config, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    for b, h, w in (1, 48, 64), (2, 33, 47), (1, 17, 90):
        photos = np.random.default_rng(h).integers(0, 256, (b, h, w, 3), np.uint8)
        images = torch.stack([data.normalise(photo) for photo in photos])
        got = session.run(None, {"image": photos.transpose(0, 3, 1, 2).astype(np.float32) / 255})[0]
        with torch.no_grad():
            want = net(images, config.passes)[-1]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["unet-b", "rec-simple", "rec-middle", "rec-last", "sru"])
def test_other_systems_are_exported_too(name, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net = baselines.build(name, 3, width=2).eval()
    monkeypatch.setattr(predict, "load_net", lambda *_: (net, train.Config(size=32), 3))
    predict.export("a.pt", tmp_path / "net.onnx")  # which compares it with PyTorch at another batch and size
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    with torch.no_grad():
        list(net.parameters())[0].fill_(torch.nan)
    with pytest.raises(ValueError, match="not written; ONNX Runtime's logits differ from PyTorch's by nan"):
        predict.export("a.pt", tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="in a folder that exists"):
        predict.export("a.pt", tmp_path / "none/other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_an_export_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    at, _ = trained
    true = predict.to_onnx

    def wrong(net, image, path):
        net.net.head.bias.data += 1
        true(net, image, path)
        net.net.head.bias.data -= 1

    monkeypatch.setattr(predict, "to_onnx", wrong)
    done = run("predict.py", at / "run/best.pt", "--export", tmp_path / "dru.onnx")
    assert "not written; ONNX Runtime's logits differ" in done.stderr and not list(tmp_path.iterdir())


def test_export_asks_for_what_it_needs(trained, tmp_path, monkeypatch):
    at, _ = trained
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = run("predict.py", at / "run/best.pt", "--export", tmp_path / "dru.onnx")
    assert done.stderr == "predict.py: --export needs two more packages: pip install onnx onnxruntime\n"
    assert run("predict.py", at / "run/best.pt").returncode == 2  # neither photos nor --export
    assert "--frames and --export" in run("predict.py", at / "run/best.pt", "--export", "x.onnx", "--frames").stderr


# ---------------------------------------------------------------- results/


def result(name):
    """A script of results/ as a module."""
    found = importlib.util.spec_from_file_location(name, HERE / f"results/{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_tables_on_the_pages_are_what_results_say():
    tables = result("tables")
    names = []
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.written(text) == text, f"{page}: python results/tables.py"
        names += re.findall("<!-- table: (.+) -->", text)
    assert sorted(names) == sorted(tables.MAKE)


def test_evidence_commands_are_what_runs():
    evidence = result("evidence")
    runs, done = list(evidence.all_runs()), {(row["data"], row["system"], row["seed"]) for row in evidence.rows()}
    assert len({run.name for run in runs}) == len(runs) == 3 * (11 * 5 + 15 * 2)
    assert done <= {(run.data, run.system, str(run.seed)) for run in runs}
    for run_ in runs:
        config, *_ = train.parse(evidence.command(run_).split(" with ")[0].split()[2:] + ["--out", run_.config.out])
        assert config == train.replace(run_.config, crop=config.crop)
    relus = sum(isinstance(module, torch.nn.ReLU) for module in evidence.relu_gates(2).unit.modules())
    assert relus == 2 * 3 and sum(isinstance(module, torch.nn.ReLU) for module in RecurrentUNet().unit.modules()) == 3
    image = torch.randn(1, 3, 20, 24)
    for variant, wanted in (evidence.Fed, lambda s: s), (evidence.Nothing, torch.zeros_like):
        net = variant(2)
        s, (mask, _) = net.step(image, net.start(image))
        assert torch.equal(mask, wanted(s))
    bare = evidence.bare_decoder(2).outer.up
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in bare.modules()) and size(bare) == size(RecurrentUNet().outer.up) - 2 * (64 + 32 + 16 + 8)
    unit, e, h = evidence.reset_state(2).unit, torch.randn(1, 64, 3, 4), torch.randn(1, 16, 3, 4)
    z, r = torch.sigmoid(unit.net_z(e)), torch.sigmoid(unit.net_r(e))
    torch.testing.assert_close(unit(e, h), z * h + (1 - z) * torch.tanh(unit.net_c(torch.cat([e, r * h], 1))))


def test_evidence_is_trained_tested_and_written_once(trained, tmp_path, monkeypatch):
    at, _ = trained
    evidence = result("evidence")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "CSV", tmp_path / "evidence.csv")
    config = train.Config(data="photos", out="run", size=16, epochs=1, batch=20)
    chosen = [evidence.Run("photos", "gates end in ReLU", 0, config)]
    monkeypatch.setattr(evidence, "all_runs", lambda: chosen)
    for _ in range(2):
        evidence.run_all(at)
    (row,) = evidence.rows()
    assert row["steps"] == "20" and len(row["IoU"].split()) == 5 and int(row["parameters"]) == size(RecurrentUNet())
    assert train.build.__module__ == "train"  # the variant was put back


def test_clips_move_a_hand_over_a_desk_that_stays(tmp_path):
    draw_clips(tmp_path / "clips", clips=1, frames=4)
    photos, masks = ([np.asarray(Image.open(path), int) for path in sorted((tmp_path / "clips" / kind).iterdir())] for kind in ("images", "masks"))
    assert all((a != b).any() for a, b in itertools.combinations(masks, 2))
    never = np.logical_and.reduce([cv == 0 for cv in masks])
    assert np.median(abs(photos[0] - photos[1])[never]) < 6 < np.median(abs(photos[0] - photos[1])[masks[0] != masks[1]])


def test_a_watched_video_is_scored_as_photos_are(trained):
    at, _ = trained
    video = result("video")
    net, c, _ = train.load_net(at / "run/best.pt", torch.device("cpu"))
    photos = open_dataset(at / "photos", "test")
    matrices, _ = scoring.evaluate(net, photos, c, torch.device("cpu"))
    ways = [video.watch(net, photos, c.size, way)[0] for way in video.WAYS]
    assert torch.equal(ways[0], matrices[2]) and torch.equal(ways[2], matrices[0])
    assert torch.equal(ways[1], ways[2])  # of one frame nothing is carried


# ---------------------------------------------------------------- tutorial.md, figures.py


PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in ("README.md", "tutorial.md", "results/README.md")}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
RUN_ALL = """
import contextlib, io, json, subprocess, sys
sys.path.insert(0, "")
names, printed = {"__name__": "tutorial"}, []
for line, kind, code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if kind == "python":
            exec(compile("\\n" * line + code, "tutorial.md", "exec"), names)  # a traceback gives the page's own lines
        else:
            print(subprocess.run(["bash", "-ec", code], check=True, stdout=subprocess.PIPE, text=True).stdout)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def agrees(shown, printed):
    """Word for word; but a number after "about" is the outcome of a training, and may differ by 0.05 on another machine."""
    rough = r"(?<=about )\d\.\d+"
    near = all(abs(float(a) - float(b)) <= 0.05 for a, b in zip(re.findall(rough, shown), re.findall(rough, printed)))
    return near and re.sub(rough, "#", shown) == re.sub(rough, "#", printed)


@Ahead
def tutorial_ran(at):
    """The blocks that the tutorial shows: of each its line and kind, what the page says that it prints, and what it printed."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, at)
    text, steps, shown = PAGES["tutorial.md"], [], []
    for block in BLOCK.finditer(text):
        if block[1] in ("python", "bash"):
            steps.append((text.count("\n", 0, block.start(2)), block[1], block[2]))
            shown.append("")
        elif block[1] in ("text", "console"):
            shown[-1] = block[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(steps), capture_output=True, text=True, cwd=at, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return [(line, kind, want, got) for (line, kind, _), want, got in zip(steps, shown, json.loads(done.stdout), strict=True)]


def test_tutorial_runs_and_prints_what_it_shows():
    for line, kind, want, got in tutorial_ran():
        if kind == "python":
            assert agrees(want, got), f"tutorial.md, the block at line {line} prints:\n{got}"
        else:  # the shell's lines are a training's log: its words count, its numbers do not
            lines = [re.sub(r"[\d.]+", "#", text).split() for text in got.splitlines()]
            assert all(re.sub(r"[\d.]+", "#", text).split() in lines for text in want.splitlines()), got
    assert agrees("IoU about 0.75\n", "IoU about 0.79\n") and not agrees("IoU about 0.75\n", "IoU about 0.65\n")
    assert not agrees("(1, 8)\n", "(1, 9)\n")


def test_tutorial_quotes_the_code_as_it_is():
    code = "\n".join(file.read_text(encoding="utf-8") for file in HERE.glob("*.py"))
    quotes = [block[2] for block in BLOCK.finditer(PAGES["tutorial.md"]) if block[1] == "py"]
    assert len(quotes) >= 3 and all(quote in code for quote in quotes)


def test_equations_that_the_code_cites_exist():
    tags = re.findall(r"\\tag\{(\d+)\}", PAGES["tutorial.md"])
    assert sorted(map(int, tags)) == list(range(1, len(tags) + 1))
    for file in HERE.glob("*.py"):
        for cited in re.findall(r"\b[Ee]qs?\. ((?:\(\d+\)(?:, |-| and )?)+)", file.read_text(encoding="utf-8")):
            assert set(re.findall(r"\d+", cited)) <= set(tags), (file, cited)


def headings(text):
    """The anchors that GitHub makes of a page's headings."""
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)]


def test_pages_show_every_picture_and_link_to_what_exists():
    pictures = {name for text in PAGES.values() for alt, name in re.findall(r"!\[([^\]]*)\]\((.+?)\)", text) if len(alt) > 30}
    assert pictures == {f"figures/{path.name}" for path in (HERE / "figures").iterdir()}
    assert {path.stem for path in (HERE / "figures").iterdir()} == set(figures.FIGURES)
    for page, text in PAGES.items():
        assert all((HERE / name).exists() for name in re.findall(r"`(results/\w+\.\w+)`", text))
        for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)):
            file, _, anchor = link.partition("#")
            if not file.startswith(("https:", "http:")):
                target = (HERE / page).parent.joinpath(file).resolve() if file else HERE / page
                assert target.exists(), link
                assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link


DRAWINGS = "architecture", "alpha", "traffic", "growth", "evidence"


def test_drawings_come_out_as_committed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in DRAWINGS:
        figures.FIGURES[name]()
        got, want = (np.asarray(Image.open(at / f"figures/{name}.png").convert("RGB"), int) for at in (tmp_path, HERE))
        assert got.shape == want.shape and abs(got - want).mean() < 1  # of 255: another matplotlib may smooth a letter otherwise


def test_figures_of_a_trained_network_are_drawn(trained, tmp_path, monkeypatch):
    at, _ = trained
    monkeypatch.chdir(tmp_path)
    for name in set(figures.FIGURES) - set(DRAWINGS):
        with pytest.raises(ValueError, match="The first line of README.md"):
            figures.FIGURES[name]()
    monkeypatch.setattr(figures, "RUN", at / "run")
    for name in figures.FIGURES:
        figures.FIGURES[name]()
        assert np.asarray(Image.open(f"figures/{name}.png").convert("L")).std() > 10
    net, image = train.load_net(at / "run/best.pt", torch.device("cpu"))[0], torch.randn(3, 32, 48)
    seen, masks = figures.look(net, image, 3), net(image[None])
    assert all(torch.equal(at["p"], s.softmax(1)[0, 1]) for at, s in zip(seen, masks))
    assert all(at[gate].min() >= 0 and at[gate].max() <= 1 for at in seen for gate in "zr")


# ---------------------------------------------------------------- README.md and tutorial.md


def test_pages_name_only_scripts_and_flags_that_exist():
    text = "\n".join(PAGES.values())
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S))
    commands = re.findall(r"python (\w+\.py)([^&#\n]*)", blocks) + re.findall(r"`python (\w+\.py)([^`]*)`", text)
    assert len(commands) > 8
    helps = {script: run(script, "--help").stdout for script in SCRIPTS} | {"figures.py": process(HERE / "figures.py", "--help").stdout}
    for script, flags in commands:
        assert (HERE / script).exists()
        assert all(flag in helps[script] for flag in re.findall(r"--[a-z]+", flags)), (script, flags)
    for flag in re.findall(r"`(--[a-z]+)", text):
        assert any(flag in help for help in helps.values()), flag


# ---------------------------------------------------------------- train.py in several processes, and killed


@Ahead
def killed_and_resumed(at):
    """A run that is killed again and again and resumed: whether every checkpoint could be read, and its weights are first_run's."""
    home, _ = first_run()
    flags, rng = ["--data", home / "photos", "--out", at / "run", *TINY], np.random.default_rng(0)
    for kill in range(int(os.environ.get("KILLS", 1))):
        began = (at / "run/last.pt").exists()
        command = [sys.executable, HERE / "train.py", *map(str, flags), *(["--resume"] if began else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as killed:
            while not (at / "run/last.pt").exists() and killed.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 6 if began else 2))
            done = killed.poll() == 0
            killed.kill()
        if done:  # and so on with a new run
            assert alike(at / "run", home / "run")
            shutil.rmtree(at / "run")
            continue
        for name in "last.pt", "best.pt":
            assert name == "best.pt" and not (at / "run/best.pt").exists() or train.load(at / "run" / name)
    resumed = process(HERE / "train.py", *flags, *["--resume"] * (at / "run/last.pt").exists())
    return resumed.returncode, alike(at / "run", home / "run")


def test_a_killed_run_can_always_be_resumed():
    """KILLS=100 python -m pytest -k killed    for the hundred; one is enough for every day."""
    assert killed_and_resumed() == (0, True)


def torchrun(*args):
    return process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)


@Ahead
def one_and_two_processes(at):
    """The same run by one process and by two: what was said, and the logs."""
    photos_of_fs(at / "photos")
    (at / "sgd.py").write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import torch, train
        torch.optim.AdamW = lambda groups, lr, weight_decay: torch.optim.SGD(groups, lr)  # AdamW is blind to a gradient that is twice too large
        train.main()
    """))
    flags = ["--data", at / "photos", *TINY, "--epochs", "1", "--lr", "0.01", "--out"]  # at 0.02 rounding parts the tables below by a point
    done = process(at / "sgd.py", *flags, at / "one"), torchrun(at / "sgd.py", *flags, at / "two")
    assert done[0].returncode == done[1].returncode == 0, done[1].stderr
    return *done, *(train.load(at / name / "last.pt")[0]["log"] for name in ("one", "two"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch comes without torch.distributed here")
def test_two_processes_learn_what_one_learns():
    one, two, first, second = one_and_two_processes()
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-3)  # sums in another order, 20 steps long
    assert [row["mIoU_3"] for row in second] == pytest.approx([row["mIoU_3"] for row in first], abs=5e-3)
    assert "and 1 more" in two.stdout and two.stdout.count("epoch   1/1") == 1 == two.stdout.count("pass    mIoU")
    tables = [[float(n) for line in done.stdout.splitlines()[-3:] for n in line.split()] for done in (one, two)]
    assert tables[0] == pytest.approx(tables[1], abs=5e-3)  # of one test photo: the second process has none


@pytest.mark.parametrize("error, world, status", [
    (SystemExit(143), 1, 143),
    (KeyboardInterrupt(), 1, 130),
    (ValueError("a.png: is grey"), 1, "train.py: a.png: is grey"),
    (ValueError("Caught ValueError in worker 0.\n  traceback\nValueError: a.png: is grey"), 1, "train.py: ValueError: a.png: is grey"),
    (MemoryError(), 1, "train.py: out of memory; a smaller --batch, --crop or --size takes less, and so does --recompute 1"),
    (RuntimeError("[gloo] connection closed\nmore"), 2, "train.py: [gloo] connection closed; did another process end?"),
    (RuntimeError("[gloo] connection closed"), 1, None),  # of one process, so an error of our own
    (RuntimeError("shapes differ"), 2, None),
])  # fmt: skip
def test_an_end_is_told_in_one_sentence_but_for_our_own_errors(monkeypatch, error, world, status):
    monkeypatch.setattr(runs, "place", lambda: (0, world))
    assert runs.status_of(error) == status


@Ahead
def one_of_two_dies(at):
    """A run by two processes, the second of which is killed: what was said, the seconds it took, and the run's folder."""
    home, _ = first_run()
    (at / "dying.py").write_text(textwrap.dedent(f"""
        import itertools, os, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import train
        steps, loss = itertools.count(), train.recurrent_loss
        def fragile(*args):
            if os.environ["RANK"] == "1" and next(steps) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(*args)
        train.recurrent_loss = fragile
        train.main()
    """))
    began = time.time()
    done = torchrun(at / "dying.py", "--data", home / "photos", "--out", at / "run", *TINY)
    return done, time.time() - began, at / "run"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch comes without torch.distributed here")
def test_a_process_that_dies_ends_the_others():
    done, seconds, out = one_of_two_dies()
    assert done.returncode != 0 and "rank      : 1" in done.stderr and "SIGKILL" in done.stderr and seconds < 100
    assert train.load(out / "last.pt") and not (out / "log.csv").exists()


@Ahead
def run_with_workers(at):
    """A run with four workers, ended by a signal to all of them, and resumed without: what it said, and whether the weights are first_run's."""
    home, _ = first_run()
    flags = ["--data", home / "photos", "--out", at / "run", *TINY]
    command = [sys.executable, HERE / "train.py", *map(str, flags), "--workers", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as stopped:
        for _ in range(2):  # until the first epoch is told of
            stopped.stdout.readline()
        os.killpg(stopped.pid, signal.SIGTERM)  # as `timeout` and many a scheduler do: to workers too
        _, errors = stopped.communicate(timeout=100)  # ends when nobody holds the pipe any more
    resumed = process(HERE / "train.py", *flags, "--resume", "--workers", "0")
    return stopped.returncode, errors, resumed.returncode, alike(at / "run", home / "run")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows knows no groups of processes")
def test_workers_change_nothing_and_leave_with_the_run():
    status, errors, resumed, same = run_with_workers()
    assert status == 143 and errors.count("\n") < 8 and "stopped after epoch" in errors, errors
    assert resumed == 0 and same
