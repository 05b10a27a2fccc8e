"""The systems that the paper compares, built from rurnet's parts. Each class reads as its difference from the U-Net.

    from paper.baselines import build
    net = build("dru-vgg16", classes=2, weights="vgg16.pth")
    masks = net(image, passes=3)      # a list of logits (B, K, H, W); of length one without recurrence

README.md beside this file describes each name. `weights` names torchvision's file for the encoder (VGG-16, ResNet-50,
ResNet-101), trained on ImageNet. To add a system, write its class and name it in SYSTEMS.
"""

import inspect
from functools import partial
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

from rurnet import (DRU, DoubleConv, PlainUNet, RecurrentUNet, UNet, Up, check_counts, check_image, count_passes,
                    five_widths, gated_reset, gated_update)  # fmt: skip
from support.checkpoints import read_tensors

# ---------------------------------------------------------------- the U-Net with one thing changed
def unet_b(classes, width=8, image_channels=3):
    """U-Net-B: batch norm in place of every group norm."""
    net = PlainUNet(classes, width, image_channels)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.BatchNorm2d(child.num_channels))
    return net


class RecSimple(nn.Module):
    """Rec-Simple, recursive refinement: the U-Net sees its last mask, eq. (1), and keeps no other memory."""

    def __init__(self, classes=2, width=8, image_channels=3, passes=3):
        super().__init__()
        self.image_channels, self.classes, self.passes = image_channels, classes, passes
        self.unet = UNet(image_channels + classes, five_widths(width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        p, masks = image.new_zeros(image.shape[0], self.classes, *image.shape[2:]), []
        for _ in range(count_passes(self, passes)):
            s = self.head(self.unet(torch.cat([image, p], dim=1)))
            masks.append(s)
            p = s.softmax(1)
        return masks


class ConvGRU(nn.Module):
    """Convolutional GRU: e (B, c_e, H, W), h (B, c_h, H, W) -> the next h. Here r masks h, where DRU masks e."""

    def __init__(self, c_e, c_h, update=gated_update, reset=gated_reset):
        super().__init__()
        gate = lambda: nn.Sequential(nn.Conv2d(c_e + c_h, c_h, 1, bias=False), nn.GroupNorm(gcd(8, c_h), c_h))
        self.net_z, self.net_r, self.net_c = gate(), gate(), gate()
        self.update, self.reset, self.c_h = update, reset, c_h

    def forward(self, e, h):
        both = torch.cat([e, h], dim=1)
        seen = torch.cat([e, self.reset(h, self.net_r(both))], dim=1)
        return self.update(h, self.net_z(both), self.net_c(seen))


class RecMiddle(nn.Module):
    """Rec-Middle: a ConvGRU for a bottleneck. The encoder runs once, the GRU and the decoder in each pass."""

    def __init__(self, classes=2, width=8, image_channels=3, passes=3):
        super().__init__()
        self.image_channels, self.passes, widths = image_channels, passes, five_widths(width)
        self.unet = UNet(image_channels, widths, middle=ConvGRU(widths[3], widths[4]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        e, skips = self.unet.encode(image)
        h, masks = e.new_zeros(e.shape[0], self.unet.middle.c_h, *e.shape[2:]), []
        for _ in range(count_passes(self, passes)):
            h = self.unet.middle(e, h)
            masks.append(self.head(self.unet.decode(h, skips)))
        return masks


class RecLast(nn.Module):
    """Rec-Last: the U-Net once, then a ConvGRU at full resolution, and the head in each pass."""

    def __init__(self, classes=2, width=8, image_channels=3, passes=3):
        super().__init__()
        self.image_channels, self.passes = image_channels, passes
        self.unet, self.unit = UNet(image_channels, five_widths(width)), ConvGRU(width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        e, masks = self.unet(image), []
        h = torch.zeros_like(e)
        for _ in range(count_passes(self, passes)):
            h = self.unit(e, h)
            masks.append(self.head(h))
        return masks


# ---------------------------------------------------------------- ImageNet's encoders, under torchvision's names
class VGG16(nn.Module):
    """The convolutions of VGG-16: (B, c_in, H, W) -> (B, 512, H/32, W/32) and the five skips before the poolings."""

    widths, c_e = (64, 128, 256, 512, 512), 512

    def __init__(self, c_in=3):
        super().__init__()
        layers = []
        for width, depth in zip(self.widths, (2, 2, 3, 3, 3)):
            for _ in range(depth):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
                c_in = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # odd sizes round up, as in rurnet
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        skips = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                skips.append(x)
            x = layer(x)
        return x, skips


class Bottleneck(nn.Module):
    """Residual block of ResNet: 1x1, 3x3, 1x1 convolutions with batch norm, around a shortcut."""

    def __init__(self, c_in, width, stride=1, dilation=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or c_in != 4 * width:
            shortcut = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet without its classifier: (B, c_in, H, W) -> (B, 2048, H/32, W/32) and skips at 1/2, 1/4, 1/8, 1/16.

    depths   (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101
    dilate   the last stage keeps its resolution and spreads its 3x3 convolutions instead: output stride 16
    """

    widths, c_e = (64, 256, 512, 1024), 2048

    def __init__(self, c_in=3, depths=(3, 4, 6, 3), dilate=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        c = 64
        for i, depth in enumerate(depths):
            last = dilate and i == 3
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(c, 64 * 2**i, 2 if i and not j and not last else 1, 2 if last else 1))
                c = 256 * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        skips = [F.relu(self.bn1(self.conv1(x)))]
        skips.append(self.layer1(F.max_pool2d(skips[0], 3, 2, padding=1)))
        skips.append(self.layer2(skips[1]))
        skips.append(self.layer3(skips[2]))
        return self.layer4(skips[3]), skips


def load_encoder(encoder, path):
    """Fill the encoder from torchvision's state-dict file. Channels beyond the photo's three start at zero."""
    found = read_tensors(path, "torchvision's state dict of the encoder")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is a {type(found).__name__}; it must be torchvision's state dict of the encoder")
    found = {name: value for name, value in found.items() if not str(name).startswith(("classifier.", "fc."))}
    wanted = encoder.state_dict()
    first = next(iter(wanted))  # the first convolution, which may see a mask as well
    extra = wanted[first].shape[1] - 3
    if torch.is_tensor(found.get(first)) and found[first].shape[1:2] == (3,) and found[first].dim() == 4:
        found[first] = F.pad(found[first], (0, 0, 0, 0, 0, extra))
    shapes, have = ({n: tuple(getattr(v, "shape", ())) for n, v in d.items()} for d in (wanted, found))
    optional = "num_batches_tracked"  # older files lack it
    wrong = [f"{n} is missing" for n in shapes if n not in have and not n.endswith(optional)]
    wrong += [f"{n} is not part of it" for n in have if n not in shapes]
    wrong += [f"{n} is {have[n]}, not {shapes[n]}" for n in shapes if n in have and have[n] != shapes[n]]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{path}: does not fit {type(encoder).__name__}: {'; '.join(wrong[:4])}{more}")
    encoder.load_state_dict(wanted | found)


# ---------------------------------------------------------------- U-Nets and DRUs around them
class PretrainedOuter(nn.Module):
    """A pretrained encoder and a decoder of the paper's kind, as rurnet.UNet has them; 512 channels between."""

    def __init__(self, encoder, c_in):
        super().__init__()
        self.encoder = encoder
        c_skips, self.stem = list(encoder.widths), None
        if isinstance(encoder, ResNet):  # its first feature map is at half the resolution
            self.stem = DoubleConv(c_in, 32)
            c_skips.insert(0, 32)
        outs = [c_skips[0], *c_skips[:-1]]  # each level outputs the width of the level above
        ins = [*outs[1:], 512]
        self.up = nn.ModuleList(Up(*c) for c in reversed(list(zip(ins, c_skips, outs))))
        self.c_out = outs[0]

    def encode(self, x):
        e, skips = self.encoder(x)
        if self.stem:
            return e, [self.stem(x), *skips]
        # VGG-16 has no norm: its features are far larger than the decoder's when pretrained, far smaller at random.
        return F.group_norm(e, 8), [F.group_norm(skip, 8) for skip in skips]

    decode = UNet.decode


class DeepUNet(nn.Module):
    """U-Net-VGG16, U-Net-ResNet50: the U-Net with a pretrained encoder; the bottleneck between is a DoubleConv."""

    def __init__(self, encoder, classes=2, image_channels=3):
        super().__init__()
        self.image_channels = image_channels
        self.outer = PretrainedOuter(encoder(image_channels), image_channels)
        self.middle = DoubleConv(self.outer.encoder.c_e, 512)
        self.head = nn.Conv2d(self.outer.c_out, classes, 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        e, skips = self.outer.encode(image)
        return [self.head(self.outer.decode(self.middle(e), skips))]


class DeepDRU(RecurrentUNet):
    """DRU-VGG16, DRU-ResNet50: rurnet's passes around a pretrained encoder, with DRU for a bottleneck at 1/32.

    The state really goes from pass to pass; in the official code it stays what it was.
    """

    def __init__(self, encoder, classes=2, image_channels=3, passes=3):
        nn.Module.__init__(self)  # the parts differ, everything else is RecurrentUNet's
        self.image_channels, self.classes, self.passes = image_channels, classes, passes
        self.level, self.hidden, c_in = 5, 512, image_channels + classes
        self.outer = PretrainedOuter(encoder(c_in), c_in)
        self.unit = (DRU if encoder is VGG16 else NarrowDRU)(self.outer.encoder.c_e, 512)
        self.f_s = nn.Conv2d(512, 512, 1)
        self.head = nn.Conv2d(self.outer.c_out, classes, 1)


class NarrowDRU(DRU):
    """DRU behind a 1x1 convolution: on ResNet-50's 2048 channels the reset gate would have 75 million parameters."""

    def __init__(self, c_e, c_h):
        super().__init__(c_h, c_h)
        self.narrow = nn.Conv2d(c_e, c_h, 1)

    def forward(self, e, h):
        return super().forward(self.narrow(e), h)


# ---------------------------------------------------------------- the heavy one-shot networks
def conv(c_in, c_out, size=3, dilation=1):
    """Convolution, group norm, ReLU. With batch norm, `whole`, one pixel a photo, could not train on a single photo."""
    layer = nn.Conv2d(c_in, c_out, size, padding=dilation * (size // 2), dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(8, c_out), nn.ReLU())


def resize_like(x, other):
    return F.interpolate(x, other.shape[-2:], mode="bilinear")


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: ResNet-50 at output stride 16, the photo seen at five scales, joined with sharp features at 1/4."""

    def __init__(self, classes=2, image_channels=3):
        super().__init__()
        self.image_channels = image_channels
        self.encoder = ResNet(image_channels, dilate=True)
        self.scales = nn.ModuleList([conv(2048, 256, 1), *(conv(2048, 256, dilation=d) for d in (6, 12, 18))])
        self.whole = conv(2048, 256, 1)
        self.join, self.sharp = conv(5 * 256, 256, 1), conv(256, 48, 1)
        self.refine = nn.Sequential(conv(256 + 48, 256), conv(256, 256))
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, image, passes=None):
        check_image(image, self)
        e, skips = self.encoder(image)
        whole = self.whole(e.mean((2, 3), keepdim=True)).expand(-1, -1, *e.shape[2:])
        e = self.join(torch.cat([*(scale(e) for scale in self.scales), whole], dim=1))
        d = torch.cat([resize_like(e, skips[1]), self.sharp(skips[1])], dim=1)
        return [resize_like(self.head(self.refine(d)), image)]


class Residual(nn.Module):
    """RefineNet's residual convolution unit."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Refine(nn.Module):
    """RefineNet's block: adapt each input, fuse them at the finer resolution, pool in a chain, adapt once more."""

    def __init__(self, c_fine, c_coarse, c):
        super().__init__()
        adapt = lambda n: nn.Sequential(nn.Conv2d(n, c, 3, padding=1), Residual(c), Residual(c))
        self.adapt = nn.ModuleList(adapt(n) for n in (c_fine, c_coarse) if n)
        self.fuse = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in self.adapt)
        self.chain = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.out = Residual(c)

    def forward(self, fine, coarse=None):
        inputs = [fine] if coarse is None else [fine, coarse]
        x = F.relu(sum(resize_like(fuse(adapt(i)), fine) for i, adapt, fuse in zip(inputs, self.adapt, self.fuse)))
        pooled = x
        for layer in self.chain:
            pooled = layer(F.max_pool2d(pooled, 5, 1, padding=2))
            x = x + pooled
        return self.out(x)


class RefineNet(nn.Module):
    """RefineNet: ResNet-101, and a cascade of blocks that refines its features from 1/32 to 1/4."""

    def __init__(self, classes=2, image_channels=3):
        super().__init__()
        self.image_channels = image_channels
        self.encoder = ResNet(image_channels, depths=(3, 4, 23, 3))
        channels = (2048, 0, 512), (1024, 512, 256), (512, 256, 256), (256, 256, 256)
        self.refine = nn.ModuleList(Refine(*c) for c in channels)
        self.head = nn.Conv2d(256, classes, 3, padding=1)

    def forward(self, image, passes=None):
        check_image(image, self)
        e, skips = self.encoder(image)
        d = self.refine[0](e)
        for refine, skip in zip(self.refine[1:], reversed(skips[1:])):
            d = refine(skip, d)
        return [resize_like(self.head(d), image)]


# ---------------------------------------------------------------- all by name
SYSTEMS = {
    "unet-b": unet_b,
    "unet-g": PlainUNet,
    "rec-simple": RecSimple,
    "rec-middle": RecMiddle,
    "rec-last": RecLast,
    "sru": partial(RecurrentUNet, unit="sru"),
    "dru": partial(RecurrentUNet, unit="dru"),
    "unet-vgg16": partial(DeepUNet, VGG16),
    "dru-vgg16": partial(DeepDRU, VGG16),
    "unet-resnet50": partial(DeepUNet, ResNet),
    "dru-resnet50": partial(DeepDRU, ResNet),
    "deeplabv3plus": DeepLabV3Plus,
    "refinenet": RefineNet,
}


def options(name):
    """The options that a system takes, besides classes and weights."""
    if name not in SYSTEMS:
        raise ValueError(f"there is no system {name!r}; there are {', '.join(SYSTEMS)}")
    return inspect.signature(SYSTEMS[name]).parameters.keys() - {"encoder", "classes", "unit"}


def describe(name, settings, defaults):
    """{"name", "options"}, for `build` and for a checkpoint. An option that the system does not have is kept where it
    was chosen, so that `build` refuses it."""
    chosen = {k for k in ("level", "width", "hidden", "passes") if settings[k] != defaults[k]}
    return {"name": name, "options": {k: settings[k] for k in sorted(chosen | options(name) & settings.keys())}}


def parameter_groups(net, lr, pretrained):
    """For an optimiser. A pretrained encoder learns at a fiftieth: the full rate would undo its training."""
    encoder = set(encoder_of(net).parameters()) if pretrained else set()
    groups = [([p for p in net.parameters() if (p in encoder) == inside], rate)
              for inside, rate in ((False, lr), (True, lr / 50))]  # fmt: skip
    return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]


def encoder_of(net):
    """The VGG-16 or ResNet of a system, or None."""
    return next((m for m in net.modules() if isinstance(m, (VGG16, ResNet))), None)


def build(name, classes, weights=None, **chosen):
    """The system of that name: model(image, passes) is a list of logits. ValueError for an unknown name or option, or
    an unfit file."""
    if unknown := chosen.keys() - options(name):
        raise ValueError(f"{name} takes no {min(unknown)}; it takes {', '.join(sorted(options(name)))}")
    check_counts(classes=classes, **{k: v for k, v in chosen.items() if k != "level"})
    net = SYSTEMS[name](classes=classes, **chosen)
    if weights:
        encoder = encoder_of(net)
        if encoder is None:
            raise ValueError(f"{name} has no pretrained encoder; leave {weights} out")
        load_encoder(encoder, weights)
    return net
