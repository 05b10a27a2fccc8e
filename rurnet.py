"""The Recurrent U-Net (Wang et al., ICCV 2019): a U-Net that sees its own mask and looks again.

This file imports torch alone, so you can copy it into another project:

    from rurnet import RecurrentUNet
    net = RecurrentUNet(classes=2)    # DRU(4), 364,338 parameters
    masks = net(image)                # (B, 3, H, W) -> three logits (B, 2, H, W), one for each pass

Pass t takes the image x, the previous segmentation s and the hidden state h, which lives below the l-th pooling:

    e_t = encoder([x, softmax(s_{t-1})])           what enters the unit; zeros for the softmax at t = 1   (1)
    z   = sigmoid(f_z(e_t))                        update gate: how much of h survives                    (2)
    r   = sigmoid(f_r(e_t))                        reset gate: how much of e the candidate sees           (3)
    c   = tanh(f_c(r * e_t))                       candidate; SRU has no r: tanh(f_c(e_t))                (4)
    h_t = z * h_{t-1} + (1 - z) * c                keep or rewrite                                        (5)
    s_t = head(decoder(f_s(h_t), skips of e_t))    logits of the new segmentation                         (6)
    L   = sum_t alpha^(N-t) CE(s_t, truth)         the loss over N passes                                 (7)

    in code       meaning                                           shape
    image         x, normalised                                     (B, 3, H, W)
    s, p          s_t, logits; softmax(s_{t-1}), fed back           (B, K, H, W)
    e, a_r        e_t; f_r(e), before its sigmoid                   (B, C_e, H/2^l, W/2^l)
    h, a_z, a_c   h_t; f_z(e), f_c(r * e), before sigmoid, tanh     (B, C_h, H/2^l, W/2^l)

B is the batch, K the number of classes. Pooling rounds odd sizes up. The equations are those of tutorial.md.
"""

from functools import partial
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------- the gates
def gated_update(h, a_z, a_c):
    """Keep or rewrite the state: z * h + (1 - z) * c with z = sigmoid(a_z), c = tanh(a_c). Eqs. (2), (4), (5)."""
    z, c = torch.sigmoid(a_z), torch.tanh(a_c)
    return z * h + (1 - z) * c  # z keeps, as in the paper; in the official code z overwrites


def gated_reset(e, a_r):
    """Choose what the candidate sees: sigmoid(a_r) * e. Eq. (3)."""
    return torch.sigmoid(a_r) * e


# ---------------------------------------------------------------- the U-Net
ReLU = partial(nn.ReLU, inplace=True)  # safe: group norm's backward needs its input, ReLU's only its output


class DoubleConv(nn.Sequential):
    """(3x3 convolution, group norm, ReLU) twice: (B, c_in, H, W) -> (B, c_out, H, W). `end` replaces the last ReLU."""

    def __init__(self, c_in, c_out, end=ReLU, groups=8):
        groups = gcd(groups, c_out)  # fewer where they do not divide the channels
        super().__init__(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.GroupNorm(groups, c_out), ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.GroupNorm(groups, c_out), end(),
        )  # fmt: skip


