from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from loss_mask_cases import PATHS, Case, differences, make_case, oracle, paths, random_case

from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension, extension_status
from megatron_speech.ops.loss_mask import (
    PROMPTLESS,
    TEXT_TARGET,
    UNLEARNED,
    LossPolicy,
    MaskedBatch,
    _emulate_cuda,
    loss_mask,
)

needs_extension = pytest.mark.skipif(extension() is None, reason=f"compiled extension {extension_status()}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TEXT, AUDIO, SPECIAL, PROMPT_END, SPEECH_END, PAD = 0, 10, 20, 21, 22, 23
TABLE = np.repeat([0, 1, 2], 10)
SFT = LossPolicy(prompt=0.0, prompt_end_id=PROMPT_END)
IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpp", marks=needs_extension),
    pytest.param("emulated", marks=needs_extension),
]


def run(case: Case, implementation: str) -> MaskedBatch:
    if implementation == "emulated":
        return _emulate_cuda(*case.inputs)
    return loss_mask(*case.inputs, implementation=implementation)


def case_of(tokens: list[list[int]], rows: list[list[int]], policy: LossPolicy) -> Case:
    """Rows of S + 1 tokens each, the last one the look-ahead."""
    return make_case(rows, len(tokens[0]) - 1, policy, tokens=np.array(tokens), modality_table=TABLE)


# ---- Agreement -------------------------------------------------------------------------------------------------------


def test_reference_agrees_with_a_per_token_oracle_on_random_cases():
    rng = np.random.default_rng(1)
    for index in range(600):
        case = random_case(rng)
        found = loss_mask(*case.inputs, implementation="reference").tensors()
        for name, expected in oracle(case).items():
            assert found[name].flatten().tolist() == expected, f"case {index}: {name}"


@needs_extension
def test_cpp_and_the_cuda_code_agree_with_the_reference_on_random_cases():
    rng = np.random.default_rng(100)
    met = Counter()
    for index in range(1000):
        case = random_case(rng)
        met.update((path, index % 8) for path in paths(case))
        expected = loss_mask(*case.inputs, implementation="reference")
        assert not differences(loss_mask(*case.inputs, implementation="cpp"), expected), f"C++, case {index}"
        # Blocks of 4 threads meet many blocks and long runs per thread; the order of threads must not matter.
        small = _emulate_cuda(*case.inputs, threads=4, reverse=index % 2 == 0)
        assert not differences(small, expected), f"CUDA code with small blocks, case {index}"
        if index % 4 == 0:
            full = _emulate_cuda(*case.inputs, threads=256, reverse=index % 8 == 0)
            assert not differences(full, expected), f"CUDA code with full blocks, case {index}"
    # Every path has been taken under every order and size of blocks.
    assert min(met[path, order] for path in PATHS for order in range(8)) > 0, met


@needs_extension
def test_the_cuda_code_agrees_on_rows_of_several_full_blocks():
    rng = np.random.default_rng(3)
    for seq_length in (1023, 1024, 1025, 4096, 5001):
        for policy in (LossPolicy(), LossPolicy(prompt=0.0, prompt_end_id=5)):
            rows = [rng.integers(0, 12, 900).tolist(), [], [3 * seq_length], [0] * 5000 + [7] * 300, [seq_length]]
            case = make_case(rows, seq_length, policy)
            expected = loss_mask(*case.inputs, implementation="reference")
            assert not differences(loss_mask(*case.inputs, implementation="cpp"), expected)
            for reverse in (False, True):
                assert not differences(_emulate_cuda(*case.inputs, reverse=reverse), expected)


