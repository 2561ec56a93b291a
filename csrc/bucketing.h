// Length buckets: what is meant, and a slow equal, is in megatron_speech/data/sequences/bucketing.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace megatron_speech {

// `oversize` receives the positions of documents longer than max_tokens.
PackedSegments pack_bucket(const int32_t* lengths, const int32_t* targets, int64_t count, int64_t max_tokens,
                           int64_t window, std::vector<int64_t>* oversize);

}  // namespace megatron_speech