class Up(nn.Module):
    """Double the resolution and join the skip connection: (B, c_in, h, w), (B, c_skip, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_skip, c_out, end=ReLU):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_skip, 2, stride=2)
        self.conv = DoubleConv(2 * c_skip, c_out, end)

    def forward(self, x, skip):
        up = self.up(x)[..., : skip.shape[-2], : skip.shape[-1]]  # cut what pooling rounded up
        return self.conv(torch.cat([skip, up], dim=1))


class UNet(nn.Module):
    """Encoder and decoder with one width for each level: (B, c_in, H, W) -> (B, c_out, H, W).

    c_out is widths[0] by default. Any tail of the widths makes a smaller U-Net, and the last width alone a
    DoubleConv. So a gate network can have the architecture of the part that it replaces.
    `middle` takes the place of the lowest DoubleConv.
    """

    def __init__(self, c_in, widths=(8, 16, 32, 64, 128), c_out=None, end=ReLU, middle=None):
        super().__init__()
        lowest = len(widths) - 1
        ins, outs, ends = [c_in, *widths], [c_out or widths[0], *widths[1:]], [end, *[ReLU] * lowest]
        # Groups of one channel would remove the photo's colour, so on level 0 a group has four, or all of fewer.
        groups = [max(1, min(8, widths[0] // 4)), *[8] * lowest]
        self.down = nn.ModuleList(DoubleConv(ins[i], widths[i], groups=groups[i]) for i in range(lowest))
        self.middle = DoubleConv(ins[lowest], outs[lowest], ends[lowest]) if middle is None else middle
        self.up = nn.ModuleList(Up(outs[i + 1], widths[i], outs[i], ends[i]) for i in reversed(range(lowest)))

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
    """The U-Net that recurrence has to beat: one pass, no state, called as RecurrentUNet is."""

    def __init__(self, classes=2, width=8, image_channels=3):
        super().__init__()
        check_counts(classes=classes, width=width, image_channels=image_channels)
        self.image_channels = image_channels
        self.unet = UNet(image_channels, five_widths(width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image, passes=None):
        """Image (B, 3, H, W) -> a list of one: the logits (B, K, H, W)."""
        check_image(image, self)
        return [self.head(self.unet(image))]


# ---------------------------------------------------------------- the recurrent units
class DRU(nn.Module):
    """Dual-gated recurrent unit, eqs. (2)-(5): e (B, c_e, H, W), h (B, c_h, H, W) -> the next h, same shape.

    The gates read e alone. The past reaches them through e, which was computed from the previous mask.
    `net(c_in, c_out)` builds f_z, f_r and f_c. They must not end in a ReLU: no gate could fall below a half.
    """

    def __init__(self, c_e, c_h, net=partial(DoubleConv, end=nn.Identity), update=gated_update, reset=gated_reset):
        super().__init__()
        self.net_z, self.net_r, self.net_c = net(c_e, c_h), net(c_e, c_e), net(c_e, c_h)
        self.update, self.reset = update, reset  # plain functions; gates_triton.py has fused ones

    def forward(self, e, h):
        seen = self.reset(e, self.net_r(e))
        return self.update(h, self.net_z(e), self.net_c(seen))


class SRU(nn.Module):
    """Single-gated recurrent unit: DRU without the reset gate."""

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

    classes          K, at least 2 with the background; they are fed back, so a new head alone cannot change them
    unit, level      "dru" or "sru"; l from 0 (the unit is the whole U-Net) to 4 (the bottleneck alone)
    width, hidden    channels at level 0, doubled by every pooling; channels of h, at most those of its level
    passes           N, how often `forward` looks at each image by default

    Images are floating point, any batch, height and width at least 16. Anything else raises ValueError.
    """

    def __init__(self, classes=2, unit="dru", level=4, width=8, hidden=16, image_channels=3, passes=3):
        super().__init__()
        check_counts(classes=classes, width=width, hidden=hidden, image_channels=image_channels, passes=passes)
        widths = five_widths(width)
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}; the units are {', '.join(UNITS)}")
        if type(level) is not int or level not in range(len(widths)):
            raise ValueError(f"level is {level!r}; it counts the poolings above the unit, 0 to {len(widths) - 1}")
        self.image_channels, self.classes, self.passes = image_channels, classes, passes
        self.level, self.hidden = level, min(hidden, widths[level])
        c_in = image_channels + classes
        c_e = widths[level - 1] if level else c_in

        def gate_network(c_in, c_out):
            return UNet(c_in, widths[level:], c_out, end=nn.Identity)  # same architecture as the replaced part

        self.outer = UNet(c_in, widths[: level + 1], middle=nn.Identity())  # the part that stays, around the unit
        self.unit = UNITS[unit](c_e, self.hidden, net=gate_network)
        self.f_s = nn.Conv2d(self.hidden, widths[level], 1)
        self.head = nn.Conv2d(width, classes, 1)

    def start(self, image):
        """The state before pass 1: probabilities p (B, K, H, W) and h, all zero. Later p sum to one in every
        pixel, so the network can recognise the first pass."""
        check_image(image, self)
        weight = next(self.parameters())
        return tuple(weight.new_zeros(shape, device=image.device) for shape in self.state_shapes(image))

    def state_shapes(self, image):
        b, _, *size = image.shape
        return (b, self.classes, *size), (b, self.hidden, *((n + 2**self.level - 1) // 2**self.level for n in size))

    def step(self, image, state):
        """One pass, eqs. (1)-(6): image and state (p, h) -> logits (B, K, H, W) and the next state.
        For a video, feed each frame with the state of the last, under no_grad or detached: a state keeps its graph.
        To change the recurrence, override this method."""
        check_image(image, self)
        p, h = state
        if (p.shape, h.shape) != (wanted := self.state_shapes(image)):
            got = tuple(p.shape), tuple(h.shape)
            raise ValueError(f"the state is {got}, the image needs {wanted}; call start(image) for a new size or batch")
        e, skips = self.outer.encode(torch.cat([image, p], dim=1))
        h = self.unit(e, h)
        s = self.head(self.outer.decode(self.f_s(h), skips))
        return s, (s.softmax(1), h)  # probabilities, which stay within 0 and 1; the official code feeds back logits

    def forward(self, image, passes=None):
        """Image (B, 3, H, W) -> the logits (B, K, H, W) of every pass, in order."""
        state, masks = self.start(image), []
        for _ in range(count_passes(self, passes)):
            s, state = self.step(image, state)
            masks.append(s)
        return masks


# ---------------------------------------------------------------- the loss over passes
VOID = 255  # the class id of pixels that neither train nor count


def recurrent_loss(masks, truth, alpha, pixels=None, dice=0.0):
    """sum_t alpha^(N-t) CE(s_t, truth), eq. (7): every pass is taught, the last one most.

    masks     logits (B, K, H, W) of N passes
    truth     class ids (B, H, W), int64; VOID does not count
    pixels    divide by this number, where processes or steps share a batch; by default the pixels of truth that count
    dice      beside each CE stands this times 1 - Dice of the foreground, which weighs large and small alike
    """
    if isinstance(masks, torch.Tensor):
        raise ValueError(f"masks is a tensor {tuple(masks.shape)}; it must be a list of logits, one for each pass")
    if (truth.dtype, truth.shape) != (torch.int64, wanted := masks[0][:, 0].shape):
        raise ValueError(f"truth is {truth.dtype} {tuple(truth.shape)}; it must be class ids, int64 {tuple(wanted)}")
    masks = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in masks]  # sums pass half precision's 65504
    counted = (truth != VOID).sum()
    pixels = counted if pixels is None else pixels
    pixels = torch.as_tensor(pixels).clamp(min=1)  # a crop may be void everywhere; its loss is then 0, not 0/0
    losses = [F.cross_entropy(s, truth, ignore_index=VOID, reduction="sum") / pixels for s in masks]
    if dice:
        losses = [loss + dice * counted / pixels * (1 - soft_dice(s, truth)) for loss, s in zip(losses, masks)]
    return sum(alpha ** (len(masks) - t) * loss for t, loss in enumerate(losses, 1))


def soft_dice(s, truth):
    """2 |P and Y| / (|P| + |Y|) over a batch; P is the probability of any class but 0, Y the pixels of such classes."""
    counted = truth != VOID
    p, foreground = (1 - s.softmax(1)[:, 0]) * counted, counted & (truth > 0)
    return (2 * (p * foreground).sum() + 1) / (p.sum() + foreground.sum() + 1)  # the ones: 1 where both are empty


class LastPass(nn.Module):
    """A RecurrentUNet for training: net(image, n) is pass n alone, [(B, K, H, W)]; passes 1 to n - 1 only run forward.

    With n drawn by the weights of eq. (7), as random.choices([1, 2, 3], [0.16, 0.4, 1])[0], the mean of the loss is
    (7), but for a factor. The gradient stays within pass n, and so does the memory.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image, n):
        check_counts(n=n)
        state = self.net.start(image)
        with torch.no_grad():
            for _ in range(n - 1):
                _, state = self.net.step(image, state)
        return [self.net.step(image, state)[0]]


# ---------------------------------------------------------------- checks
def five_widths(width):
    return tuple(width * 2**level for level in range(5))


def check_counts(**counts):
    for name, n in counts.items():
        least = 2 if name == "classes" else 1
        if type(n) is not int or n < least:
            raise ValueError(f"{name} is {n!r}; it must be a whole number, at least {least}")


def count_passes(net, passes):
    """N: as the call says, or as the network was built."""
    passes = net.passes if passes is None else passes
    check_counts(passes=passes)
    return passes


def check_image(image, net):
    weight, wanted = next(net.parameters()), f"(B, {net.image_channels}, H, W) with H and W at least 16"
    if image.dim() != 4 or image.shape[1] != net.image_channels or min(image.shape[2:]) < 16:
        hint = "; image[None] makes a batch of one" if image.dim() == 3 else ""
        raise ValueError(f"the image is {tuple(image.shape)}; it must be {wanted}{hint}")
    if not image.is_floating_point():
        raise ValueError(f"the image is {image.dtype}; it must be floating point, normalised as in training")
    if image.dtype != weight.dtype and not torch.is_autocast_enabled(image.device.type):
        raise ValueError(f"the image is {image.dtype}, the weights are {weight.dtype}; call image.to({weight.dtype})")
