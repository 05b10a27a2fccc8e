"""From a checkpoint to a network, from a network to masks, from masks to scores: one path for training and prediction.

    from support.pictures import read_photo
    model = load("runs/hands/best.pt")
    masks = segment(model, read_photo("photo.jpg"))    # probabilities (K, H, W) after each pass

The network sees a photo at the size of its training. Masks and scores have the photo's own size. Scores come from one
confusion matrix over a whole split, never from averages over photos.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from paper.baselines import build
from support.checkpoints import PARTS, new_file, one_sentence, read_checkpoint
from support.pictures import VOID, normalise, resize
from support.processes import gather_from_processes, print_once, rank_and_world
from support.runtime import autocast, for_device, replayed

# ---------------------------------------------------------------- 1. from a checkpoint to a network
UNDO = 0, 1, 2, 3, 4, 6, 5, 7  # which view takes back view k: the quarter turns, 5 and 6, each other


def turned(x, k):
    """View k of eight, (..., h, w): bit 1 mirrors, bit 2 turns upside down, bit 4 makes rows of columns."""
    flips = [axis for axis, bit in ((-1, 1), (-2, 2)) if k & bit]
    x = x.flip(flips) if flips else x  # ONNX Runtime refuses to flip no axis
    return x.transpose(-1, -2) if k & 4 else x


class Segmenter(nn.Module):
    """A network and how it is shown photos: their short side in pixels, N passes, and 1, 2 or 8 views, whose
    probabilities are averaged. Two are a photo and its mirror image, as in the official code; eight add all turns."""

    def __init__(self, net, size, passes, views):
        super().__init__()
        if not (16 <= size <= 4096 and 1 <= passes <= 1000 and views in (1, 2, 8)):
            raise ValueError(f"size {size}, passes {passes}, views {views}: must be 16-4096, 1-1000, and 1, 2 or 8")
        self.net, self.size, self.passes, self.views = net, size, passes, views

    def forward(self, image):
        """Normalised images (B, 3, h, w) -> the logits (B, K, h, w) of every pass."""
        if self.views == 1:
            return self.net(image, self.passes)
        views = [[turned(s, UNDO[k]) for s in self.net(turned(image, k), self.passes)] for k in range(self.views)]
        return [torch.stack(masks).log_softmax(2).logsumexp(0) for masks in zip(*views)]  # ONNX has no logaddexp

    def to_input(self, photo):
        """RGB picture -> (1, 3, h, w), on the network's device."""
        if photo.width * photo.height / min(photo.size) ** 2 * self.size**2 > 2**25:  # five gigabytes
            raise ValueError(f"{photo.width}x{photo.height} is too much for a network of short side {self.size}")
        return normalise(resize(photo, self.size))[None].to(next(self.parameters()).device)


def read_matching(path, parts=PARTS, net=None):
    """A checkpoint and its network, or `net`, filled with the running mean. Shapes are compared on the meta device
    before any memory is taken: a small file cannot ask for gigabytes."""
    content = read_checkpoint(path, parts)
    if not net and content["network"].get("name") == "":
        raise ValueError(f"{path}: holds a network of your own; evaluate.load takes it as `net`")
    with one_sentence(path):
        network, weights, own = content["network"], content["ema"], net
        with torch.device("meta"):
            net = net or build(network["name"], content["classes"], **network["options"])
        types = {name: x.dtype for name, x in net.state_dict().items()}
        net.load_state_dict(weights, assign=not own)
        if sum(x.nbytes for x in weights.values()) > Path(path).stat().st_size:
            raise ValueError("its network is larger than the file")
        for name, x in weights.items():
            if x.dtype != types[name] or not x.isfinite().all():
                raise ValueError(f"{name} is {'not finite' if x.dtype == types[name] else x.dtype}")
    return content, net


def load(path, device=torch.device("cpu"), net=None):
    """The Segmenter of a checkpoint, with the running mean of the weights; its attribute `classes` is K. `net` is
    needed where paper.baselines cannot build the network. ValueError says what is wrong with the file."""
    content, net, device = *read_matching(path, net=net), torch.device(device)
    with one_sentence(path):
        model = Segmenter(replayed(for_device(net, device), device), **content["input"]).eval()
        model.classes = content["classes"]
        return model


