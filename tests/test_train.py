"""Runs of train.py: what they leave, what ends them, how they go on. Then support/processes.py, support/runtime.py."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import BOX, HERE, NO_GPU, TINY, alike, process, raising, run, write_checkpoint, write_pair
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import train
from evaluate import draw_samples, evaluate_split, load
from paper import baselines
from rurnet import LastPass, PlainUNet, RecurrentUNet, recurrent_loss
from support import processes, runtime
from support.checkpoints import FILES, read_checkpoint, save, write_log
from support.export import export
from train import Config, parse


@pytest.fixture
def photos(trained):
    return trained[0] / "photos"


@pytest.fixture
def short(monkeypatch):
    """24 photos make an epoch, which are three steps of 7, and no curves are drawn."""
    times = property(lambda self: 4 if self.augment else 1, lambda *_: None)
    monkeypatch.setattr(data.Photos, "repeat", times, raising=False)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def tiny(photos, out, **more):
    """The settings of TINY, by which `trained` ran."""
    return Config(**dict(data=str(photos), out=str(out), size=16, width=4, epochs=2, batch=20) | more)


def at_step(k, change):
    """A criterion whose k-th loss, counted from 1, becomes change(loss)."""
    steps, keep = count(1), lambda loss: loss
    return lambda *batch: (change if next(steps) == k else keep)(recurrent_loss(*batch))


def test_a_run_leaves_what_readme_promises_and_evaluate_prints_its_table_again(trained, photos, tmp_path):
    at, printed = trained
    assert {p.name for p in (at / "run").iterdir()} == {*FILES}
    assert "seeded split" in printed and re.search(r"epoch +2/2  loss [\d.]+  val mIoU [\d.]+", printed)
    head, *rows = printed.splitlines()[-4:]
    assert head.split() == ["pass", "mIoU", "mPrec", "mRec", "mF1", "IoU", "F1", "BEP"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert re.fullmatch(r"epoch,loss,gradient,lr,.*\n1,.*\n2,.*\n", (at / "run/log.csv").read_text())
    assert Image.open(at / "run/samples.png").width > 5 * 100  # photo, truth and three passes

    path = Path(shutil.copy(at / "run/best.pt", tmp_path))  # samples.png is drawn beside it
    table = lambda *flags: run("train.py", "--data", photos, "--evaluate", path, *flags).stdout.splitlines()[3:]
    five, two = table("--passes", 5), table("--views", 2)
    assert table() == rows == five[:3] and len(five) == 5 and (tmp_path / "samples.png").exists()
    ((name, photo, mask, _),) = data.open_dataset(photos, "test").pairs  # the test split alone will do
    write_pair(tmp_path / "alone", name, Image.open(mask), Image.open(photo))
    (tmp_path / "alone/test.txt").write_text(name)
    assert table("--data", tmp_path / "alone") == rows
    (tmp_path / "samples.png").write_bytes(b"mine")
    assert table() == rows and (tmp_path / "samples.png").read_bytes() == b"mine"
    assert len(two) == 3 and two != rows


@pytest.mark.parametrize("model, level", [("dru", 0), ("sru", 2), ("unet-b", 4), ("rec-last", 4)])
def test_a_seed_decides_the_weights_and_a_checkpoint_describes_its_network(photos, short, tmp_path, model, level):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        train.train(tiny(photos, tmp_path / name, epochs=1, batch=12, model=model, level=level, seed=seed))
    assert alike(tmp_path / "a", tmp_path / "b") and not alike(tmp_path / "a", tmp_path / "c")
    rebuilt = load(tmp_path / "a/best.pt")
    assert read_checkpoint(tmp_path / "a/best.pt")["network"]["name"] == model
    assert (rebuilt.size, rebuilt.passes, rebuilt.views, rebuilt.classes) == (16, 3, 1, 2)


def test_a_step_teaches_one_drawn_pass_or_all(photos, short, tmp_path, monkeypatch):
    """Drawn as often as it weighs in the loss: 0.16, 0.4 and 1 of 1.56."""
    drawn, taught, forward = [], [], LastPass.forward
    monkeypatch.setattr(LastPass, "forward", lambda self, image, n: drawn.append(n) or forward(self, image, n))
    criterion = lambda masks, *more: taught.append(len(masks)) or recurrent_loss(masks, *more)
    for teach, epochs in ("one", 20), ("all", 1):
        train.train(tiny(photos, tmp_path / teach, teach=teach, batch=7, epochs=epochs), criterion=criterion)
    assert taught == [1] * 60 + [3] * 3 and len(drawn) == 60
    assert [drawn.count(n) / 60 for n in (1, 2, 3)] == pytest.approx([0.103, 0.256, 0.641], abs=0.1)


def test_what_a_checkpoint_holds(photos, short, tmp_path, monkeypatch):
    """Of a network and a loss of one's own, after two epochs, of which the first scores better."""
    net, weights, losses, norms = RecurrentUNet(width=2, hidden=3, level=1), [], [], []
    net.head.bias.requires_grad_(False)  # it has no gradient
    ious, criterion = iter([0.9, 0.5]), lambda *a: losses.append(recurrent_loss(*a)) or losses[-1]
    monkeypatch.setattr(train, "summary", lambda *_: (next(ious), {"CE_1": 1, "mIoU_1": 1}))

    def note(*_):
        weights.append([p.detach().clone() for p in net.parameters()])
        norms.append(sum(p.grad.double().square().sum() for p in net.parameters() if p.requires_grad).sqrt().item())

    hook = register_optimizer_step_post_hook(note)
    c = tiny(photos, tmp_path, batch=7)
    train.train(c, net, data.survey(photos), criterion)
    hook.remove()
    means = [(sum(losses[k : k + 3]).item() / 3, sum(norms[k : k + 3]) / 3) for k in (0, 3)]
    for name, steps, parts in ("best.pt", 3, set()), ("last.pt", 6, {"optimiser", "schedule"}):
        content, mean = torch.load(tmp_path / name, weights_only=True), weights[0]
        about = {"network", "input", "classes", "config", "photos", "log", "best", "done", "total", "norms"}
        assert content.keys() == about | {"model", "ema"} | parts and content["config"] == asdict(c)
        for new in weights[1:steps]:
            mean = [0.99 * old + 0.01 * p for old, p in zip(mean, new)]
        for part, want, within in ("model", weights[steps - 1], 0), ("ema", mean, 1e-6):
            assert content[part].keys() == net.state_dict().keys()
            torch.testing.assert_close([*content[part].values()], want, rtol=0, atol=within)
        for row, (loss, norm) in zip(content["log"], means[: steps // 3], strict=True):
            assert (row["loss"], row["gradient"]) == pytest.approx((loss, norm))
        progress = [content[name] for name in ("best", "done", "total", "norms")]
        assert progress == [0.9, 0, 0, 0] and len(content["photos"]) == 7
    own = load(tmp_path / "last.pt", net=RecurrentUNet(width=2, hidden=3, level=1))
    assert all(torch.equal(x, y) for x, y in zip(own.net.state_dict().values(), content["ema"].values()))


def test_a_pretrained_encoder_learns_at_a_fiftieth_and_is_read_once(photos, short, tmp_path, monkeypatch):
    read = []
    build = lambda name, classes, weights, **_: read.append(weights) or RecurrentUNet(classes, width=4)
    monkeypatch.setattr(baselines, "build", build)
    monkeypatch.setattr(baselines, "encoder_of", lambda net: net.outer)
    c = tiny(photos, tmp_path, epochs=1, batch=24, weights="some.pth")
    train.train(c)
    train.train(replace(c, resume=True))
    begun = parse(["--data", str(photos), "--start", f"{tmp_path}/best.pt", "--out", f"{tmp_path}/more"])
    train.train(replace(begun, epochs=1, batch=24))
    whole, some = (len(list(net.parameters())) for net in (RecurrentUNet(width=4), RecurrentUNet(width=4).outer))
    for last in "last.pt", "more/last.pt":
        groups = read_checkpoint(tmp_path / last)["optimiser"]["param_groups"]
        assert [(len(g["params"]), g["max_lr"]) for g in groups] == [(whole - some, 4e-3), (some, pytest.approx(8e-5))]
    assert read == ["some.pth", "", ""]


def test_start_begins_with_the_weights_of_another_run(trained, photos, short, tmp_path, monkeypatch):
    other = trained[0] / "run/best.pt"
    with monkeypatch.context() as patch:
        patch.setattr(train, "recurrent_loss", raising(KeyboardInterrupt()))
        stopped = run("train.py", "--data", photos, "--out", tmp_path, "--start", other, "--size", 16, "--epochs", 1)
    assert stopped.returncode == 130 and "head is new" not in stopped.stdout
    want, content = (read_checkpoint(path) for path in (other, tmp_path / "last.pt"))
    assert all(torch.equal(x, want["ema"][name]) for part in ("model", "ema") for name, x in content[part].items())
    assert content["log"] == [] and content["config"]["epochs"] == 1 and content["config"]["batch"] == 8
    done = run("train.py", "--data", photos, "--out", tmp_path, "--resume")
    (row,), (first, _) = read_checkpoint(tmp_path / "last.pt")["log"], want["log"]
    assert done.returncode == 0 and row["mIoU_3"] > first["mIoU_3"] + 0.1, done.stderr  # which began with nothing


def test_flags_override_the_checkpoint_which_overrides_the_defaults(trained, photos, tmp_path):
    out, best = trained[0] / "run", str(trained[0] / "run/best.pt")
    asked = parse(["--data", "other/", "--evaluate", best, "--passes", "5"])
    assert asked == Config(data="other/", evaluate=best, passes=5, size=16, width=4, epochs=2, batch=20)
    assert parse(["--out", str(out), "--resume", "--workers", "3"]) == tiny(photos, out, workers=3, resume=True)
    begun = Config("other/", width=4, size=16, lr=0.1, start=best)
    assert parse(["--data", "other/", "--start", best, "--lr", "0.1"]) == begun
    old = read_checkpoint(best)
    old["config"]["recompute"] = 1  # a flag that is gone
    save(tmp_path / "old.pt", old)
    assert parse(["--data", "other/", "--evaluate", f"{tmp_path}/old.pt"]).width == 4
    assert parse([]) == Config() and Config(data="a/b/").out == "runs/b"


@pytest.fixture(scope="module")
def wrong(trained, tmp_path_factory):
    """three/: three classes. odd/: best.pt under the name of last.pt. unet.pt, four.pt: one pass; four classes."""
    at = tmp_path_factory.mktemp("wrong")
    (at / "odd").mkdir()
    shutil.copy(trained[0] / "run/best.pt", at / "odd/last.pt")
    write_checkpoint(at / "unet.pt", "unet-g", width=4)
    write_checkpoint(at / "four.pt", classes=4, width=4)
    for i in range(4):
        write_pair(at / "three", f"p{i}", Image.fromarray(BOX * np.uint8(2) + (np.arange(40) < 3)))
    return at


OUTSIDE = ("--level 5, --level -1, --epochs 0, --batch -1, --passes 0, --width 100000, --size 1000000, --size 8, "
           "--crop 4, --alpha 0.0, --alpha nan, --lr inf, --rotate 400.0, --void 256, --seed -5, --workers -2")


@pytest.mark.parametrize("flags, words", [  # of predict.py, or after `train.py --data {at}/photos --out {tmp}`
    ("--data {tmp}/absent --out {tmp}/runs/new", "absent: is not a folder"),
    ("--out {at}/run/log.csv", "log.csv: is a file, or a link to none; it must be"),
    ("--resume", "last.pt: no such file; it must be a checkpoint of train.py"),
    ("--out {at}/run --resume --lr 0.1", "--lr 0.1: {at}/run/last.pt has 0.004"),
    ("--start {at}/run/best.pt --resume", "choose one"),
    ("--start {at}/run/best.pt --level 3", "--level 3: {at}/run/best.pt has 4"),
    ("--evaluate {at}/run", "run: is not a checkpoint"),
    ("--evaluate {at}/run/best.pt --data {wrong}/three", "best.pt: has 2 classes, {wrong}/three 3"),
    ("--model unet-g --level 2", "unet-g takes no level"),
    ("--out {wrong}/odd --resume", "last.pt: is no last.pt; it lacks optimiser, schedule"),
    *((flags, f"{flags}: must be from ") for flags in OUTSIDE.split(", ")),
    ("{wrong}/absent.pt {at}/photos/images", "absent.pt: no such file"),
    ("{wrong}/unet.pt {at}/photos/images --frames", "unet.pt: holds a network that carries no state; leave"),
    ("{wrong}/four.pt {at}/photos/images --threshold 0.4", "four.pt: has 4 classes; --probabilities and --threshold"),
    ("{best} {at}/photos/images --threshold nan", "--threshold nan: is a probability, from 0 to 1"),
    ("{best} {tmp}/absent.jpg", "absent.jpg: no such file or folder"),
    ("{best} {tmp}", "holds no pictures (.bmp, .gif"),
    ("{best} {at}/photos/images {at}/photos/masks --out {tmp}", "would both become p0.png"),
    ("{best} {at}/photos/images/p0.png --out {at}/photos/images", "p0.png: is an input or another input's output"),
    ("{best} {at}/photos/images --out {at}/photos/images", "images: is an input; the masks would lie among"),
    ("{best} {at}/photos/images --out {at}/run/log.csv", "log.csv"),
    ("{best} --export {tmp}/none/net.onnx", "net.onnx: must name a file in a folder that exists"),
    ("{best} --export {tmp}/net.onnx --frames", "--export writes no masks; leave --frames"),
    ("{best} {at}/photos/images --frames --views 2", "--views averages masks of photos; leave --frames"),
    ("{best}", "name photos or folders, or --export FILE"),
])  # fmt: skip
def test_a_mistake_gets_one_sentence_and_changes_nothing(trained, wrong, tmp_path, flags, words):
    fill = lambda text: text.format(at=trained[0], best=trained[0] / "run/best.pt", wrong=wrong, tmp=tmp_path)
    script, args = ("predict.py", flags) if flags[0] == "{" else ("train.py", "--data {at}/photos --out {tmp} " + flags)
    before = [sorted(at.rglob("*")) for at in (trained[0], wrong, tmp_path)]
    done = run(script, *fill(args).split())  # a traceback would come through
    assert done.returncode in (1, 2) and f"{script}: " in done.stderr and fill(words) in done.stderr
    assert [sorted(at.rglob("*")) for at in (trained[0], wrong, tmp_path)] == before


def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(photos, short, tmp_path, monkeypatch, capsys):
    """After a signal in step 3 or 5 of 3 + 3, or a crash between the epochs."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    train.train(tiny(photos, tmp_path / "whole", batch=7))
    for way, done in (3, 3), (5, 2), ("evaluate_split", 3), ("write_log", 3):
        c = tiny(photos, tmp_path / str(way), batch=7)
        with monkeypatch.context() as patch, pytest.raises(BaseException) as stopped:
            if isinstance(way, str):
                patch.setattr(train, way, raising(KeyboardInterrupt()))
            train.train(c, criterion=at_step(way, lambda loss: signal.raise_signal(signal.SIGINT) or loss))
        assert read_checkpoint(tmp_path / str(way) / "last.pt")["done"] == done
        if isinstance(way, int):
            words = r"after (.*), all is saved; python (.*) goes on(?:; python (.*) PHOTOS uses what is best so far)?\n"
            where, again, use = re.search(words, capsys.readouterr().err).groups()
            assert use == (f"predict.py {tmp_path}/{way}/best.pt" if way > 3 else None)
            assert stopped.value.code == 130 and where == f"step {done} of epoch {way // 4 + 1}"
            assert run(*shlex.split(again)).returncode == 0
        else:
            train.train(replace(c, resume=True))
        assert alike(tmp_path / str(way), tmp_path / "whole"), way


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no groups of processes")
def test_workers_change_nothing_and_leave_with_the_run(trained, photos, tmp_path):
    command = [sys.executable, HERE / "train.py", "--data", photos, "--out", tmp_path, *TINY, "--workers", 2]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=NO_GPU)
    with subprocess.Popen([*map(str, command)], **how) as stopped:
        while "epoch" not in stopped.stdout.readline():  # the first is over, the second begins
            assert stopped.poll() is None
        os.killpg(stopped.pid, signal.SIGTERM)  # to the workers too, as `timeout` and many schedulers do
        _, errors = stopped.communicate(timeout=100)  # ends when no process holds the pipe any more
    assert stopped.returncode == 143 and errors.count("\n") < 8 and "stopped after " in errors, errors
    train.train(tiny(photos, tmp_path, resume=True, workers=0))
    assert alike(tmp_path, trained[0] / "run")


@pytest.mark.parametrize("change, words", [
    (lambda loss: loss * torch.nan, "loss is nan, its gradient nan in epoch 2, step 2"),
    (lambda loss: loss + (0 * loss).sqrt(), r"loss is \d\S*, its gradient nan in epoch 2"),
])  # fmt: skip
def test_a_loss_that_is_no_number_stops_the_run(photos, short, tmp_path, change, words):
    with pytest.raises(ValueError, match=words + ".*; last.pt holds an earlier state. Try a smaller --lr"):
        train.train(tiny(photos, tmp_path, batch=7), criterion=at_step(5, change))
    content = read_checkpoint(tmp_path / "last.pt")
    assert len(content["log"]) == 1 and all(x.isfinite().all() for x in content["model"].values())


@pytest.mark.parametrize("error, world, status", [
    (PermissionError(13, "Permission denied", "a"), 1, "train.py: [Errno 13] Permission denied: 'a'"),
    (ValueError("a.png: is grey"), 1, "train.py: a.png: is grey"),
    (ValueError("Caught ValueError in worker 0.\n  trace\nValueError: a.png: gone"), 1, "train.py: ValueError: a.png"),
    (MemoryError(), 1, "train.py: out of memory; a smaller --batch, --crop or --size takes less"),
    (torch.OutOfMemoryError("CUDA out of memory\nmore"), 1, "train.py: CUDA out of memory; a smaller --batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "train.py: DataLoader worker (pid 7)"),
    (RuntimeError("[gloo] connection closed\nmore"), 2, "train.py: [gloo] connection closed; did another process end?"),
    (RuntimeError("[gloo] connection closed"), 1, None),  # of one process, so an error of our own
    (RuntimeError("CUDA error: an illegal memory access was encountered"), 2, None),
])  # fmt: skip
def test_a_run_ends_with_one_sentence_but_for_our_own_errors(monkeypatch, error, world, status):
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, world))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as support/terminal.py leaves it
    with pytest.raises(SystemExit if status else type(error)) as ended, processes.one_ending("train.py"):
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        raise error
    got = ended.value.code if status else None
    assert got == status or got.startswith(status) and "\n" not in got


@pytest.mark.parametrize("script", ["train.py", "predict.py", "data.py"])
def test_ctrl_c_while_torch_loads_shows_no_traceback(tmp_path, script):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    done = process(HERE / script, PYTHONPATH=str(tmp_path))
    assert done.returncode not in (0, 1) and not done.stderr


@pytest.mark.parametrize("world, ending, words", [(1, KeyboardInterrupt, ""), (2, SystemExit, "same torchrun command")])
def test_a_second_ctrl_c_does_not_wait_but_torchrun_sends_two(monkeypatch, capsys, world, ending, words):
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, world))
    with pytest.raises(ending), processes.Interrupts(torch.device("cpu"), "hands/", Path("out")) as interrupts:
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
        interrupts.obey("step 1")
    assert words in capsys.readouterr().err


WRITERS = {  # all that writes a file
    "checkpoint": lambda path, best: save(path, {"a": torch.zeros(3)}),
    "log.csv": lambda path, best: write_log([{"epoch": 1, "loss": 1.0, "CE_1": 1, "mIoU_1": 0.5}], {}, path.parent),
    "samples": lambda path, best: draw_samples(load(best), data.open_dataset(best.parents[1] / "photos", "test"), path),
    "network": lambda path, best: export(load(best), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(trained, tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).write_text("before")
    (tmp_path / f".{name}.part").symlink_to(name)
    (hidden := RuntimeError("unexpected pos 1172224")).__context__ = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", raising(hidden))  # as torch's writer hides it
    with pytest.raises(ValueError) if name != "samples" else nullcontext() as raised:  # a table matters more
        WRITERS[name](tmp_path / name, trained[0] / "run/best.pt")
    words = str(raised.value) if raised else capsys.readouterr().out
    assert re.search(f"{name}: could not be written .*No space.*its previous content is intact", words)
    assert (tmp_path / name).read_text() == "before" and [*tmp_path.iterdir()] == [tmp_path / name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such locks")
def test_a_folder_belongs_to_one_run(trained, photos, tmp_path, monkeypatch):
    import fcntl

    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    shutil.copytree(trained[0] / "run", tmp_path, dirs_exist_ok=True)
    for resume in [], ["--resume"]:
        done = run("train.py", "--data", photos, "--out", tmp_path, *resume)
        assert done.stderr.startswith(f"train.py: {tmp_path}: another run is writing there") and done.returncode == 1
    os.close(held)
    monkeypatch.setattr(fcntl, "flock", raising(OSError(9, "Bad file descriptor")))
    done = run("train.py", "--data", photos, "--out", tmp_path, "--resume")
    assert "cannot be held against a second run (Bad file" in done.stdout and done.returncode == 0
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / "new").rmdir())  # as the run that held it
    done = run("train.py", "--data", photos, "--out", tmp_path / "new")
    assert "new: another run is writing there" in done.stderr and not (tmp_path / "new").exists()


def test_a_new_run_replaces_nothing_but_a_start_without_a_step(photos, short, tmp_path):
    for name in {*FILES} - {"last.pt"}:
        (tmp_path / name / name).mkdir(parents=True)
        done = run("train.py", "--data", photos, "--out", tmp_path / name, *TINY)
        assert f"{name}: holds a run already ({name}); --resume" in done.stderr
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(photos, tmp_path / "new"), criterion=raising(KeyboardInterrupt()))
    train.train(tiny(photos, tmp_path / "new", epochs=1, level=2))
    assert read_checkpoint(tmp_path / "new/last.pt")["config"]["level"] == 2


@pytest.mark.parametrize("words, change", [
    ("train/p0 changed, 1 in all", lambda at: (at / "images/p0.png").write_bytes((at / "images/p1.png").read_bytes())),
    ("p0 changed, train/p1 changed, ", lambda at: [ImageOps.invert(Image.open(p)).save(p) for p in at.glob("masks/*")]),
    (" gone, ", lambda at: [path.unlink() for path in at.glob("*/p0.png")]),
])  # fmt: skip
def test_resuming_says_what_has_changed(trained, tmp_path, words, change):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path / "photos")
    done = run("train.py", "--data", tmp_path / "photos", "--out", tmp_path / "run", "--resume")
    assert "photos: changed since" in done.stderr and words in done.stderr
    again = re.search("(--start .*)\n", done.stderr)[1].split()
    assert run("train.py", "--data", tmp_path / "photos", "--out", tmp_path / "new", *again, *TINY[4:]).returncode == 0


OTHER = {"name": "dru", "options": {"width": 2}}, baselines.build("dru", 2, width=2).state_dict()


@pytest.mark.parametrize("changed, words", [
    *(({k: v}, "last.pt: ") for k, v in dict(log="abc", done="x", best=None, total=[], optimiser=3, photos=3, network=5,
      config=7, schedule={"last_epoch": "x"}, model={}).items()), ({"log": [1]}, "last.pt: "),
    ({"network": OTHER[0], "ema": OTHER[1]}, f"last.pt: holds {OTHER[0]}, but its settings build"),
    (lambda old: old["optimiser"]["state"][0].update(exp_avg=torch.zeros(3)), "optimiser's exp_avg has not the"),
    (lambda old: old["photos"].update({7: "a number"}), "7 gone"),
])  # fmt: skip
def test_a_last_checkpoint_of_wrong_parts_gets_one_sentence(trained, photos, tmp_path, changed, words):
    content = read_checkpoint(trained[0] / "run/last.pt")
    changed(content) if callable(changed) else content.update(changed)
    torch.save(content, tmp_path / "last.pt")
    done = run("train.py", "--data", photos, "--out", tmp_path, "--resume")
    assert done.stderr.startswith("train.py: ") and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such shell")
@pytest.mark.parametrize("shell", ['exec "$@"', 'exec "$@" >&- 2>&-', 'exec "$@" 0<&- >&- 2>&-'])
def test_any_name_and_any_stream_will_do(photos, tmp_path, shell):
    shutil.copytree(photos, tmp_path / "手\x1b[31m")
    args = "data.py", "--check", tmp_path / "手\x1b[31m"
    how = dict(capture_output=True, cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    done = subprocess.run(["bash", "-c", shell, "-", sys.executable, *map(str, args)], **how)
    shown = b"" if ">&-" in shell else b"\\u624b\\x1b[31m"
    assert done.returncode == 0 and b"\x1b" not in done.stdout and shown in done.stdout


def test_processes_share_every_batch_and_count_every_photo_once(photos, trained, monkeypatch):
    batches = lambda epoch=1, done=0: list(processes.share_of_batches(402, 20, 7, epoch, 2, done))
    alone, shares, parts = batches(), [], []
    assert batches(1, 3) == alone[3:] and batches(2, 5) == alone[25:]
    shown = [[k for epoch, k in sum(alone, []) if epoch == e] for e in (1, 2)]
    assert all(len(set(ks)) == len(ks) == 400 for ks in shown) and shown[0] != shown[1]  # whole batches of 402
    model, split = load(trained[0] / "run/best.pt"), data.open_dataset(photos, "train")
    whole = evaluate_split(model, split)
    monkeypatch.setattr("evaluate.gather_from_processes", lambda part: [part])
    for rank in range(4):
        for module in "support.processes", "evaluate":
            monkeypatch.setattr(f"{module}.rank_and_world", lambda rank=rank: (rank, 4))
        shares.append(batches())
        parts.append(evaluate_split(model, split))
    for *quarters, batch in zip(*shares, alone, strict=True):
        assert sorted(sum(quarters, [])) == sorted(batch) and min(map(len, quarters)) == 5
    torch.testing.assert_close([sum(part) for part in zip(*parts)], list(whole), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="--batch 3: is shared between 4 processes"):
        processes.share(model, 3)


def test_the_second_process_writes_nothing(photos, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(processes, "share", lambda net, batch: net)
    train.train(tiny(photos, tmp_path, epochs=1, batch=7))
    assert not any(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_learn_what_one_learns(photos, tmp_path, monkeypatch):
    """With SGD, as AdamW is blind to a gradient's size. At --lr 0.02 rounding moves the tables by 0.01."""
    flags = ["--data", photos, *TINY, "--epochs", "1", "--batch", "67", "--lr", "0.01", "--out"]
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "tests/two_processes.py"
    two = process(*torchrun, *flags, tmp_path / "two", PYTHONPATH=str(HERE))
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, weight_decay: torch.optim.SGD(groups))
    one = run("train.py", *flags, tmp_path / "one")
    assert one.returncode == two.returncode == 0, two.stderr
    (first,), (second,) = (read_checkpoint(tmp_path / name / "last.pt")["log"] for name in ("one", "two"))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)  # sums in another order, six steps long
    assert second["mIoU_3"] == pytest.approx(first["mIoU_3"], abs=5e-3)
    assert "and 1 more" in two.stdout and two.stdout.count("epoch   1/1") == 1 == two.stdout.count("pass    mIoU")
    tables = [[float(n) for line in done.stdout.splitlines()[-3:] for n in line.split()] for done in (one, two)]
    assert tables[0] == pytest.approx(tables[1], abs=5e-3)  # of one test photo: the second process has none


