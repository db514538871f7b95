"""Operators whose gradients are written out, against autograd of the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llmcli.models import ops
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.training import losses
from llmcli.training.losses import IGNORED, head_loss, piece_loss, summed_loss

pytestmark = pytest.mark.usefixtures("one_thread")
Function = Callable[..., Tensor]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_same(ours: Function, plain: Function, inputs: Sequence[Tensor], **bounds: float) -> None:
    """Values and every gradient of `ours` in float32 are those of `plain` in float64; without gradients too."""
    narrow = [item.clone().requires_grad_() for item in inputs]
    wide = [item.double().requires_grad_() for item in inputs]
    found, expected = ours(*narrow), plain(*wide)
    assert found.dtype == inputs[0].dtype
    near = {**CLOSE, **bounds}
    torch.testing.assert_close(found.double(), expected, **near)
    direction = drawn(*expected.shape, seed=99).to(found.dtype)
    of_ours = torch.autograd.grad(found, narrow, direction)
    of_plain = torch.autograd.grad(expected, wide, direction.double())
    for gradient, wanted, item in zip(of_ours, of_plain, inputs, strict=True):
        assert gradient.dtype == item.dtype
        torch.testing.assert_close(gradient.double(), wanted, **near)
    with torch.inference_mode():
        torch.testing.assert_close(ours(*inputs).double(), expected.detach(), **near)


# ----------------------------------------------------------------------------------------------------------------
# Norm, rotation, gate


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(2, 3, 16), (5, 16), (2, 3, 4, 8), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_rms_norm(shape: tuple[int, ...], eps: float, scale: float) -> None:
    module = ops.RMSNorm(shape[-1], eps)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, x)  # type: ignore[no-any-return]

    weight = 1 + drawn(shape[-1], seed=1, scale=0.3)
    assert_same(norm, lambda x, w: plain_norm(x, w, eps), [drawn(*shape, scale=scale), weight], atol=2e-5 / scale)


def test_rms_norm_of_zeros_is_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    module = ops.RMSNorm(8, 1e-6)
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.equal(module(x), torch.zeros(2, 8))


def test_float32_masters_serve_bfloat16_activations() -> None:
    """What autocast would do: activations in bfloat16, gradients of the weights in their own precision."""
    torch.manual_seed(0)
    x = drawn(4, 16).bfloat16().requires_grad_()
    norm, linear, layer, conv = ops.RMSNorm(16, 1e-6), ops.Linear(16, 16), ops.LayerNorm(16), ops.Conv1D(16, 16)
    nn.init.normal_(conv.weight, 0, 0.25)
    with torch.inference_mode():
        expected = conv(layer(linear(norm(x.detach().float()))))
        narrow = conv(layer(linear(norm(x.detach()))))
    wide = conv(layer(linear(norm(x))))
    for found in (narrow, wide):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.08)
    wide.float().square().sum().backward()
    for parameter in (norm.weight, linear.weight, linear.bias, layer.weight, conv.weight, conv.bias):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert float(parameter.grad.abs().sum()) > 0


def angles(count: int, size: int) -> tuple[Tensor, Tensor]:
    turned = torch.arange(count)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8)])
def test_rope_turns_pairs_by_their_angle(heads: int, size: int) -> None:
    cos, sin = angles(7, size)

    def plain(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def rope(x: Tensor) -> Tensor:
        return ops.apply_rope(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    assert_same(rope, plain, [drawn(2, heads, 7, size)])


def test_rope_keeps_lengths_and_depends_on_distance_alone() -> None:
    cos, sin = angles(12, 8)
    query, key = (drawn(1, 8, seed=seed).expand(12, 8) for seed in (1, 2))
    query, key = (ops.apply_rope(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)) for x in (query, key))
    torch.testing.assert_close(query.norm(dim=-1), query[0].norm().expand(12))
    products = query @ key.t()
    for distance in range(-5, 6):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[0].expand_as(along), rtol=1e-4, atol=1e-4)


def test_swiglu() -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    assert_same(ops.swiglu, plain, [drawn(2, 5, 24, scale=3.0)])
    assert torch.autograd.gradcheck(ops.swiglu, drawn(3, 8).double().requires_grad_())


@pytest.mark.parametrize("bias", [True, False])
def test_joined_maps_are_the_maps(bias: bool) -> None:
    torch.manual_seed(0)
    maps = [ops.Linear(6, outputs, bias=bias) for outputs in (4, 2, 8)]
    x = drawn(3, 6)
    torch.testing.assert_close(ops.joined(x, *maps), torch.cat([each(x) for each in maps], -1))


# ----------------------------------------------------------------------------------------------------------------
# Attention


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Row by row and head by head, as the papers write it."""
    groups, count = query.size(1) // key.size(1), query.size(2)
    output = torch.empty_like(query)
    for head in range(query.size(1)):
        for place in range(count):
            seen = slice(0, key.size(2) - count + place + 1)
            keys, values = key[:, head // groups, seen], value[:, head // groups, seen]  # (B, S, D)
            scores = (keys @ query[:, head, place, :, None])[..., 0] / query.size(-1) ** 0.5
            output[:, head, place] = (torch.softmax(scores, -1)[:, None] @ values)[:, 0]
    return output


@pytest.mark.parametrize(("heads", "shared", "count", "size"), [(1, 1, 1, 2), (2, 2, 9, 4), (4, 2, 6, 8), (6, 1, 5, 4)])
def test_causal_attention(heads: int, shared: int, count: int, size: int) -> None:
    inputs = [drawn(2, heads, count, size, seed=1, scale=2.0)]
    inputs += [drawn(2, shared, count, size, seed=seed, scale=2.0) for seed in (2, 3)]
    assert_same(lambda q, k, v: ops.attend(q, k, v, None), plain_attention, inputs)


def test_long_rows_take_the_other_kernel_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [drawn(1, 4, 12, 8, seed=1), drawn(1, 2, 12, 8, seed=2), drawn(1, 2, 12, 8, seed=3)]
    monkeypatch.setattr(ops, "EXPLICIT_POSITIONS", 11)
    assert_same(lambda q, k, v: ops.attend(q, k, v, None), plain_attention, inputs)


@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (4, 1)])
def test_a_single_query_sees_every_key(heads: int, shared: int) -> None:
    """As when a cached model is fed a token; with gradients on, too."""
    inputs = [drawn(2, heads, 1, 4, seed=1), drawn(2, shared, 7, 4, seed=2), drawn(2, shared, 7, 4, seed=3)]
    assert_same(lambda q, k, v: ops.attend(q, k, v, None), plain_attention, inputs)


