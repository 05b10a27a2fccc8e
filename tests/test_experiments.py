"""What experiments/ measures, trains, writes and draws."""

import ast
import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import HERE, SCRIPTS, blob, letter_f, process, run, write_pair
from PIL import Image
from torch import nn
from torch.nn import functional as F

import gates_triton
import train
from data import open_dataset
from evaluate import evaluate_split, load, segment
from experiments import bench, compare, diagnosis, evidence, figures, gpu, tables, video
from rurnet import VOID, RecurrentUNet, recurrent_loss
from support.checkpoints import read_checkpoint

HEAD = "data,system,seed,commit,parameters,steps,minutes,epoch,val_mIoU,mIoU,IoU,F1,photos"
SCRIPTS |= {m.__name__: m for m in (compare, diagnosis, evidence, figures, video)}


def test_no_two_functions_have_one_name():
    files = [file for folder in ("support", "paper", "experiments") for file in (HERE / folder).glob("*.py")]
    files += [HERE / f"{name}.py" for name in "rurnet gates_triton data evaluate train predict".split()]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if not file.name.startswith("test_")]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(trees) > 15 and {name for name in names if names.count(name) > 1} == {"main"}


def test_bench_compares_forms_within_shuffled_rounds(capsys, monkeypatch):
    order, ms = [], {"plain": iter([4.0] * 8 + [40.0] * 2), "slow": iter([8.0] * 10)}
    forms = {name: lambda name=name: order.append(name) or next(ms[name]) for name in ms}
    monkeypatch.setattr(bench, "timed", lambda call: call())
    assert bench.compare("", forms, rounds=9, warm=1) == {"plain": 4, "slow": 8}  # the two slow rounds do not count
    assert {tuple(order[k : k + 2]) for k in range(2, 20, 2)} == {("plain", "slow"), ("slow", "plain")}


def test_every_form_of_bench_returns_the_same_logits(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # compiling takes a minute
    monkeypatch.setattr(bench, "compare", lambda title, forms, _: dict.fromkeys(forms, 3 if "kept" in title else 6))
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # for good
    bench.compare_inference(1)
    text = capsys.readouterr().out
    found = re.findall(r"differ by at most (\S+); (\d+) pixels", text)
    assert found and all(float(off) < 3e-4 and pixels == "0" for off, pixels in found)
    assert text.count("predict.py is 2.00 times faster than plain") == 2


def test_the_gpu_hour_takes_every_branch_without_a_gpu(monkeypatch, tmp_path):
    """Stand-ins for the device, its clock and the processes. What is printed and in which order is real."""
    assert sum(seconds for seconds, _ in gpu.STEPS.values()) <= 540
    ran, fake, profile = [], MagicMock(), MagicMock()
    fake.Event.return_value.elapsed_time = lambda end: 1.0
    fake.memory_allocated.return_value = fake.max_memory_allocated.return_value = 2**20
    kernel = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, self_device_time_total=5, count=2, key="conv")
    profile.return_value.__enter__.return_value.key_averages.return_value = [kernel] * 12

    def run_here(command, stdout, timeout=None, **how):
        ran.append(command[-1])
        assert stdout == gpu.subprocess.PIPE or command[1] == "-u"  # every line at once
        if timeout == 1:
            raise gpu.subprocess.TimeoutExpired(command, timeout)
        with contextlib.redirect_stdout(stdout):
            gpu.STEPS.get(ran[-1], (0, nothing))[1]()
        if "train.py" in command:
            stdout.write("pass    mIoU   mPrec\n   1  0.7000  0.8000\n")
        return SimpleNamespace(returncode=0, stdout="a5f0c1b2")

    nothing, same = lambda *_, **__: None, lambda net, **how: net
    seconds, slower = gpu.time_forms, lambda name, ms: [t * (1 + (name == "fused")) for t in ms]
    for at, stand_ins in {
        gpu: dict(cuda=fake, profile=profile, Replayed=same, Graphed=same, WARM=0, ROUNDS=2, MEGABYTES=(64, 512),
                  DEVICE=torch.device("cpu"), MEGABYTE=2**9, SIZES=((1, 3, 16, 17), (2, 3, 16, 16)),
                  time_forms=lambda forms: {name: slower(name, ms) for name, ms in seconds(forms).items()},
                  autocast_to=lambda dtype: contextlib.nullcontext()),
        torch: dict(compile=same), torch.compiler: dict(reset=nothing), gpu.subprocess: dict(run=run_here),
        gates_triton: dict(_runs_triton=lambda x: False),
    }.items():  # fmt: skip
        for name, value in stand_ins.items():
            monkeypatch.setattr(at, name, value)
    for steps, sanitizer in (gpu.STEPS, None), ({"memcheck": gpu.STEPS["memcheck"]}, "/bin/compute-sanitizer"):
        monkeypatch.setattr(gpu, "STEPS", steps)
        monkeypatch.setattr(shutil, "which", lambda name, at=sanitizer: at)
        gpu.spend_gpu_hour(tmp_path)
    text = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert list(dict.fromkeys(ran)) == ["device", "tests", "gate or norm or network", "memcheck", "profile",
                                        "kernels", "network", "training", "edges_of_a_block and reset"]  # fmt: skip
    assert all(part.endswith(" s\n") and "status 0" in part for part in text.values()) and len(text) == 7
    assert text["profile"].count("kernels\n") == 16 and text["profile"].count("conv") == 160
    assert text["kernels"].count("of a copy") == 2 * 2 * (4 * 2 * 3 + 2 + 4 * 2)
    assert text["kernels"].count("100.0% of a copy") == 2 * 2 * 1 and text["kernels"].count("0.500 of") == 104
    assert text["network"].count("1.000x") == 4 * 9 and text["training"].count("1.000x") == 2 * 7
    assert text["network"].count("0.500x") == 4 * 1 and text["training"].count("0.500x") == 2 * 1
    monkeypatch.setattr(gpu, "STEPS", {"training": (1, nothing)})
    gpu.spend_gpu_hour(tmp_path / "late")
    assert "stopped at its limit" in (tmp_path / "late/training.txt").read_text()
    gpu.spend_gpu_hour(tmp_path / "train", training=True)
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"dru.txt", "unet-g.txt", "runs.csv"}
    head, *rows = (tmp_path / "train/runs.csv").read_text().splitlines()
    assert head == tables.read_result("runs.csv")[0] and len(rows) == 2
    assert re.fullmatch(r"train.py --data DRIVE/ .* --model dru,a5f0c1b,0,GPU,0.0,2,1,0.7000,0.8000", rows[0])
    fake.is_available.return_value = False
    assert [run("experiments.bench", way, tmp_path).returncode for way in ("--gpu", "--gpu-train")] == [1, 1]


