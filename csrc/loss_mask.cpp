// Loss mask on the CPU: one pass over each row, and the emulation of the CUDA kernels for the tests.
#include "loss_mask.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace megatron_speech {
namespace {

// One row. `valid` becomes false when a token has no modality; which one is looked up afterwards. `kSingle` knows at
// compile time that there is one stream.
template <bool kSingle>
class Row {
  public:
    Row(const LossMaskProblem& p, int64_t row)
        : p_(p),
          streams_(kSingle ? 1 : p.streams),
          tokens_(p.tokens + row * (p.seq_length + 1) * streams()),
          labels_(p.labels + row * p.seq_length * streams()),
          loss_weights_(p.loss_weights + row * p.seq_length * streams()),
          position_ids_(p.position_ids + row * p.seq_length),
          group_ids_(p.group_ids + row * p.seq_length * streams()) {
        for (int i = 0; i < kModalities; ++i) {
            weights_[0][i] = p.weights[i];
            weights_[1][i] = p.weights[kModalities + i];
        }
        for (int64_t at = 0; at < streams(); ++at) check(at);
    }

    bool valid = true;
    int64_t loss_tokens = 0, prompt_tokens = 0;

    // Columns [start, stop) hold a document (its in-row part), which goes on beyond the row where `cut`.
    void document(int64_t start, int64_t stop, bool cut, int32_t group, uint8_t flags) {
        if (start == stop) return;
        // The last column of a whole document has no label.
        const int64_t labelled = flags & kUnlearned ? start : (cut ? stop : stop - 1);
        int64_t prompted = start;                        // columns below it have a label in the prompt
        if (p_.prompt_end_id >= 0 && !(flags & kPromptless)) {
            const int64_t prompt_end_id = prompt_end_of(p_, flags);
            int64_t prompt_end = start;
            while (prompt_end < stop && tokens_[prompt_end * streams()] != prompt_end_id) ++prompt_end;
            prompted = prompt_end == stop ? labelled : std::min(prompt_end, labelled);
            prompt_tokens += std::min(prompt_end + 1, stop) - start;
        }
        learn(start, start, prompted, weights_[1], group);
        learn(prompted, start, labelled, weights_[0], group);
        ignore(labelled, start, stop);
    }

    void ignore(int64_t begin, int64_t start, int64_t end) {
        for (int64_t at = begin * streams(); at < end * streams(); ++at) {
            check(at + streams());
            labels_[at] = kIgnoreLabel;
            loss_weights_[at] = 0.0f;
            if (kSingle) position_ids_[at] = at - start;
            group_ids_[at] = kNoGroup;
        }
        if (!kSingle) number(begin, start, end);
    }

  private:
    int64_t streams() const { return kSingle ? 1 : streams_; }

    void learn(int64_t begin, int64_t start, int64_t end, const float* weights, int32_t group) {
        const uint64_t vocabulary = static_cast<uint64_t>(p_.vocabulary);
        const int32_t group_base = group * kModalities;
        const uint8_t* const modality_of = p_.modality_table;
        const int64_t* const following = tokens_ + streams();
        int64_t* const labels = labels_;
        float* const loss_weights = loss_weights_;
        int64_t* const position_ids = position_ids_;
        int32_t* const group_ids = group_ids_;
        int64_t learned_tokens = 0;
        bool all_valid = true;
        // One loop over the elements: nested loops over steps and streams cost one stream more than twice the time.
        for (int64_t at = begin * streams(); at < end * streams(); ++at) {
            const int64_t next = following[at];
            const bool known = static_cast<uint64_t>(next) < vocabulary;
            const int modality = modality_of[known ? next : 0];
            all_valid &= known & (modality < kModalities);
            const float weight = weights[modality & 3];
            const bool learned = weight != 0.0f;
            learned_tokens += learned;
            labels[at] = learned ? next : kIgnoreLabel;
            loss_weights[at] = weight;
            if (kSingle) position_ids[at] = at - start;
            group_ids[at] = learned ? group_base + modality : kNoGroup;
        }
        if (!kSingle) number(begin, start, end);
        valid &= all_valid;
        loss_tokens += learned_tokens;
    }

    void number(int64_t begin, int64_t start, int64_t end) {
        for (int64_t column = begin; column < end; ++column) position_ids_[column] = column - start;
    }

    void check(int64_t at) {
        const int64_t id = tokens_[at];
        const bool known = static_cast<uint64_t>(id) < static_cast<uint64_t>(p_.vocabulary);
        valid &= known & (p_.modality_table[known ? id : 0] < kModalities);
    }