def start_from(net, path, network, folder):
    """Fill a new network from another run's checkpoint. The head stays new where the classes differ. Prints what it
    begins with, and how many photos of folder's val and test that run trained or validated on."""
    (content, _), own = read_matching(path), net.state_dict()
    with one_sentence(path):
        there, here = ({**d, "options": d["options"] | {"passes": None}} for d in (content["network"], network))
        weights, new_head = content["ema"], len(net.head.weight) != content["classes"]
    if there != here:
        raise ValueError(f"--start {path}: holds {content['network']}; this run builds {network}")
    for name in own:
        if not (new_head and name.startswith("head.")):
            shared = tuple(map(slice, map(min, own[name].shape, weights[name].shape)))
            own[name][shared] = weights[name][shared]  # everything, or the channels of photo and common classes
    about = f"--start {path}: {network['name']} of {content['classes']} classes, short side {content['input']['size']}"
    print_once(about + "; here the classes differ, so the head is new" * new_head)
    before = {h: name.split("/")[0] for name, h in content.get("photos", {}).items()}
    moved = sum(before.get(h, s) != s for s in ("val", "test") for h in folder.fingerprint(s).values())
    if moved:
        print_once(f"--start {path}: knows {moved} of the photos that validate or test here; scores are too good")


# ---------------------------------------------------------------- 2. from a network to masks
def to_probabilities(s, photo):
    """Logits (1, K, h, w) -> probabilities (K, H, W) at the photo's own size, on the CPU."""
    return F.interpolate(s.float(), photo.size[::-1], mode="bilinear")[0].softmax(0).cpu()


def in_strips(s, photo, find, rows=256):
    """Logits (1, K, h, w) -> what `find` makes of the probabilities (K, H, W), uint8 (H, W). A strip of rows at a
    time, because all probabilities of a large photo take gigabytes."""
    w, h = photo.size
    s, found = F.interpolate(s.float(), (s.shape[2], w), mode="bilinear")[0], []
    y = ((torch.arange(h, device=s.device) + 0.5) * (s.shape[1] / h) - 0.5).clamp(min=0)
    for at in y.split(rows):
        above = at.long()
        below, part = (above + 1).clamp(max=s.shape[1] - 1), (at - above)[:, None]
        found.append(find((s[:, above] * (1 - part) + s[:, below] * part).softmax(0)).byte().cpu())
    return torch.cat(found).numpy()


def to_classes(s, photo, rows=256):
    """Logits (1, K, h, w) -> the likeliest class of each pixel, uint8 (H, W)."""
    return in_strips(s, photo, lambda p: p.max(0).indices, rows)  # several times as fast as argmax


@torch.no_grad()
def segment(model, photo, every=True, enlarge=to_probabilities):
    """RGB picture of any size -> a list of probabilities (K, H, W), one a pass; without `every` only the last."""
    image = model.to_input(photo)
    with autocast(image.device):
        masks = model(image)
    return [enlarge(finite(s), photo) for s in (masks if every else masks[-1:])]


@torch.no_grad()
def segment_frame(model, photo, state, enlarge=to_probabilities):
    """One pass over a frame of a video, from the state of the last frame: probabilities and the next state. Without a
    state, or after a frame of another size, the model makes all its passes over this one."""
    image, passes = model.to_input(photo), 1
    if state is None or state[0].shape[2:] != image.shape[2:]:
        state, passes = model.net.start(image), model.passes
    with autocast(image.device):
        for _ in range(passes):
            s, state = model.net.step(image, state)
    return enlarge(finite(s), photo), state


def finite(s):
    if not s.isfinite().all():
        raise ValueError("the network's output is not finite; its training has diverged")
    return s


# ---------------------------------------------------------------- 3. from masks to scores
def confusion(prediction, truth, classes):
    """(K, K): how many pixels of class row were predicted as class column. Void pixels do not count."""
    seen = truth != VOID
    return torch.bincount(truth[seen] * classes + prediction[seen], minlength=classes**2).view(classes, classes)


def class_ious(matrix):
    """(K,) in float64, eq. (8); NaN for a class that neither occurs nor is predicted."""
    return matrix.diag().double() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())


def scores(matrix):
    """Means over the classes that occur or are predicted; of two classes also the foreground's IoU and F1. Eq. (8)."""
    tp, actual, predicted = matrix.diag().double(), matrix.sum(1), matrix.sum(0)
    iou, f1 = class_ious(matrix), 2 * tp / (actual + predicted)
    precision, recall = tp / predicted.clamp(min=1), tp / actual.clamp(min=1)
    table = {"mIoU": iou, "mPrec": precision, "mRec": recall, "mF1": f1}
    row = {name: values[actual + predicted > 0].mean().item() for name, values in table.items()}
    return row | {"IoU": iou[1].item(), "F1": f1[1].item()} if len(matrix) == 2 else row


