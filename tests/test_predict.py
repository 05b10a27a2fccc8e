"""From a checkpoint, which may be damaged or foreign, to masks and to ONNX."""

import contextlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import FUZZ, blob, letter_f, raising, run, save_turned, spoiled, write_checkpoint
from hypothesis import given
from PIL import Image, ImageOps
from torch.nn import functional as F

import evaluate
import predict
from evaluate import load, segment, segment_frame
from paper.baselines import build
from rurnet import PlainUNet
from support import export
from support.pictures import normalise, read_photo

pixels = lambda path: np.asarray(Image.open(path))


def new(**parts):
    """The checkpoint with other parts; a function gets the old part."""
    fill = lambda content: {name: part(content[name]) if callable(part) else part for name, part in parts.items()}
    return lambda best, out: torch.save((content := torch.load(best, weights_only=True)) | fill(content), out)


def turn_a_bit(best, out):
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)


def deflate(best, out):
    shutil.copy(best, out)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("best/data/999", bytes(10**7))


each = lambda f: lambda weights: {name: f(x) for name, x in weights.items()}
expanded = lambda _: each(lambda x: torch.zeros(1).expand(x.shape))(build("dru", 2, width=128).state_dict())
network = lambda name="dru", **options: {"name": name, "options": options}
DAMAGED, WHAT = "is not a checkpoint of train.py, or is damaged", "does not hold what it describes "
CHECKPOINTS = {  # how it is made from a good one: words of the sentence
    "without its end": (lambda best, out: out.write_bytes(best.read_bytes()[:-100]), DAMAGED),
    "a bit turned among the weights": (turn_a_bit, DAMAGED),
    "a picture": (lambda best, out: blob()[0].save(out, "png"), DAMAGED),
    "another zip": (lambda best, out: zipfile.ZipFile(out, "w").writestr("a", "b"), DAMAGED),
    "a bare state dict": (lambda best, out: torch.save(PlainUNet().state_dict(), out), "it lacks classes, ema"),
    "code": (lambda best, out: torch.save({"network": print}, out), DAMAGED + " (UnpicklingError)"),
    "a list": (lambda best, out: torch.save([1, 2], out), "it lacks classes, ema"),
    "the first edition's": (lambda best, out: torch.save({"net": {}, "config": {}}, out), "of the first edition"),
    "of other classes": (new(classes=5), WHAT + "(size mismatch for"),
    "of a network of one's own": (new(network=network("")), "holds a network of your own; evaluate.load takes it"),
    "of no system": (new(network=network("segnet")), WHAT + "(there is no system 'segnet'"),
    "of a level in words": (new(network=network(level="4")), WHAT + "(level is '4'"),
    "seen never": (new(input={"size": 16, "passes": 0, "views": 1}), WHAT + "(size 16, passes 0"),
    "a later version's settings": (new(config={"model": "dru", "depth": 3}), WHAT),
    "settings of the wrong kind": (new(config={"level": "four"}), WHAT),
    "parts of the wrong kind": (new(classes="2"), "its classes is of the wrong type"),
    "of a network too wide": (new(network=network(width=1024)), WHAT + "(size mismatch for"),
    "of views too large": (new(input={"size": 8192, "passes": 2, "views": 1}), WHAT + "(size 8192"),
    "weights in no file": (new(network=network(width=128), ema=expanded, model={}), "(its network is larger than"),
    "weights of NaN": (new(ema=each(lambda x: x * torch.nan)), WHAT + "(outer.down.0.0.weight is not finite"),
    "complex weights": (new(ema=each(lambda x: x.cfloat())), WHAT + "(outer.down.0.0.weight is torch.complex64"),
    "a compressed member": (deflate, "or is damaged (compressed)"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_foreign_checkpoint_gets_one_sentence(trained, tmp_path, monkeypatch, name):
    (make, words), photos, devices = CHECKPOINTS[name], trained[0] / "photos", set()
    watch = lambda net: devices.update(p.device.type for p in net.parameters()) or net
    monkeypatch.setattr(evaluate, "build", lambda *a, **how: watch(build(*a, **how)))
    make(trained[0] / "run/best.pt", tmp_path / "it.pt")
    monkeypatch.chdir(tmp_path)
    commands = [("train.py", "--data", photos, "--evaluate", "it.pt"), ("predict.py", "it.pt", photos / "images")]
    for args in commands[: 1 if "settings" in name else 2]:  # predict.py reads no settings
        done = run(*args)
        assert done.stderr.startswith(f"{args[0]}: it.pt: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert devices <= {"meta"}  # shapes are compared before memory is taken


def test_a_spoiled_checkpoint_is_read_or_named(trained, tmp_path):
    path, content = tmp_path / "spoiled.pt", (trained[0] / "run/best.pt").read_bytes()
    want = load(trained[0] / "run/best.pt").net.state_dict()

    @FUZZ
    @given(spoiled(content))
    def try_it(content):
        path.write_bytes(content)
        try:
            model = load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:  # the damage did not reach what is read
            assert model.classes == 2 and all(torch.equal(x, want[name]) for name, x in model.net.state_dict().items())

    try_it()


@pytest.mark.parametrize("classes", [2, 4])
def test_masks_have_the_size_of_their_photos_and_hold_white_or_class_ids(trained, tmp_path, classes):
    at, best = trained[0], trained[0] / "run/best.pt"
    if classes == 4:
        write_checkpoint(best := tmp_path / "a.pt", "rec-last", classes=4, width=4)
    (tmp_path / "in").mkdir()
    save_turned(blob(61, 33)[0], tmp_path / "in/turned.jpg")
    blob(12, 40)[0].save(tmp_path / "in/narrow.png")
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8nothing")
    (tmp_path / "in/film.mp4").touch()
    first = at / "photos/images/p0.png"
    done = run("predict.py", best, tmp_path / "in", first, first, "--out", tmp_path / "out")
    for words in "skipped 1 that are no pictures (film.mp4)", "broken.jpg: cannot be read", "narrow.png: is 12x40":
        assert words in done.stderr
    assert done.returncode == 1 and "2 masks" in done.stdout and "2 pictures could not be read" in done.stdout
    assert pixels(tmp_path / "out/turned.png").shape == (33, 61)
    assert pixels(tmp_path / "out/turned_overlay.jpg").shape == (33, 61, 3)
    want = segment(load(best), read_photo(first))[-1].argmax(0)
    assert len(want.unique()) > 1
    np.testing.assert_array_equal(pixels(tmp_path / "out/p0.png"), want * (255 if classes == 2 else 1))


def test_an_overlay_dims_the_background_and_tints_and_outlines_each_class():
    mask = np.zeros((40, 60), int)
    mask[10:30, 20:50] = 2
    got = np.asarray(predict.overlay(Image.new("RGB", (60, 40), (100, 100, 100)), mask))
    assert got[2, 2].tolist() == [60] * 3 and got[10, 30].tolist() == predict.COLOURS[1].tolist()
    assert got[20, 30].tolist() == (75 + 0.25 * predict.COLOURS[1]).astype(int).tolist()


@pytest.mark.parametrize("owner, name, each, error, words", [
    (predict, "segment", 1, MemoryError(), "p1.png: out of memory"),
    (ImageOps, "exif_transpose", 1, MemoryError(), "p1.png: out of memory"),
    (predict, "segment", 1, RuntimeError("not enough memory: tried to allocate 9 GB"), "p1.png: not enough memory"),
    (predict, "overlay", 1, RuntimeError("could not create a primitive"), "p1.png: could not create a primitive"),
    (os, "fsync", 2, OSError(28, "No space left"), "out/p1.png: could not be written ([Errno 28] No space left); its"),
])  # fmt: skip
def test_a_failure_is_named_and_the_batch_goes_on(trained, tmp_path, monkeypatch, owner, name, each, error, words):
    command = "predict.py", trained[0] / "run/best.pt", trained[0] / "photos/images", "--out", tmp_path / "out"
    works = getattr(owner, name)
    calls = iter([*[works] * each, raising(error), *[works] * 14])
    monkeypatch.setattr(owner, name, lambda *a, **how: next(calls)(*a, **how))
    done = run(*command)
    assert done.returncode == 1 and words in done.stderr and "7 masks" in done.stdout
    assert len(list((tmp_path / "out").glob("*_overlay.jpg"))) == 7 and not list((tmp_path / "out").glob(".*"))
    monkeypatch.setattr(predict, "overlay", raising(RuntimeError("Triton Error [CUDA]: invalid argument")))
    with pytest.raises(RuntimeError, match="invalid argument"):  # not the photo's fault
        run(*command)


@pytest.mark.parametrize("name", ["predicted/p1.png", "predicted/p1_overlay.jpg", "it.onnx"])
def test_what_exists_is_replaced_by_nobody_else(trained, tmp_path, monkeypatch, name):
    """predict.py replaces only what it has written itself, whatever the file is."""
    monkeypatch.chdir(tmp_path)
    args = ["--export", name] if name == "it.onnx" else [trained[0] / "photos/images/p1.png"]
    ends = lambda: run("predict.py", trained[0] / "run/best.pt", *args)
    assert ends().returncode == ends().returncode == 0
    (tmp_path / name).write_bytes(b"mine")
    assert f"{name}: exists, and predict.py did not write it" in ends().stderr
    assert (tmp_path / name).read_bytes() == b"mine"


def test_frames_carry_the_state_in_order_of_number(tmp_path):
    net, state, frames = write_checkpoint(tmp_path / "a.pt", width=4), None, [("f2", 70), ("f10", 70), ("f11", 45)]
    (tmp_path / "in").mkdir()
    for name, side in frames:
        letter_f()[0].resize((90, side)).save(tmp_path / f"in/{name}.png")
    done = run("predict.py", tmp_path / "a.pt", tmp_path / "in", "--frames", "--out", tmp_path)
    assert "3 masks" in done.stdout, done.stderr
    for name, side in frames:
        image = load(tmp_path / "a.pt").to_input(read_photo(tmp_path / f"in/{name}.png"))
        state = state if name == "f10" else net.start(image)  # the state of another size is of no use to f11
        with torch.no_grad():
            for _ in range(1 if name == "f10" else 2):  # without a state both passes look at the frame
                s, state = net.step(image, state)
        want = F.interpolate(s, (side, 90), mode="bilinear")[0].argmax(0)
        np.testing.assert_array_equal(pixels(tmp_path / f"{name}.png"), want * 255)


def test_a_video_file_is_read_frame_by_frame(trained, tmp_path, monkeypatch):
    """With a stub of PyAV: its frames, upright, are what a folder of them would be."""
    photos = [blob(x=x)[0] for x in (3, 9, 15)]
    frame = lambda photo: SimpleNamespace(rotation=90, to_image=lambda: photo.rotate(-90, expand=True))
    film = lambda path: contextlib.nullcontext(SimpleNamespace(decode=lambda video: map(frame, photos)))
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=film))
    (tmp_path / "film.MP4").write_bytes(b"a film")
    (tmp_path / "in").mkdir()
    for k, photo in enumerate(photos):
        photo.save(tmp_path / f"in/{k}.png")
    best, flags = trained[0] / "run/best.pt", ("--frames", "--out", tmp_path / "out")
    assert "3 masks" in run("predict.py", best, tmp_path / "film.MP4", *flags).stdout
    assert "3 masks" in run("predict.py", best, tmp_path / "in", *flags).stdout
    for k in range(3):
        np.testing.assert_array_equal(pixels(tmp_path / f"out/film_{k + 1:06d}.png"), pixels(tmp_path / f"out/{k}.png"))
    monkeypatch.setitem(sys.modules, "av", None)
    done = run("predict.py", best, tmp_path / "film.MP4", *flags)
    assert done.returncode == 1 and "film.MP4: is a video, which needs PyAV: pip install av" in done.stderr
    assert "film.MP4: is a video; add --frames" in run("predict.py", best, tmp_path / "film.MP4").stderr


def test_a_state_carried_over_a_cut_recovers(trained):
    """Two frames later the mask is that of a network that has seen nothing before the cut."""
    model, photos = load(trained[0] / "run/best.pt"), trained[0] / "photos/images"
    for before, after in ("p0", "p1"), ("p2", "p3"), ("p1", "p4"):
        carried, fresh, differ = None, None, []
        for name in [before] * 3 + [after] * 3:
            photo = read_photo(photos / f"{name}.png")
            p, carried = segment_frame(model, photo, carried)
            if name == after:
                q, fresh = segment_frame(model, photo, fresh)
                differ.append((p.argmax(0) != q.argmax(0)).float().mean())
        assert differ[0] > 0.01 > differ[1] and differ[2] < 0.002


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    write_checkpoint(tmp_path / "a.pt", width=2)
    model, state, photo = load(tmp_path / "a.pt"), None, Image.new("RGB", (16, 16))
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
    for t in range(int(os.environ.get("FRAMES", 800))):  # 10,000 take a minute
        _, state = segment_frame(model, photo, state)
        if t == 300:
            before = pages()
    assert (pages() - before) * os.sysconf("SC_PAGE_SIZE") < 2**21  # a frame's activations are 50 kilobytes


def test_a_threshold_chooses_from_the_probabilities_that_are_written(trained, tmp_path):
    best, photo = trained[0] / "run/best.pt", trained[0] / "photos/images/p0.png"
    want = segment(load(best), read_photo(photo))[-1][1].numpy()
    threshold = f"{np.quantile(want, 0.7):.4f}"
    masks = {}
    for flags in (), ("--threshold", threshold), ("--threshold", 1), ("--threshold", 0):
        assert run("predict.py", best, photo, "--probabilities", *flags, "--out", tmp_path).returncode == 0
        masks[flags[1:]] = pixels(tmp_path / "p0.png") == 255
        assert np.abs(pixels(tmp_path / "p0_probabilities.png") / 255 - want).max() < 0.51 / 255
    np.testing.assert_array_equal(masks[()], want > 0.5)
    np.testing.assert_array_equal(masks[(threshold,)], want >= float(threshold))
    assert 0.2 < masks[(threshold,)].mean() < 0.4 and masks[(0,)].all() and not masks[(1,)].any()
    model = load(best)
    model.views = 8
    assert run("predict.py", best, photo, "--probabilities", "--views", 8, "--out", tmp_path).returncode == 0
    seen = pixels(tmp_path / "p0_probabilities.png") / 255
    assert np.abs(seen - segment(model, read_photo(photo))[-1][1].numpy()).max() < 0.51 / 255 < abs(seen - want).max()
    shutil.copy(photo, other := tmp_path / "in_p0_probabilities.png"), shutil.copy(photo, tmp_path / "in_p0.png")
    done = run("predict.py", best, tmp_path / "in_p0.png", "--probabilities", "--out", tmp_path / "out", other)
    assert done.returncode == 1 and "in_p0_probabilities.png: is an input or another input's output" in done.stderr


@pytest.mark.parametrize("name", ["dru", "dru of 8 views", "sru", "unet-b", "rec-simple", "rec-middle", "rec-last"])
def test_an_exported_network_gives_the_same_logits_at_any_size(tmp_path, name):
    write_checkpoint(tmp_path / "a.pt", name.split()[0], classes=3, views=8 if "views" in name else 1, width=2)
    done = run("predict.py", tmp_path / "a.pt", "--export", tmp_path / "net.onnx")
    assert done.returncode == 0 and "RGB from 0 to 1" in done.stdout, done.stderr
    model, session = load(tmp_path / "a.pt"), onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for b, h, w in (1, 48, 64), (2, 33, 47), (1, 17, 90):
        photos = np.random.default_rng(h).integers(0, 256, (b, h, w, 3), np.uint8)
        (got,) = session.run(None, {"image": photos.transpose(0, 3, 1, 2).astype(np.float32) / 255})
        with torch.no_grad():
            want = model(torch.stack([normalise(photo) for photo in photos]))[-1]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-3)


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    for name in "a", "b":
        write_checkpoint(tmp_path / f"{name}.pt", width=2)
    model, other, to_onnx = load(tmp_path / "a.pt"), export.FromRGB(load(tmp_path / "b.pt")), export.to_onnx
    monkeypatch.setattr(export, "to_onnx", lambda _, *more: to_onnx(other.eval(), *more))
    for by in r"\d", "nan":
        with pytest.raises(ValueError, match=f"net.onnx: not written; ONNX Runtime's logits differ .* by {by}"):
            export.export(model, tmp_path / "net.onnx")
        model.net.head.bias.data.fill_(torch.nan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]
