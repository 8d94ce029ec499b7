"""Every script in benchmarks/, run by its own command line at a small size (gpu.py: test_gpu_benchmark.py)."""

import copy
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.inference.checkpoint import SIZE, write_checkpoint
from vjepa_scale.core.errors import exit_code
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.demo.impossible import EVENTS
from vjepa_scale.demo.synthetic import World, write_videos
from vjepa_scale.recipe import load_recipe, recipe_yaml
from vjepa_scale.shards.work import Settings, Work

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
# Networks as small as the masks of short clips allow.
SMALL = (
    "model.encoder={width: 48, depth: 2, heads: 2}",
    "model.predictor={width: 24, depth: 2, heads: 2}",
    "model.patch=8",
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")

Rows = list[dict[str, str]]
# A command that has run in this process: its exit code, standard output, standard error.
Run = Callable[..., tuple[int, str, str]]


def load(script: str) -> Any:
    """A script as a module that no other module is named like."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", BENCHMARKS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What scripts change in a process that is theirs is as before after each test."""
    modules, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    # Of the scripts, of the checkout they were given, and what stands in for a package that is not installed.
    own = {*SCRIPTS, *(f"benchmark_{script}" for script in SCRIPTS), "src", "timm"}
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in own:
            del sys.modules[name]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_here(script: str, *words: object) -> tuple[int, str, str]:
        main = load(script).main
        capsys.readouterr()
        code = exit_code(lambda: main([str(word) for word in words]))
        return code, *capsys.readouterr()

    return run_here


def run_process(script: str, *words: object, **env: object) -> str:
    """Standard output of a script in a process of its own, for those that fork, spawn or measure their process."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in env.items()}},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(text: str) -> Rows:
    """The rows of a table, cells by column: of Markdown, or of columns between bars."""
    lines = [line.strip("|") for line in text.splitlines() if " | " in line]
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert rows
    assert all(len(row) == len(head) for row in rows), text
    return [dict(zip(head, row, strict=True)) for row in rows]


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(cell)]


def column(rows: Rows, name: str, *, above: float = 0.0) -> list[float]:
    """The figures of a column, one a row: finite, and larger than ``above``."""
    found = []
    for row in rows:
        (value,) = numbers(row[name])
        assert math.isfinite(value), row
        assert value > above, (name, row)
        found.append(value)
    return found


# -- the list ----------------------------------------------------------------------------------------

# Which tests below run it; for a module that is no command: which commands use it.
RUN_BY = {
    "checkpoint": {"test_checkpoint_training", "test_checkpoint_consolidation"},
    "clock": {"step"},
    "encoder": {"test_encoder"},
    "gpu": {"test_gpu_beside_the_published_code"},
    "gpu_book": {"gpu"},
    "gpu_resume": {"gpu"},
    "gpu_rows": {"gpu"},
    "host": {"test_host"},
    "loader": {"test_loader"},
    "order": {"test_order"},
    "precision": {"test_precision"},
    "published": {"step", "precision"},
    "shards": {"test_shards_beside_tar", "test_shards_of_many_records"},
    "showcase": {"test_showcase_of_finished_runs", "test_showcase_runs_the_demo", "test_showcase_check"},
    "step": {"test_step", "test_step_beside_the_published_code"},
    "surprise": {"test_surprise"},
    "transcode": {"test_transcode"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_run(script: str) -> None:
    assert script in RUN_BY, f"benchmarks/{script}.py: add a test that runs it, and its name to RUN_BY"
    command = "run_command(main)" in (BENCHMARKS / f"{script}.py").read_text() or script == "showcase"
    for by in RUN_BY[script]:
        if command:
            assert callable(globals().get(by)), f"no test {by}"
        else:
            assert f"from {script} import" in (BENCHMARKS / f"{by}.py").read_text()


def test_no_script_is_listed_that_is_not_there() -> None:
    assert sorted(RUN_BY) == SCRIPTS


# -- data --------------------------------------------------------------------------------------------


def test_order(run: Run) -> None:
    sizes = ("--records", 20_000, "--shard-records", 10, "--batch", 64, "--ranks", 4, "--lanes", 1, 8)
    code, text, _ = run("order", *sizes, "--steps", 2)
    assert code == 0
    assert text.startswith("20,000 records in 2,000 shards of 5 data sets, global batch 64;\n")
    rows = table(text)
    assert [row["lanes"] for row in rows] == ["1", "8"]
    for name in ("µs per record", "first batch, ms"):
        column(rows, name)
    for average, most in zip(column(rows, "shards: mean"), column(rows, "most"), strict=True):
        assert 1 <= average <= most <= 1600  # a rank reads 16 clips a step, in 100 steps
    assert "(1,600 clips)" in text


def test_transcode(run: Run) -> None:
    sizes = ("--size", "64x48", "--seconds", 4, "--clips", 1, "--rounds", 1, "--short-side", 32)
    code, text, _ = run("transcode", *sizes)
    assert code == 0
    rows = table(text)
    assert [row["file"] for row in rows] == ["source", "same size", "short side 32"]
    assert numbers(rows[0]["CPU s per s"]) == [0]
    for name in ("MB", "÷ source", "clips/s/core", "× source"):
        column(rows, name)
    assert (rows[0]["÷ source"], rows[0]["× source"]) == ("1.00", "1.0")
    speeds, factors = column(rows, "clips/s/core"), column(rows, "× source")
    assert factors == pytest.approx([speed / speeds[0] for speed in speeds], abs=0.051)


def test_transcode_wants_videos_as_long_as_its_clips(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("transcode", "--size", "64x48", "--seconds", 3)
    assert ended.value.code == 2
    assert "--seconds: at least 4" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_beside_tar() -> None:
    """Tiny files, of which tar takes less than a hundredth of a second."""
    text = run_process("shards", "--files", 2, "--mb", 1, "--shard-mb", 1, "--rounds", 1)
    assert text.startswith("2 files of 0.5 MB, 1 workers\n")
    rows = table(text)
    assert [row["way"] for row in rows] == ["tar", "tar and sha256", "write", "all of it"]
    for name in ("MB/s", "wall s"):
        column(rows, name)
    quotients = [numbers(row[name])[0] for row in rows for name in ("÷ tar", "CPU s")]
    assert all(math.isfinite(value) and value >= 0 for value in quotients)
    for shorter, longer in ((0, 1), (2, 3)):  # each of these is the other, and more
        assert column(rows, "wall s")[shorter] <= column(rows, "wall s")[longer]


@pytest.mark.slow
def test_shards_of_many_records() -> None:
    text = run_process("shards", "--records", 2000)
    assert text.startswith("2000 records; ")
    rows = table(text)
    assert [row["step"] for row in rows] == ["plan", "finish", "open"]
    assert column(rows[:2], "seconds")
    for row in rows:
        held, a_record = numbers(row["MB held"])[0], numbers(row["bytes a record"])[0]
        assert 0 <= held < 100
        assert a_record == pytest.approx(held * 1e6 / 2000, abs=0.6e6 / 2000)


def test_shards_counts_little_time() -> None:
    """Less than the hundredths of a second in which psutil counts: tar of small files took 0 s, and was divided by."""
    times = load("shards").Times
    for _ in range(20):
        began = times.now()
        hashlib.sha256(bytes(10**5))
        taken = times.now().since(began)
        assert taken.cpu_s > 0
        assert taken.wall_s > 0


def test_shards_pretends_what_planning_and_finishing_read(tmp_path: Path) -> None:
    shards = load("shards")
    work = Work(*[tmp_path / "out"] * 3, Settings(shard_records=100), {}, files=1000, chunk=500, made_out=False)
    shards._pretend_probed(work)
    for step in (shards.plan, shards._pretend_written, shards.finish, shards._open):
        step(work)
    manifest = Manifest.open(work.out)
    # Of the first 1,000 one in 100 was rejected. (There is one duplicate in a whole chunk of 1,000.)
    assert manifest.records == 990
    assert list(manifest.records_per_shard) == [100] * 9 + [90]


def test_shards_says_what_failed() -> None:
    """A thread watches the memory meanwhile: it must not hold up the error for ever."""
    before = threading.active_count()

    def fails(_: object) -> None:
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        load("shards")._measured(fails, None)
    assert threading.active_count() == before


DECORD = '''
"""Stands in for decord, with what benchmarks/loader.py calls, by PyAV."""

import av
import numpy as np


class Batch:
    def __init__(self, pictures):
        self._pictures = pictures

    def asnumpy(self):
        return np.stack(self._pictures)


class VideoReader:
    def __init__(self, path, num_threads, ctx):
        with av.open(path) as container:
            self._rate = float(container.streams.video[0].average_rate)
            self._frames = list(container.decode(video=0))

    def get_avg_fps(self):
        return self._rate

    def get_batch(self, wanted):
        return Batch([self._frames[min(int(i), len(self._frames) - 1)].to_ndarray(format="rgb24") for i in wanted])


def cpu(number):
    return number
'''


@pytest.mark.slow
def test_loader(tmp_path: Path) -> None:
    (tmp_path / "decord.py").write_text(DECORD)
    sizes = ("--frames", 4, "--clips", 1, "--rounds", 1, "--videos", 1, "--seconds", 1)
    text = run_process("loader", *sizes, PYTHONPATH=tmp_path)
    rows = table(text)
    ways = ["bare decoder", "ours", "torchcodec", "webdataset", "published"]
    if "torchcodec is not installed" in text:
        ways.remove("torchcodec")
    assert [row["way"] for row in rows] == ways
    assert {row["frames"] for row in rows} == {"4"}
    column(rows, "peak MB", above=10)
    rates, ratios = column(rows, "clips/s/core"), column(rows, "÷ bare")
    assert column(rows, "best") == rates  # of one round
    assert ratios == pytest.approx([rate / rates[0] for rate in rates], abs=0.001)


# -- models ------------------------------------------------------------------------------------------


def test_encoder(run: Run) -> None:
    sizes = ("--sizes", "48x1x2", "24x1x1", "--grids", "2x2x2", "2x4x4", "--repeats", 1, "--batch", 1)
    code, text, _ = run("encoder", *sizes)
    assert code == 0
    assert f"torch {torch.__version__}, cpu, float32, 1 threads, batch 1; ms, ours / transformers" in text
    rows = table(text)
    (first, *_) = rows[0]
    assert first.split() == ["width", "depth", "tokens"]
    assert [row[first].split() for row in rows] == [
        [width, "1", tokens] for width in ("48", "24") for tokens in ("8", "32")
    ]
    for row in rows:
        for name in ("forward", "forward + backward"):
            ours, theirs, quotient = numbers(row[name])
            assert ours > 0
            assert quotient == pytest.approx(theirs / ours, abs=0.01 + 0.02 * theirs / ours**2)


def test_host(run: Run) -> None:
    code, text, _ = run("host", "--model", "vit_tiny", "--ranks", 4, "--repeats", 1, *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, rank 1 of 4, torch ")
    rows = table(text)
    assert [row[""] for row in rows] == ["optimiser", "plan", "rank", "tables"]
    column(rows, "the first way")
    for row in rows:
        assert numbers(row["this code"])[0] >= 0


def test_surprise(run: Run, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    list(write_videos(tmp_path / "videos", World(size=SIZE, fps=8, seconds=2.0), seed=0, train=1, val=0, workers=1))
    sizes = ("--world", tmp_path / "videos", "--pairs", len(EVENTS), "--seeds", 1000, 1001)
    code, text, _ = run("surprise", model, *sizes)
    assert code == 0
    head = ["", "all", "of each seed", *EVENTS, "by the maximum", "untrained"]
    rows = [row for row in table(text) if row["all"] != "---"]
    assert [list(row) for row in rows] == [head]
    assert rows[0][""] == str(model)
    share, error = numbers(rows[0]["all"])
    each, kinds = numbers(rows[0]["of each seed"]), [numbers(rows[0][event])[0] for event in EVENTS]
    assert all(0 <= value <= 1 for value in [share, *each, *kinds])
    assert share == pytest.approx(mean(each), abs=0.011)
    assert share == pytest.approx(mean(kinds), abs=0.011)
    assert error == pytest.approx(math.sqrt(share * (1 - share) / (2 * len(EVENTS))), abs=0.011)


def test_surprise_has_no_model(run: Run, tmp_path: Path) -> None:
    code, _, err = run("surprise", tmp_path / "none")
    assert code == 2
    assert str(tmp_path / "none") in err


# -- the step ----------------------------------------------------------------------------------------

PARTS = ("target", "context", "predictor", "backward", "optimiser", "EMA", "rest")
TINY = ("--model", "vit_tiny", "--frames", 4, "--size", 32, "--batch", 1)
STEPS = ("--steps", 3, "--warmup", 1, "--product", 256)


def of_step(text: str, *, clips: int) -> Rows:
    """The rows of step.py's table, after what holds for each."""
    rows = [row for row in table(text) if row["step"] != "---"]
    product = numbers(text.partition("a large matrix product:")[2])[0]
    for row in rows:
        (step,) = column([row], "step")
        # The parts are of one step, the typical one, which is the median of an odd number.
        assert sum(numbers(row[part])[0] for part in PARTS) == pytest.approx(step, abs=0.05 * (len(PARTS) + 1))
        assert column([row], "clips/s") == pytest.approx([1000 * clips / step], abs=0.01 + 60 * clips / step**2)
        column([row], "peak GiB")
        rate, share = numbers(row["TFLOP/s"])[0], column([row], "of a product", above=-1)[0] / 100
        assert rate / product == pytest.approx(share, abs=0.0006 + 0.0006 / product)
    return rows


@pytest.mark.slow
def test_step(run: Run) -> None:
    code, text, _ = run("step", *TINY, *STEPS, "--attention", "sdpa", "flash", *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, 4 frames of 32×32, 1 clips a step; fsdp, float32, ")
    first, second = of_step(text, clips=1)
    assert [(row["compile"], row["code"]) for row in (first, second)] == [("off", "ours")] * 2
    assert first["attention"] != second["attention"]


def test_a_steps_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts its readings: what runs inside a part and has a part of its own is counted once."""
    module = load("clock")
    readings = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(readings) / 1000)
    clock = module.Clock(torch.device("cpu"))
    network = torch.nn.Identity()
    clock.watch("target", network)

    class Owner:
        def step(self, x: torch.Tensor) -> torch.Tensor:
            return network(network(x))

    owner = Owner()
    clock.time_method("backward", owner, "step")
    for _ in range(2):  # nothing stays from the step before
        row = clock.whole(lambda: owner.step(torch.zeros(1)), parts=True)
        # Readings: whole, backward, twice target's two, backward, whole.
        assert row == {"target": 2.0, "backward": 3.0, "rest": 2.0, "step": 7.0}
    assert clock.whole(lambda: owner.step(torch.zeros(1)), parts=False)["step"] == 7.0


# -- beside the published code -----------------------------------------------------------------------

ENCODER = '''
"""Stands in for the published code: its classes' arguments and calls, over networks of vjepa_scale."""

from vjepa_scale.model import Encoder
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig


def sizes(width, depth, heads, mlp_ratio):
    return {"width": width, "depth": depth, "heads": heads, "mlp_hidden": int(width * mlp_ratio)}


class VisionTransformer(Encoder):
    def __init__(self, *, img_size, patch_size, num_frames, tubelet_size, qkv_bias, norm_layer, uniform_power, use_sdpa,
                 use_rope, use_activation_checkpointing, embed_dim, depth, num_heads, mlp_ratio):
        assert qkv_bias and use_sdpa and use_rope and uniform_power and norm_layer(embed_dim).eps == 1e-6
        encoder = EncoderConfig(**sizes(embed_dim, depth, num_heads, mlp_ratio))
        super().__init__(
            ModelConfig(encoder=encoder, predictor=PredictorConfig(), patch=patch_size, tubelet=tubelet_size)
        )
'''
PREDICTOR = """
from src.models.vision_transformer import sizes
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.recipe.schema import EncoderConfig, ModelConfig, PredictorConfig


class VisionTransformerPredictor(Predictor):
    def __init__(self, *, img_size, patch_size, num_frames, tubelet_size, qkv_bias, norm_layer, uniform_power, use_sdpa,
                 use_rope, use_activation_checkpointing, embed_dim, predictor_embed_dim, depth, num_heads, mlp_ratio,
                 use_mask_tokens, num_mask_tokens):
        assert use_mask_tokens
        own = sizes(predictor_embed_dim, depth, num_heads, mlp_ratio)
        config = ModelConfig(
            encoder=EncoderConfig(width=embed_dim, depth=1, heads=1),
            predictor=PredictorConfig(**own, mask_tokens=num_mask_tokens),
            patch=patch_size,
            tubelet=tubelet_size,
        )
        super().__init__(config)
        self.grid = num_frames // tubelet_size, img_size[0] // patch_size, img_size[1] // patch_size

    def forward(self, tokens, context, target, mask_index):
        return super().forward(tokens, context, target, self.grid, mask_index) * FACTOR
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    return write_peer(tmp_path / "vjepa2")


def write_peer(folder: Path, *, factor: float = 1.0) -> Path:
    """A checkout that computes the same as this package, or other predictions."""
    models = folder / "src" / "models"
    models.mkdir(parents=True)
    (models / "vision_transformer.py").write_text(ENCODER)
    (models / "predictor.py").write_text(PREDICTOR.replace("FACTOR", str(factor)))
    return folder


def test_step_beside_the_published_code(run: Run, peer: Path) -> None:
    code, text, _ = run("step", *TINY, *STEPS, "--peer", peer, *SMALL)
    assert code == 0
    rows = of_step(text, clips=1)
    assert [row["code"] for row in rows] == ["ours", "published"]
    assert rows[1]["attention"] == "its SDPA"
    # Both have target, context, predictor, optimiser and EMA: a part that nothing reaches would be 0.
    assert all(numbers(row[part])[0] > 0 for row in rows for part in ("target", "context", "predictor", "optimiser"))
    note = text.splitlines()[-1]
    factor, ours, theirs, apart, *last = numbers(note.partition("published step takes")[2].replace("float32", ""))
    our_ms, their_ms = column(rows, "step")
    assert factor == pytest.approx(their_ms / our_ms, abs=0.01 + 0.1 * their_ms / our_ms**2)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert apart <= 1e-5
    assert last[0] == pytest.approx(last[1], rel=1e-3)  # four steps of the same optimiser on the same clips


def test_a_peer_that_computes_another_loss_is_not_timed(run: Run, tmp_path: Path) -> None:
    other = write_peer(tmp_path / "other", factor=0.5)
    code, text, err = run("step", *TINY, *STEPS, "--peer", other, *SMALL)
    assert code == 2
    assert "published |" not in text
    assert re.search(r"--peer: the loss is [\d.]+ here and [\d.]+ there, from the same weights", err)


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("jepa.loss_exponent=2", "jepa.loss_exponent: 2.0"),
        ("model.rope.layout=interleaved", "model.rope.layout: interleaved"),
        ("pretrain.clip={frames: 4, size: [32, 48]}", "pretrain.clip.size: 32"),
    ],
)
def test_a_recipe_that_the_published_code_cannot_follow(run: Run, peer: Path, override: str, wrong: str) -> None:
    code, _, err = run("precision", *TINY, "--peer", peer, *SMALL, override)
    assert code == 2
    assert wrong in err


def test_a_folder_without_the_published_code(run: Run, tmp_path: Path) -> None:
    code, _, err = run("precision", *TINY, "--peer", tmp_path, *SMALL)
    assert code == 2
    assert f"{tmp_path}: no checkout of the published code" in err


def test_precision(run: Run, peer: Path) -> None:
    code, text, _ = run("precision", *TINY, "--peer", peer, *SMALL)
    assert code == 0
    assert text.startswith("vit_tiny, 4 frames of 32 px, gain 1, loss ")
    assert numbers(text.partition("loss ")[2])[0] > 0
    rows = {row["beside our float32"]: row for row in table(text) if row["loss"] != "---"}
    assert list(rows) == ["ours, bf16 by FSDP2", "published, float32", "published, autocast"]
    for name in ("targets", "largest", "gradient"):
        ours, exact, theirs = (numbers(row[name])[0] for row in rows.values())
        assert exact <= 1e-5  # the same, from the same weights
        # Eight bits of mantissa.
        assert 1e-4 < ours < 0.1
        assert 1e-4 < theirs < 0.1
    assert numbers(rows["published, float32"]["loss"])[0] <= 1e-5


@pytest.mark.slow
@pytest.mark.distributed
def test_gpu_beside_the_published_code(peer: Path, tmp_path: Path) -> None:
    run_process("gpu", "--device", "cpu", "--toy", "--part", "peer", "--peer", peer, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["ours", "published"] * 3
    assert {row["state"] for row in rows} == {"measured"}
    for row in rows:
        assert row["median_ms"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert theirs["facts"]["× our time"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])
        assert theirs["facts"]["same weights, float32: losses differ by"] <= 1e-5
        losses = [side["facts"]["loss of the last step"] for side in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -- checkpoints -------------------------------------------------------------------------------------


def test_checkpoint_training(run: Run, tmp_path: Path) -> None:
    small = ("pretrain.global_batch=2", "pretrain.micro_batch=2", "masks.group=2", "engine.threads=1", *SMALL)
    alone = ("cooldown=null", "action=null", "probe=null")
    clip = "pretrain.clip={frames: 4, size: 32}"
    code, text, _ = run("checkpoint", "--saves", 2, "--skip-consolidation", "--dir", tmp_path, *small, *alone, clip)
    assert code == 0
    head, _, *lines = text.strip().splitlines()
    assert head.endswith("MB of tensors, 2 saves; median milliseconds")
    assert numbers(head)[0] >= 1
    found = {line[:36].strip(): numbers(line[36:])[0] for line in lines}
    assert list(found) == [
        "a step",
        "a save that training waits for",
        "a save in the background: the copy",
        "all that training waits",
        "beyond the copy, of a step",
        "a step while it is being written",
    ]
    assert all(value > 0 for name, value in found.items() if name != "beyond the copy, of a step")
    step, copy = found["a step"], found["a save in the background: the copy"]
    beyond = 100 * max(0.0, found["all that training waits"] - copy) / step
    assert found["beyond the copy, of a step"] == pytest.approx(beyond, abs=0.1 + 10 / step)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoint_consolidation(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("checkpoint", "--model", "vit_tiny", "--skip-training", "--dir", tmp_path)
    assert code == 0
    assert re.match(r"vit_tiny: a checkpoint of 0\.1 GB, written in \d+ s\n", text)
    rows = table(text)
    assert [row["to"] for row in rows] == ["safetensors", "huggingface"]
    column(rows, "seconds")
    column(rows, next(name for name in rows[0] if name.startswith("peak GiB")))
    assert not list(tmp_path.iterdir())


# -- the showcase ------------------------------------------------------------------------------------

RECORDED = json.loads((BENCHMARKS / "results" / "showcase.json").read_text())


def summary(**changes: float) -> dict[str, Any]:
    """One run's summary.json: the recorded means, but for some planning figures."""
    tree = {key: copy.deepcopy(value) for key, value in RECORDED.items() if key not in ("std", "seeds")}
    tree["planning"] |= changes
    return tree


@pytest.mark.parametrize(("success", "code"), [(None, 0), (0.05, 1)])
def test_showcase_check(run: Run, tmp_path: Path, success: float | None, code: int) -> None:
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary(**({} if success is None else {"success": success}))))
    found, text, _ = run("showcase", "--check", file)
    assert found == code
    lines = text.splitlines()
    assert len(lines) == 6
    assert all(line[:5] in ("yes  ", "NO   ") for line in lines)
    assert [line[5:].split()[0] for line in lines if line.startswith("NO")] == ([] if code == 0 else ["planning"])


OVERRIDES = ("pretrain.steps=8", "cooldown.steps=2")


def test_showcase_of_finished_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are there are not trained again; their means and spreads are printed."""
    monkeypatch.chdir(ROOT)
    successes = {21: 0.7, 22: 0.8}
    for seed, success in successes.items():
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(success=success)))
        words = words_of(tmp_path, seed)
        (folder / "recipe.yaml").write_text(recipe_yaml(load_recipe("recipes/demo.yaml", words)))
    code, text, _ = run("showcase", "--seeds", 21, 22, "--out", tmp_path, *OVERRIDES)
    assert code == 0
    assert re.search(r"^over seeds 21, 22 +mean +std$", text, re.MULTILINE)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[\w.]+ +\S+ +\S+$", line))
    average, spread = map(float, rows["planning.success"].split())
    assert (average, spread) == pytest.approx((mean(successes.values()), stdev(successes.values())), rel=0.02)
    assert all(math.isfinite(float(value)) for row in rows.values() for value in row.split())
    assert len(re.findall("^yes ", text, re.MULTILINE)) == 6

    showcase = load("showcase")
    monkeypatch.setattr(showcase, "RESULT", tmp_path / "recorded.json")
    assert showcase.main(["--seeds", "21", "22", "--out", str(tmp_path), "--record", *OVERRIDES]) == 0
    recorded = json.loads((tmp_path / "recorded.json").read_text())
    assert recorded["seeds"] == [21, 22]
    assert recorded["planning"]["success"] == pytest.approx(mean(successes.values()))
    assert recorded["std"]["planning"]["success"] == pytest.approx(stdev(successes.values()))

    with pytest.raises(SystemExit, match="is of another recipe"):
        run("showcase", "--seeds", 21, 22, "--out", tmp_path, "pretrain.steps=9")


def words_of(out: Path, seed: int) -> list[str]:
    shards = {"synthetic": "train", "held_out": "val", "robot": "robot"}
    return [
        f"run.dir={out / f'seed{seed}'}",
        f"run.seed={seed}",
        f"data.seed={seed}",
        *OVERRIDES,
        *(f"data.sets.{name}.path={out / f'data{seed}' / 'shards' / folder}" for name, folder in shards.items()),
    ]


def test_showcase_runs_the_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, as tools/demo.py reads it, with the demo's own steps left out: those take minutes."""
    spec = importlib.util.spec_from_file_location("demo_of_showcase", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    steps: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "step", lambda _, *words: steps.append(words))
    measured = SimpleNamespace(measure_demo=lambda *_, **__: summary())
    for name, stub in (("chain", measured), ("summary", SimpleNamespace(table=lambda _: []))):
        monkeypatch.setitem(sys.modules, f"vjepa_scale.demo.{name}", stub)  # they take seconds to import

    def here(command: Sequence[str], *, check: bool) -> None:
        assert check
        assert command[:2] == [sys.executable, str(ROOT / "tools" / "demo.py")]
        assert demo.main(command[2:]) == 0

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.chdir(ROOT)
    (tmp_path / "seed31").mkdir()
    code, text, _ = run("showcase", "--seeds", 31, "--out", tmp_path, "--clips", 20, "--val-clips", 4, *OVERRIDES)
    assert code == 0
    assert [words[0] for words in steps][-4:] == ["launch", "launch", "consolidate", "consolidate"]
    assert steps[0][1:6] == (tmp_path / "data31" / "videos", "--clips", 20, "--val-clips", 4)
    assert steps[1][3:5] == ("--trajectories", 192)
    assert json.loads((tmp_path / "seed31" / "summary.json").read_text())["planning"] == RECORDED["planning"]
    assert len(re.findall("^yes ", text, re.MULTILINE)) == 6
