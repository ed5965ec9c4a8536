"""What tests of precision share: values in half precision, and how near to float64 one rounding leaves them.

What float32 computes and half precision then stores is the exact value rounded once: off by half a unit in the last
place. Arithmetic in half precision rounds several times, and shows.
"""

import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
SEED = 0


def randn(*shape, dtype=torch.float32, scale=1.0, seed=SEED):
    print(f"seed {seed}")
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_rounded_once(got, exact, dtype, slack=0.0, relative=1e-5):
    """`got` is in `dtype` and as near to the float64 `exact` as one rounding brings it; float32 in between may add
    `relative` of the value, and `slack`, a number or a tensor."""
    assert got.dtype == dtype
    allowed = (torch.finfo(dtype).eps / 2 + relative) * exact.abs() + slack + torch.finfo(dtype).smallest_normal
    excess = ((got.double() - exact).abs() / allowed).max().item()
    assert excess <= 1, f"{excess:.2f} times as far as one rounding to {dtype} brings it"
