"""What a supervisor reads of the other ranks' reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import LIMIT_S
from vjepa_scale.core.ranks import Ranks
from vjepa_scale.launch import peers as peers_module
from vjepa_scale.launch.peers import Peers

RANKS = Ranks(1, 2, 1, 2, "7", "submitit-local", "7")


def test_a_rank_that_has_lost_a_peer_stays_until_the_cause_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each report is read once, whatever their number."""
    ranks = replace(RANKS, rank=0, world_size=64)
    peers, read = Peers(tmp_path, ranks), []

    def write(rank: int, bystander: bool = True) -> None:
        row = {"rank": rank, "step": 1, "kind": "E", "message": "", "user_error": False, "log": None}
        (tmp_path / f"7.{rank}.json").write_text(json.dumps({**row, "bystander": bystander}))

    real = peers_module.read_report
    monkeypatch.setattr(peers_module, "read_report", lambda path: read.append(path.name) or real(path))
    for rank in range(40):
        write(rank)
    turns: list[float] = []

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 3:
            write(50, bystander=False)

    monkeypatch.setattr(peers_module.time, "sleep", sleep)
    peers.wait_for_words(LIMIT_S, every_s=7)
    assert turns == [7] * 3
    assert sorted(read) == sorted([*(f"7.{rank}.json" for rank in range(40)), "7.50.json"])
    # All have said that they have lost a peer: nobody needs to be waited for, nor read.
    for rank in range(64):
        write(rank)
    read.clear()
    peers.wait_for_words(LIMIT_S, every_s=7)
    assert not read
