"""Row-wise dropout and its generator: known answers, rates, independence and equal masks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, nan_filled, strided

from fastmtl_kernels.dispatch import unsupported_reason
from fastmtl_kernels.dropout.api import dropout
from fastmtl_kernels.philox import keep_mask, philox

REASON = unsupported_reason("dropout", "cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(bool(REASON), reason=REASON or "built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]

# Counter, key and words of Random123's test vectors for philox4x32-10.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter: str, key: str, words: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    unsigned = low | high << 32
    seed = torch.tensor(unsigned - 2**64 if unsigned >= 2**63 else unsigned)
    found = philox(seed, *(torch.tensor(int(word, 16)) for word in counter.split()))
    assert [f"{int(word):08x}" for word in found] == words.split()


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 140),
    dropout_p=st.sampled_from([1e-10, 0.1, 0.5, 0.999]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_case(
    impl: Any, rows: int, columns: int, dropout_p: float, dtype: torch.dtype, layout: str, seed: int
) -> None:
    """Result and gradient have the definition's mask; dropped infinities are zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[::3, ::5] = float("inf")
    x = strided(x.to(dtype), layout).detach().requires_grad_()
    key = torch.tensor([seed])
    y = nan_filled(lambda: dropout(x, dropout_p, key, impl=impl))
    (dx,) = nan_filled(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))
    keep = keep_mask(key, rows, columns, dropout_p)
    scale = torch.tensor(1 / (1 - dropout_p), dtype=torch.float32)
    assert torch.equal(y, torch.where(keep, x.float() * scale, 0.0).to(dtype))
    assert torch.equal(dx, torch.where(keep, scale, 0.0).to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_are_rows(impl: Any) -> None:
    x, seed = torch.ones(3, 5, 7), torch.tensor(4)
    assert torch.equal(dropout(x, 0.5, seed, impl=impl).view(15, 7), dropout(x.view(15, 7), 0.5, seed, impl=impl))
    assert dropout(x, 0.0, None, impl=impl) is x
    assert dropout(x[:0], 0.5, seed, impl=impl).shape == (0, 5, 7)


@pytest.mark.parametrize("dropout_p", [0.02, 0.1, 0.5, 0.9])
def test_rate_and_independence(dropout_p: float) -> None:
    """Rates overall, per row and column, and of equal neighbours and seeds.

    The tolerance is 5 standard deviations.
    """
    shape = 600, 515
    masks = [keep_mask(torch.tensor(seed), *shape, dropout_p).double() for seed in (0, 1, 2**32, -1)]
    variance = dropout_p * (1 - dropout_p)
    for mask in masks:
        assert abs(mask.mean() - (1 - dropout_p)) <= 5 * (variance / mask.numel()) ** 0.5
        for dim in (0, 1):
            means = mask.mean(dim)
            assert (means - (1 - dropout_p)).abs().max() <= 5 * (variance / shape[dim]) ** 0.5
    centred = [(mask - (1 - dropout_p)) / variance**0.5 for mask in masks]
    pairs = [(centred[0], other) for other in centred[1:]]
    pairs += [(centred[0][step:], centred[0][:-step]) for step in (1, 2, 4)]
    pairs += [(centred[0][:, step:], centred[0][:, :-step]) for step in (1, 2, 3, 4, 8)]
    for a, b in pairs:
        assert abs((a * b).mean()) <= 5 / a.numel() ** 0.5


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_vectors_and_words_draw_the_same(tmp_path: Path) -> None:
    """The AVX2 code of csrc/philox.h draws the words of the portable code of other processors."""
    source = tmp_path / "philox.cpp"
    source.write_text("""
#include "philox.h"
#include <vector>
int main() {
  if (!__builtin_cpu_supports("avx2")) return 77;
  std::vector<uint8_t> a(96), b(96);
  for (uint32_t row = 0; row < 40; ++row)
    for (int64_t d = 1; d <= 768; d += 37) {
      const uint64_t seed = 0x123456789abcdef0ull * (row + 1);
      const int32_t threshold = static_cast<int32_t>(row * 107374182u);
      fastmtl::dropped_row_avx2(seed, row * 107374183u, threshold, d, a.data());
      fastmtl::dropped_row_portable(seed, row * 107374183u, threshold, d, b.data());
      for (int64_t c = 0; c < d; ++c)
        if ((a[c / 8] ^ b[c / 8]) >> c % 8 & 1) return 1;
    }
  return 0;
}
""")
    include = Path(__file__).parents[3] / "csrc"
    program = tmp_path / "philox"
    subprocess.run(["c++", "-std=c++17", "-O1", f"-I{include}", str(source), "-o", str(program)], check=True)
    status = subprocess.run([str(program)]).returncode
    if status == 77:
        pytest.skip("no AVX2 here")
    assert status == 0


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("x", (torch.tensor(1.0), 0.1, torch.tensor(0))),
        ("x", (torch.ones(3, dtype=torch.int64), 0.1, torch.tensor(0))),
        ("dropout_p", (torch.ones(2, 3), 1.0, torch.tensor(0))),
        ("seed", (torch.ones(2, 3), 0.1, None)),
        ("seed", (torch.ones(2, 3), 0.1, torch.tensor(0, device="meta"))),
    ],
)
def test_errors_name_the_argument(name: str, arguments: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        dropout(*arguments)