    const LossMaskProblem& p_;
    const int64_t streams_;
    const int64_t* tokens_;
    int64_t* labels_;
    float* loss_weights_;
    int64_t* position_ids_;
    int32_t* group_ids_;
    float weights_[2][kModalities + 1] = {};  // by whether in the prompt, and modality; one spare for `& 3`
};

// Runs the threads of one stretch between barriers in either order: the result must not depend on it.
template <typename Body>
void each(int64_t count, bool reversed, const Body& body) {
    for (int64_t i = 0; i < count; ++i) body(reversed ? count - 1 - i : i);
}

// Shared memory starts out undefined on a GPU; here it starts as a value that no right result contains.
template <typename Shared>
void poison(Shared* shared) {
    std::memset(shared, 0xA5, sizeof(Shared));
}

template <int kThreads>
void emulate(LossMaskProblem p, bool reversed) {
    using Documents = DocumentKernel<kThreads>;
    using Positions = PositionKernel<kThreads>;
    std::vector<int32_t> prompt_ends(p.documents, -1), row_is_cut(p.rows, -1);
    p.prompt_ends = prompt_ends.data();
    p.row_is_cut = row_is_cut.data();
    std::fill_n(p.counts, static_cast<int>(kCounts), 0);
    *p.invalid = 0;
    if (p.rows == 0) {
        p.cu_seqlens[0] = 0;
        return;
    }
    each(p.rows, reversed, [&](int64_t row) {
        typename Documents::Shared s;
        poison(&s);
        int from = 0;
        each(kThreads, reversed, [&](int64_t t) { Documents::sum_runs(p, s, row, static_cast<int>(t)); });
        for (int distance = 1; distance < kThreads; distance *= 2, from = 1 - from) {
            each(kThreads, reversed, [&](int64_t t) { Documents::scan(p, s, static_cast<int>(t), distance, from); });
        }
        each(kThreads, reversed, [&](int64_t t) { Documents::write(p, s, row, static_cast<int>(t), from); });
    });
    if (p.prompt_end_id >= 0) {
        each(p.rows * Tile<kThreads>::per_row(p.seq_length), reversed, [&](int64_t block) {
            each(kThreads, reversed,
                 [&](int64_t t) { PromptKernel<kThreads>::find(p, block, static_cast<int>(t)); });
        });
    }
    const bool vector = outputs_are_aligned(p), single = p.streams == 1;
    each(p.rows * Tile<kThreads>::per_row(p.seq_length * p.streams), reversed, [&](int64_t block) {
        typename Positions::Shared s;
        poison(&s);
        each(kThreads, reversed, [&](int64_t t) { Positions::begin(p, s, block, static_cast<int>(t)); });
        each(kThreads, reversed, [&](int64_t t) {
            const int thread = static_cast<int>(t);
            if (single) {
                vector ? Positions::template compute<true, true>(p, s, block, thread)
                       : Positions::template compute<false, true>(p, s, block, thread);
            } else {
                vector ? Positions::template compute<true, false>(p, s, block, thread)
                       : Positions::template compute<false, false>(p, s, block, thread);
            }
        });
        each(kThreads, reversed, [&](int64_t t) { Positions::end(p, s, static_cast<int>(t)); });
    });
}

// A function of its own for each instance: inlined into one, their values would not all find a register.
template <bool kSingle>
[[gnu::noinline]] bool mask_rows(const LossMaskProblem& p) {
    const int64_t seq_length = p.seq_length;
    bool valid = true;
    std::fill_n(p.counts, static_cast<int>(kCounts), 0);
    *p.invalid = 0;
    int32_t* boundary = p.cu_seqlens;
    *boundary++ = 0;
    for (int64_t row = 0; row < p.rows; ++row) {
        Row<kSingle> out(p, row);
        int64_t offset = 0;
        for (int32_t d = p.row_pointers[row]; d < p.row_pointers[row + 1]; ++d) {
            const int64_t start = std::min(offset, seq_length);
            offset += p.document_lengths[d];
            const int64_t stop = std::min(offset, seq_length);
            out.document(start, stop, offset > seq_length, p.document_groups[d], flags_of(p, d));
            *boundary++ = static_cast<int32_t>(row * seq_length + stop);
        }
        const int64_t used = std::min(offset, seq_length);
        out.ignore(used, used, seq_length);
        *boundary++ = static_cast<int32_t>((row + 1) * seq_length);
        p.counts[kDocumentTokens] += used;
        p.counts[kPadTokens] += seq_length - used;
        p.counts[kLossTokens] += out.loss_tokens;
        p.counts[kPromptTokens] += out.prompt_tokens;
        valid &= out.valid;
    }
    return valid;
}

}  // namespace

bool loss_mask_cpu(const LossMaskProblem& p) { return p.streams == 1 ? mask_rows<true>(p) : mask_rows<false>(p); }

void loss_mask_emulated(const LossMaskProblem& p, int threads, bool reversed) {
    threads == 4 ? emulate<4>(p, reversed) : emulate<256>(p, reversed);
}

}  // namespace megatron_speech
