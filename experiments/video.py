"""A video with one pass a frame and the state carried along: networks trained on photos, and on motion made from them.

    python -m experiments.video DATA    train and watch what results/video.csv lacks; draw figures/video.png

DATA holds video_hand/ and video_davis/. DRU(4) trains for as many passes either way. Checkpoints are kept in
runs/video/. You may stop it at any time: what is finished stays.
"""

import itertools
import random
import re
import shutil
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data import open_dataset
from evaluate import Segmenter, confusion, load, scores, segment, segment_frame, to_classes
from experiments.figures import keep_figure, show_picture
from experiments.tables import add_rows, commit, read_rows
from paper.baselines import build
from predict import overlay
from rurnet import VOID, recurrent_loss
from support.checkpoints import save
from support.processes import share_of_batches
from support.runtime import for_device, keep_memory
from support.toy import draw_hand_photo, draw_set

# ---------------------------------------------------------------- 1. motion from photos

def draw_maps(rng, frames, batch, pace=1.0, cuts=0.3):
    """A smooth drift for each crop of a batch: maps (frames, batch, 2, 3) for affine_grid, light (frames, batch), and
    which crop each frame shows (frames, batch). After a cut it shows its neighbour in the batch."""
    speed = pace * rng.uniform(0, 1, (batch, 1)) * (0.06, 0.05, 0.08, 0.08, 0.03)  # a frame
    first, last = speed * rng.normal(size=(2, batch, 5))
    along = np.linspace(0, 1, frames)[:, None, None]
    path = np.cumsum((1 - along) * first + along * last, 0)
    turn, size, x, y, light = np.moveaxis(path - path.mean(0), 2, 0)  # size is a logarithm, x and y count half sides
    cos, sin = np.cos(turn) * np.exp(size), np.sin(turn) * np.exp(size)
    maps = np.stack([np.stack([cos, -sin, x], -1), np.stack([sin, cos, y], -1)], -2)
    cut = np.where(rng.random(batch) < pace * cuts, rng.integers(1, frames, batch), frames)
    shown = (np.arange(batch) + (np.arange(frames)[:, None] >= cut)) % batch
    return torch.from_numpy(maps).float(), torch.from_numpy(light).float(), torch.from_numpy(shown)


