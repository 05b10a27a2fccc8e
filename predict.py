"""Masks for photographs, folders of them, or the frames of a video, from a checkpoint.

    python predict.py runs/hands/best.pt photo.jpg folder/ --out masks/
    python predict.py runs/hands/best.pt frames/ --frames --out masks/    one pass a frame; the state is carried
    python predict.py runs/hands/best.pt --export dru.onnx                the network as ONNX, for any size of photo

Writes NAME.png (0 and 255, or class ids) at the photo's own size, and NAME_overlay.jpg to look at.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from evaluate import load, segment, segment_frame
from support.export import export
from support.pictures import ENDINGS, read_photo
from support.processes import is_out_of_memory
from support.runtime import keep_memory

COLOURS = np.uint8([(0, 200, 160), (255, 120, 60), (90, 120, 255), (255, 210, 60), (220, 80, 200), (120, 210, 60)])


def overlay(photo, mask):
    """The photo with its background dimmed and each class tinted and outlined."""
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
        found = [path]
        if path.is_dir():
            held = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
            found = [p for p in held if p.suffix.lower() in ENDINGS]
            if others := [p.name for p in held if p not in found]:
                shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
                print(f"predict.py: {path}: skipped {len(others)} that are no pictures ({shown})", file=sys.stderr)
        if not found:
            raise ValueError(f"{path}: holds no pictures ({', '.join(sorted(ENDINGS))})")
        for file in found:
            other = files.setdefault(file.stem, file)
            if other.resolve() != file.resolve():
                raise ValueError(f"{file} and {other}: would both become {file.stem}.png; rename one of them")
    by_number = lambda stem: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)]
    return [files[stem] for stem in sorted(files, key=by_number)]


def mask_all(args):
    """Write every mask and overlay; return how many pictures failed."""
    keep_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(args.checkpoint, device)
    if args.frames and not hasattr(model.net, "step"):
        raise ValueError(f"{args.checkpoint}: holds a network that carries no state; leave --frames out")
    inputs = find_inputs(args.inputs)
    outputs = [(args.out / f"{path.stem}.png", args.out / f"{path.stem}_overlay.jpg") for path in inputs]
    if clash := {path.resolve() for path in inputs} & {path.resolve() for pair in outputs for path in pair}:
        raise ValueError(f"{min(clash)}: is an input and would be overwritten; name another folder with --out")
    args.out.mkdir(parents=True, exist_ok=True)

    state, failed = None, 0
    for path, (mask_path, overlay_path) in zip(tqdm(inputs, disable=None), outputs):
        try:
            photo = read_photo(path)
            if min(photo.size) < 16:
                raise ValueError(f"{path}: is {photo.width}x{photo.height}; it must be at least 16x16")
            if args.frames:
                probabilities, state = segment_frame(model, photo, state)
            else:
                (probabilities,) = segment(model, photo, every=False)
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            about = "" if isinstance(error, ValueError) else f"{path}: "
            tqdm.write(f"predict.py: {about}{(str(error).splitlines() or ['out of memory'])[0]}", file=sys.stderr)
            failed += 1
            continue
        mask = probabilities.max(0).indices.numpy()  # several times as fast as argmax
        try:
            Image.fromarray((mask * (255 if model.classes == 2 else 1)).astype(np.uint8)).save(mask_path)
            overlay(photo, mask).save(overlay_path, quality=92)
        except OSError as error:
            raise ValueError(f"{mask_path}: could not be written ({error}); the masks before it are complete") from None
    print(f"{len(inputs) - failed} masks in {args.out}/" + f", {failed} pictures could not be read" * (failed > 0))
    return failed


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("inputs", type=Path, nargs="*", help="photos and folders of photos")
    cli.add_argument("--out", type=Path, default=Path("masks"), help="folder for the masks")
    cli.add_argument("--frames", action="store_true", help="the inputs are one video, in order of name")
    cli.add_argument("--export", type=Path, metavar="FILE", help="write the network as ONNX; no photos then")
    args = cli.parse_args()
    if bool(args.inputs) == bool(args.export):
        cli.error("name photos or folders, or --export FILE, and not both")
    if args.export and args.frames:
        cli.error("--frames and --export: an exported network makes all its passes over one photo; choose one")
    status = 0
    try:
        if args.export:
            model = load(args.checkpoint)
            off, shape = export(model, args.export), f"RGB from 0 to 1 (B, 3, h, w), short side {model.size}"
            print(f"{args.export}: image, {shape} -> logits (B, K, h, w); within {off:.0e} of PyTorch's")
        else:
            status = int(mask_all(args) > 0)
    except (ValueError, OSError) as error:  # OSError: a folder that may not be read or written
        status = f"predict.py: {error}"
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