@needs_cuda
def test_cuda_agrees_with_the_reference_on_random_cases():
    rng = np.random.default_rng(100)
    for index in range(1000):
        case = random_case(rng)
        expected = loss_mask(*case.inputs, implementation="reference")
        on_device = dataclasses.replace(
            case, **{name: value.cuda() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
        )
        assert not differences(loss_mask(*on_device.inputs, implementation="cuda"), expected), f"case {index}"


@needs_cuda
def test_cuda_agrees_on_a_row_of_a_million_tokens():
    rng = np.random.default_rng(4)
    for seq_length in (1 << 20, (1 << 20) - 3):
        case = make_case([rng.integers(0, 900, 3000).tolist()], seq_length, LossPolicy(prompt=0.0, prompt_end_id=5))
        expected = loss_mask(*case.inputs, implementation="reference")
        inputs = [value.cuda() if isinstance(value, torch.Tensor) else value for value in case.inputs]
        assert not differences(loss_mask(*inputs, implementation="cuda"), expected)


# ---- What it means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sft_learns_exactly_the_tokens_after_speech_start_and_speech_end(implementation):
    # text, <speech_start>, two codes, <speech_end>; then a second document; then padding.
    row = [TEXT, TEXT + 1, PROMPT_END, AUDIO, AUDIO + 1, SPEECH_END, TEXT, PROMPT_END, AUDIO, SPEECH_END, PAD, PAD, PAD]
    out = run(case_of([row], [[6, 4]], SFT), implementation)
    assert out.labels.tolist() == [
        [-100, -100, AUDIO, AUDIO + 1, SPEECH_END, -100, -100, AUDIO, SPEECH_END, -100, -100, -100]
    ]
    assert out.loss_weights.tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]]
    assert out.group_ids.tolist() == [[-1, -1, 1, 1, 2, -1, -1, 4, 5, -1, -1, -1]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]]
    assert out.cu_seqlens.tolist() == [0, 6, 10, 12]
    assert out.counts.tolist() == [10, 2, 5, 5]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_first_prompt_end_of_a_document_closes_its_prompt(implementation):
    out = run(case_of([[TEXT, PROMPT_END, AUDIO, PROMPT_END, AUDIO, PAD]], [[5]], SFT), implementation)
    assert out.labels.tolist() == [[-100, AUDIO, PROMPT_END, AUDIO, -100]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_without_a_prompt_end_is_all_prompt_and_its_neighbour_is_not_touched(implementation):
    out = run(case_of([[TEXT, AUDIO, AUDIO, PROMPT_END, AUDIO, PAD]], [[3, 2]], SFT), implementation)
    assert out.labels.tolist() == [[-100, -100, -100, AUDIO, -100]]
    assert out.counts.tolist() == [5, 0, 1, 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_end_in_the_padding_or_the_look_ahead_closes_no_prompt(implementation):
    out = run(case_of([[TEXT, AUDIO, PROMPT_END, PROMPT_END]], [[2]], SFT), implementation)
    assert out.counts.tolist() == [2, 1, 0, 2]
    out = run(case_of([[TEXT, AUDIO, AUDIO, PROMPT_END]], [[9]], SFT), implementation)
    assert out.counts.tolist() == [3, 0, 0, 3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_follow_the_modality_of_the_label_and_the_prompt(implementation):
    policy = LossPolicy(text=0.5, audio=2.0, special=0.25, prompt=0.5, prompt_end_id=PROMPT_END)
    out = run(case_of([[TEXT, TEXT, PROMPT_END, AUDIO, TEXT, SPEECH_END, PAD]], [[6]], policy), implementation)
    assert out.loss_weights.tolist() == [[0.25, 0.125, 2.0, 0.5, 0.25, 0.0]]
    assert out.group_ids.tolist() == [[0, 2, 1, 0, 2, -1]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pretraining_learns_every_token_of_a_cut_document_through_the_look_ahead(implementation):
    cut = run(case_of([[TEXT, AUDIO, AUDIO + 1, AUDIO + 2, AUDIO + 3]], [[1, 9]], LossPolicy()), implementation)
    assert cut.labels.tolist() == [[-100, AUDIO + 1, AUDIO + 2, AUDIO + 3]]
    assert cut.cu_seqlens.tolist() == [0, 1, 4, 4]
    # The rest of that document, as the next row's first segment, learns no token a second time.
    rest = run(case_of([[AUDIO + 3, AUDIO + 4, PAD, PAD, PAD]], [[2]], LossPolicy()), implementation)
    assert rest.labels.tolist() == [[AUDIO + 4, -100, -100, -100]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_last_position_of_a_document_that_ends_at_the_edge_has_no_label(implementation):
    # Also when a further document starts behind the edge: the look-ahead is not its neighbour's token.
    for rows in ([[4]], [[4, 3]], [[4, 0, 3]]):
        out = run(case_of([[TEXT, AUDIO, AUDIO + 1, AUDIO + 2, AUDIO + 3]], rows, LossPolicy()), implementation)
        assert out.labels.tolist() == [[AUDIO, AUDIO + 1, AUDIO + 2, -100]]
        assert out.cu_seqlens.tolist() == [0, 4] + [4] * len(rows[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_documents_are_empty_segments_and_change_nothing_else(implementation):
    tokens = [[TEXT, AUDIO, AUDIO, TEXT, PAD]]
    plain = run(case_of(tokens, [[2, 1]], LossPolicy()), implementation)
    case = case_of(tokens, [[0, 0, 2, 0, 1, 0]], LossPolicy())
    case.document_groups = torch.tensor([9, 9, 0, 9, 1, 9], dtype=torch.int32)
    with_empty = run(case, implementation)
    assert with_empty.cu_seqlens.tolist() == [0, 0, 0, 2, 2, 3, 3, 4]
    assert set(differences(with_empty, plain)) == {"cu_seqlens"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [[], [[]], [[], []], [[0]], [[0, 0], [], [0]]])
def test_rows_without_tokens_are_all_padding(implementation, rows):
    out = run(make_case(rows, 3, LossPolicy()), implementation)
    assert out.counts.tolist() == [0, 3 * len(rows), 0, 0]
    assert (out.labels == -100).all() and (out.group_ids == -1).all() and (out.loss_weights == 0).all()
    assert out.position_ids.tolist() == [[0, 1, 2]] * len(rows)
    assert out.cu_seqlens[-1] == 3 * len(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_position_per_row_works(implementation):
    out = run(case_of([[TEXT, AUDIO], [TEXT, AUDIO]], [[1], [2]], LossPolicy()), implementation)
    assert out.labels.tolist() == [[-100], [AUDIO]]


@needs_extension
@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_outputs_can_be_reused_between_calls(implementation):
    rng = np.random.default_rng(5)
    out = MaskedBatch.allocate(2, 16, 4)
    for tensor in out.tensors().values():
        tensor.fill_(77)
    addresses = [tensor.data_ptr() for tensor in out.tensors().values()]
    for _ in range(3):
        case = make_case([rng.integers(0, 9, 2).tolist(), rng.integers(0, 9, 2).tolist()], 16, SFT)
        returned = loss_mask(*case.inputs, implementation=implementation, out=out)
        assert returned is out and addresses == [tensor.data_ptr() for tensor in out.tensors().values()]
        assert not differences(out, loss_mask(*case.inputs, implementation="reference"))


@needs_extension
def test_inputs_that_are_views_give_the_same_result():
    case = make_case([[5, 4], [3]], 11, SFT)
    wide = torch.zeros(2, 30, dtype=torch.int64)
    wide[:, 7:19] = case.tokens
    viewed = dataclasses.replace(case, tokens=wide[:, 7:19])
    assert not differences(loss_mask(*viewed.inputs), loss_mask(*case.inputs, implementation="reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_promptless_document_learns_everything_and_its_neighbours_keep_their_prompts(implementation):
    case = case_of([[TEXT, TEXT, TEXT, PROMPT_END, AUDIO, TEXT, TEXT, PAD]], [[2, 3, 2]], SFT)
    case.document_flags = torch.tensor([PROMPTLESS, 0, 0], dtype=torch.uint8)
    out = run(case, implementation)
    assert out.labels.tolist() == [[TEXT, -100, -100, AUDIO, -100, -100, -100]]
    assert out.counts.tolist() == [7, 0, 2, 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_with_a_text_target_learns_what_follows_its_own_prompt_end(implementation):
    # <speech_start>, a code, <target_text>, text, </target_text>; beside it a document whose target is speech.
    row = [PROMPT_END, AUDIO, SPEECH_END, TEXT, TEXT + 1, SPEECH_END, TEXT, PROMPT_END, AUDIO, PAD]
    policy = dataclasses.replace(SFT, text_prompt_end_id=TEXT)
    case = case_of([row], [[6, 3]], policy)
    case.document_flags = torch.tensor([TEXT_TARGET, 0], dtype=torch.uint8)
    out = run(case, implementation)
    assert out.labels.tolist() == [[-100, -100, -100, TEXT + 1, SPEECH_END, -100, -100, AUDIO, -100]]
    assert out.counts.tolist() == [9, 0, 3, 6]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_learned_of_an_unlearned_document_which_is_a_document_all_the_same(implementation):
    case = case_of([[TEXT, AUDIO, PAD, PAD, PAD, TEXT, AUDIO]], [[2, 3, 9]], LossPolicy())
    case.document_flags = torch.tensor([0, UNLEARNED, 0], dtype=torch.uint8)
    out = run(case, implementation)
    assert out.labels.tolist() == [[AUDIO, -100, -100, -100, -100, AUDIO]]
    assert out.group_ids.tolist() == [[1, -1, -1, -1, -1, 7]]
    assert out.position_ids.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert out.cu_seqlens.tolist() == [0, 2, 5, 6, 6]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_stream_learns_its_own_next_id_and_stream_0_ends_the_prompt(implementation):
    # Three steps of two streams, then padding; the prompt end of stream 1 is no prompt end.
    grid = np.array(
        [[[TEXT, PROMPT_END], [PROMPT_END, AUDIO], [AUDIO, AUDIO + 1], [AUDIO + 2, SPEECH_END], [PAD, PAD]]]
    )
    out = run(make_case([[4]], 4, SFT, tokens=grid, modality_table=TABLE, streams=2), implementation)
    nothing = [-100, -100]
    assert out.labels.tolist() == [[nothing, [AUDIO, AUDIO + 1], [AUDIO + 2, SPEECH_END], nothing]]
    assert out.group_ids.tolist() == [[[-1, -1], [1, 1], [1, 2], [-1, -1]]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3]]
    assert out.cu_seqlens.tolist() == [0, 4, 4]
    assert out.counts.tolist() == [4, 0, 4, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_may_be_negative_and_one_of_0_is_no_label(implementation):
    out = run(case_of([[TEXT, TEXT, AUDIO, SPECIAL, PAD]], [[4]], LossPolicy(text=-1.0, special=0.0)), implementation)
    assert out.loss_weights.tolist() == [[-1.0, 1.0, 0.0, 0.0]]
    assert out.labels.tolist() == [[TEXT, AUDIO, -100, -100]]


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("bad", [-1, 30, 2**40, -(2**63)])
@pytest.mark.parametrize("column", [0, 2, 3, 5, 6])  # first, inside, last of a document, padding, look-ahead
def test_a_token_outside_the_table_is_refused_with_its_place(implementation, bad, column):
    tokens = np.full((2, 7), TEXT)
    tokens[1, column] = bad
    case = make_case([[3], [4]], 6, LossPolicy(), tokens=tokens, modality_table=TABLE)
    with pytest.raises(InputError, match=rf"token {bad} at row 1, column {column} is outside the 30 ids"):
        loss_mask(*case.inputs, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpp", marks=needs_extension)])
def test_an_id_without_a_modality_is_refused(implementation):
    table = TABLE.copy()
    table[TEXT] = 255
    case = make_case([[3]], 3, LossPolicy(), tokens=np.full((1, 4), TEXT), modality_table=table)
    with pytest.raises(InputError, match="token 0 at row 0, column 0 has no modality"):
        loss_mask(*case.inputs, implementation=implementation)


@needs_extension
def test_the_cuda_code_counts_what_it_cannot_refuse_and_stays_inside_its_memory():
    tokens = np.full((1, 7), AUDIO)
    tokens[0, [0, 2, 6]] = [-5, 30, 2**40]
    out = _emulate_cuda(*make_case([[4]], 6, LossPolicy(), tokens=tokens, modality_table=TABLE).inputs)
    assert out.invalid.tolist() == [3]
    assert out.labels.tolist() == [[AUDIO, -100, AUDIO, -100, -100, -100]]
    case = make_case([[2], [2]], 6, LossPolicy(), modality_table=TABLE)
    for pointers in ([0, 2, 1], [0, 1, 9], [-3, 1, 2], [2, 1, 0], [0, 0, 0]):
        broken = dataclasses.replace(case, row_pointers=torch.tensor(pointers, dtype=torch.int32))
        assert _emulate_cuda(*broken.inputs).invalid.item() > 0
    for name in ("document_lengths", "document_groups"):
        broken = dataclasses.replace(case, **{name: torch.tensor([-4, 3], dtype=torch.int32)})
        assert _emulate_cuda(*broken.inputs).invalid.item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 7, dtype=torch.int32)}, "tokens is torch.int32"),
        ({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, "at least 1 position and the look-ahead"),
        ({"row_pointers": torch.tensor([0, 2], dtype=torch.int32)}, "2 rows need 3 row_pointers"),
        ({"row_pointers": torch.tensor([0, 2, 1], dtype=torch.int32)}, "row_pointers must rise from 0 to 2"),
        ({"row_pointers": torch.tensor([0, 1, 3], dtype=torch.int32)}, "row_pointers must rise from 0 to 2"),
        ({"row_pointers": torch.tensor([1, 1, 2], dtype=torch.int32)}, "row_pointers must rise from 0 to 2"),
        ({"document_lengths": torch.tensor([3, -1], dtype=torch.int32)}, "document 1 has length -1"),
        ({"document_groups": torch.tensor([-2, 0], dtype=torch.int32)}, "document 0 has group -2"),
        ({"document_groups": torch.tensor([0], dtype=torch.int32)}, "2 document_lengths but 1 document_groups"),
        ({"modality_table": torch.zeros(0, dtype=torch.uint8)}, "modality_table is empty"),
        ({"document_flags": torch.zeros(3, dtype=torch.uint8)}, "2 document_lengths but 3 document_flags"),
        ({"document_flags": torch.zeros(2, dtype=torch.bool)}, "document_flags is torch.bool"),
        ({"tokens": torch.zeros(2, 7, 0, dtype=torch.int64)}, "tokens have 0 streams"),
    ],
)
def test_malformed_inputs_are_refused_in_a_sentence(change, message):
    case = dataclasses.replace(make_case([[3], [4]], 6, LossPolicy()), **change)
    with pytest.raises(InputError, match=message):
        loss_mask(*case.inputs)


def test_wrong_outputs_and_implementations_are_refused():
    case = make_case([[3]], 6, LossPolicy())
    with pytest.raises(InputError, match=r"out.labels is torch.int64 \(1, 5\)"):
        loss_mask(*case.inputs, out=MaskedBatch.allocate(1, 5, 1))
    with pytest.raises(InputError, match="needs tensors on cuda"):
        loss_mask(*case.inputs, implementation="cuda")
    with pytest.raises(InputError, match="'fast' is unknown"):
        loss_mask(*case.inputs, implementation="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [{"text": -2e6}, {"audio": float("nan")}, {"prompt": float("inf")}])
def test_a_policy_with_an_impossible_weight_is_refused(weights):
    with pytest.raises(InputError, match=r"must lie between -1e\+06 and 1e\+06"):
        LossPolicy(**weights)
