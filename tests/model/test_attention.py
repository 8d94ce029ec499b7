"""Attention kernels against float64 arithmetic, and the choice between them."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vjepa_scale.core.errors import UserError
from vjepa_scale.distributed import attention_backend
from vjepa_scale.distributed.attention_backend import set_kernel
from vjepa_scale.model import blocks
from vjepa_scale.model.blocks import Attention

CPU = torch.device("cpu")
HEAD_SIZES = (32, 48, 64, 88)


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v, in the type it is given."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def errors(kernel: blocks.Kernel, head_size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Error against float64, root mean square, of the output and of the gradients of q, k and v. (The largest error
    is one element's luck.)"""
    generator = torch.Generator().manual_seed(head_size)
    inputs = torch.randn(3, 2, 3, 197, head_size, generator=generator).to(dtype)
    weights = torch.randn(2, 3, 197, head_size, generator=generator).to(dtype)
    found, wanted = [], []
    for results, compute, where, kind in ((found, kernel, device, dtype), (wanted, exact, CPU, torch.float64)):
        q, k, v = (x.to(where, kind).requires_grad_() for x in inputs)
        out = compute(q, k, v, None)
        out.backward(weights.to(where, kind))
        results += [x.detach().double().cpu() for x in (out, q.grad, k.grad, v.grad) if x is not None]
    return [float((a - b).square().mean().sqrt()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_run_on_cpu(head_size: int, dtype: torch.dtype) -> None:
    """On a CPU PyTorch's own choice is its flash kernel, so both are held to the arithmetic written out."""
    plain = errors(exact, head_size, CPU, dtype)
    for kernel in (blocks.sdpa, blocks.torch_flash):
        for ours, theirs in zip(errors(kernel, head_size, CPU, dtype), plain, strict=True):
            assert ours <= 1.5 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kernel", [blocks.torch_flash, blocks.torch_varlen, blocks.fa3, blocks.fa4])
def test_kernels_on_a_gpu(kernel: blocks.Kernel, head_size: int) -> None:
    device = torch.device("cuda")
    if problem := attention_backend._problem(kernel, head_size, device, torch.bfloat16):
        assert kernel in (blocks.fa3, blocks.fa4), problem
        pytest.skip(f"{kernel.__name__}: {problem}")
    of_kernel = errors(kernel, head_size, device, torch.bfloat16)
    if kernel in (blocks.fa3, blocks.fa4):
        torch.nn.attention.restore_flash_attention_impl()
    of_sdpa = errors(blocks.sdpa, head_size, device, torch.bfloat16)
    for ours, theirs in zip(of_kernel, of_sdpa, strict=True):
        assert ours <= 1.5 * theirs


def test_a_mask_is_obeyed_or_refused() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    allowed = torch.arange(6)[:, None] // 2 >= torch.arange(6) // 2
    torch.testing.assert_close(blocks.sdpa(q, k, v, allowed), exact(q, k, v, allowed))
    for kernel in (blocks.torch_flash, blocks.torch_varlen):
        with pytest.raises(AssertionError, match="no mask"):
            kernel(q, k, v, allowed)


def test_flash_attn_gets_and_gives_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contract: flash_attn_func(q, k, v), each [B, K, h, d]. The package itself has no wheel and is not tested."""
    shapes: list[tuple[int, ...]] = []
    asked: list[bool] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool) -> Tensor:
        shapes.append(tuple(q.shape))
        asked.append(deterministic)
        return exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    torch.testing.assert_close(blocks.flash_attn(q, k, v, None), exact(q, k, v))
    assert shapes == [(2, 5, 4, 8)]
    torch.use_deterministic_algorithms(True)  # engine.deterministic
    try:
        blocks.flash_attn(q, k, v, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


@pytest.mark.parametrize(("choice", "name"), [("fa3", "FA3"), ("fa4", "FA4")])
def test_other_flash_kernels_are_put_in_place_of_pytorchs(
    choice: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's own registry, once, before the kernel is tried; a package that is not there is told."""
    import torch.nn.attention as registry

    asked: list[str] = []
    monkeypatch.setattr(registry, "activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(registry, "current_flash_attention_impl", lambda: asked[-1] if asked else None)
    kernel = getattr(blocks, choice)
    for _ in range(2):
        blocks.activate(kernel)
    blocks.activate(blocks.sdpa)
    assert asked == [name]
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    torch.testing.assert_close(kernel(q, k, v, None), exact(q, k, v))  # PyTorch's flash operation, whoever computes it

    def absent(_: str) -> None:
        raise ImportError("No module named 'flash_attn'")

    asked.clear()
    monkeypatch.setattr(registry, "activate_flash_attention_impl", absent)
    assert (
        attention_backend._problem(kernel, 64, torch.device("cuda"), torch.bfloat16) == "No module named 'flash_attn'"
    )
    with pytest.raises(UserError, match=r"engine.attention: FlashAttention-\d cannot run on cpu .* it needs a GPU"):
        set_kernel(Attention(64, 2), choice, device=CPU, dtype=torch.bfloat16)


def test_what_is_chosen() -> None:
    layer = Attention(64, 2)
    for choice, name, kernel in (
        ("auto", "PyTorch's scaled_dot_product_attention", blocks.sdpa),
        ("sdpa", "PyTorch's scaled_dot_product_attention", blocks.sdpa),
        ("flash", "PyTorch's flash kernel", blocks.torch_flash),
    ):
        assert set_kernel(layer, choice, device=CPU, dtype=torch.float32) == name
        assert layer.kernel is kernel


# generation of the GPU, kernels that are installed and right, heads → what auto takes for a network
@pytest.mark.parametrize(
    ("major", "right", "kernel"),
    [
        (9, {"fa3", "fa4", "flash_attn"}, blocks.fa3),
        (9, {"flash_attn"}, blocks.sdpa),  # cuDNN is faster there
        (10, {"fa3", "fa4"}, blocks.fa4),
        (8, {"flash_attn", "fa3"}, blocks.flash_attn),
        (8, set(), blocks.sdpa),
        (7, {"flash_attn"}, blocks.sdpa),
        (12, {"fa4"}, blocks.sdpa),
    ],
)
def test_what_auto_takes(major: int, right: set[str], kernel: blocks.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(
        attention_backend,
        "_problem",
        lambda kernel, *_: "" if kernel.__name__ in {"sdpa", *right} else "it is not installed",
    )
    layer = Attention(64, 2)
    set_kernel(layer, "auto", device=torch.device("cuda"), dtype=torch.bfloat16)
    assert layer.kernel is kernel


@pytest.mark.parametrize(
    ("package", "broken", "warned"),
    [
        ("json", False, True),  # a package that is there
        ("no_such_package", False, False),
        ("no_such_package.part", False, False),
        ("broken_package.part", True, True),  # there, and its import fails
    ],
)
def test_auto_warns_of_an_installed_kernel_that_fails(
    package: str,
    broken: bool,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if broken:
        (tmp_path / "broken_package.py").write_text("raise ImportError('undefined symbol')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(attention_backend._PACKAGES, blocks.fa3, package)
    monkeypatch.setattr(attention_backend, "_problem", lambda *_: "its results are wrong by 40%")
    layer = Attention(64, 2)
    name = set_kernel(layer, "auto", device=torch.device("cuda"), dtype=torch.bfloat16)
    assert name == "PyTorch's scaled_dot_product_attention"
    said = capsys.readouterr().err
    warning = (
        "warning: Attention: engine.attention auto takes PyTorch's scaled_dot_product_attention: FlashAttention-3 "
        "fails its trial with heads of 32 channels: its results are wrong by 40%\n"
    )
    assert said == (warning if warned else "")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda q, k, v, _: exact(q, k, v), ""),
        (lambda q, k, v, _: exact(q, k, v).float().to(q.dtype), ""),
        (lambda q, k, v, _: exact(q * 1.2, k, v), "its results are wrong by"),
        (lambda q, k, v, _: exact(q, k, v, torch.ones(40, 40).tril().bool()), "its results are wrong by"),
        (lambda q, k, v, _: exact(q, k.detach(), v), "The differentiated Tensor"),
        (lambda q, k, v, _: exact(q, k, v) + (k - k.detach()), "its results are wrong by"),  # a wrong gradient alone
        (lambda q, k, v, _: exact(q, k, v) * torch.nan, "its results are wrong by inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_runs_and_is_wrong_is_found(wrong: blocks.Kernel, problem: str, dtype: torch.dtype) -> None:
    found = attention_backend._problem(wrong, 88, CPU, dtype)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_what_was_activated_for_a_trial_that_failed_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what another network uses already."""
    done: list[str] = []
    monkeypatch.setattr(attention_backend, "_largest_error", lambda *_: 1.0)
    monkeypatch.setattr(blocks, "deactivate", lambda: done.append("undone"))
    for active in (True, False):
        monkeypatch.setattr(blocks, "activate", lambda _, active=active: not active)
        assert "wrong by 100%" in attention_backend._problem(blocks.fa3, 64, torch.device("cuda"), torch.bfloat16)
    assert done == ["undone"]


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        set_kernel(Attention(64, 2), "varlen", device=CPU, dtype=torch.bfloat16)
    assert str(refusal.value) == (
        "engine.attention: PyTorch's variable-length flash kernel cannot run on cpu with bfloat16 and heads of 32 "
        "channels: it needs a GPU (auto, or sdpa, which runs everywhere)"
    )


@pytest.mark.gpu
def test_flash_in_float32_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.attention: PyTorch's flash kernel cannot run on cuda with float32"):
        set_kernel(Attention(64, 2), "flash", device=torch.device("cuda"), dtype=torch.float32)
