"""A video with one pass a frame and the state carried along, against three passes a frame.

    python results/video.py DATA OUT    DATA holds video_hand/ and video_davis/; writes a line a video set and way to OUT

DRU(4) trains on the first 60 % of each sequence's frames (the last sixth of them validates), as on photos that have nothing to do with
each other, and is tested on the rest. Runs are kept in runs/video/ and resumed. The times want an idle machine.
"""

import csv
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fast
import toy
import train
from data import open_dataset
from scoring import confusion, scores, to_photo, to_size

SETS = {"toy clips": 96, "video_hand": 96, "video_davis": 144}  # and the short side
WAYS = ["three passes a frame", "one pass, state carried", "one pass, nothing carried"]


def prepare(name, source):
    """The set as a folder with lists of its own."""
    root = Path("runs/video") / name.replace(" ", "_")
    if not (root / "masks").exists():
        shutil.rmtree(root, ignore_errors=True)  # half drawn
        root.mkdir(parents=True)
        if source is None:
            toy.draw_clips(root / "drawing")
            for kind in "images", "masks":
                (root / "drawing" / kind).rename(root / kind)
        else:
            for kind in "images", "masks":
                (root / kind).symlink_to((source / kind).resolve())
    sequences = {}
    for path in sorted((root / "images").iterdir()):
        sequences.setdefault(path.stem.rpartition("_")[0], []).append(path.stem)
    lists = {"train": [], "val": [], "test": []}
    for frames in sequences.values():
        n = len(frames)
        for split, a, b in ("train", 0, n // 2), ("val", n // 2, 6 * n // 10), ("test", 6 * n // 10, n):
            lists[split] += frames[a:b]
    for split, names in lists.items():
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


@torch.no_grad()
def watch(net, photos, size, way):
    """Confusion matrix over the test frames, and seconds for them, reading not counted."""
    matrix, seconds, sequence = 0, 0.0, None
    for (name, *_), (image, truth) in zip(photos.pairs, photos):
        began = time.perf_counter()
        frame = to_size(image, size)
        if way != "one pass, state carried" or name.rpartition("_")[0] != sequence:
            sequence, state = name.rpartition("_")[0], net.start(frame)
        for _ in range(3 if way == "three passes a frame" else 1):
            s, state = net.step(frame, state)
        mask = to_photo(s, image.shape[1:]).argmax(0)
        seconds += time.perf_counter() - began
        matrix += confusion(mask, truth, 2)
    return matrix, seconds


if __name__ == "__main__":
    data, table = sys.argv[1:]
    rows = []
    for name, size in SETS.items():
        root = prepare(name, None if name == "toy clips" else Path(data) / name)
        out = f"runs/video/{root.name}_run"
        c = train.Config(data=str(root), out=out, size=size, crop=size, epochs=15)
        train.train(c, resume=Path(out, "last.pt").exists())
        net, *_ = train.load_net(Path(out) / "best.pt", torch.device("cpu"))
        photos = open_dataset(root, "test")
        fast.keep_memory()
        watch(net, photos, size, WAYS[0])
        for way in WAYS:
            matrix, seconds = watch(net, photos, size, way)
            row = [name, way, len(photos), f"{scores(matrix)['IoU']:.4f}", f"{len(photos) / seconds:.1f}"]
            print(*row, sep=", ", flush=True)
            rows.append(row)
    with open(table, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
