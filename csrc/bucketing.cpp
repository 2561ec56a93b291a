// Length buckets: what is meant, and a slow equal, is in megatron_speech/data/sequences/bucketing.py.
#include "bucketing.h"

#include <algorithm>
#include <utility>

namespace megatron_speech {
namespace {

struct Batch {
    uint64_t key;  // of its place among the batches of its window
    int64_t begin, end;
};

}  // namespace

PackedSegments pack_bucket(const int32_t* lengths, const int32_t* targets, int64_t count, int64_t max_tokens,
                           int64_t window, std::vector<int64_t>* oversize) {
    PackedSegments out;
    out.seq_ptr.push_back(0);
    std::vector<int64_t> members;
    std::vector<Batch> batches;
    const auto flush = [&] {
        const int64_t base = members.empty() ? 0 : members.front();
        std::stable_sort(members.begin(), members.end(),
                         [&](int64_t a, int64_t b) { return targets[a] < targets[b]; });
        batches.clear();
        int64_t longest = 0, begin = 0;
        const int64_t size = static_cast<int64_t>(members.size());
        for (int64_t k = 0; k < size; ++k) {
            const int64_t length = lengths[members[static_cast<size_t>(k)]];
            longest = std::max(longest, length);
            if ((k - begin + 1) * longest > max_tokens) {
                batches.push_back({0, begin, k});
                begin = k;
                longest = length;
            }
        }
        if (begin < size) batches.push_back({0, begin, size});
        for (Batch& batch : batches) {
            batch.key = splitmix64(static_cast<uint64_t>(members[static_cast<size_t>(batch.begin)] - base));
        }
        std::sort(batches.begin(), batches.end(), [](const Batch& a, const Batch& b) { return a.key < b.key; });
        for (const Batch& batch : batches) {
            for (int64_t k = batch.begin; k < batch.end; ++k) {
                const int64_t member = members[static_cast<size_t>(k)];
                out.position.push_back(member);
                out.start.push_back(0);
                out.length.push_back(lengths[member]);
            }
            out.seq_ptr.push_back(static_cast<int64_t>(out.position.size()));
        }
        members.clear();
    };
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (lengths[i] == 0) continue;
        if (lengths[i] > max_tokens) {
            oversize->push_back(i);
            continue;
        }
        if (tokens + lengths[i] > window * max_tokens) {
            flush();
            tokens = 0;
        }
        tokens += lengths[i];
        members.push_back(i);
    }
    flush();
    return out;
}

}  // namespace megatron_speech
