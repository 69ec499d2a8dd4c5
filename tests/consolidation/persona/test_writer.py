"""CharacterWriter: untrained nothing, the closed forms by hand, what it learns goes over to words it has not seen."""

import numpy as np
import pytest
import torch

from hypernet.consolidation.persona.last_block import LastBlock, Shared
from hypernet.consolidation.persona.writer import WRITERS, CharacterWriter


@pytest.fixture
def block(make_doc_to_lora):
    return LastBlock(make_doc_to_lora())


@pytest.fixture
def sheets(block):
    generator = torch.Generator().manual_seed(0)
    features = 3.0 + torch.randn(2, 6, block.place.d_in, generator=generator)
    return features, torch.tensor([[1.0, 1, 1, -1, -1, -1], [-1.0, 1, -1, 1, -1, 1]])


def writer_of(block, features, **changes):
    answers = torch.ones(1, block.place.d_out)
    return CharacterWriter(block, Shared.of(features.flatten(0, 1)), answers, inner_dim=4, **changes)


@pytest.mark.parametrize("kind", WRITERS)
def test_untrained_writer_changes_nothing(block, sheets, kind):
    lora = writer_of(block, sheets[0], kind=kind, rank=2)(*sheets)
    rank = 2 if kind == "perceiver" else 1
    assert lora.A.shape == (2, rank, block.place.d_in) and lora.B.shape == (2, rank, block.place.d_out)
    assert (lora.A.mT @ lora.B == 0).all()


@pytest.mark.parametrize("kind", ["ridge", "mean"])
def test_closed_forms_are_those_of_float64_by_hand(block, sheets, kind):
    features, marks = sheets
    writer = writer_of(block, features, kind=kind, ridge=0.5)
    with torch.no_grad():
        writer.up.normal_()
    lora = writer(features, marks)
    (u,), scale = writer.shared.directions.double().numpy(), writer.shared.scale
    W = (writer.down @ writer.up).detach().double().numpy()
    for own, (x, y) in enumerate(zip(features.double().numpy(), marks.double().numpy(), strict=True)):
        x = scale * (x - np.outer(x @ u, u))
        z, d = x @ (np.eye(len(u)) + W), len(u)
        a = np.linalg.solve(z @ z.T / d + 0.5 * np.eye(len(y)), y) if kind == "ridge" else y / len(y)
        A = (np.eye(len(u)) + W) @ (z.T @ a) / d**0.5
        expected = scale * (A - (A @ u) * u)
        assert np.allclose(lora.A[own, 0].detach().numpy(), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kind", WRITERS)
def test_one_sheet_is_written_alike_with_others_beside_it(block, sheets, kind):
    writer = writer_of(block, sheets[0], kind=kind)
    for parameter in writer.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    both, alone = writer(*sheets), writer(*(one[:1] for one in sheets))
    delta = both.A[0].T @ both.B[0]
    assert (
        torch.allclose(delta, alone.A[0].T @ alone.B[0], atol=1e-4 * delta.abs().max().item()) and delta.abs().max() > 0
    )


@pytest.mark.parametrize("kind", ["ridge", "mean"])
def test_opposite_sheet_is_the_opposite_persona(block, sheets, kind):
    features, marks = sheets
    writer = writer_of(block, features, kind=kind)
    assert torch.allclose(writer(features, marks).A, -writer(features, -marks).A, atol=1e-5)


def test_unknown_kind_is_refused(block, sheets):
    with pytest.raises(ValueError, match="kind is 'dice'. Choose of ridge, mean, perceiver"):
        writer_of(block, sheets[0], kind="dice")
