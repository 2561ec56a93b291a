"""What the head learns of a micro-batch is the positions that weigh something, each with its weight in the total."""

import torch

from megatron_speech.model.targets import TOKENS, HeadTargets, Losses
from megatron_speech.ops.cross_entropy import LinearLoss

LABELS = torch.tensor([[5, -100, 7, 2], [9, 4, -100, 1]])
WEIGHTS = torch.tensor([[0.5, 0.0, 1.0, 2.0], [-1.0, 1.0, 0.0, 0.25]])
# Document group · 3 + modality; -1 where nothing is learned.
GROUPS = torch.tensor([[0, -1, 4, 2], [3, 1, -1, 5]], dtype=torch.int32)


def test_targets_are_the_positions_with_a_weight_of_either_sign():
    targets = HeadTargets.build(LABELS, WEIGHTS, GROUPS, scales=[0.25], label_smoothing=0.1, z_loss=1e-3)
    assert targets.rows.tolist() == [0, 2, 3, 4, 5, 7]
    assert targets.labels.tolist() == [5, 7, 2, 9, 4, 1]
    assert targets.loss_weights.tolist() == [0.5, 1.0, 2.0, -1.0, 1.0, 0.25]
    assert torch.equal(targets.weights, targets.loss_weights * 0.25)
    assert targets.groups.tolist() == [0, 4, 2, 3, 1, 5] and targets.groups.dtype == torch.int32
    assert (targets.label_smoothing, targets.z_loss) == (0.1, 1e-3)


def test_a_modality_that_counts_for_nothing_is_no_target():
    targets = HeadTargets.build(LABELS, WEIGHTS, GROUPS, scales=[2.0, 0.0, 4.0])
    assert targets.rows.tolist() == [0, 3, 4, 7]
    assert targets.weights.tolist() == [1.0, 8.0, -2.0, 1.0]
    assert targets.loss_weights.tolist() == [0.5, 2.0, -1.0, 0.25]


def test_the_total_is_the_sum_of_the_losses_and_of_one_that_loss():
    parts = [LinearLoss(torch.tensor(value), torch.zeros(1), torch.zeros(1)) for value in (1.5, 2.0)]
    assert Losses({TOKENS: parts[0], "other": parts[1]}).total == 3.5
    assert Losses({TOKENS: parts[0]}).total is parts[0].total
