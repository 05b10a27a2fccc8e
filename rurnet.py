"""The Recurrent U-Net (Wang et al., ICCV 2019): a U-Net that sees its own mask and looks again.

Read it top to bottom: the gates, the U-Net, the two recurrent units, the recurrent network. It imports torch alone, so
copying this file into another project is enough:

    from rurnet import RecurrentUNet
    net = RecurrentUNet(classes=2)    # DRU(4), 364,338 parameters
    masks = net(image)                # (B, 3, H, W) -> [logits (B, 2, H, W)] * 3, one a pass

A pass t takes the image x, the last segmentation s and the hidden state h, which lives below the l-th pooling:

    e_t = encoder([x, softmax(s_{t-1})])                     what enters the unit; at t = 1 no mask: 0  (1)
    z   = sigmoid(f_z(e_t))                                  update gate: how much of h survives        (2)
    r   = sigmoid(f_r(e_t))                                  reset gate: how much of e is seen          (3)
    c   = tanh(f_c(r * e_t))                                 candidate; SRU: tanh(f_c(e_t)), no r       (4)
    h_t = z * h_{t-1} + (1 - z) * c                          keep or rewrite                            (5)
    s_t = head(decoder(f_s(h_t), skips of e_t))              logits of the new segmentation             (6)

    in code      meaning                                     shape
    image        x, normalised                               (B, 3, H, W)
    s            s_t, logits                                 (B, K, H, W)
    e            e_t                                         (B, C_e, H/2^l, W/2^l)
    a_r          f_r(e), before the sigmoid                  as e
    h            h_t                                         (B, C_h, H/2^l, W/2^l)
    a_z, a_c     f_z(e), f_c(r * e), before sigmoid, tanh    as h

B is the batch, K the classes. Every pooling rounds odd sizes up. Equation numbers are those of tutorial.md.
"""

from functools import partial
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------- the gates


def gated_update(h, a_z, a_c):
    """Keep or rewrite the state: z * h + (1 - z) * c, z = sigmoid(a_z), c = tanh(a_c), of equal shapes. Eqs. (2), (4), (5)."""
    z, c = torch.sigmoid(a_z), torch.tanh(a_c)
    return z * h + (1 - z) * c  # z keeps, as in the paper; in the official code it overwrites


def gated_reset(e, a_r):
    """Mask what the candidate gets to see: sigmoid(a_r) * e, of equal shapes. Eq. (3)."""
    return torch.sigmoid(a_r) * e


# ---------------------------------------------------------------- the U-Net

ReLU = partial(nn.ReLU, inplace=True)  # no gradient misses what it overwrites: group norm's needs its input, ReLU's its own result


class DoubleConv(nn.Sequential):
    """(3x3 convolution, group norm, ReLU) twice: (B, c_in, H, W) -> (B, c_out, H, W). `end` replaces the last ReLU."""

    def __init__(self, c_in, c_out, end=ReLU, groups=8):
        def group_norm():  # where 8 does not divide the channels, as many groups as can be
            return nn.GroupNorm(gcd(groups, c_out), c_out)

        super().__init__(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), group_norm(), ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), group_norm(), end(),
        )  # fmt: skip