@pytest.mark.skipif(gates_triton.triton is None, reason="triton is not installed")
def test_bench_counts_what_the_fused_kernels_save():
    """A pass saves 2 transfers of every ReLU, 11 and 2 of the gates, and a norm's second reading where it is small."""
    net, out = RecurrentUNet(passes=1), {}
    for module in net.modules():
        module.register_forward_hook(lambda m, i, y: out.update({m: y}))
    with torch.no_grad():
        net(torch.rand(1, 3, 70, 90))
    relus, small = [y.nbytes for m, y in out.items() if isinstance(m, nn.ReLU)], []
    nbytes, gates = 2 * sum(relus), 11 * out[net.unit.net_z].nbytes + 2 * out[net.unit.net_r].nbytes
    launches = len(relus) + 5 + 1
    for norm in (m for m in out if isinstance(m, nn.GroupNorm)):
        (_, channels, height, width), n = out[norm].shape, norm.num_groups
        small.append(2 ** (channels // n - 1).bit_length() * 2 ** (height * width - 1).bit_length() <= 16384)
        parts = -(-height * width // 4096)  # a large norm writes and reads two numbers for each
        nbytes += 4 * 2 * n + (out[norm].nbytes if small[-1] else -4 * 2 * 2 * channels * parts)
        launches += 2 if small[-1] else 1  # one or two kernels, not 3
    plain, fused = (bench.count_traffic(form, 1, (70, 90)) for form in (False, True))
    assert set(small) == {True, False}
    assert plain.norms - fused.norms == 3 * nbytes and plain.bytes - fused.bytes == 3 * (nbytes + gates)
    assert plain.launches - fused.launches == 3 * launches


def test_tables_on_the_pages_are_what_results_say():
    names = []
    for page in filter(Path.exists, tables.PAGES):
        text = page.read_text(encoding="utf-8")
        assert tables.fill_tables(text) == text, f"{page}: python -m experiments.tables"
        names += re.findall("<!-- table: (.+) -->", text)
    assert sorted(names) == sorted(tables.MAKE)


def test_a_table_has_the_mean_of_the_seeds_after_the_right_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert all("awaited" in make() or make is tables.diagnosis_table for make in tables.MAKE.values())
    rows = [f"hgr,DRU(4),{k},abc,7,1,1,1,0,0,0.5 0.{k + 1} 0.{k + 4} 0.9 0.9,0," for k in (0, 1, 2)]
    (tmp_path / "evidence.csv").write_text("\n".join([HEAD, *rows]))
    text = tables.fill_tables("a\n<!-- table: short -->\nold\n<!-- end -->\nb")
    assert "| DRU(4) | 7 | awaited | 0.500 (0.400 to 0.600) |" in text
    assert text.startswith("a\n<!--") and text.endswith("-->\nb") and "old" not in text


def test_a_lead_and_its_interval_are_those_of_a_bootstrap(tmp_path, monkeypatch):
    """Two photos of one seed have four equally likely resamples, two seeds of either system sixteen."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    a, b, c, d = (6, 2, 2), (2, 2, 6), (8, 1, 1), (5, 0, 5)
    iou = lambda *photos: sum(photo[0] for photo in photos) / sum(map(sum, photos))
    by_photo = iou(a, c) - iou(b, d), iou(a, a) - iou(b, b), iou(c, c) - iou(d, d)
    ends = min(iou(a), iou(c)) - max(iou(b), iou(d)), max(iou(a), iou(c)) - min(iou(b), iou(d))
    by_seed = (iou(a) + iou(c) - iou(b) - iou(d)) / 2, *ends
    cases = ([((a, c), (b, d))], by_photo, ", one seed"), ([((a,), (b,)), ((c,), (d,))], by_seed, ", 2 seeds")
    text = lambda photos: " ".join("/".join(map(str, photo)) for photo in photos)
    for found, (value, *ends), more in cases:
        rows = [f"roads,{name},{seed},,7,1,1,,0,0,0.5,0,{text(photos)}"
                for seed, pair in enumerate(found) for name, photos in zip("AB", pair)]  # fmt: skip
        (tmp_path / "long.csv").write_text("\n".join([HEAD, *rows]))
        low, high = sorted(ends)
        assert tables.lead_of("roads", "A", "B") == f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}{more})"
    assert tables.lead_of("roads", "A", "B", "1").startswith(f"{100 * (iou(c) - iou(d)):+.1f} (")  # of that seed alone
    names = "0_A_hgr2B_id10_1 1_A_hgr2B_id10_2 0_A_hgr1_id10_1"
    (tmp_path / "splits.csv").write_text(f"data,split,names\nhgr,train,x\nhgr,test,{names}\nroads,test,y")
    assert tables.units_of("hgr", 3) == [[0, 1], [2]] and tables.units_of("DRIVE", 2) == [[0], [1]]


def test_evidence_commands_are_what_runs(monkeypatch):
    runs = list(evidence.all_runs())
    done = {(r["data"], r["system"], r["seed"]) for r in tables.read_rows("long.csv") if r["data"] in evidence.DATA}
    assert len({r.key for r in runs}) == len(runs) == len({r.config.out for r in runs}) == 5 * 3 * 3 + 3 * 3 + 13
    views = {(data, "U-Net-G, three views", s) for data in evidence.DATA for s in "012"}
    longer = {(r.data, f"{r.system}, eight views", str(r.seed)) for r in runs if r.system.endswith(" x steps")}
    gone = {(data, "DRU(4), passes 2 and 3 late", "0") for data in ("roads", "hgr")}  # trained by commit ae09e1e
    assert done <= {r.key for r in runs} | views | longer | gone
    for r in runs:
        monkeypatch.setattr(train, "read_checkpoint", lambda path: {"config": vars(r.config)})  # of what it starts from
        assert train.parse(evidence.command_of(r).split()[2:]) == r.config


def test_evidence_is_trained_tested_and_written_once(trained, tmp_path, monkeypatch):
    at, _ = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    how = dict(data="photos", size=16, epochs=1, batch=20)
    chosen = [evidence.Run("photos", system, 0, train.Config(out=f"runs/evidence/{model}", model=model, **how))
              for system, model in (("DRU(4), 3 x steps", "dru"), ("U-Net-G", "unet-g"))]  # fmt: skip
    monkeypatch.setattr(evidence, "all_runs", lambda: chosen)
    with evidence.FileLock(tmp_path / "runs/evidence/unet-g/lock"):  # another process trains it
        evidence.run_all(at)
    names = ["DRU(4), 3 x steps", "DRU(4), 3 x steps, eight views"]
    assert [row["system"] for row in tables.read_rows("long.csv")] == names
    (tmp_path / "long.csv").unlink()  # as if stopped before the test: the finished training is resumed
    for _ in range(2):  # the second finds nothing left to do
        assert run("experiments.evidence", "run", at).returncode == 0
    drawn, eight, plain, views = tables.read_rows("long.csv")
    assert eight["system"] == names[1] and eight["photos"] != drawn["photos"]
    assert drawn["parameters"] == "364338" and len(drawn["val_mIoU"].split()) == 3
    assert drawn["steps"] == plain["steps"] == "20" and plain["epoch"] == "1 of 1"  # 6 photos, 67 times, 20 a step
    model, photos = load("runs/evidence/unet-g/best.pt"), open_dataset(at / "photos", "test")
    (matrix,), *_ = evaluate_split(model, photos)
    hit, false, missed = sum(np.array(photo.split("/"), int) for photo in plain["photos"].split())
    assert (hit, false, missed) == (matrix[1, 1], matrix[0, 1], matrix[1, 0])
    assert plain["IoU"] == f"{hit / (hit + false + missed):.4f}" and views["system"] == "U-Net-G, three views"
    image, look = torch.randn(1, 3, 32, 48), lambda x: model.net(x)[0].softmax(1)
    turned, shifted = look(image.flip(2)).flip(2), look(image.roll((8, 8), (2, 3))).roll((-8, -8), (2, 3))
    for upside_down, third in (True, turned), (False, shifted):
        (got,) = evidence.ThreeViews(model, upside_down)(image)
        torch.testing.assert_close(got.softmax(1), (look(image) + look(image.flip(3)).flip(3) + third) / 3)


def test_a_diagnosis_gives_pass_two_what_it_says(trained, tmp_path, monkeypatch):
    at, _ = trained
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert run("experiments.diagnosis", at / "photos", at / "run").returncode == 0
    rows, model = tables.read_rows("diagnosis.csv"), load(at / "run/last.pt")
    f1 = {(row["split"], row["given"]): row["F1"] for row in rows}
    assert len(rows) == 2 * 9 and float(f1["train", "tiles, pass 3"]) > 0.5
    image, truth = torch.randn(1, 3, 32, 40), torch.randint(2, (1, 32, 40))
    truth[0, 0] = VOID
    tiles = diagnosis.masks_of_tiles(model.net, image, 16, 3)
    torch.testing.assert_close(tiles[2][..., 16:, 24:], model.net(image[..., 16:, 24:])[2])  # the last column overlaps
    masks, (s, (_, h)) = diagnosis.second_masks(model.net, image, truth), model.net.step(image, model.net.start(image))
    right = torch.where(truth == VOID, s.softmax(1), torch.stack([1 - truth, truth], 1).float())
    for given, mask in ("the truth", right), ("nothing", 0 * right):
        torch.testing.assert_close(masks[f"pass 2, given {given}"], model.net.step(image, (mask, h))[0])


def test_a_moved_photo_and_its_moved_mask_stay_aligned():
    """Masks as photos: wherever a pixel counts, it must show its own class, in every frame and after a cut."""
    masks = torch.stack([torch.from_numpy(np.array(letter_f()[1].resize((96, 96)).rotate(turn))) for turn in (0, 70)])
    truth = masks.long()[[0, 1, 0, 1]]
    image = torch.stack([truth.float()] * 3, 1)
    for frames, cuts in (3, 0), (6, 1):
        maps, light, shown = video.draw_maps(np.random.default_rng(1), frames, 4, cuts=cuts)
        assert (shown[0] == torch.arange(4)).all() and (shown[-1] != shown[0]).all() == cuts
        seen = [video.move(image[k], truth[k], *how) for k, *how in zip(shown, maps, light)]
        for bright, (photo, labels) in zip(light, seen):
            counts = labels != VOID
            wrong = (((photo - bright[:, None, None, None])[:, 0] > 0.5).long() != labels) & counts
            assert counts.float().mean() > 0.7 and wrong.sum() < 0.02 * counts.sum()
        assert (seen[0][1] != seen[-1][1]).any((1, 2)).all()
    still, net = video.draw_maps(np.random.default_rng(1), 3, 4, pace=0), RecurrentUNet(width=4)
    want = recurrent_loss(net(F.avg_pool2d(image, 2)), truth[:, 1::2, 1::2], 0.4)
    torch.testing.assert_close(video.motion_loss(net, image, truth, *still), want, rtol=0.02, atol=0)


def test_runs_are_compared(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(at := trained[0] / "run", "other")
    config = json.loads((at / "config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"lr": 0.1}))
    done = run("experiments.compare", at, "other")
    best = max(row["mIoU_3"] for row in read_checkpoint(at / "last.pt")["log"])
    assert f"\nother: validation mIoU {best:.4f} at epoch " in done.stdout and "lr 0.1" in done.stdout
    assert "alpha" not in done.stdout and Image.open("compare.png").width == 900
    (tmp_path / "other/log.csv").write_text("epoch")
    assert "other: must hold config.json and log.csv of a run" in run("experiments.compare", "other").stderr


def test_a_watched_video_is_scored_as_photos_are(trained, monkeypatch):
    model, photos = load(trained[0] / "run/best.pt"), open_dataset(trained[0] / "photos", "train")
    matrices, *_ = evaluate_split(model, photos)
    found = [video.watch(model, photos)[way] for way in video.WAYS]
    assert torch.equal(found[0][0], matrices[2]) and torch.equal(found[1][0], matrices[0])
    assert not any(torch.equal(found[k][0], matrices[0]) for k in (2, 3))  # one sequence, so the state is carried
    flickers, pairs = [0, 0], [photos.pictures(i) for i in range(len(photos))]
    for (a, truth_a), (b, truth_b) in zip(pairs, pairs[1:]):
        still = np.asarray(truth_a) == np.asarray(truth_b)
        masks = [segment(model, photo)[-1].argmax(0).numpy() for photo in (a, b)]
        flickers = [flickers[0] + (masks[0] != masks[1])[still].sum(), flickers[1] + still.sum()]
    assert [int(n) for n in found[0][1:3]] == flickers and flickers[0] > 0
    monkeypatch.setattr(video, "sequence_of", lambda name: name)  # now each frame begins a sequence
    alone = video.watch(model, photos)
    assert [torch.equal(alone[video.WAYS[k]][0], matrices[2 if k == 3 else 0]) for k in (1, 2, 3)] == [True] * 3
    assert alone[video.WAYS[0]][2] == 0


def test_videos_are_trained_watched_and_written_once(tmp_path, monkeypatch):
    """And predict.py --frames on the test frames gives the table's digits."""
    for t in range(10):
        write_pair(tmp_path / "video_hand", f"{t:02d}", *reversed(blob(x=2 * t)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(video, "SETS", {"video_hand": (32, 3)})
    monkeypatch.setattr(video, "SEEDS", (0,))
    for _ in range(2):  # the second finds nothing left to do
        assert run("experiments.video", tmp_path).returncode == 0
    rows = tables.read_rows("video.csv")
    assert [(row["trained on"], row["way"]) for row in rows] == [(how, w) for how in video.TRAINED for w in video.WAYS]
    frames = [tmp_path / f"video_hand/images/{t:02d}.png" for t in range(6, 10)]
    assert run("predict.py", "runs/video/video_hand_motion_0.pt", *frames, "--frames", "--out", "out").returncode == 0
    got, true = ([np.asarray(Image.open(at / f"{t:02d}.png")) > 0 for t in range(6, 10)] for at in
                 (tmp_path / "out", tmp_path / "video_hand/masks"))  # fmt: skip
    iou = np.logical_and(got, true).sum() / np.logical_or(got, true).sum()
    assert rows[-1]["way"] == video.WAYS[3] and rows[-1]["IoU"] == f"{iou:.4f}"


def test_figures_are_drawn_as_committed_or_of_a_trained_network(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "RUN", trained[0] / "run")
    assert run("experiments.figures", *figures.DRAWINGS, *figures.TRAINED).returncode == 0
    for name in figures.DRAWINGS:
        got, want = (np.asarray(Image.open(at / f"figures/{name}.png").convert("RGB"), int) for at in (tmp_path, HERE))
        assert got.shape == want.shape and abs(got - want).mean() < 1  # of 255: matplotlibs smooth letters differently
    for name in figures.TRAINED:
        assert np.asarray(Image.open(f"figures/{name}.png").convert("L")).std() > 10
    net, image = load(trained[0] / "run/best.pt").net, torch.randn(1, 3, 32, 48)
    seen = figures.look_inside(net, image)
    assert all(torch.equal(at["p"], s.softmax(1)[0, 1]) for at, s in zip(seen, net(image), strict=True))


@pytest.mark.skipif(sys.platform != "linux" or not gates_triton.triton, reason="triton's compilers ship for Linux")
@pytest.mark.parametrize("part", ["gates", "norms", "passes"])
def test_kernels_built_for_real_gpus(part):
    done = process("-m", "tests.build_kernels", part, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
