"""RoPE tables and rotation against a float64 reference written from the formulas (method: paper section 2.1)."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vjepa_scale.model.positions import Layout, RopeTables, rescale_to, rope_tables, rotate, time_tables


def reference(x: Tensor, index: list[int], grid: tuple[int, int, int], layout: Layout) -> Tensor:
    """x [h, K, d] float64, one channel at a time, in plain Python arithmetic."""
    d = x.shape[-1]
    a = 2 * ((d // 3) // 2)
    out = x.clone()
    for k, n in enumerate(index):
        place = (n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2])
        for axis in range(3):
            for channel in range(a):
                frequency = channel % (a // 2) if layout == "tiled" else channel // 2
                angle = place[axis] * 10000.0 ** (-frequency / (a / 2))
                c = axis * a + channel
                partner = -x[:, k, c + 1] if channel % 2 == 0 else x[:, k, c - 1]
                out[:, k, c] = x[:, k, c] * math.cos(angle) + partner * math.sin(angle)
    return out


@pytest.mark.parametrize("layout", ["tiled", "interleaved"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 88, 6])
def test_equals_reference_on_a_masked_subset_of_a_non_square_grid(layout: Layout, head_dim: int) -> None:
    grid = (5, 3, 7)
    generator = torch.Generator().manual_seed(head_dim)
    index = torch.stack([torch.randperm(105, generator=generator)[:20] for _ in range(2)])
    x = torch.randn(2, 2, 20, head_dim, generator=generator)
    ours = rotate(x, rope_tables(index, grid=grid, head_dim=head_dim, layout=layout))
    for b in range(2):
        torch.testing.assert_close(
            ours[b].double(), reference(x[b].double(), index[b].tolist(), grid, layout), rtol=0, atol=5e-7
        )


def test_one_subset_for_all_clips() -> None:
    index = torch.tensor([3, 40, 17])
    x = torch.randn(2, 4, 3, 32)
    shared = rotate(x, rope_tables(index, grid=(4, 3, 4), head_dim=32, layout="tiled"))
    for b in range(2):
        expected = reference(x[b].double(), index.tolist(), (4, 3, 4), "tiled")
        torch.testing.assert_close(shared[b].double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("layout", ["tiled", "interleaved"])
def test_all_tokens_are_the_tokens_in_order(layout: Layout) -> None:
    x = torch.randn(1, 1, 24, 20)
    ours = rotate(x, rope_tables(None, grid=(2, 3, 4), head_dim=20, layout=layout))
    expected = reference(x[0].double(), list(range(24)), (2, 3, 4), layout)
    torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=5e-7)


def test_interleaved_scores_depend_on_distance_only() -> None:
    """A true rotation: moving query and key by the same offset leaves their product alone."""
    q, k = torch.randn(2, 1, 1, 1, 64)
    grid = (8, 8, 8)

    def score(q_place: int, k_place: int) -> float:
        tables = [
            rope_tables(torch.tensor([n]), grid=grid, head_dim=64, layout="interleaved") for n in (q_place, k_place)
        ]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    moved = 2 * 64 + 3 * 8 + 1
    assert score(10, 77) == pytest.approx(score(10 + moved, 77 + moved), abs=1e-5)


def test_bfloat16_input_is_rotated_in_float32() -> None:
    """float32 tables under bfloat16 leave the rounding of the result only; bfloat16 throughout triples the error."""
    grid = (32, 24, 24)
    index = torch.arange(32 * 24 * 24)[::97]
    tables = rope_tables(index, grid=grid, head_dim=64, layout="tiled")
    assert tables.cos.dtype == tables.signed_sin.dtype == torch.float32
    x = torch.randn(1, 1, len(index), 64).bfloat16()
    exact = reference(x[0].double(), index.tolist(), grid, "tiled")

    a = 20  # the same in the type of the activations throughout
    omega = 1.0 / 10000 ** (torch.arange(a // 2, dtype=torch.bfloat16) / (a / 2))
    parts = []
    for axis, place in enumerate((index // 576, index // 24 % 24, index % 24)):
        angle = (place.to(torch.bfloat16)[:, None] * omega).repeat(1, 2)
        part = x[..., axis * a : (axis + 1) * a]
        partner = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
        parts.append(part * angle.cos() + partner * angle.sin())
    low = torch.cat([*parts, x[..., 3 * a :]], dim=-1)
    ours = rotate(x, tables)
    assert ours.dtype == torch.bfloat16

    def error(y: Tensor) -> float:
        return float((y[0].double() - exact).square().mean().sqrt())

    rounding = (exact.to(torch.bfloat16).double() - exact).square().mean().sqrt()
    assert error(ours) < 1.01 * float(rounding)
    assert error(ours) < 0.4 * error(low)


def test_tables_stay_float32_inside_a_block_sharded_in_bfloat16(tmp_path: Path) -> None:
    """FSDP2's bfloat16 policy casts the arguments of a block; it must not find the tables."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor, tables: RopeTables) -> Tensor:
            seen.append((x.dtype, tables.cos.dtype))
            return rotate(x * self.scale, tables)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        block = fully_shard(Probe(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        block(torch.randn(1, 1, 4, 12), rope_tables(None, grid=(1, 2, 2), head_dim=12, layout="tiled"))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [(torch.bfloat16, torch.float32)]


def test_rescaled_positions_reach_from_the_first_to_the_last_of_the_pretraining_grid() -> None:
    """V-JEPA 2.1: row y of h stands at y·(h₀−1)/(h−1); a table for those (real) positions, by the formula."""
    grid, own = (2, 3, 7), (5, 4)
    scale = rescale_to(own, grid)
    x = torch.randn(1, 1, 42, 32)
    ours = rotate(x, rope_tables(None, grid=grid, head_dim=32, layout="interleaved", scale=scale))
    expected = x[0].double().clone()
    for n in range(42):
        place = (n // 21, n // 7 % 3 * (5 - 1) / (3 - 1), n % 7 * (4 - 1) / (7 - 1))
        for axis in range(3):
            for j in range(5):
                c, angle = axis * 10 + 2 * j, place[axis] * 10000.0 ** (-j / 5)
                pair = x[0, :, n, c].double(), x[0, :, n, c + 1].double()
                expected[:, n, c] = pair[0] * math.cos(angle) - pair[1] * math.sin(angle)
                expected[:, n, c + 1] = pair[1] * math.cos(angle) + pair[0] * math.sin(angle)
    torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=5e-7)
    assert rescale_to(None, grid) == (1, 1, 1)
    assert rescale_to((16, 16), (1, 1, 16)) == (1, 15, 1)  # one row: at 0 whatever it is multiplied by


@pytest.mark.parametrize("layout", ["tiled", "interleaved"])
def test_a_token_with_a_time_only(layout: Layout) -> None:
    x = torch.randn(1, 2, 6, 32)
    ours = rotate(x, time_tables(3, tokens=2, head_dim=32, layout=layout, device=torch.device("cpu")))
    expected = reference(x[0].double(), [0, 0, 1, 1, 2, 2], (3, 1, 1), layout)
    torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=5e-7)
    assert torch.equal(ours[..., 10:], x[..., 10:])
