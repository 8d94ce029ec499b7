"""Small pictures of three colours for probe stages, and such stages without the launcher, in real processes."""

import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tests.processes import LIMIT_S
from tests.videos import quiet
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.distributed import process_group
from vjepa_scale.eval import attentive_probe
from vjepa_scale.recipe import Recipe, stages_of
from vjepa_scale.recipe.load import validate_recipe
from vjepa_scale.shards.make import Settings, make_shards
from vjepa_scale.training.signals import Interrupt, SavedAndStopped
from vjepa_scale.training.trainer import train_stage

CLASSES = ("red", "green", "blue")
PER_CLASS = {"train": 20, "held_out": 7}  # 21 held-out clips: not a multiple of two ranks, nor of their batches
FIRST_LR = 1e-3


def png(pixels: np.ndarray) -> bytes:
    """An image file of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as out:
        stream = out.add_stream("png", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def shards_of_colours(folder: Path, name: str, *, seed: int, shuffled: bool = False) -> Path:
    """Noise around a colour, which is its class; shuffled: classes drawn uniformly, whatever the colour."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    rows = []
    for number in range(PER_CLASS[name.removeprefix("shuffled_")] * len(CLASSES)):
        colour = number % len(CLASSES)
        pixels = rng.integers(0, 120, (24, 32, 3))
        pixels[..., colour] += 120
        (folder / name / f"{number}.png").write_bytes(png(pixels.astype(np.uint8)))
        label = int(rng.integers(len(CLASSES))) if shuffled else colour
        rows.append({"path": f"{name}/{number}.png", "label": CLASSES[label]})
    listed = folder / f"{name}.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = folder / f"{name}-shards"
    make_shards(listed, shards, Settings(shard_records=16, images=True), workers=1, progress=quiet)
    return shards


def make_colours(folder: Path) -> dict[str, Path]:
    sets = {name: shards_of_colours(folder, name, seed=seed) for seed, name in enumerate(PER_CLASS)}
    for seed, name in enumerate(PER_CLASS):
        sets[f"shuffled_{name}"] = shards_of_colours(folder, f"shuffled_{name}", seed=seed + 7, shuffled=True)
    return sets


def probe_recipe(run_dir: Path, sets: dict[str, Path], *, train: str = "train", **probe: Any) -> Recipe:
    """A probe stage on an untrained encoder; ``probe`` over it."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 3},
        "launch": {"cluster": "local", "tasks_per_node": 1, "timeout_min": 10},
        "engine": {"device": "cpu", "precision": "float32", "timeout_s": LIMIT_S},
        "data": {
            "sets": {name: {"path": str(path)} for name, path in sets.items()},
            "lanes": 2,
            "workers": 0,
            "augment": {"flip": 0.5},
        },
        "model": {
            "encoder": {"width": 32, "depth": 2, "heads": 2},
            "predictor": {"width": 24, "depth": 2, "heads": 2},
            "patch": 8,
        },
        "checkpoint": {"every": 2},
        "probe": {
            "init_from": "untrained",
            "steps": 6,
            "mixture": {train: 1},
            "evaluate_on": "held_out",
            "clip": {"frames": 2, "size": 16},
            "depth": 2,
            "heads": 2,
            "lr_scales": [1, 0.1],
            "weight_decays": [0.05],
            "global_batch": 8,
            "micro_batch": 4,
            "phases": [{"name": "decay", "start_lr": FIRST_LR, "final_lr": 0}],
            **probe,
        },
    }
    return validate_recipe(tree, source="test")


def result(recipe: Recipe) -> dict[str, Any]:
    """evaluation.json, read as a user would."""
    return json.loads((Path(recipe.run.dir) / "probe" / "evaluation.json").read_text())


def checkpoint(recipe: Recipe) -> Path:
    (newest,) = sorted((Path(recipe.run.dir) / "probe" / "checkpoints").glob("step_*"))[-1:]
    return newest


# -- what runs on every rank (tests.processes.run_processes) -------------------------------------------


def probe_stage(ranks: Ranks, recipes: Sequence[Recipe]) -> None:
    """The probe stages of some recipes, one after the other."""
    process_group.stop()  # the stage makes its own
    for recipe in recipes:
        train_stage(stages_of(recipe)["probe"], ranks)


def stopped_after_a_step(ranks: Ranks, recipe: Recipe) -> None:
    process_group.stop()
    interrupt = Interrupt()
    interrupt.signal = "SIGUSR2"
    try:
        train_stage(stages_of(recipe)["probe"], ranks, interrupt=interrupt)
    except SavedAndStopped:
        return
    raise AssertionError("the signal was not obeyed")


def probe_stage_of_few_features(ranks: Ranks, recipe: Recipe) -> None:
    """As if the training set were larger than features are kept of."""
    attentive_probe.FEATURE_RECORDS = 59
    probe_stage(ranks, [recipe])


def killed_before_the_result(ranks: Ranks, recipe: Recipe) -> None:
    """kill -9 of this process when everything is looked at and the result about to be worked out."""

    def killed(*arguments: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    attentive_probe._choice = killed  # type: ignore[assignment]
    probe_stage(ranks, [recipe])


def plain_views(
    recipe: Recipe, manifest: Manifest, records: Sequence[int], folder: Path, *, lefts: Sequence[int] = (4,)
) -> torch.Tensor:
    """Normalised clips of 2 × 16 × 16 pixels by FFmpeg and torch, [len(records) · len(lefts), 3, 2, 16, 16].

    lefts: of pictures of 24 × 32 pixels, at which columns the squares begin that are seen; 4: the middle
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.augment.mean, recipe.data.augment.std))
    clips = []
    for record in records:
        (folder / "picture.png").write_bytes(manifest.read(record))
        with av.open(str(folder / "picture.png")) as file:
            (frame,) = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        for left in lefts:
            square = torch.from_numpy(frame[:, left : left + 24]).permute(2, 0, 1)[None]
            small = torch.nn.functional.interpolate(square, size=(16, 16), mode="bilinear", antialias=True)[0]
            clips.append(((small / 255 - mean) / std)[:, None].expand(3, 2, 16, 16))
    return torch.stack(clips)


def labels_in(shards: Path, names: Sequence[str]) -> np.ndarray:
    """The class of every record, a number into ``names``, from each record's JSON as the shard holds it."""
    manifest = Manifest.open(shards)
    labels = [json.loads(manifest.read(record, "json"))["label"] for record in range(manifest.records)]
    return np.array([names.index(label) for label in labels])
