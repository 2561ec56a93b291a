// The CPU kernels that bindings.cpp gives to Python.
#pragma once

#include <cstdint>
#include <vector>

#include "loss_mask.h"

namespace megatron_speech {

// Fills the outputs of `p` (its workspace is not used). False when a token has no modality: outputs are then
// not to be used. Lengths, groups and row pointers have been checked by the caller.
bool loss_mask_cpu(const LossMaskProblem& p);

// The CUDA kernels' code, thread by thread, with 4 or 256 threads to a block; for tests.
void loss_mask_emulated(const LossMaskProblem& p, int threads, bool reversed);

// See megatron_speech/data/packing_kernels.py for what the fields mean.
struct PackedSegments {
    std::vector<int64_t> seq_ptr;
    std::vector<int64_t> position;
    std::vector<int32_t> start;
    std::vector<int32_t> length;
};

PackedSegments pack_cut(const int32_t* lengths, int64_t count, int64_t seq_length);

// `oversize` receives the positions of documents longer than seq_length.
PackedSegments pack_fit(const int32_t* lengths, int64_t count, int64_t seq_length, int64_t open_bins,
                        std::vector<int64_t>* oversize);

// See `schedule` in megatron_speech/data/order.py. Stratum k holds costs[ptr[k]:ptr[k + 1]].
// Throws std::invalid_argument when a stratum runs out before `stop` tokens.
std::vector<int64_t> blend_order(const int32_t* costs, const int64_t* ptr, const double* shares, int64_t strata,
                                 int64_t stop);

}  // namespace megatron_speech
