"""One answer to each exercise of tutorial.md, whose checks import them."""

import torch
from torch import nn
from torch.nn import functional as F

from gates_triton import _Fused, _load, _sigmoid, _span, jit, tl
from rurnet import RecurrentUNet
from support.pictures import normalise, resize


class FeedsLogits(RecurrentUNet):
    def step(self, image, state):
        s, (_, h) = super().step(image, state)
        return s, (s, h)


class SeesState(RecurrentUNet):
    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(self.hidden, self.hidden, 1)

    def step(self, image, state):
        (p, h), unit = state, self.unit
        e, skips = self.outer.encode(torch.cat([image, p], dim=1))
        h = unit.update(h, unit.net_z(e) + self.look(h), unit.net_c(unit.reset(e, unit.net_r(e))))
        s = self.head(self.outer.decode(self.f_s(h), skips))
        return s, (s.softmax(1), h)


@jit
def _shift_fwd(a_ptr, e_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, inside = _span(n, BLOCK)
    r, e, b = _sigmoid(_load(a_ptr, i, inside)), _load(e_ptr, i, inside), _load(b_ptr, i, inside)
    tl.store(out_ptr + i, r * e + b, inside)


@jit
def _shift_bwd(g_ptr, a_ptr, e_ptr, b_ptr, da_ptr, de_ptr, db_ptr, n, BLOCK: tl.constexpr):
    i, inside = _span(n, BLOCK)
    g, r, e = _load(g_ptr, i, inside), _sigmoid(_load(a_ptr, i, inside)), _load(e_ptr, i, inside)
    tl.store(da_ptr + i, g * e * r * (1 - r), inside)
    tl.store(de_ptr + i, g * r, inside)
    tl.store(db_ptr + i, g, inside)


def fused_shift(a, e, b):
    return _Fused.apply(_shift_fwd, _shift_bwd, a, e, b)


def parameters_at_level_3():
    double = lambda a, b: 9 * a * b + 9 * b * b + 4 * b  # two convolutions without bias, two norms
    up = lambda a, b, c: 4 * a * b + b + double(2 * b, c)  # to b channels; a DoubleConv of those and the skip's
    outer = double(5, 8) + double(8, 16) + double(16, 32) + up(64, 32, 32) + up(32, 16, 16) + up(16, 8, 8)
    gate = double(32, 64) + double(64, 128) + up(128, 64, 32)
    return outer + 3 * gate + (32 * 64 + 64) + (8 * 2 + 2)  # f_s and head have biases


@torch.no_grad()
def watch(model, frames, cuts):
    state, shown = None, []
    for t, frame in enumerate(frames):
        image, looks = normalise(resize(frame, model.size))[None], 1
        if state is None or t in cuts or state[0].shape[2:] != image.shape[2:]:
            state, looks = model.net.start(image), model.passes
        for _ in range(looks):
            s, state = model.net.step(image, state)
        shown.append(F.interpolate(s, frame.size[::-1], mode="bilinear")[0].softmax(0))
    return shown
