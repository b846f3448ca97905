"""The weight average has the closed form of an exponential moving average, in place and in fp32.

Not proved here: that it follows every parameter of a sharded model.
"""

import pytest
import torch

from megatron_rlhf.algorithms.average import follow


@pytest.mark.parametrize(("steps", "weight"), [(86, 0.501), (500, 0.0180), (4000, 1.1e-14)])
def test_weight_of_the_initial_value(steps: int, weight: float) -> None:
    average, live = [torch.ones(1, dtype=torch.float64)], [torch.zeros(1, dtype=torch.float64)]
    for _ in range(steps):
        follow(average, live, 0.992)
    assert average[0].item() == pytest.approx(0.992**steps, rel=1e-9)
    assert average[0].item() == pytest.approx(weight, rel=0.02)


def test_closed_form_of_a_moving_weight() -> None:
    """After n steps: d^n w_0 + (1 - d) sum over k of d^(n-k) w_k."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(31, 4, generator=generator)
    average = [weights[0].clone()]
    storage = average[0]
    for k in range(1, 31):
        follow(average, [weights[k]], 0.9)
    closed = 0.9**30 * weights[0].double() + 0.1 * sum(0.9 ** (30 - k) * weights[k].double() for k in range(1, 31))
    assert average[0] is storage
    torch.testing.assert_close(storage.double(), closed, atol=1e-6, rtol=0)


def test_live_weights_stay_and_may_be_bf16_parameters() -> None:
    live = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.bfloat16))
    average = [torch.zeros(3)]
    follow(average, [live], 0.75)
    assert average[0].tolist() == [0.5, 0.5, 0.5] and average[0].dtype == torch.float32
    assert live.tolist() == [2.0, 2.0, 2.0] and not average[0].requires_grad


def test_an_average_in_16_bits_or_of_other_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="keep it in float32"):
        follow([torch.zeros(1, dtype=torch.bfloat16)], [torch.ones(1)], 0.992)
    with pytest.raises(ValueError, match="shorter"):
        follow([torch.zeros(1), torch.zeros(1)], [torch.ones(1)], 0.992)
