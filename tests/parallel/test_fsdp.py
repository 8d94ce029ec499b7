"""Sharded training is the same training: against plain PyTorch on one process, for every way to shard."""

import pytest

from tests.parallel.jepa_shape import Outcome, train_plain, train_sharded
from tests.processes import ENGINE, run_processes

WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "1 process": (1, {}),
    "2 ranks": (2, {}),
    "4 ranks": (4, {}),
    "hybrid 2x2": (4, {"replicate": 2}),
    "plain replication": (2, {"replicate": 2}),
    "weights kept gathered": (2, {"reshard_after_forward": False}),
    "activation checkpointing": (2, {"activation_checkpointing": "full"}),
}


@pytest.fixture(scope="module")
def plain() -> Outcome:
    outcome = train_plain()
    assert outcome.losses[0] - outcome.losses[-1] > 0.05 * outcome.losses[0]  # else little would be compared
    return outcome


@pytest.mark.distributed
@pytest.mark.parametrize("name", WAYS)
def test_training_equals_plain_pytorch(name: str, plain: Outcome) -> None:
    world_size, changes = WAYS[name]
    cfg = ENGINE.model_copy(update=changes)
    outcomes = run_processes(train_sharded, world_size, cfg, cfg=cfg)
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        assert outcome.norms == outcomes[0].norms
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(plain.norms, rel=1e-4)
        assert outcome.weights.keys() == plain.weights.keys()
        for key, wanted in plain.weights.items():
            assert float((outcome.weights[key] - wanted).abs().max()) < 1e-5, key
