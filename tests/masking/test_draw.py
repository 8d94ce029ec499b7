"""Masks against the method's definition, re-stated here by brute force, and against its published figures."""

import itertools

import numpy as np
import pytest
import torch

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.batch import draw_masks
from vjepa_scale.masking import check_masks
from vjepa_scale.masking.blocks import BlockMasksConfig
from vjepa_scale.recipe.mask_sections import MasksConfig

GRID = (8, 16, 16)
SHORT = {"blocks": 8, "spatial_scale": (0.15, 0.15)}
LONG = {"blocks": 2, "spatial_scale": (0.7, 0.7)}


def config(*generators: dict, group: int = 24, truncate: str = "random") -> MasksConfig:
    made = tuple(BlockMasksConfig.model_validate(g) for g in generators)
    return MasksConfig(generators=made or MasksConfig().generators, group=group, truncate=truncate)


def rows(tensor: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in tensor.tolist()]


@pytest.mark.parametrize("truncate", ["random", "tail"])
@pytest.mark.parametrize("grid", [(8, 16, 16), (4, 5, 7), (1, 3, 3)])
def test_rows_are_sorted_disjoint_and_equally_long(truncate: str, grid: tuple[int, int, int]) -> None:
    cfg = config(truncate=truncate)
    for step in range(5):
        for pair in draw_masks(cfg, seed=1, step=step, slots=range(24, 48), grid=grid):
            for tokens in (pair.context, pair.target):
                assert tokens.dtype == torch.int64
                assert tokens.shape[0] == 24
                assert tokens.shape[1] > 0
                assert (tokens.diff(dim=1) > 0).all()
                assert tokens.min() >= 0
                assert tokens.max() < np.prod(grid)
            assert all(not c & t for c, t in zip(rows(pair.context), rows(pair.target), strict=True))


def covered_by(target_HW: np.ndarray, size: tuple[int, int], blocks: int) -> bool:
    """Whether some ``blocks`` rectangles of this size, all inside the target, cover it. Depth-first search."""
    uncovered = np.argwhere(target_HW)
    if len(uncovered) == 0:
        return True
    if blocks == 0:
        return False
    return _search(target_HW, target_HW.copy(), size, blocks)


def _search(target: np.ndarray, left: np.ndarray, size: tuple[int, int], blocks: int) -> bool:
    uncovered = np.argwhere(left)
    if len(uncovered) == 0:
        return True
    if blocks == 0:
        return False
    y, x = uncovered[0]  # the first in reading order: a block over it starts at or above, at or left of it
    for top, start in itertools.product(range(max(0, y - size[0] + 1), y + 1), range(max(0, x - size[1] + 1), x + 1)):
        place = (slice(top, top + size[0]), slice(start, start + size[1]))
        if target[place].shape == size and target[place].all():
            rest = left.copy()
            rest[place] = False
            if _search(target, rest, size, blocks - 1):
                return True
    return False


def test_targets_are_a_union_of_blocks_of_one_size_over_all_of_time() -> None:
    # At aspect 1: 0.15·256 = 38 tokens, side round(6.16) = 6; 0.7·256 = 179 tokens, side round(13.4) = 13.
    cases = [({**SHORT, "aspect_ratio": 1.0}, (6, 6), 8), ({**LONG, "aspect_ratio": 1.0}, (13, 13), 2)]
    for generator, size, blocks in cases:
        for slot in range(20):
            (pair,) = draw_masks(config(generator, group=1), seed=3, step=slot, slots=range(slot, slot + 1), grid=GRID)
            mask = np.zeros(8 * 16 * 16, bool)
            mask[pair.target[0]] = True
            mask = mask.reshape(GRID)
            assert pair.target.shape[1] + pair.context.shape[1] == mask.size
            assert (mask == mask[0]).all()
            assert covered_by(mask[0], size, blocks)
            assert mask[0].sum() >= size[0] * size[1]


def test_the_search_itself_can_say_no() -> None:
    target = np.zeros((6, 6), bool)
    target[0:3, 0:3] = target[3:6, 3:6] = True
    assert covered_by(target, (3, 3), 2)
    assert not covered_by(target, (3, 3), 1)
    target[5, 0] = True
    assert not covered_by(target, (3, 3), 8)


