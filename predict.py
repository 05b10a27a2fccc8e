"""Masks for photographs, folders of them, or the frames of a video, from a checkpoint.

    python predict.py runs/hands/best.pt photo.jpg folder/ --out masks/
    python predict.py runs/hands/best.pt frames/ --frames --out masks/    one pass a frame, the state carried along
    python predict.py runs/hands/best.pt --export dru.onnx                the network as an ONNX file, for any size of photo

Writes NAME.png (0 and 255, or class ids) at the photo's own size, and NAME_overlay.jpg to look at.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from data import MEAN, STD, normalise, read_photo
from fast import Replayed, keep_memory
from layouts import ENDINGS
from runs import memory_is_short
from scoring import autocast, look, to_photo, to_size
from train import load_net

COLOURS = np.uint8([(0, 0, 0), (0, 200, 160), (255, 120, 60), (90, 120, 255), (255, 210, 60), (220, 80, 200), (120, 210, 60)])


def overlay(photo, mask):
    """The photo with its background dimmed, each class tinted and outlined."""
    pixels = np.asarray(photo, np.float32)
    tint = COLOURS[(mask - 1) % 6 + 1].astype(np.float32)
    grey = pixels.mean(2, keepdims=True) * 0.35 + pixels * 0.25
    pixels = np.where(mask[..., None] > 0, 0.75 * pixels + 0.25 * tint, grey)
    thick = max(photo.size) // 400 * 2 + 3
    ids = torch.from_numpy(mask).float()
    most, least = widest(ids, thick), -widest(-ids, thick)
    rim = COLOURS[(most - 1) % 6 + 1]
    return Image.fromarray(np.where((most != least)[..., None], rim, pixels).astype(np.uint8))


def widest(ids, thick):
    """The largest id within a square around every pixel: along the rows, then along the columns."""
    rows = F.max_pool2d(ids[None], (1, thick), 1, (0, thick // 2))
    return F.max_pool2d(rows, (thick, 1), 1, (thick // 2, 0))[0].numpy().astype(int)


def find_inputs(paths):
    """Files and the pictures of folders, in order of name (2 before 10), none twice and no two of the same name."""
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
                print(f"predict.py: {path}: passed over {len(others)} that are no pictures here ({shown})", file=sys.stderr)
        if not found:
            raise ValueError(f"{path}: holds no pictures ({', '.join(sorted(ENDINGS))})")
        for file in found:
            other = files.setdefault(file.stem, file)
            if other.resolve() != file.resolve():
                raise ValueError(f"{file} and {other}: would both become {file.stem}.png; give them different names or runs")
    return [files[stem] for stem in sorted(files, key=lambda stem: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", stem)])]


@torch.no_grad()
def mask_all(args):
    """Write every mask and overlay; return how many pictures failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_memory()
    net, config, classes = load_net(args.checkpoint, device)
    inputs = find_inputs(args.inputs)
    if args.frames and not hasattr(net, "step"):
        raise ValueError(f"{args.checkpoint}: is a {config.model}, which carries no state; leave --frames out")
    outputs = [(args.out / f"{path.stem}.png", args.out / f"{path.stem}_overlay.jpg") for path in inputs]
    clash = {path.resolve() for path in inputs} & {path.resolve() for pair in outputs for path in pair}
    if clash:
        raise ValueError(f"{min(clash)}: is an input and would be overwritten; name another folder with --out")
    args.out.mkdir(parents=True, exist_ok=True)

    step = lambda frame, mask, h: net.step(frame, (mask, h))
    run, step = (Replayed(net), Replayed(step)) if device.type == "cuda" else (net, step)
    state, failed = None, 0
    for path, (mask_path, overlay_path) in zip(tqdm(inputs, disable=None), outputs):
        try:
            photo = read_photo(path)
            if min(photo.size) < 16:
                raise ValueError(f"{path}: is {photo.width}x{photo.height}; wanted at least 16x16")
            image = normalise(photo).to(device)
            small = to_size(image, config.size)
            if args.frames and (state is None or state[0].shape[2:] != small.shape[2:]):
                state = net.start(small)
            with autocast(device):
                if args.frames:
                    s, state = step(small, *state)
                else:
                    s = look(run, small, config)[-1]
            mask = to_photo(s, image.shape[1:]).max(0).indices.numpy()  # several times as fast as argmax
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not memory_is_short(error):
                raise
            told = error if isinstance(error, ValueError) else f"{path}: {(str(error).splitlines() or ['out of memory'])[0]}"
            tqdm.write(f"predict.py: {told}", file=sys.stderr)
            failed += 1
            continue
        try:
            Image.fromarray((mask * (255 if classes == 2 else 1)).astype(np.uint8)).save(mask_path)
            overlay(photo, mask).save(overlay_path, quality=92)
        except OSError as error:
            raise ValueError(f"{args.out}: {mask_path.stem} could not be written ({error}); what was written before it is whole") from None
    print(f"{len(inputs) - failed} masks in {args.out}/" + (f", {failed} pictures could not be read" if failed else ""))
    return failed