def break_even(curve):
    """F1 where precision equals recall. curve (2, bins): pixels of either class by the foreground's probability."""
    tp, predicted = curve[1].flip(0).cumsum(0), curve.sum(0).flip(0).cumsum(0)  # at every threshold, from 1 down
    actual = tp[-1]
    at = (predicted - actual).abs().argmin()  # as many predicted as there are: tp / predicted = tp / actual
    return (2 * tp[at] / (predicted[at] + actual)).item()


def evaluate_split(model, photos):
    """Over all photos, for every pass: confusion matrices (N, K, K), curves of the foreground (N, 2, 1001), and the
    cross-entropy (N,), its sum over the pixels."""
    model.eval()
    matrices, curves, entropies, (rank, world) = 0, 0, 0, rank_and_world()
    for i in tqdm(range(rank, len(photos), world), desc="evaluate", leave=False, disable=rank > 0 or None):
        photo, mask = photos.pictures(i)
        truth = torch.from_numpy(np.array(mask, np.int64))
        try:
            masks = segment(model, photo)
        except ValueError as error:
            raise ValueError(f"{photos.pairs[i][1]}: {error}") from None
        matrices += torch.stack([confusion(p.argmax(0), truth, photos.classes) for p in masks])
        seen = truth != VOID
        bins = [(truth[seen] == 1) * 1001 + (1000 * p[1][seen]).round().long() for p in masks]
        curves += torch.stack([torch.bincount(b, minlength=2002).view(2, 1001) for b in bins])
        right = [p.gather(0, truth.clamp(max=photos.classes - 1)[None])[0][seen] for p in masks]
        entropies += torch.stack([-p.double().clamp(min=1e-12).log().sum() for p in right])
    return tuple(map(sum, zip(*gather_from_processes((matrices, curves, entropies)))))


def summary(matrices, curves, entropies):
    """Of the validation photos: the last pass's mIoU, and {column: value} for the log: scores and mean cross-entropy
    after each pass; of more than two classes also the last pass's IoU of each."""
    rows = [scores(m) | {"CE": entropy.item() / m.sum().item()} for m, entropy in zip(matrices, entropies)]
    columns = {f"{name}_{t}": value for t, row in enumerate(rows, 1) for name, value in row.items()}
    ious = class_ious(matrices[-1]).tolist() if len(matrices[-1]) > 2 else []
    return rows[-1]["mIoU"], columns | {f"IoU of class {k}": iou for k, iou in enumerate(ious)}


def print_table(matrices, curves, title, names):
    """The scores after each pass; of more than two classes also the last pass's IoU of each."""
    rows = [scores(matrix) for matrix in matrices]
    if len(matrices[0]) == 2:
        rows = [row | {"BEP": break_even(curve)} for row, curve in zip(rows, curves)]
    print(f"\n{title}\npass  " + "  ".join(f"{name:>6}" for name in rows[0]))
    for t, row in enumerate(rows, 1):
        print(f"{t:4}  " + "  ".join(f"{value:6.4f}" for value in row.values()))
    if len(matrices[0]) > 2:
        ious = [f"{names[k] if names else k} {iou:.4f}" for k, iou in enumerate(class_ious(matrices[-1]).tolist())]
        print("IoU of each class, last pass: " + ", ".join(ious))
    if not matrices[-1][:, 1:].any():
        print("The last pass predicts background everywhere. More --epochs or a larger --size may find small things.")


def draw_samples(model, photos, path, rows=4):
    """A few photos, a row for each: photo, truth, the mask after pass 1, 2, ..., N. Void is blue."""
    pairs = [photos.pictures(i) for i in np.linspace(0, len(photos) - 1, min(rows, len(photos))).astype(int)]
    lines = [[photo, truth, *(p.argmax(0) for p in segment(model, photo))] for photo, truth in pairs]
    figure = Figure(figsize=(2.2 * len(lines[0]), 1.9 * len(lines)), layout="constrained")
    titles = ["photo", "truth", *(f"pass {t}" for t in range(1, len(lines[0]) - 1))]
    colours = colormaps["gray"].with_extremes(over="tab:blue")
    for i, (picture, title) in enumerate(zip(sum(lines, []), titles * len(lines)), 1):
        axis = figure.add_subplot(len(lines), len(lines[0]), i, title=title)
        axis.imshow(np.asarray(picture), colours, vmin=0, vmax=photos.classes - 1)
        axis.axis("off")
    try:
        with new_file(path) as file:
            figure.savefig(file, dpi=80)
    except ValueError as error:  # a folder that may not be written: the table is printed all the same
        print_once(error)
