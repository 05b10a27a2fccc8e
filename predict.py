"""Masks for photographs, folders of them, or the frames of a video, from a checkpoint.

    python predict.py runs/hands/best.pt photo.jpg folder/ --out masks/
    python predict.py runs/hands/best.pt frames/ --frames --out masks/    one pass a frame; the state is carried
    python predict.py runs/hands/best.pt --export dru.onnx                the network as ONNX, for any size of photo

Writes NAME.png (0 and 255, or class ids) at the photo's own size, and NAME_overlay.jpg to look at. It replaces no
files but its own.
"""

if __name__ == "__main__":
    from support import terminal  # noqa: F401  (before torch)

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.nn import functional as F
from tqdm import tqdm

from evaluate import load, segment, segment_frame, to_classes
from support.checkpoints import first_line, new_file
from support.export import export
from support.pictures import ENDINGS, read_photo, stem_of
from support.processes import is_out_of_memory, one_ending
from support.runtime import keep_memory

COLOURS = np.uint8([(0, 200, 160), (255, 120, 60), (90, 120, 255), (255, 210, 60), (220, 80, 200), (120, 210, 60)])
MARK = "predict.py of Recurrent U-Net"  # near the start of every file that this script writes


def overlay(photo, mask):
    """The photo with its background dimmed and each class tinted and outlined, at most 2,000 pixels a side."""
    if max(photo.size) > 2000:
        photo = ImageOps.contain(photo, (2000, 2000))
        mask = np.array(Image.fromarray(mask).resize(photo.size, Image.NEAREST))
    pixels = np.asarray(photo, np.float32)
    grey = pixels.mean(2, keepdims=True) * 0.35 + pixels * 0.25
    pixels = np.where(mask[..., None] > 0, 0.75 * pixels + 0.25 * COLOURS[(mask - 1) % 6], grey)
    thick = max(photo.size) // 400 * 2 + 3
    ids = torch.from_numpy(mask).float()
    most, least = largest_nearby(ids, thick), -largest_nearby(-ids, thick)
    outline = (most != least)[..., None]
    return Image.fromarray(np.where(outline, COLOURS[(most - 1) % 6], pixels).astype(np.uint8))


def largest_nearby(ids, side):
    """The largest id within a square around every pixel: along the rows, then along the columns."""
    rows = F.max_pool2d(ids[None], (1, side), 1, (0, side // 2))
    return F.max_pool2d(rows, (side, 1), 1, (side // 2, 0))[0].numpy().astype(int)


def find_inputs(paths):
    """Files and the pictures of folders in order of name, 2 before 10: none twice, and no two of one name."""
    files = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        held = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")] if path.is_dir() else [path]
        found = [p for p in held if p.suffix.lower() in ENDINGS or p == path]  # a file that is named is tried
        if others := [p.name for p in held if p not in found]:
            shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            print(f"predict.py: {path}: skipped {len(others)} that are no pictures ({shown})", file=sys.stderr)
        if not found:
            raise ValueError(f"{path}: holds no pictures ({', '.join(sorted(ENDINGS))})")
        for file in found:
            other = files.setdefault(stem_of(file), file)
            if os.path.realpath(other) != os.path.realpath(file):
                raise ValueError(f"{file} and {other}: would both become {file.stem}.png; rename one of them")
    by_number = lambda stem: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)]
    return [files[stem] for stem in sorted(files, key=by_number)]


def refuse_foreign(path):
    """ValueError where writing would replace a file that this script did not write."""
    if os.path.lexists(path) and not (path.is_file() and MARK.encode() in open(path, "rb").read(300)):
        raise ValueError(f"{path}: exists, and predict.py did not write it; choose another --out or --export")


def mask_all(args):
    """Write every mask and overlay; return how many pictures failed."""
    keep_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(args.checkpoint, device)
    if args.frames and not hasattr(model.net, "step"):
        raise ValueError(f"{args.checkpoint}: holds a network that carries no state; leave --frames out")
    inputs = find_inputs(args.inputs)
    outputs = [(args.out / f"{path.stem}.png", args.out / f"{path.stem}_overlay.jpg") for path in inputs]
    taken = set(map(os.path.realpath, inputs))
    for path in sum(outputs, ()):
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path}: is an input and would be overwritten; name another folder with --out")
        refuse_foreign(path)
    args.out.mkdir(parents=True, exist_ok=True)

    mark, state, failed = PngInfo(), None, 0
    mark.add_text("Software", MARK)
    for path, (mask_path, overlay_path) in zip(tqdm(inputs, disable=None), outputs):
        try:
            photo = read_photo(path)
            if min(photo.size) < 16:
                raise ValueError(f"is {photo.width}x{photo.height}; it must be at least 16x16")
            if args.frames:
                mask, state = segment_frame(model, photo, state, to_classes)
            else:
                (mask,) = segment(model, photo, every=False, enlarge=to_classes)
            drawn = overlay(photo, mask)
            with new_file(mask_path) as file:
                Image.fromarray(mask * np.uint8(255 if model.classes == 2 else 1)).save(file, "PNG", pnginfo=mark)
            with new_file(overlay_path) as file:
                drawn.save(file, "JPEG", quality=92, comment=MARK)
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error):
                raise
            about = "" if str(error).startswith(f"{path}: ") else f"{path}: "
            tqdm.write(f"predict.py: {about}{first_line(error)}", file=sys.stderr)
            failed += 1
    lost = f", {failed} pictures could not be read or masked" * (failed > 0)
    print(f"{len(inputs) - failed} masks in {args.out}/{lost}")
    return failed


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("inputs", type=Path, nargs="*", help="photos and folders of photos")
    cli.add_argument("--out", type=Path, default=Path("predicted"), help="folder for the masks [predicted/]")
    cli.add_argument("--frames", action="store_true", help="the inputs are one video, in order of name")
    cli.add_argument("--export", type=Path, metavar="FILE", help="write the network as ONNX; no photos then")
    args = cli.parse_args()
    if bool(args.inputs) == bool(args.export):
        cli.error("name photos or folders, or --export FILE, and not both")
    if args.export and args.frames:
        cli.error("--frames and --export: an exported network makes all its passes over one photo; choose one")
    with one_ending("predict.py"):
        if args.inputs:
            sys.exit(mask_all(args) > 0)
        if not args.export.parent.is_dir():
            raise ValueError(f"--export {args.export}: must name a file in a folder that exists")
        refuse_foreign(args.export)
        model = load(args.checkpoint)
        off, shape = export(model, args.export, MARK), f"RGB from 0 to 1 (B, 3, h, w), short side {model.size}"
        print(f"{args.export}: image, {shape} -> logits (B, K, h, w); within {off:.0e} of PyTorch's")


if __name__ == "__main__":
    main()
