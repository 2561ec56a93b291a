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

}  // namespace megatron_speech
