"""Masks and contrast: what is hidden, what a batch's loss is, and that pieces give the whole batch's gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_encoder import draw
from small_run import text
from small_tokenizer import make_tokenizer
from torch import Tensor

from llmcli.config import TokenizerConfig
from llmcli.data.frames import framed
from llmcli.data.sentences import sentences_of
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.data.tokenizer_training import Trained, train
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig
from llmcli.models.ops import attend_both
from llmcli.models.pooling import pooled
from llmcli.training.contrast import Groups, alignment, cached, info_nce, uniformity
from llmcli.training.losses import IGNORED, found_tokens, head_loss
from llmcli.training.masking import MaskedWindows, Masking, Words
from llmcli.training.packing import Packed
from llmcli.training.seeding import seeded

USUAL = Masking(0.15, True, 0.8, 0.1)


@pytest.fixture(scope="module")
def wordpieces() -> TextTokenizer:
    settings = TokenizerConfig(kind="wordpiece", vocab_size=300, encoder=True)
    last = list(train([text(30_000)], settings, workers=1))[-1]
    assert isinstance(last, Trained)
    return last.tokenizer


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return framed(load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("bytewise") / "tokenizer")))


def windows(tokenizer: TextTokenizer, masking: Masking = USUAL, seed: int = 3) -> MaskedWindows:
    ids = np.array(tokenizer.encode(text(30_000)), np.uint16)
    return MaskedWindows([ids], tokenizer, masking, length=64, batch_size=32, seed=seed)


def original(tokenizer: TextTokenizer, number: int) -> np.ndarray:
    """The batch with nothing hidden."""
    rows, _ = windows(tokenizer).windows.batch(number)
    ends = np.full((len(rows), 1), tokenizer.cls_id), np.full((len(rows), 1), tokenizer.sep_id)
    return np.concatenate([ends[0], rows.numpy(), ends[1]], 1)


# ----------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("kind", ["wordpieces", "bytewise"])
def test_words_are_hidden_whole(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(kind)
    line = "inheritance is understandable, isn't it"
    ids = np.array([tokenizer.encode(line, special=True)])
    begins = Words(tokenizer).begins(ids)[0]
    parts = np.split(ids[0], np.flatnonzero(begins)[1:])
    words = [tokenizer.decode([int(index) for index in part]).strip() for part in parts[1:-1]]
    assert words == ["inheritance", "is", "understandable", ",", "isn", "'", "t", "it"]
    assert max(map(len, parts)) > 1

    hidden = windows(tokenizer, Masking(0.15, True, 1.0, 0.0))
    inputs, _ = hidden.batch(0)
    whole = original(tokenizer, 0)
    is_hidden = inputs.ids.numpy() == tokenizer.mask_id
    unit = np.cumsum(hidden.words.begins(whole).ravel())
    for number in np.unique(unit[is_hidden.ravel()]):
        assert is_hidden.ravel()[unit == number].all()


def test_the_share_that_is_hidden_and_by_what(wordpieces: TextTokenizer) -> None:
    made = windows(wordpieces)
    hidden = strange = same = count = 0
    for number in range(12):
        inputs, targets = made.batch(number)
        assert len(targets) == len(inputs.chosen) == int(0.15 * 32 * 64)
        counted = targets != IGNORED
        places, wanted = inputs.chosen[counted].numpy(), targets[counted].numpy()
        assert len(set(places.tolist())) == len(places)
        whole = original(wordpieces, number).ravel()
        found = inputs.ids.numpy().ravel()
        assert (whole[places] == wanted).all()
        others = np.setdiff1d(np.arange(whole.size), places)
        assert (whole[others] == found[others]).all()
        assert not set(wanted.tolist()) & wordpieces.special_ids
        count += len(places)
        hidden += int((found[places] == wordpieces.mask_id).sum())
        same += int((found[places] == wanted).sum())
        strange += int(((found[places] != wanted) & (found[places] != wordpieces.mask_id)).sum())
        assert not set(found[places].tolist()) & (wordpieces.special_ids - {wordpieces.mask_id})
    assert count / (12 * 32 * 62) == pytest.approx(0.15, abs=0.005)
    assert hidden / count == pytest.approx(0.8, abs=0.05)
    assert strange / count == pytest.approx(0.1, abs=0.04)
    assert same / count == pytest.approx(0.1, abs=0.04)


def test_masks_are_drawn_anew_and_depend_on_seed_and_number_alone(wordpieces: TextTokenizer) -> None:
    first, again, other = windows(wordpieces), windows(wordpieces), windows(wordpieces, seed=4)
    for number in (0, 7, 3):  # in any order
        assert torch.equal(first.batch(number)[0].ids, again.batch(number)[0].ids)
    assert not torch.equal(first.batch(0)[0].chosen, other.batch(0)[0].chosen)
    shown = [list(each.validation(first.windows.shards, batch_size=4, tokens=600)) for each in (first, other)]
    assert len(shown[0]) == 3
    for (one, wanted), (two, also) in zip(*shown, strict=True):  # a validation is the same whatever the seed
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(wanted, also)
    ranks = [
        MaskedWindows(first.windows.shards, wordpieces, USUAL, length=64, batch_size=2, seed=3, rank=rank, world=2)
        for rank in (0, 1)
    ]
    assert not torch.equal(ranks[0].batch(0)[0].ids, ranks[1].batch(0)[0].ids)


def test_an_alphabet_of_one_word_still_has_something_to_find(wordpieces: TextTokenizer) -> None:
    made = MaskedWindows(
        [np.full(50, wordpieces.id_of("e"), np.uint16)], wordpieces, USUAL, length=4, batch_size=1, seed=0
    )
    _, targets = made.batch(0)
    assert (targets != IGNORED).sum() == 1


# ----------------------------------------------------------------------------------------------------------------
# Losses


def test_the_head_s_loss_with_a_bias_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    states, head, bias = (
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((70, 8), (50, 8), (50,))
    )
    targets = torch.randint(0, 50, (70,), generator=generator)
    targets[::7] = IGNORED
    ours = head_loss(states, head, targets, torch.tensor(0.5), bias=bias)
    theirs = F.cross_entropy(states @ head.t() + bias, targets, ignore_index=IGNORED, reduction="sum") * 0.5
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(
        torch.autograd.grad(ours, (states, head, bias)), torch.autograd.grad(theirs, (states, head, bias)), strict=True
    ):
        torch.testing.assert_close(one, two)
    nats, hits = found_tokens(states, head, bias, targets)
    assert nats == pytest.approx(2 * float(theirs.detach()), rel=1e-5)
    assert hits == int(((states @ head.t() + bias).argmax(-1) == targets).sum())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_both_ways_has_the_right_gradient(dropout: float) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(3, 5, 3 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]

    def attended(parts: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend_both(parts, 2, mask[:, None, None], dropout)

    assert torch.autograd.gradcheck(attended, (parts,))
    if not dropout:
        with torch.no_grad():  # the kernel that serves where nothing is learnt
            plain = attend_both(parts, 2, mask[:, None, None])
        torch.testing.assert_close(attended(parts)[mask], plain[mask])


def test_contrast_by_hand() -> None:
    anchors, others = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    names = torch.tensor([[0, 1], [2, 3]])
    cosines = torch.tensor([[0.5**0.5, 0.0], [0.5**0.5, 1.0]]) / 0.5
    wanted = -cosines.log_softmax(1).diagonal().sum()
    torch.testing.assert_close(info_nce(torch.stack([anchors, others]), names, 0.5), wanted)
    # A text that is equal to one's own, or to the anchor, is no wrong answer: then nothing is left to be wrong.
    for equal in ([[0, 1], [2, 2]], [[0, 1], [1, 0]]):
        assert float(info_nce(torch.stack([anchors, others]), torch.tensor(equal), 0.5)) == 0.0
    # A third text is a wrong answer for all.
    three = torch.stack([anchors, others, torch.tensor([[1.0, 0.0], [-1.0, 0.0]])])
    wide = torch.cat([cosines, torch.tensor([[1.0, -1.0], [0.0, 0.0]]) / 0.5], 1)
    names = torch.tensor([[0, 1], [2, 3], [4, 5]])
    torch.testing.assert_close(info_nce(three, names, 0.5), -wide.log_softmax(1).diagonal().sum())


def test_alignment_and_uniformity_by_hand() -> None:
    right = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert alignment(torch.stack([right, right])) == 0.0
    assert alignment(torch.stack([right, -right])) == pytest.approx(4.0)
    assert uniformity(right) == pytest.approx(-4.0)  # one pair, at a squared distance of 2
    assert uniformity(right[:1]) == 0.0


def small_encoder(dropout: float) -> Encoder:
    shape = EncoderConfig("bert", 60, 16, 2, 2, 32, 20, hidden_dropout=dropout, attention_dropout=dropout)
    model = Encoder(shape)
    draw(model)
    return model.train()


def gradients(
    model: Encoder, batch_pieces: tuple[Packed, ...], names: Tensor, views: int, *, cache: bool
) -> list[Tensor]:
    def vectors(piece: Packed, part: int) -> Tensor:
        seeded(7, 1, part)
        return pooled(model.hidden(piece.ids, segments=piece.segments)[0, : piece.tokens], piece.lengths, "mean")

    runs = [partial(vectors, piece, part) for part, piece in enumerate(batch_pieces)]
    found = cached(runs, model.embedding) if cache else [run() for run in runs]
    joined = torch.cat([each.view(views, -1, 16) for each in found], 1)
    model.zero_grad()
    loss = info_nce(joined, names, 0.1)
    torch.autograd.backward([loss])
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def groups(width: int) -> Groups:
    random = np.random.default_rng(0)
    return Groups([tuple(random.integers(1, 60, random.integers(2, 12)) for _ in range(width)) for _ in range(13)])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_pieces_give_the_whole_batch_s_gradients(width: int) -> None:
    """Without dropout, whatever the pieces; with it, what the same pieces give whose activations are all kept."""
    model, texts = small_encoder(0.0), groups(width)
    chosen = [4, 0, 12, 7, 1, 9, 3]
    expected = None
    for pieces in (1, 2, 3, 7):
        batch, targets = texts.batch(chosen, pieces, 0)
        assert len(batch.pieces) == -(-len(chosen) // -(-len(chosen) // pieces))
        assert len(targets) == len(chosen)
        found = gradients(model, batch.pieces, batch.names, batch.views, cache=True)
        expected = expected or found
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    model = small_encoder(0.2)
    batch, _ = texts.batch(chosen, 3, 0)
    kept = gradients(model, batch.pieces, batch.names, batch.views, cache=False)
    for one, two in zip(gradients(model, batch.pieces, batch.names, batch.views, cache=True), kept, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.equal(kept[0], expected[0] if expected else kept[0])


def test_two_views_of_a_text_differ_by_dropout_alone() -> None:
    texts = groups(1)
    batch, _ = texts.batch([0, 1], 1, 0)
    assert batch.views == 2
    assert torch.equal(batch.names[0], batch.names[1])
    for dropout in (0.0, 0.2):
        model = small_encoder(dropout)
        seeded(0, 0)
        states = model.hidden(batch.pieces[0].ids, segments=batch.pieces[0].segments)[0, : batch.pieces[0].tokens]
        one, two = pooled(states, batch.pieces[0].lengths, "mean").view(2, 2, 16)
        assert torch.allclose(one, two, atol=1e-6) == (dropout == 0.0)


# ----------------------------------------------------------------------------------------------------------------
# Sentences


def test_sentences_are_cut_where_one_ends_and_another_begins() -> None:
    told = 'A first line\nIt cost 3.5 dollars then. "Is it so?" she asked. No. (We do not know that.) The end is here'
    assert sentences_of(told) == [
        "A first line",
        "It cost 3.5 dollars then.",
        '"Is it so?" she asked.',
        "(We do not know that.",
        "The end is here",
    ]
    assert sentences_of("这是一个足够长的句子。这是另一个足够长的句子！") == [
        "这是一个足够长的句子。",
        "这是另一个足够长的句子！",
    ]
    assert sentences_of("") == []