def test_height_over_width_is_the_aspect_ratio() -> None:
    # One block, 0.2·256 = 51 tokens at height/width 1.5: round(√76.5) = 9 high, round(√34) = 6 wide.
    one = {"blocks": 1, "spatial_scale": 0.2, "aspect_ratio": 1.5}
    (pair,) = draw_masks(config(one, group=1), seed=0, step=0, slots=range(1), grid=GRID)
    _, y, x = np.unravel_index(pair.target[0].numpy(), GRID)
    assert (len(set(y)), len(set(x))) == (9, 6)


def test_a_shorter_temporal_scale_gives_blocks_of_fewer_frames_anywhere_in_time() -> None:
    one = {"blocks": 1, "spatial_scale": 0.2, "temporal_scale": 0.5}
    (pair,) = draw_masks(config(one, group=24), seed=0, step=0, slots=range(24), grid=GRID)
    firsts = set()
    for row in pair.target.numpy():
        tau = sorted(set(np.unravel_index(row, GRID)[0].tolist()))
        assert tau == list(range(tau[0], tau[0] + 4))
        firsts.add(tau[0])
    assert firsts == {0, 1, 2, 3, 4}


def test_context_sizes_are_those_that_the_method_reports() -> None:
    """Short-range at 16×16, tokens per time step: mean 101, least of 8 clips 75, of 24 clips 65 (method.md 4).

    A plain simulation with random.randint gives 100.2, 74.5 and 65.6 for square blocks, 97.9, 71.4 and
    62.3 over the aspect ratios: the figures are those of square blocks.
    """
    square, line = {**SHORT, "aspect_ratio": 1.0}, (1, 16, 16)
    for group, mean, steps in ((1, 101, 1500), (8, 75, 300), (24, 65, 300)):
        cfg = config(square, group=group)
        drawn = [draw_masks(cfg, seed=6, step=s, slots=range(1), grid=line)[0].context.shape[1] for s in range(steps)]
        assert np.mean(drawn) == pytest.approx(mean, abs=2)


def test_every_clip_of_a_step_has_blocks_of_the_same_size_but_not_the_same_place() -> None:
    one = {"blocks": 1, "spatial_scale": (0.1, 0.6)}
    sizes = set()
    for step in range(6):
        shapes, masks = set(), set()
        for slot in (0, 1, 30, 71):
            (pair,) = draw_masks(config(one, group=1), seed=0, step=step, slots=range(slot, slot + 1), grid=GRID)
            _, y, x = np.unravel_index(pair.target[0].numpy(), GRID)
            shapes.add((len(set(y)), len(set(x))))
            masks.add(tuple(pair.target[0].tolist()))
        assert len(shapes) == 1
        assert len(masks) > 1
        sizes |= shapes
    assert len(sizes) > 3


@pytest.mark.parametrize("truncate", ["random", "tail"])
def test_micro_batches_of_any_size_give_the_rows_of_the_group(truncate: str) -> None:
    cfg = config(truncate=truncate)
    whole = draw_masks(cfg, seed=2, step=9, slots=range(24, 48), grid=GRID)
    for size in (1, 2, 8):
        parts = [draw_masks(cfg, seed=2, step=9, slots=range(s, s + size), grid=GRID) for s in range(24, 48, size)]
        for j, pair in enumerate(whole):
            assert torch.equal(torch.cat([p[j].context for p in parts]), pair.context)
            assert torch.equal(torch.cat([p[j].target for p in parts]), pair.target)


@pytest.mark.parametrize("truncate", ["random", "tail"])
def test_lists_are_cut_to_the_least_of_their_group(truncate: str) -> None:
    """A group of one slot is never cut, and its places are the same: the two differ by truncation alone."""
    group = range(48, 72)
    cut = draw_masks(config(truncate=truncate), seed=4, step=2, slots=group, grid=GRID)
    alone = [draw_masks(config(group=1), seed=4, step=2, slots=range(s, s + 1), grid=GRID) for s in group]
    for j, pair in enumerate(cut):
        for got, full in ((pair.context, [a[j].context for a in alone]), (pair.target, [a[j].target for a in alone])):
            least = min(f.shape[1] for f in full)
            assert got.shape[1] == least
            for row, uncut in zip(got.tolist(), full, strict=True):
                kept = uncut[0].tolist()
                assert set(row) <= set(kept)
                if truncate == "tail":
                    assert row == kept[:least]


