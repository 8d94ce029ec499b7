"""Statistics of states and actions against plain numpy and scipy on everything at once."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.data.robots import robots
from vjepa_scale.core import log
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.trajectories import Moments, merged, read_trajectory, trajectory_statistics
from vjepa_scale.run.progress import Page, Progress, part_of

FPS = 5.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return robots(tmp_path_factory.mktemp("robots"), even=5)


def everything(manifest: Manifest, records: list[int]) -> dict[str, np.ndarray]:
    """All states and all actions, in memory: the last logged state at each fifth of a second, one by one."""
    states, actions = [], []
    for record in records:
        log = read_trajectory(manifest, record)
        times_s = np.arange(0, float(manifest.column("duration")[record]) - 1 / FPS + 1e-6, 1 / FPS)
        rows = [log.states[[k for k, at in enumerate(log.times_s) if at <= time + 1e-6][-1]] for time in times_s]
        own = np.array(rows).astype(np.float32).astype(np.float64)
        turned = Rotation.from_euler("xyz", own[:, 3:6])
        angles = (turned[1:] * turned[:-1].inv()).as_euler("xyz")
        states.append(own)
        actions.append(np.concatenate([np.diff(own[:, :3], axis=0), angles, np.diff(own[:, 6:], axis=0)], 1))
    return {"states": np.concatenate(states), "actions": np.concatenate(actions)}


def agree(found: dict, rows: dict[str, np.ndarray], *, atol: float = 2e-7) -> None:
    for kind, all_rows in rows.items():
        assert found[kind]["count"] == len(all_rows)
        plain = {"mean": all_rows.mean(0), "std": all_rows.std(0), "min": all_rows.min(0), "max": all_rows.max(0)}
        for name, expected in plain.items():
            np.testing.assert_allclose(found[kind][name], expected, atol=atol, err_msg=f"{kind} {name}")


def test_statistics_are_numpys_on_everything_at_once(made: Manifest) -> None:
    found = trajectory_statistics(made, range(made.records), FPS)
    rows = everything(made, list(range(made.records)))
    assert (found["records"], found["fps"]) == (7, FPS)
    assert len(rows["states"]) == 5 * 15 + 5 + 16
    assert len(rows["actions"]) == len(rows["states"]) - 7
    agree(found, rows)
    assert json.loads(json.dumps(found)) == found
    hardly_slower = trajectory_statistics(made, range(made.records), FPS * (1 - 1e-9))
    assert hardly_slower["states"]["count"] == found["states"]["count"], "durations are sums of floats"


def test_each_record_begins_the_time_limit_of_set_up_anew(made: Manifest) -> None:
    """A large data set takes longer than one limit."""
    page = Page()
    log.tell_regions(Progress(page=page, outside_s=60).enter)
    try:
        trajectory_statistics(made, range(made.records), FPS)
    finally:
        log.tell_regions(None)
    assert (page.beats, page.limit_ms, part_of(page)) == (made.records, 60_000, "setup")


def test_ranks_add_up(made: Manifest) -> None:
    """Shares of any size, none included, in any order, and after a journey as JSON."""
    whole = trajectory_statistics(made, np.arange(made.records), FPS)
    shares = [[4], [0, 2, 6], [], [5, 1, 3]]
    parts = [json.loads(json.dumps(trajectory_statistics(made, share, FPS))) for share in shares]
    together = merged(parts)
    assert together["records"] == made.records
    for kind in ("states", "actions"):
        assert together[kind]["count"] == whole[kind]["count"]
        for name in ("mean", "std", "min", "max"):
            assert together[kind][name] == pytest.approx(whole[kind][name], rel=1e-12, abs=1e-14)
    assert merged([parts[2], parts[2]])["actions"] == {"count": 0, "mean": [], "std": [], "min": [], "max": []}


def test_rates_are_not_mixed(made: Manifest) -> None:
    with pytest.raises(AssertionError, match=r"2 rates: \[4.0, 5.0\]"):
        merged([trajectory_statistics(made, [0], 5.0), trajectory_statistics(made, [1], 4.0)])


def test_a_record_of_one_state_has_no_action(made: Manifest) -> None:
    found = trajectory_statistics(made, [0], 0.5)
    assert (found["states"]["count"], found["actions"]["count"]) == (1, 0)
    assert found["states"]["std"] == [0.0] * 7


def test_a_small_spread_far_from_zero_is_not_lost() -> None:
    """A sum of squares minus a squared sum would have no digit left: 1e8² is 1e16."""
    rows = 1e8 + np.random.default_rng(0).normal(size=(3000, 7))
    joined = Moments.of([])
    for start in range(0, 3000, 7):
        joined = joined.joined(Moments.of(rows[start : start + 7]))
    assert joined.count == 3000
    np.testing.assert_allclose(joined.as_json()["std"], rows.std(0), rtol=1e-6)
    np.testing.assert_allclose(joined.mean, rows.mean(0), rtol=1e-14)
    naive = (rows**2).mean(0) - rows.mean(0) ** 2
    assert np.abs(naive - rows.var(0)).max() > 0.1, "the test can tell"
