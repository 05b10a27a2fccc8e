"""What the tests of several rooms share: small photos, a trained run, and the scripts called from within Python."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: pytest-xdist has a process for every core

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings, strategies as st
from PIL import Image, ImageDraw

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: afterwards the kernels fail in confusing ways

import data
import predict
import train
from experiments import bench
from paper.baselines import build
from support.checkpoints import read_checkpoint, save

HERE = Path(__file__).parent.parent
torch.cuda.device_count = lambda: 0  # the scripts then take the CPU: runs are compared bit for bit
NO_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the same for another process
settings.register_profile("laws", deadline=None, max_examples=25)
settings.load_profile("laws")
FUZZ = settings(max_examples=int(os.environ.get("FUZZ", 25)), suppress_health_check=list(HealthCheck))
raising = lambda error: Mock(side_effect=error)  # to patch a function with
seeds = st.integers(0, 2**31 - 1)
TINY = ["--size", "16", "--width", "4", "--epochs", "2", "--batch", "20"]
SCRIPTS = {"train.py": train, "predict.py": predict, "data.py": data, "experiments.bench": bench}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def blob(w=40, h=32, x=8):
    """A photo with a bright box off its middle, and the box as mask (0 and 255)."""
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).rectangle((x, 4, x + 12, 19), fill=255)
    return Image.merge("RGB", [mask.point(lambda v, c=c: v * c // 255 + 20) for c in (200, 120, 90)]), mask


BOX = np.asarray(blob()[1]) // 255


def letter_f():
    """A photo of an F and its mask (0 and 1). It has no symmetry: a flip or turn of one of them alone would show."""
    mask = Image.new("L", (90, 70))
    for box in (25, 10, 34, 60), (25, 10, 60, 19), (25, 30, 50, 39):
        ImageDraw.Draw(mask).rectangle(box, fill=1)
    return mask.point(lambda v: v * 255).convert("RGB"), mask


def write_pair(folder, name, mask=None, photo=None):
    for kind in "images", "masks":
        (folder / kind).mkdir(parents=True, exist_ok=True)
    default, box = blob()
    (photo or default).save(folder / "images" / f"{name}.png")
    (box if mask is None else mask).save(folder / "masks" / f"{name}.png")


STORED = {  # EXIF's orientation: how the pixels of an upright photo are stored
    1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270,
}  # fmt: skip


def save_turned(photo, path, orientation=6, **options):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    stored = photo if STORED[orientation] is None else photo.transpose(STORED[orientation])
    stored.save(path, exif=exif, **options)


@pytest.fixture
def folder(tmp_path):
    """Six pairs and the three lists."""
    root = tmp_path / "photos"
    for i in range(6):
        write_pair(root, f"p{i}", blob(x=8 + i)[1])
    for split, names in ("train", "p0 p1 p2 p3"), ("val", "p4"), ("test", "p5"):
        (root / f"{split}.txt").write_text("\n".join(names.split()) + "\n")
    return root


def run(script, *args):
    """The script as the command line calls it, but inside this process: loading torch takes seconds."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            SCRIPTS[script].main()
        except SystemExit as stop:
            status = int(stop.code or 0) if not isinstance(stop.code, str) else print(stop.code, file=errors) or 1
    return subprocess.CompletedProcess([script, *args], status, out.getvalue(), errors.getvalue())


def process(*args, cwd=HERE, **environment):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd,
                          env=NO_GPU | environment)  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder, printed): photos/ with an F on each, and run/, two epochs over them. Tests must not write into it."""
    base = tmp_path_factory.getbasetemp()
    at = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"  # one for all of xdist's processes
    with FileLock(f"{at}.lock"):
        if not (at / "printed").exists():
            for i in range(8):
                photo, mask = data.augment(*letter_f(), 48, 15, np.random.default_rng(i))
                write_pair(at / "photos", f"p{i}", mask.point(lambda v: v % 255 * 255), photo)
            done = run("train.py", "--data", at / "photos", "--out", at / "run", *TINY)
            assert done.returncode == 0, done.stderr
            (at / "printed").write_text(done.stdout)
    return at, (at / "printed").read_text()


def alike(run, other):
    """Whether two runs ended in the same weights, bit for bit, and the same log but for the seconds."""
    a, b = (read_checkpoint(at / "last.pt") for at in (run, other))
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in content["log"]] for content in (a, b)]
    weights = [zip(a[part].values(), b[part].values(), strict=True) for part in ("model", "ema")]
    same = all(torch.equal(x, y) for part in weights for x, y in part)
    return same and logs[0] == logs[1] and len((run / "log.csv").read_text().splitlines()) == len(a["log"]) + 1


@st.composite
def spoiled(draw, content):
    """The bytes cut, changed, zeroed, repeated or deleted at random places."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        at = min(at, draw(st.sampled_from([len(content), 200, 20])))  # damage to a header breaks most
        old = content[at : at + draw(st.sampled_from([1, 2, 4, 30, 300]))]
        cut, others = draw(st.integers(1, 5)) == 5, st.binary(min_size=len(old), max_size=len(old))
        new = draw(others | st.sampled_from([b"", bytes(len(old)), old * 2]))
        content = content[:at] + (b"" if cut else new + content[at + len(old) :])
    return content


def write_checkpoint(path, name="dru", classes=2, size=16, passes=2, views=1, **options):
    """A checkpoint of an untrained network, as train.py describes it; returns that network."""
    net = build(name, classes, **options)
    how = {"size": size, "passes": passes, "views": views}
    weights = {"model": build(name, classes, **options).state_dict(), "ema": net.state_dict()}
    save(path, {"network": {"name": name, "options": options}, "input": how, "classes": classes} | weights)
    return net.eval()
