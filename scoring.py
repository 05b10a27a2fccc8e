"""From a network to masks, and from masks to scores.

A photo of any size is seen at the size that the network was trained at; its masks, and the scores, are at the photo's own.
Scores come from one confusion matrix over a whole split, never from averages over photos.
"""

from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch import distributed
from torch.nn import functional as F
from tqdm import tqdm

from data import MEAN, STD
from layouts import VOID
from runs import place

# ---------------------------------------------------------------- masks


def autocast(device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def to_size(image, size):
    """Image (3, H, W) -> a batch of one (1, 3, h, w) with the short side at `size`."""
    scale = size / min(image.shape[-2:])
    shape = [round(side * scale) for side in image.shape[-2:]]
    return F.interpolate(image[None], shape, mode="bilinear", antialias=True)


def to_photo(s, shape):
    """Logits (1, K, h, w) -> probabilities (K, H, W) at the photo's own resolution, on the CPU."""
    return F.interpolate(s.float(), shape, mode="bilinear")[0].softmax(0).cpu()


@torch.no_grad()
def segment(net, image, c):
    """Image (3, H, W) of any size -> the probabilities (K, H, W) after every pass."""
    with autocast(image.device):
        masks = look(net, to_size(image, c.size), c)
    return [to_photo(s, image.shape[-2:]) for s in masks]


def look(net, small, c):
    """The logits of every pass, averaged over the image and its mirror image if the Config says so."""
    masks = net(small, c.passes)
    if c.views == 1:
        return masks
    mirrored = net(small.flip(-1), c.passes)
    return [torch.logaddexp(s.log_softmax(1), m.log_softmax(1).flip(-1)) for s, m in zip(masks, mirrored)]


# ---------------------------------------------------------------- scores


def confusion(prediction, truth, classes):
    """(K, K): how many pixels of class row were called class column. Void pixels are left out."""
    seen = truth != VOID
    return torch.bincount(truth[seen] * classes + prediction[seen], minlength=classes**2).view(classes, classes)


def class_ious(matrix):
    """(K,) in float64; NaN for a class that neither occurs nor is called."""
    matrix = matrix.double()
    return matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())


def break_even(curve):
    """Where precision equals recall, for two classes. curve (2, bins): pixels of either class by the foreground's probability."""
    hit, called = curve[1].flip(0).cumsum(0), curve.sum(0).flip(0).cumsum(0)  # at every threshold, from 1 down
    true = curve[1].sum()
    at = (called - true).abs().argmin()  # as many called as there are: then hit / called = hit / true
    return (2 * hit[at] / (called[at] + true)).item()


def scores(matrix):
    """From one confusion matrix over the whole split. A class that neither occurs nor is called is left out."""
    matrix = matrix.double()
    hit, true, called = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, f1 = class_ious(matrix), 2 * hit / (true + called)
    precision, recall = hit / called.clamp(min=1), hit / true.clamp(min=1)
    table = {"mIoU": iou, "mPrec": precision, "mRec": recall, "mF1": f1}
    row = {name: values[true + called > 0].mean().item() for name, values in table.items()}
    return row | ({"IoU": iou[1].item(), "F1": f1[1].item()} if len(matrix) == 2 else {})  # of the foreground alone


def evaluate(net, dataset, c, device):
    """Over the whole split, for every pass: confusion matrices (N, K, K) and, of the foreground, curves (N, 2, 1001)."""
    net.eval()
    matrices, curves = 0, 0
    rank, world = place()
    for i in tqdm(range(rank, len(dataset), world), desc="evaluate", leave=False, disable=rank > 0 or None):
        image, truth = dataset[i]
        passes = segment(net, image.to(device), c)
        matrices += torch.stack([confusion(p.argmax(0), truth, dataset.classes) for p in passes])
        seen = truth != VOID
        bins = [(truth[seen] == 1) * 1001 + (1000 * p[1][seen]).round().long() for p in passes]
        curves += torch.stack([torch.bincount(b, minlength=2002).view(2, 1001) for b in bins])
    parts = [(matrices, curves)] * world
    if world > 1:
        distributed.all_gather_object(parts, parts[0])
    return tuple(map(sum, zip(*parts)))


def print_table(matrices, curves, title, names):
    rows = [scores(matrix) for matrix in matrices]
    if len(matrices[0]) == 2:
        rows = [row | {"BEP": break_even(curve)} for row, curve in zip(rows, curves)]
    print(f"\n{title}\npass  " + "  ".join(f"{name:>6}" for name in rows[0]))
    for t, row in enumerate(rows, 1):
        print(f"{t:4}  " + "  ".join(f"{value:6.4f}" for value in row.values()))
    if len(matrices[0]) > 2:
        ious = class_ious(matrices[-1]).tolist()
        print("IoU of each class, last pass: " + ", ".join(f"{names[k] if names else k} {iou:.4f}" for k, iou in enumerate(ious)))


# ---------------------------------------------------------------- pictures


def draw_samples(net, dataset, c, device, path, rows=4, height=160):
    """A row each: photo, truth, the mask after pass 1, 2, ..., N."""
    net.eval()
    lines = []
    for i in np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int):
        image, truth = dataset[i]
        masks = [p.argmax(0) for p in segment(net, image.to(device), c)]
        photo = ((image.numpy().transpose(1, 2, 0) * STD + MEAN) * 255).round().astype(np.uint8)
        greys = [np.where(m == VOID, 96, m * 255 // (dataset.classes - 1)).astype(np.uint8) for m in (truth, *masks)]
        pictures = [Image.fromarray(photo)] + [Image.fromarray(grey).convert("RGB") for grey in greys]
        shape = (max(1, round(height * photo.shape[1] / photo.shape[0])), height)
        lines.append(np.hstack([np.pad(p.resize(shape), ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pictures]))
    wide = max(line.shape[1] for line in lines)
    sheet = [np.pad(line, ((0, 0), (0, wide - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    Image.fromarray(np.vstack(sheet)).save(path)
