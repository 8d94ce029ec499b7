"""probe.keep_tokens: clips of few labels are encoded once, and the probes trained on their tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.chain import metrics
from tests.processes import run_processes
from tests.training.probe_material import (
    labels_in,
    make_colours,
    plain_views,
    probe_recipe,
    probe_stage,
    result,
    stopped_after_a_step,
)
from vjepa_scale.core.errors import UserError
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.data.host_limits import shared_memory_needed
from vjepa_scale.data.loader import PhaseLoader
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.stage_data import data_order, open_data
from vjepa_scale.distributed.engine import build_engine
from vjepa_scale.eval import attentive_probe
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.init import initialise
from vjepa_scale.model.probe import AttentiveProbe
from vjepa_scale.objective.probe import Probes
from vjepa_scale.recipe import Recipe, stages_of

pytestmark = pytest.mark.distributed
KEPT: dict[str, Any] = {"keep_tokens": True, "labels_per_class": 3, "label_draws": 2, "lr_scales": [1]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_colours(tmp_path_factory.mktemp("colours"))


def kept_and_first_losses(ranks: Ranks, recipe: Recipe) -> dict[str, Any]:
    """The tokens that are kept; and of the first step's micro-batches of this rank: records and the loss."""
    engine = build_engine(recipe.engine, ranks)
    stage = stages_of(recipe)["probe"]
    manifests, phases = open_data(stage), stage.phases
    kept = stage.records(manifests)
    probes = Probes(stage, engine, manifests, kept)
    probes.before_phase(phases[0], lambda: None)
    loader = PhaseLoader(
        stage=stage,
        phase=phases[0],
        order=data_order(stage, manifests, phases, {}, kept),
        manifests=manifests,
        dp_rank=ranks.rank,
        dp_world_size=ranks.world_size,
        first_step=0,
        records=kept,
    )
    with loader:
        batch = next(iter(loader))
    assert all(part.clips.numel() == 0 for part in batch)
    weights = {name: p.full_tensor().detach() for name, p in probes.probes["probe_00"].named_parameters()}
    steps = [(part.records, part.extras["label_draws"], probes.loss(part)["loss"].item()) for part in batch]
    return {"kept": probes.kept, "weights": weights, "steps": steps}


@pytest.mark.parametrize("world_size", [1, 2])
def test_they_are_the_encoders_and_the_loss_is_of_them(world_size: int, sets: dict[str, Path], tmp_path: Path) -> None:
    """Against the encoder on pixels by FFmpeg and torch, and plain cross-entropy with labels from the records' JSON."""
    recipe = probe_recipe(tmp_path, sets, **KEPT)
    found = run_processes(kept_and_first_losses, world_size, recipe)
    encoder = Encoder(recipe.model).eval()
    initialise(encoder, seed=recipe.run.seed, prefix="encoder")
    manifest = Manifest.open(sets["train"])
    labels = torch.from_numpy(labels_in(sets["train"], manifest.classes))
    probe = AttentiveProbe(width=32, heads=2, classes=3, depth=2, eps=1e-6)
    probe.load_state_dict(found[0]["weights"])
    for rank in found:
        kept: dict[tuple[str, int], Tensor] = rank["kept"]
        assert len(kept) == 3 * 3 * 2
        assert {name for name, _ in kept} == {"train"}
        assert sorted(labels[[record for _, record in kept]].tolist()) == [0] * 6 + [1] * 6 + [2] * 6
        with torch.no_grad():
            plain = encoder(plain_views(recipe, manifest, [record for _, record in kept], tmp_path))
        torch.testing.assert_close(torch.stack(list(kept.values())), plain, rtol=1e-4, atol=1e-5)
        for records, draws, loss in rank["steps"]:
            with torch.no_grad():
                logits = probe(encoder(plain_views(recipe, manifest, records, tmp_path)))
            # Both draws' probes start equal, so their losses add up to the mean over the micro-batch, twice.
            assert len(draws) == len(records)
            assert loss == pytest.approx(2 * F.cross_entropy(logits, labels[list(records)]).item(), rel=1e-4)


def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not(sets: dict[str, Path], tmp_path: Path) -> None:
    """And its last phase, of other pictures, has tokens of its own."""
    phases = [
        {"name": "small", "steps": 4, "start_lr": 1e-3},
        {"name": "large", "start_lr": 1e-3, "clip": {"size": 32}},
    ]
    whole = probe_recipe(tmp_path / "whole", sets, **KEPT, phases=phases)
    stopped = probe_recipe(tmp_path / "stopped", sets, **KEPT, phases=phases)
    run_processes(stopped_after_a_step, 1, stopped)
    run_processes(probe_stage, 1, [stopped, whole])
    ours, theirs = metrics(tmp_path / "stopped", "probe"), metrics(tmp_path / "whole", "probe")
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert len(ours) == 6
    assert result(stopped) == result(whole)


def test_steps_hold_nothing_in_shared_memory(sets: dict[str, Path], tmp_path: Path) -> None:
    """However many micro-batches a loader would prepare: only those of the evaluation, of the same clips, count."""
    for keep, same in ((True, True), (False, False)):
        recipe = probe_recipe(tmp_path, sets, **{**KEPT, "keep_tokens": keep})
        needed = []
        for prefetch in (2, 50):
            data = recipe.data.model_copy(update={"workers": 2, "prefetch": prefetch})
            needed.append(shared_memory_needed(stages_of(recipe.model_copy(update={"data": data}))["probe"]))
        assert needed[0] > 0
        assert (needed[0] == needed[1]) == same


def test_too_little_memory_is_said_before_a_clip_is_encoded(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = probe_recipe(tmp_path, sets, **KEPT)
    stage = stages_of(recipe)["probe"]
    kept, phases = stage.records(open_data(stage)), stage.phases
    needed = 3 * 3 * 2 * 4 * 32 * 4  # clips, tokens, width, bytes
    ranks = Ranks(0, 4, 0, 4, job="0", source="test", job_id="0")
    for free, enough in ((4 * needed * 2, True), (4 * needed * 2 - 1, False)):
        found = SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda found=found: found)
        if enough:
            attentive_probe.check_memory(stage, kept, phases[0], ranks)
        else:
            with pytest.raises(UserError, match=r"probe\.keep_tokens.*18 clips.*fewer labels_per_class"):
                attentive_probe.check_memory(stage, kept, phases[0], ranks)