@pytest.mark.parametrize("truncate", ["random", "tail"])
def test_counts_are_rounded_down_to_a_multiple(truncate: str) -> None:
    plain = config(truncate=truncate)
    rounded = plain.model_copy(update={"multiple_of": 64})
    rests = set()
    for step in range(20):
        drawn = (draw_masks(cfg, seed=1, step=step, slots=range(24), grid=GRID) for cfg in (plain, rounded))
        for whole, pair in zip(*drawn, strict=True):
            for before, after in ((whole.context, pair.context), (whole.target, pair.target)):
                assert after.shape[1] == max(64, before.shape[1] // 64 * 64)
                assert all(kept <= had for kept, had in zip(rows(after), rows(before), strict=True))
                rests.add(before.shape[1] % 64)
    assert len(rests) > 5  # there was something to round
    with pytest.raises(ValueError, match="multiple_of: the length of a complement"):
        MasksConfig.model_validate({"multiple_of": 8, "generators": [{**SHORT, "full_complement": True}]})


def test_random_truncation_keeps_all_of_time_alike() -> None:
    kept = np.zeros(8)
    for step in range(30):
        (pair,) = draw_masks(config(SHORT), seed=0, step=step, slots=range(24), grid=GRID)
        kept += np.bincount(pair.context.numpy().ravel() // 256, minlength=8)
    assert kept.min() / kept.max() > 0.95


def test_options() -> None:
    everything = set(range(8 * 16 * 16))

    def pair_of(truncate: str = "random", **options: object) -> tuple[list[set[int]], list[set[int]]]:
        cfg = config({**SHORT, **options}, truncate=truncate)
        (pair,) = draw_masks(cfg, seed=0, step=1, slots=range(24), grid=GRID)
        return rows(pair.context), rows(pair.target)

    for truncate in ("random", "tail"):
        context, target = pair_of(truncate, full_complement=True)
        assert all(t == everything - c for c, t in zip(context, target, strict=True))
        assert context == pair_of(truncate)[0]
        context, target = pair_of(truncate, pred_full_complement=True)
        assert all(c == everything - t for c, t in zip(context, target, strict=True))
        assert target == pair_of(truncate)[1]
        context, target = pair_of(truncate, max_keep=100)
        assert {len(c) for c in context} == {100}
        assert target == pair_of(truncate)[1]
        assert pair_of(truncate, invert=True) == pair_of(truncate)[::-1]
        context, target = pair_of(truncate, max_context_frames=0.4, full_complement=True)
        assert max(max(c) for c in context) < 3 * 256  # int(0.4·8) time steps
        assert all(set(range(3 * 256, 8 * 256)) <= t for t in target)
    assert {len(c) for c in pair_of(max_keep=2000)[0]} == {len(c) for c in pair_of()[0]}


def test_a_draw_is_its_key() -> None:
    def draw(**key: int) -> tuple[list[int], ...]:
        at = {"seed": 0, "step": 0, **key}
        return tuple(p.context.flatten().tolist() for p in draw_masks(config(), slots=range(24), grid=GRID, **at))

    assert draw() == draw()
    assert draw() != draw(seed=1)
    assert draw() != draw(step=1)


def test_blocks_that_cover_the_grid_are_a_user_error_that_names_the_generator() -> None:
    too_much = config(SHORT, {"blocks": 2, "spatial_scale": 1.0, "aspect_ratio": 1.0})
    with pytest.raises(UserError, match=r"masks\.generators\.1.*4×6×6"):
        draw_masks(too_much, seed=0, step=0, slots=range(24), grid=(4, 6, 6))
    with pytest.raises(UserError, match=r"masks\.generators\.1.*4×6×6"):
        check_masks(too_much, grid=(4, 6, 6))
    check_masks(config(), grid=GRID)


def test_context_that_is_rarely_left_is_drawn_again() -> None:
    """Four blocks of one token on a grid of four: all four covered in 3 draws of 32, never in what is returned."""
    cfg = config({"blocks": 4, "spatial_scale": 0.25}, group=1)
    for slot in range(200):
        (pair,) = draw_masks(cfg, seed=0, step=0, slots=range(slot, slot + 1), grid=(1, 2, 2))
        assert 1 <= pair.context.shape[1] <= 3


def test_slots_across_groups_are_refused() -> None:
    with pytest.raises(AssertionError):
        draw_masks(config(), seed=0, step=0, slots=range(20, 28), grid=GRID)