class Up(nn.Module):
    """Double the resolution and join the skip connection: (B, c_in, h, w), (B, c_skip, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_skip, c_out, end=ReLU):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_skip, 2, stride=2)
        self.conv = DoubleConv(2 * c_skip, c_out, end)

    def forward(self, x, skip):
        up = self.up(x)[..., : skip.shape[-2], : skip.shape[-1]]  # the pooling had rounded an odd size up
        return self.conv(torch.cat([skip, up], dim=1))


class UNet(nn.Module):
    """Encoder and decoder, one width a level: (B, c_in, H, W) -> (B, c_out, H, W), where c_out is widths[0] unless given.

    Any tail of the widths is a smaller U-Net, and the last width alone a DoubleConv: this is how the gate networks take
    on the architecture of what they replace. `middle` stands between encoder and decoder in place of the lowest DoubleConv.
    """

    def __init__(self, c_in, widths=(8, 16, 32, 64, 128), c_out=None, end=ReLU, middle=None):
        super().__init__()
        c_out, top = c_out or widths[0], len(widths) - 1
        ins = [c_in, *widths[:-1]]
        groups = [max(1, min(8, widths[0] // 4)), *[8] * top]  # where a photo enters, a group of one channel would take away its colour
        self.down = nn.ModuleList(DoubleConv(ins[i], widths[i], groups=groups[i]) for i in range(top))
        self.middle = middle if middle is not None else (DoubleConv(ins[top], widths[top]) if top else DoubleConv(c_in, c_out, end))
        self.up = nn.ModuleList(
            Up(widths[i + 1], widths[i], widths[i] if i else c_out, ReLU if i else end) for i in reversed(range(top))
        )

    def encode(self, x):
        skips = []
        for conv in self.down:
            skips.append(conv(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)
        return x, skips

    def decode(self, d, skips):
        for up, skip in zip(self.up, reversed(skips)):
            d = up(d, skip)
        return d

    def forward(self, x):
        e, skips = self.encode(x)
        return self.decode(self.middle(e), skips)


class PlainUNet(nn.Module):
    """The U-Net that recurrence has to beat: one pass, no state. Called as RecurrentUNet is; the list has one entry."""

    def __init__(self, classes=2, width=8, image_channels=3):
        super().__init__()
        self.image_channels = whole("image_channels", image_channels, 1)
        self.unet = UNet(image_channels, widths_from(width))
        self.head = nn.Conv2d(width, whole("classes", classes, 2), 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        return [self.head(self.unet(image))]


# ---------------------------------------------------------------- the recurrent units


class DRU(nn.Module):
    """Dual-gated recurrent unit, eqs. (2)-(5): e (B, c_e, H, W), h (B, c_h, H, W) -> the next h, shaped as h.

    The gates read e alone. The past reaches them all the same, for e was computed from the last mask.
    `net(c_in, c_out)` builds f_z, f_r and f_c. None of them may end in a ReLU, or sigmoid could not fall below a half.
    """

    def __init__(self, c_e, c_h, net=partial(DoubleConv, end=nn.Identity), update=gated_update, reset=gated_reset):
        super().__init__()
        self.net_z, self.net_r, self.net_c = net(c_e, c_h), net(c_e, c_e), net(c_e, c_h)
        self.update, self.reset = update, reset  # plain functions: gates_triton.py has faster ones

    def forward(self, e, h):
        seen = self.reset(e, self.net_r(e))
        return self.update(h, self.net_z(e), self.net_c(seen))


class SRU(nn.Module):
    """Single-gated recurrent unit: DRU without the reset gate. The network is a third lighter for it (a fifth at level 4)."""

    def __init__(self, c_e, c_h, net=partial(DoubleConv, end=nn.Identity), update=gated_update):
        super().__init__()
        self.net_z, self.net_c = net(c_e, c_h), net(c_e, c_h)
        self.update = update

    def forward(self, e, h):
        return self.update(h, self.net_z(e), self.net_c(e))


UNITS = {"dru": DRU, "sru": SRU}


# ---------------------------------------------------------------- the recurrent network


class RecurrentUNet(nn.Module):
    """A U-Net whose part below the l-th pooling is a recurrent unit, run several times over one image.

    classes          K, at least 2; the background is one of them
    unit, level      "dru" or "sru"; l = 0 (the unit is the whole U-Net) to 4 (the bottleneck alone)
    width, hidden    channels at level 0, doubled by every pooling; channels of the state, cut to those of its level
    passes           N, how often `forward` looks at each image unless told otherwise

    Images: floating point, any batch, any height and width from 16. Anything else is a ValueError.
    """

    def __init__(self, classes=2, unit="dru", level=4, width=8, hidden=16, image_channels=3, passes=3):
        super().__init__()
        widths = widths_from(width)
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}; the units are {', '.join(UNITS)}")
        if type(level) is not int or level not in range(len(widths)):
            raise ValueError(f"level is {level!r}; it counts the poolings above the unit, 0 to {len(widths) - 1}")
        self.image_channels, self.classes = whole("image_channels", image_channels, 1), whole("classes", classes, 2)
        self.level, self.hidden, self.passes = level, min(whole("hidden", hidden, 1), widths[level]), check_passes(passes)

        c_in = image_channels + classes
        c_e = widths[level - 1] if level else c_in
        f = partial(UNet, widths=widths[level:], end=nn.Identity)  # each gate: the architecture of the part that is replaced
        self.outer = UNet(c_in, widths[: level + 1], middle=nn.Identity())  # what stays of the U-Net, around the unit
        self.unit = UNITS[unit](c_e, self.hidden, net=lambda c_in, c_out: f(c_in, c_out=c_out))
        self.f_s = nn.Conv2d(self.hidden, widths[level], 1)
        self.head = nn.Conv2d(width, classes, 1)

    def start(self, image):
        """The state before the first pass: a mask without any class, as no later one can be, and nothing remembered."""
        check_image(image, self)
        return tuple(torch.zeros(shape, dtype=self.head.weight.dtype, device=image.device) for shape in self.state_shapes(image))

    def state_shapes(self, image):
        b, _, *size = image.shape
        return (b, self.classes, *size), (b, self.hidden, *((n + 2**self.level - 1) // 2**self.level for n in size))

    def step(self, image, state):
        """One pass, eqs. (1)-(6): image and (mask, h) -> logits and the next (mask, h). A video hands the state on."""
        check_image(image, self)
        mask, h = state
        if (mask.shape, h.shape) != (wanted := self.state_shapes(image)):
            got, wanted = ([*map(tuple, shapes)] for shapes in ((mask.shape, h.shape), wanted))
            raise ValueError(f"the state is {got}, to an image of {tuple(image.shape)} belongs {wanted}; call start(image) where batch or size changes")
        e, skips = self.outer.encode(torch.cat([image, mask], dim=1))
        h = self.unit(e, h)
        s = self.head(self.outer.decode(self.f_s(h), skips))
        return s, (s.softmax(1), h)  # probabilities are fed back, not logits: they stay within 0 and 1

    def forward(self, image, passes=None):
        """Image (B, 3, H, W) -> the logits (B, K, H, W) of every pass, in order."""
        state, masks = self.start(image), []
        for _ in range(self.passes if passes is None else check_passes(passes)):
            s, state = self.step(image, state)
            masks.append(s)
        return masks


# ---------------------------------------------------------------- checks


def whole(name, value, least, hint=""):
    """The value, if it is a whole number from `least`; True is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it takes a whole number from {least}{hint}")
    return value


def widths_from(width):
    """Channels of the five levels."""
    return tuple(whole("width", width, 1, ", the channels at level 0 (the paper: 8)") * 2**level for level in range(5))


def check_passes(passes):
    return whole("passes", passes, 1, " (the paper: 3)")


def check_image(image, net):
    wanted = f"(B, {net.image_channels}, H, W) with H and W from 16"
    if image.dim() != 4 or image.shape[1] != net.image_channels or min(image.shape[2:]) < 16:
        hint = "; image[None] makes a batch of one" if image.dim() == 3 else ""
        raise ValueError(f"the image is {tuple(image.shape)}; wanted {wanted}{hint}")
    if not image.is_floating_point():
        raise ValueError(f"the image is {image.dtype}; wanted floating point, normalised as in training (see data.py)")
    weight = net.head.weight
    if image.dtype != weight.dtype and not torch.is_autocast_enabled(image.device.type):
        raise ValueError(f"the image is {image.dtype} and the weights are {weight.dtype}; call image.to({weight.dtype})")