def test_a_killed_run_can_always_be_resumed(trained, photos, tmp_path):
    """KILLS=25 python -m pytest -k killed    kills a run, and what resumes it, 25 times."""
    out, rng = tmp_path / "run", np.random.default_rng(0)
    command = [sys.executable, HERE / "train.py", "--data", photos, "--out", out, *TINY]
    for _ in range(int(os.environ.get("KILLS", 1))):
        resume = ["--resume"] * (out / "last.pt").exists()
        with subprocess.Popen([*map(str, command), *resume], stdout=subprocess.DEVNULL, env=NO_GPU) as killed:
            while not (out / "last.pt").exists() and killed.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 6 if resume else 2))
            ended = killed.poll() == 0
            killed.kill()
        assert all(read_checkpoint(path) for path in out.glob("*.pt"))
        if ended:  # the next is a new run
            assert alike(out, trained[0] / "run")
            shutil.rmtree(out)
    train.train(tiny(photos, out, resume=(out / "last.pt").exists()))
    assert alike(out, trained[0] / "run")


# ---------------------------------------------------------------- support/runtime.py
class FakeGraph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph does, on a CPU: replaying reads and writes the same tensors as the recorded calls."""

    def __init__(self, made):
        super().__init__()
        self.calls = []
        made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}, out := func(*args, **(kwargs or {}))))
        return out

    @torch.inference_mode()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, x in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                old.copy_(x) if isinstance(x, torch.Tensor) else None


@pytest.fixture
def graphs(monkeypatch):
    """All that is recorded. Of the rest of torch.cuda, stand-ins note how they are called."""
    made, fake = [], MagicMock(graph=lambda graph, pool: graph)
    fake.CUDAGraph = lambda: FakeGraph(made)
    fake._is_compiled.return_value = fake.amp.common.amp_definitely_not_available.return_value = False
    monkeypatch.setattr(torch, "cuda", fake)
    return made


def test_a_replayed_call_or_network_is_recorded_the_second_time(graphs):
    f = lambda x, times: [x * times, x + times]
    replayed, seen = runtime.Replayed(f, most=2), []
    for k in range(5):
        x = torch.full((2, 3), float(k))
        with torch.inference_mode(k < 3):  # a recording made inside serves outside too
            seen.append((x, replayed(x, 2)))
    assert len(graphs) == 1  # the first call ran eagerly, the second was recorded, the rest replayed
    for x, got in seen:  # each result belongs to its caller: later calls have not written over it
        assert torch.equal(got[0], x * 2) and torch.equal(got[1], x + 2)
    for other in (torch.ones(3, 2), 2), (torch.ones(2, 3), 5), (torch.ones(2, 3).double(), 2):  # shape, number, dtype
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(replayed(*other), f(*other)))
    for n in 5, 6, 5, 5:  # of two, the latest is kept
        replayed(torch.ones(2, 3), n)
    assert len(graphs) == 4 and len(replayed.graphs) == 2
    net, image = RecurrentUNet(width=2).eval(), torch.randn(1, 3, 20, 17)
    replayed, state = runtime.ReplayedNet(net), net.start(image)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(replayed(image, 2), net(image, 2))
            torch.testing.assert_close(replayed.step(image, state), net.step(image, state))
            state = net.step(image, state)[1]
    assert len(graphs) == 6 and not hasattr(runtime.ReplayedNet(PlainUNet()), "step")


def test_a_recording_casts_the_weights_itself_and_waits_for_what_came_before(graphs, monkeypatch):
    order = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: order.append("clear"))
    for name in "Stream", "current_stream":
        getattr(torch.cuda, name).return_value.wait_stream = lambda other, name=name: order.append(name)
    replayed = runtime.Replayed(lambda x: order.append("run") or x + 1)
    for half in False, True:  # of which each needs its own
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            assert [replayed(torch.tensor(k)).item() for k in (1, 2, 3)] == [2, 3, 4]
            assert order == ["run", "Stream", "run", "run", "current_stream", "clear", "run", "clear"]
        order.clear()
    torch.cuda.graph_pool_handle.assert_called_once_with()


def test_what_cannot_be_recorded_runs_as_it_is_and_is_tried_once(graphs, monkeypatch, capsys):
    replayed = runtime.Replayed(lambda x: 2 * x)
    monkeypatch.setattr(runtime.Replayed, "record", raising(RuntimeError("operation not permitted")))
    assert [replayed(torch.tensor(k)).item() for k in (1, 2, 3, 4)] == [2, 4, 6, 8]
    assert capsys.readouterr().err == "runs without a CUDA graph: operation not permitted\n"
    torch.cuda.set_stream.assert_called_once_with(torch.cuda.current_stream())  # a failed capture leaves another


@pytest.mark.parametrize("taught", [lambda net: net, LastPass])
def test_training_is_recorded_at_the_second_batch_of_a_shape(graphs, monkeypatch, taught):
    """A stand-in for PyTorch's recorder says what it is given. Its networks must learn as others do."""
    flags = lambda: (torch.is_autocast_enabled("cuda"), torch.is_autocast_cache_enabled())
    keep = lambda f, args: graphs.append((f, args[0].shape, flags())) or f.forward
    torch.cuda.make_graphed_callables.side_effect = keep
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    net, other = taught(RecurrentUNet(width=2)), PlainUNet(width=2)
    graphed, normed = runtime.Graphed(net), runtime.Graphed(baselines.build("unet-b", 2))
    for image in torch.randn(3, 2, 3, 20, 17):
        for half in False, True:
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                masks = graphed(image, 2)
            torch.testing.assert_close(masks, net(image, 2))
            assert type(masks) is list and masks[-1].requires_grad
        normed(image, 2)
    (recorded, *how), (_, *halved) = graphs  # a batch norm is not recorded, as warming up would move its means
    assert how == [(2, 3, 20, 17), (False, False)] and halved == [(2, 3, 20, 17), (True, False)]
    assert {*recorded.parameters()} == {*net.parameters()}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    graphed(image[:1], 2), graphed(image[:1], 2)
    assert len(graphs) == 2 and runtime.Graphed(other).state_dict().keys() == {f"net.{k}" for k in other.state_dict()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_change_neither_gradients_nor_masks():
    net = runtime.for_device(RecurrentUNet(), torch.device("cuda"))
    images = torch.randn(4, 2, 3, 40, 56, device="cuda")
    gradients = lambda masks: torch.autograd.grad(sum(s.square().mean() for s in masks), [*net.parameters()])
    for learner in net, LastPass(net):
        graphed = runtime.Graphed(learner)
        for image in images:
            torch.testing.assert_close(*(gradients(f(image, 3)) for f in (graphed, learner)), rtol=1e-3, atol=1e-4)
    for half, within in (False, 1e-4), (True, 1e-2):
        replayed = runtime.Replayed(net.eval())
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
            for image in images:
                torch.testing.assert_close(replayed(image, 3), net(image, 3), rtol=within, atol=within)