def move(image, truth, maps, light):
    """Images (B, 3, 2H, 2W) and masks under one map each, at half the size: a map would blur photos at full size, and
    the network would know moved ones by that. What comes from outside is mirrored, and void."""
    b, _, h, w = image.shape
    grid = F.affine_grid(maps, (b, 1, h // 2, w // 2), align_corners=False)
    moved = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    labels = F.grid_sample(truth[:, None].float() + 1, grid, "nearest", align_corners=False)[:, 0].long() - 1
    return moved + light[:, None, None, None], torch.where(labels < 0, VOID, labels)


def motion_loss(net, image, truth, maps, light, shown, alpha=0.4):
    """Eq. (7) over frames: pass t sees frame t, and is compared with that frame's own mask. Of more than three frames
    the gradient is cut after every third."""
    state, masks, truths = None, [], []
    for k, *how in zip(shown, maps, light):
        seen, labels = move(image[k], truth[k], *how)
        s, state = net.step(seen, net.start(seen) if state is None else state)
        masks, truths = [*masks, s], [*truths, labels]
        state = tuple(x.detach() for x in state) if len(masks) % 3 == 0 else state
    weights = [alpha ** (len(masks) - t) for t in range(1, len(masks) + 1)]
    return sum(weight * recurrent_loss([s], labels, 1) for weight, s, labels in zip(weights, masks, truths))


# ---------------------------------------------------------------- 2. training
SETS = {"toy clips": (48, 400), "video_hand": (48, 300), "video_davis": (64, 300),
        "video_davis, new clips": (64, 200)}  # and the short side, and how many steps of 8 crops
COMMIT = commit()  # of the code that was imported
TRAINED, SEEDS = ("photos", "motion"), (0, 1, 2)


def fit(photos, how, seed, steps, batch=8, frames=3):
    """A network and its running mean after the last step. On photos nothing moves. Motion begins with that, and grows
    to its full pace and number of cuts at the last step."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = for_device(build("dru", photos.classes), torch.device("cpu"))
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    order = share_of_batches(len(photos), batch, seed, 1, steps, 0)  # more epochs than steps
    for step, chosen in zip(tqdm(range(steps), how, leave=False, disable=None), order):
        image, truth = map(torch.stack, zip(*(photos[k] for k in chosen)))
        pace = (how == "motion") * step / steps
        loss = motion_loss(net, image, truth, *draw_maps(rng, frames, len(image), pace))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        ema.update_parameters(net)
    return net, ema.module


# ---------------------------------------------------------------- 3. the videos

def draw_clip(seed, frames=48):
    """(photo, mask) of each frame: a hand moves over a desk and swings about its wrist. Halfway is a cut to another
    desk. Of three clips one has a hand that leaves and returns, and one a card that passes over it."""
    for frame in range(frames):
        rng = np.random.default_rng([seed, 2 * frame // frames])
        ways, t = rng.uniform(-1, 1, 6), 4 * np.pi * frame / frames
        move = 0.22 * (ways[0] * np.sin(t) + 1j * ways[1] * np.sin(2 * t + ways[2]))
        move += 0.9 * np.sin(t / 2) ** 2 * (seed % 3 == 0)
        photo, mask = draw_hand_photo(rng, move=move, turn=0.5 * ways[3] * np.sin(t + ways[4]))
        if seed % 3 == 1:
            x, y = int(photo.width * (3.2 * frame / frames % 1.6 - 0.4)), int(photo.height * (0.4 + 0.2 * ways[5]))
            photo.paste(tuple((120 + 90 * ways[:3]).astype(int)), (x, y, x + 44, y + 30))
            mask.paste(0, (x, y, x + 44, y + 30))
        yield photo, mask


def prepare(name, data):
    """The set as a folder with lists of its own: the toy set, tested on clips, or a link to what DATA holds."""
    complete = Path("runs/video") / re.sub(r"\W+", "_", name)
    if complete.exists():
        return complete
    root = complete.with_suffix(".part")
    shutil.rmtree(root, ignore_errors=True)
    if name == "toy clips":
        draw_set(root, 200, seed=1)
        clips = {f"clip{clip}_{k:02d}": pair for clip in range(6) for k, pair in enumerate(draw_clip(clip))}
        for frame, (photo, mask) in clips.items():
            photo.save(root / "images" / f"{frame}.jpg", quality=90)
            mask.save(root / "masks" / f"{frame}.png")
        (root / "test.txt").write_text("\n".join(clips))
        return root.rename(complete)
    root.mkdir(parents=True)
    for kind in "images", "masks":
        (root / kind).symlink_to((Path(data) / name.partition(",")[0] / kind).resolve())
    sequences, split_lists = {}, {"train": [], "val": [], "test": []}
    for path in sorted((root / "images").iterdir()):
        sequences.setdefault(sequence_of(path.stem), []).append(path.stem)
    for sequence, frames in sequences.items():
        n = len(frames)
        parts = [("train", 0, n // 2), ("val", n // 2, 6 * n // 10), ("test", 6 * n // 10, n)]
        if "new" in name:
            parts = parts[:2] if sequence in ("camel", "goat", "kite-surf") else [("test", 0, n)]
        for split, a, b in parts:
            split_lists[split] += frames[a:b]
    for split, names in split_lists.items():
        (root / f"{split}.txt").write_text("\n".join(names))
    return root.rename(complete)


def sequence_of(name):
    return name.rpartition("_")[0]


# ---------------------------------------------------------------- 4. watching them
WAYS = ("three passes a frame", "one pass, nothing carried", "one pass, carried",
        "one pass, carried, first frame three")  # fmt: skip


@torch.no_grad()
def watch(model, photos):
    """For each way its confusion matrix, pixels that flicker and that could, and seconds, reading not included. The
    ways take turns at every frame, in an order that is drawn, so that the machine is as busy for all."""
    once, found, sequence = Segmenter(model.net, model.size, 1, 1), {way: [0, 0, 0, 0.0] for way in WAYS}, None
    for i, (name, *_) in enumerate(photos.pairs):
        photo, truth = photos.pictures(i)
        truth = torch.from_numpy(np.array(truth, np.int64))
        if sequence_of(name) != sequence:
            states, sequence = {WAYS[2]: model.net.start(model.to_input(photo)), WAYS[3]: None}, sequence_of(name)
            before, last = torch.full_like(truth, VOID), dict.fromkeys(WAYS, truth)
        still = (truth == before) & (truth != VOID)
        for way in random.sample(WAYS, len(WAYS)):
            began = time.perf_counter()
            if way in states:
                probabilities, states[way] = segment_frame(model, photo, states[way])
            else:
                (probabilities,) = segment(model if way == WAYS[0] else once, photo, every=False)
            mask = probabilities.argmax(0)
            seconds = time.perf_counter() - began
            flickers = ((mask != last[way]) & still).sum()
            more = confusion(mask, truth, photos.classes), flickers, still.sum(), seconds
            found[way], last[way] = [a + b for a, b in zip(found[way], more)], mask
        before = truth
    return found


def train_and_watch(name, root, how, seed):
    """Train, keep the checkpoint, and return a row for each way to watch the test frames."""
    size, steps = SETS[name]
    photos = open_dataset(root, "train", 2 * size, augment=True, crop=96, seed=seed)
    net, mean = fit(photos, how, seed, steps)
    about = {"network": {"name": "dru", "options": {}}, "classes": photos.classes}
    about["input"] = {"size": size, "passes": 3, "views": 1}
    path = root.with_name(f"{root.name}_{how}_{seed}.pt")
    save(path, about | {"model": net.state_dict(), "ema": mean.state_dict()})
    frames, rows = open_dataset(root, "test"), []
    for way, (matrix, flickers, still, seconds) in watch(load(path), frames).items():
        rows.append({"set": name, "trained on": how, "seed": seed, "commit": COMMIT, "way": way, "frames": len(frames)})
        rows[-1] |= {"IoU": f"{scores(matrix)['IoU']:.4f}", "flicker": f"{flickers / still:.5f}"}
        rows[-1]["ms"] = f"{1000 * seconds / len(frames):.2f}"
    return rows


def draw_strip(root):
    """Frames about the middle of the first clip: what they show, and the masks of either training, carried along."""
    photos = open_dataset(root, "test")
    first = [i for i, (name, *_) in enumerate(photos.pairs) if sequence_of(name) == sequence_of(photos.pairs[0][0])]
    pictures, middle = [photos.pictures(i)[0] for i in first], len(first) // 2
    rows = {"": pictures}
    for how in TRAINED:
        model, state, rows[f"trained on {how}"] = load(root.with_name(f"{root.name}_{how}_0.pt")), None, []
        for photo in pictures:
            mask, state = segment_frame(model, photo, state, to_classes)
            rows[f"trained on {how}"].append(overlay(photo, mask))
    rows = {title: row[max(0, middle - 3) :][:6] for title, row in rows.items()}
    figure, axes = plt.subplots(3, len(rows[""]), figsize=(1.2 * len(rows[""]), 2.9), layout="constrained")
    for line, (title, row) in zip(axes, rows.items()):
        for ax, picture in zip(line, row):
            show_picture(ax, picture)
        line[0].set_title(title, loc="left")
    keep_figure(figure, "video")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    keep_memory()
    roots = {}
    for seed, how, name in itertools.product(SEEDS, TRAINED, SETS):
        if (name, how, str(seed)) in {(row["set"], row["trained on"], row["seed"]) for row in read_rows("video.csv")}:
            continue
        began, roots[name] = time.monotonic(), roots.get(name) or prepare(name, sys.argv[1])
        rows = train_and_watch(name, roots[name], how, seed)
        add_rows("video.csv", rows)
        for row in rows:
            print(*row.values(), sep=", ", flush=True)
        print(f"{(time.monotonic() - began) / 60:.1f} min", flush=True)
    draw_strip(prepare(next(iter(SETS)), sys.argv[1]))


if __name__ == "__main__":
    main()
