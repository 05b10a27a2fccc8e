"""A video with one pass a frame and the state carried along, against three passes a frame.

    python -m experiments.video DATA OUT    DATA holds video_hand/ and video_davis/; OUT is a csv

DRU(4) trains on the first half of each sequence's frames, as on unrelated photos, validates on the next tenth and is
tested on the rest. Runs are kept in runs/video/ and resumed. Use an idle machine: OUT has frames a second.
"""

import csv
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

import train
from data import open_dataset
from evaluate import confusion, load, scores, segment, segment_frame
from support.runtime import keep_memory
from support.toy import draw_hand_photo

SETS = {"toy clips": 96, "video_hand": 96, "video_davis": 144}  # and the short side
WAYS = ["three passes a frame", "one pass, state carried", "one pass, nothing carried"]


def draw_clips(folder, clips=8, frames=30, seed=1):
    """images/CLIP_FRAME.jpg and masks/: in each clip a hand moves over its desk, swinging about its wrist."""
    for kind in "images", "masks":
        (folder / kind).mkdir(parents=True)
    for clip in range(clips):
        ways = np.random.default_rng([seed, clip]).uniform(-1, 1, 6)
        for frame in range(frames):
            t = 2 * np.pi * frame / frames
            move = 0.22 * (ways[0] * np.sin(t) + 1j * ways[1] * np.sin(2 * t + ways[2]))
            turn = 0.5 * ways[3] * np.sin(t + ways[4])
            photo, mask = draw_hand_photo(np.random.default_rng([seed, clip, 1]), move=move, turn=turn)
            photo.save(folder / "images" / f"clip{clip}_{frame:02d}.jpg", quality=90)
            mask.save(folder / "masks" / f"clip{clip}_{frame:02d}.png")


def sequence_of(name):
    return name.rpartition("_")[0]


def prepare(name, source):
    """The set as a folder with lists of its own, drawn where there is no source."""
    root = Path("runs/video") / name.replace(" ", "_")
    if not (root / "masks").exists():
        shutil.rmtree(root, ignore_errors=True)  # half drawn
        root.mkdir(parents=True)
        if source is None:
            draw_clips(source := root / "drawing")
        for kind in "images", "masks":
            (root / kind).symlink_to((source / kind).resolve())
    sequences, split_lists = {}, {"train": [], "val": [], "test": []}
    for path in sorted((root / "images").iterdir()):
        sequences.setdefault(sequence_of(path.stem), []).append(path.stem)
    for frames in sequences.values():
        n = len(frames)
        for split, a, b in ("train", 0, n // 2), ("val", n // 2, 6 * n // 10), ("test", 6 * n // 10, n):
            split_lists[split] += frames[a:b]
    for split, names in split_lists.items():
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def watch(model, photos, way):
    """Confusion matrix over the frames, and seconds for their masks, reading not included."""
    matrix, seconds, state, sequence = 0, 0.0, None, None
    for i, (name, *_) in enumerate(photos.pairs):
        photo, truth = photos.pictures(i)
        began = time.perf_counter()
        if way == WAYS[0]:
            (probabilities,) = segment(model, photo, every=False)
        else:
            carried = state if way == WAYS[1] and sequence_of(name) == sequence else None
            probabilities, state = segment_frame(model, photo, carried)
        mask, sequence = probabilities.argmax(0), sequence_of(name)
        seconds += time.perf_counter() - began
        matrix += confusion(mask, torch.from_numpy(np.array(truth, np.int64)), photos.classes)
    return matrix, seconds


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    (data, table), rows = sys.argv[1:], []
    for name, size in SETS.items():
        root = prepare(name, None if name == "toy clips" else Path(data) / name)
        out = Path(f"runs/video/{root.name}_run")
        c = train.Config(data=str(root), out=str(out), size=size, epochs=15, resume=(out / "last.pt").exists())
        train.train(c)
        model, photos = load(out / "best.pt"), open_dataset(root, "test")
        keep_memory()
        watch(model, photos, WAYS[0])  # warms up
        for way in WAYS:
            matrix, seconds = watch(model, photos, way)
            rows.append([name, way, len(photos), f"{scores(matrix)['IoU']:.4f}", f"{len(photos) / seconds:.1f}"])
            print(*rows[-1], sep=", ", flush=True)
    with open(table, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