# ---------------------------------------------------------------- export


class Exported(torch.nn.Module):
    """RGB from 0 to 1 (B, 3, h, w), at the working size -> the logits (B, K, h, w) of the last pass."""

    def __init__(self, net, c):
        super().__init__()
        self.net, self.c = net, c
        self.register_buffer("mean", torch.from_numpy(MEAN)[:, None, None])
        self.register_buffer("std", torch.from_numpy(STD)[:, None, None])

    def forward(self, image):
        return look(self.net, (image - self.mean) / self.std, self.c)[-1]


def to_onnx(net, image, path):
    """Any batch, height and width. The newer exporter (dynamo=True) would fix which poolings meet an odd size, and with it the sizes."""
    sizes = {name: {0: "batch", 2: "height", 3: "width"} for name in ("image", "logits")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rurnet's checks, which are left behind, and that this exporter is the older one
        torch.onnx.export(net, (image,), path, dynamo=False, opset_version=18, input_names=["image"], output_names=["logits"], dynamic_axes=sizes)


@torch.no_grad()
def export(checkpoint, path):
    """Write the network as ONNX, once ONNX Runtime has given the same logits for photos of sizes that it has not seen."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        raise ValueError("--export needs two more packages: pip install onnx onnxruntime") from None
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--export {path}: wanted the name of a file in a folder that exists")
    net, config, _ = load_net(checkpoint, torch.device("cpu"))
    net, part, differences = Exported(net, config).eval(), path.with_name(path.name + ".part"), []
    try:
        to_onnx(net, torch.rand(1, 3, 97, 131), part)
        session = onnxruntime.InferenceSession(part)
        for shape in (1, 3, 96, 128), (2, 3, 59, 102):
            image = torch.rand(shape)
            got, want = torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), net(image)
            differences.append(((got - want).abs().max() / (1 + want.abs().max())).item())
        if not all(off < 1e-3 for off in differences):  # nor where one is no number
            raise ValueError(f"ONNX Runtime's logits differ from PyTorch's by {max(differences):.1e} of the largest")
        part.replace(path)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # what exporter and runtime raise
        raise ValueError(f"{path}: not written; {(str(error).splitlines() or ['?'])[0]}") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{path}: image, RGB from 0 to 1 (B, 3, h, w), short side {config.size} -> logits (B, K, h, w); within {max(differences):.0e} of PyTorch's")


# ---------------------------------------------------------------- the command line


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
        cli.error("--frames and --export: an exported network makes all its passes over one photo; leave one of them out")
    try:
        status = export(args.checkpoint, args.export) if args.export else mask_all(args) > 0
    except (ValueError, OSError) as error:  # OSError: a folder that may not be read or written
        status = f"predict.py: {error}"
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
