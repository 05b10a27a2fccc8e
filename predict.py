"""Masks for photographs, folders of them, or the frames of a video, from a checkpoint.

    python predict.py runs/hands/best.pt photo.jpg folder/ --out masks/
    python predict.py runs/hands/best.pt frames/ --frames --out masks/    one pass a frame; the state is carried
    python predict.py runs/hands/best.pt film.mp4 --frames --out masks/   the same, for a video file
    python predict.py runs/hands/best.pt --export dru.onnx                the network as ONNX, for any size of photo

Writes NAME.png (0 and 255, or class ids) at the photo's own size, and NAME_overlay.jpg to look at; of a video
NAME_000001.png and so on. It replaces no files but its own.
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
from scipy.ndimage import maximum_filter, minimum_filter
from tqdm import tqdm

from evaluate import in_strips, load, segment, segment_frame, to_classes
from support.checkpoints import first_line, new_file
from support.export import export
from support.pictures import ENDINGS, read_photo, stem_of
from support.processes import is_out_of_memory, one_ending
from support.runtime import keep_memory

COLOURS = np.uint8([(0, 200, 160), (255, 120, 60), (90, 120, 255), (255, 210, 60), (220, 80, 200), (120, 210, 60)])
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
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
    most, least = maximum_filter(mask, thick), minimum_filter(mask, thick)
    outline = (most != least)[..., None]
    return Image.fromarray(np.where(outline, COLOURS[(most - 1) % 6], pixels).astype(np.uint8))


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


def read_pictures(path):
    """(name, picture) of a photo, or of a video's frames, each read when it is asked for."""
    if path.suffix.lower() not in VIDEOS:
        yield path.stem, read_photo(path)
        return
    try:
        import av  # FFmpeg's libraries in one wheel, without a program beside it; most users have no videos
    except ImportError:
        raise ValueError("is a video, which needs PyAV: pip install av. Or name a folder of its frames") from None
    with av.open(str(path)) as film:
        for k, frame in enumerate(film.decode(video=0), 1):
            yield f"{path.stem}_{k:06d}", frame.to_image().rotate(frame.rotation, expand=True)  # a phone held upright


def outputs_of(args, name, taken):
    """Where its mask, its overlay and its probabilities go: nothing `taken`, and no file that is not ours."""
    ends = [".png", "_overlay.jpg", *["_probabilities.png"] * args.probabilities]
    for path in (paths := [args.out / f"{name}{end}" for end in ends]):
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path}: is an input or another input's output; rename one, or choose another --out")
        refuse_foreign(path)
    return paths


def mask_all(args):
    """Write every mask and overlay; return how many inputs failed."""
    keep_memory()
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    model = load(args.checkpoint, device)
    model.views = args.views or model.views
    if args.frames and not hasattr(model.net, "step"):
        raise ValueError(f"{args.checkpoint}: holds a network that carries no state; leave --frames out")
    if model.classes > 2 and (args.probabilities or args.threshold is not None):
        raise ValueError(f"{args.checkpoint}: has {model.classes} classes; --probabilities and --threshold are for two")
    if args.out.resolve() in {path.resolve() for path in args.inputs}:
        raise ValueError(f"--out {args.out}: is an input; the masks would lie among the photos, so name another folder")
    inputs = find_inputs(args.inputs)
    taken = set(map(os.path.realpath, inputs))
    for path in inputs:
        if path.suffix.lower() not in VIDEOS:
            outputs_of(args, path.stem, taken)
    args.out.mkdir(parents=True, exist_ok=True)

    def enlarge(s, photo):
        """The mask, and the foreground's probability from 0 to 255."""
        above = lambda p: p[1] >= args.threshold
        grey = in_strips(s, photo, lambda p: (255 * p[1]).round()) if args.probabilities else None
        return to_classes(s, photo) if args.threshold is None else in_strips(s, photo, above), grey

    mark, state, done, failed = PngInfo(), None, 0, 0
    mark.add_text("Software", MARK)
    for path in tqdm(inputs, disable=None):
        try:
            for name, photo in read_pictures(path):
                if min(photo.size) < 16:
                    raise ValueError(f"is {photo.width}x{photo.height}; it must be at least 16x16")
                if args.frames:
                    (mask, grey), state = segment_frame(model, photo, state, enlarge)
                else:
                    ((mask, grey),) = segment(model, photo, every=False, enlarge=enlarge)
                white = mask * np.uint8(255 if model.classes == 2 else 1)
                mask_path, overlay_path, *grey_path = outputs_of(args, name, taken)
                drawn = overlay(photo, mask)
                for to, picture in (mask_path, white), *((to, grey) for to in grey_path):
                    with new_file(to) as file:
                        Image.fromarray(picture).save(file, "PNG", pnginfo=mark)
                with new_file(overlay_path) as file:
                    drawn.save(file, "JPEG", quality=92, comment=MARK)
                taken |= set(map(os.path.realpath, (mask_path, overlay_path, *grey_path)))
                done += 1
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error):
                raise
            about = "" if str(error).startswith(f"{path}: ") else f"{path}: "
            tqdm.write(f"predict.py: {about}{first_line(error)}", file=sys.stderr)
            failed += 1
    lost = f", {failed} pictures could not be read or masked" * (failed > 0)
    print(f"{done} masks in {args.out}/{lost}")
    return failed


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("inputs", type=Path, nargs="*", help="photos and folders of photos")
    cli.add_argument("--out", type=Path, default=Path("predicted"), help="folder for the masks [predicted/]")
    cli.add_argument("--frames", action="store_true", help="the inputs are one video, in order of name")
    cli.add_argument("--probabilities", action="store_true", help="of two classes, also write NAME_probabilities.png")
    cli.add_argument("--threshold", type=float, metavar="T", help="of two classes, the foreground's least probability")
    cli.add_argument("--views", type=int, choices=[1, 2, 8], help="2 adds a mirror image, 8 all turns [as trained]")
    cli.add_argument("--export", type=Path, metavar="FILE", help="write the network as ONNX; no photos then")
    args = cli.parse_intermixed_args()  # flags may stand among the photos
    if bool(args.inputs) == bool(args.export):
        cli.error("name photos or folders, or --export FILE, and not both")
    if args.export and (args.frames or args.probabilities or args.threshold is not None):
        cli.error("--export writes no masks; leave --frames, --probabilities and --threshold out")
    if args.views and (args.frames or args.export):
        cli.error("--views averages masks of photos; leave --frames and --export out")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        cli.error(f"--threshold {args.threshold}: is a probability, from 0 to 1")
    if not args.frames and (films := [f"{path}" for path in args.inputs if path.suffix.lower() in VIDEOS]):
        cli.error(f"{films[0]}: is a video; add --frames")
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
