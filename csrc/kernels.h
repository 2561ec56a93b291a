// The CPU kernels that bindings.cpp gives to Python.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "loss_mask.h"

namespace megatron_speech {

// Fills the outputs of `p` (its workspace is not used). False when a token has no modality: outputs are then
// not to be used. Lengths, groups and row pointers have been checked by the caller.
bool loss_mask_cpu(const LossMaskProblem& p);

// The CUDA kernels' code, thread by thread, with 4 or 256 threads to a block; for tests.
void loss_mask_emulated(const LossMaskProblem& p, int threads, bool reversed);

// See megatron_speech/data/sequences/packing_kernels.py for what the fields mean.
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

uint64_t splitmix64(uint64_t x);

// A keyed permutation of 0 … count - 1 without arrays; see `permuted` in megatron_speech/data/blend/order.py.
class Permutation {
  public:
    Permutation() = default;
    Permutation(int64_t count, uint64_t key);
    uint64_t operator()(uint64_t index) const;

  private:
    static constexpr int kRounds = 8;

    // A hash of `word` in 0 … range - 1; range is below 2^32.
    static uint64_t draw(uint64_t word, uint64_t range) {
        word *= 0xBF58476D1CE4E5B9u;
        word = (word ^ (word >> 32)) * 0x94D049BB133111EBu;
        return (word >> 32) * range >> 32;
    }

    uint64_t count_ = 0, left_ = 1, right_ = 1;
    uint64_t keys_[kRounds] = {};
};

// Run s holds the elements at[s] … at[s + 1] - 1; at[0] is 0 and no run is empty.
struct ShardBounds {
    const int64_t* at;
    int64_t runs;
};

// A permutation that is local to windows of a few runs; see `windowed` in megatron_speech/data/blend/order.py.
class WindowedPermutation {
  public:
    WindowedPermutation() = default;
    WindowedPermutation(ShardBounds bounds, int64_t shards, uint64_t key);
    // Of indices that never decrease.
    int64_t operator()(int64_t index);

  private:
    void next_window();

    ShardBounds bounds_{};
    int64_t windows_ = 0, window_ = -1;
    int64_t start_ = 0, end_ = 0;    // elements of the windows before this one, and with it
    uint64_t key_ = 0;
    Permutation of_runs_, inside_;
    std::vector<int64_t> run_;       // of this window
    std::vector<int64_t> before_;    // elements of the window before each of its runs
};

// The documents of one stratum. `lengths`, `counted` (int32) and `seconds` (float) are the dataset's columns, which
// need not be aligned; documents index them. The first epoch takes `first_documents` where there are any.
struct StratumDocuments {
    const int32_t* documents;
    int64_t count;
    const int32_t* first_documents;
    int64_t first_count;
    uint64_t first_epoch;
    const void* lengths;
    const void* counted;
    const void* seconds;
    double share;
    uint64_t key;
    int64_t window_shards;  // 0: every epoch is a uniform permutation
    ShardBounds bounds, first_bounds;
};

struct OrderedDocuments {
    uint16_t* stratum;
    int32_t* document;
    int32_t* length;
    int32_t* counted;
    float* seconds;
};

// The endless order of documents, resumable; see `BlendOrder` in megatron_speech/data/blend/order.py.
class BlendOrder {
  public:
    explicit BlendOrder(std::vector<StratumDocuments> strata);
    // Fills the next `count` documents. Throws std::invalid_argument when one has no tokens that count.
    void take(int64_t count, const OrderedDocuments& out);

  private:
    struct Document {
        const int32_t* place;
        int32_t document, length, counted;
        float seconds;
    };
    struct Stratum {
        StratumDocuments given;
        uint64_t epoch;
        const int32_t* documents;  // of the epoch that is under way
        int64_t count, at;
        Permutation permutation;
        WindowedPermutation local;  // in its place where there are windows
        std::vector<Document> ahead;
        int64_t taken, served;
    };
    using Event = std::pair<double, size_t>;  // (time in tokens, stratum): of equal times the lower stratum
    using Queue = std::priority_queue<Event, std::vector<Event>, std::greater<Event>>;

    static void begin_epoch(Stratum& stratum, bool partly);
    void look_ahead(Stratum& stratum);

    std::vector<Stratum> strata_;
    Queue waiting_;  // by the time at which the next document may start
    Queue ready_;    // by the time at which it would be through
    int64_t total_ = 0;
};

}  // namespace megatron_speech