def test_a_mask_is_obeyed() -> None:
    query, key, value = drawn(1, 2, 3, 4), drawn(1, 1, 5, 4, seed=1), drawn(1, 1, 5, 4, seed=2)
    mask = torch.arange(5) <= torch.tensor([2, 3, 4])[:, None]
    torch.testing.assert_close(ops.attend(query, key, value, mask[None, None]), plain_attention(query, key, value))


def test_huge_scores_do_not_overflow() -> None:
    query = drawn(1, 2, 4, 8, scale=1e4).requires_grad_()
    output = ops.attend(query, drawn(1, 2, 4, 8, scale=1e4), drawn(1, 2, 4, 8), None)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()


# ----------------------------------------------------------------------------------------------------------------
# The loss at the head


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.flatten(0, -2) @ head.t()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.fixture
def pieces_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are worked off 16 rows at a time, the least."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 1)


@pytest.mark.parametrize(
    "ignored", [(), (0,), (0, 7, 39), (13, 14, 15, 16, 17, 18), tuple(range(40))], ids=["none", "1", "3", "6", "all"]
)
@pytest.mark.usefixtures("pieces_of_16")
def test_the_head_loss(ignored: tuple[int, ...]) -> None:
    targets = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(1))
    targets[list(ignored)] = IGNORED
    targets, scale = targets.view(2, 20), torch.tensor(0.25)
    inputs = [drawn(2, 20, 6), drawn(11, 6, seed=2)]
    assert_same(
        lambda hidden, head: head_loss(hidden, head, targets, scale),
        lambda hidden, head: plain_loss(hidden, head, targets) * 0.25,
        inputs,
    )
    assert summed_loss(*inputs, targets) == pytest.approx(float(plain_loss(*inputs, targets)), rel=1e-5)


def test_what_comes_back_through_the_loss_scales_its_gradients() -> None:
    hidden, head = drawn(3, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()
    targets = torch.tensor([0, 4, 2])
    once = torch.autograd.grad(head_loss(hidden, head, targets, torch.tensor(1.0)), [hidden, head])
    thrice = torch.autograd.grad(3 * head_loss(hidden, head, targets, torch.tensor(1.0)), [hidden, head])
    for plain, scaled in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * plain, scaled)


def test_large_logits_give_a_finite_loss() -> None:
    loss, gradient = piece_loss(torch.tensor([[1e4, -1e4], [500.0, 0.0]]), torch.tensor([1, 0]), torch.tensor(1.0))
    assert float(loss) == pytest.approx(2e4)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_a_bfloat16_hidden_state_keeps_the_loss_in_float32() -> None:
    hidden, head = drawn(64, 16).bfloat16().requires_grad_(), drawn(32, 16, seed=1).requires_grad_()
    targets = torch.arange(64) % 32
    loss = head_loss(hidden, head, targets, torch.tensor(1 / 64))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(hidden.float(), head, targets).item() / 64, rel=0.02)
    assert hidden.grad is not None
    assert head.grad is not None
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)


# ----------------------------------------------------------------------------------------------------------------
# A whole model


def model(family: str, tied: bool) -> Decoder:
    config = DecoderConfig(
        model_type=family,
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if family == "gpt2" else 2,
        head_dim=4,
        intermediate_size=20,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        attention_bias=family == "gpt2",
        mlp_bias=family == "gpt2",
    )
    made = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return made


def gradients(made: Decoder) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in made.named_parameters()}
    made.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_accumulated_pieces_are_one_big_batch(family: str, tied: bool) -> None:
    """Pieces with unequal counts of targets: averaging by piece would weigh their tokens unequally."""
    made, generator = model(family, tied), torch.Generator().manual_seed(4)
    ids = torch.randint(0, 30, (4, 13), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0], targets[2, :5], targets[3, 1:] = IGNORED, IGNORED, IGNORED
    scale = 1 / (targets != IGNORED).sum()
    whole = F.cross_entropy(made(ids[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    whole.backward()
    expected = gradients(made)
    assert len(expected) == len(list(made.parameters()))
    for rows in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        total = 0.0
        for part in rows:
            loss = head_loss(made.hidden(ids[part, :-1]), made.head, targets[part], scale)
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(whole.item(), rel=1e-5)
        for name, gradient in gradients(made).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_gradients_of_a_model_are_the_slope_of_its_loss(family: str) -> None:
    made = model(family, True)
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(4))
    scale = torch.tensor(1 / 16)

    def loss() -> Tensor:
        return head_loss(made.hidden(ids[:, :-1]), made.head, ids[:, 1:], scale)

    loss().backward()
    found = gradients(made)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(loss().double()))
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-2
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=0.02, abs=2e-4), name
