// Loss mask: tokens and document lengths of a micro-batch -> labels, loss weights, position ids, group ids,
// cu_seqlens and counts. What each output means is written down in megatron_speech/ops/loss_mask.py, whose
// PyTorch reference all implementations equal element for element.
//
// This header holds the problem and the body of the CUDA kernels. The body is plain functions of (problem,
// block, thread), one for each stretch between two barriers, so that loss_mask.cu runs them on a GPU and
// loss_mask.cpp runs the same code thread by thread on a CPU: the device code's logic is tested where there
// is no GPU. The number of threads of a block is a template parameter, so that small tests meet many blocks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MS_HOST_DEVICE inline
#endif

namespace megatron_speech {

constexpr int kModalities = 3;
constexpr int64_t kIgnoreLabel = -100;
constexpr int32_t kNoGroup = -1;
constexpr int32_t kNoPromptEnd = INT32_MAX;  // a document without a prompt end is all prompt
// Positions of a row, and of the flattened batch, fit in int32 with room to spare.
constexpr int64_t kMaxSeqLength = 1 << 30;

enum Count { kDocumentTokens, kPadTokens, kLossTokens, kPromptTokens, kCounts };

// Bits of a document's flags.
constexpr uint8_t kPromptless = 1;  // has no prompt: its labels weigh what they weigh outside one
constexpr uint8_t kUnlearned = 2;   // nothing of it is learned
constexpr uint8_t kTextTarget = 4;  // its prompt ends at `text_prompt_end_id`

// Shapes: B rows, S = seq_length steps, K = streams, D documents, V = vocabulary. All arrays are dense and on one
// device. A step holds K ids, one of each stream; documents, prompts and positions count steps.
struct LossMaskProblem {
    // Inputs.
    const int64_t* tokens;             // [B, S + 1, K]
    const int32_t* document_lengths;   // [D]
    const int32_t* row_pointers;       // [B + 1]
    const int32_t* document_groups;    // [D]
    const uint8_t* document_flags;     // [D], or null where no document has any
    const uint8_t* modality_table;     // [V]
    int64_t rows;
    int64_t seq_length;
    int64_t streams;
    int64_t documents;
    int64_t vocabulary;
    int64_t prompt_end_id;             // -1: documents have no prompt
    int64_t text_prompt_end_id;        // that of documents whose target is text; not looked at where the above is -1
    float weights[2 * kModalities];    // by modality of the label: outside the prompt, then inside it
    // Outputs.
    int64_t* labels;                   // [B, S, K]
    float* loss_weights;               // [B, S, K]
    int64_t* position_ids;             // [B, S]
    int32_t* group_ids;                // [B, S, K]
    int32_t* cu_seqlens;               // [D + B + 1]
    int64_t* counts;                   // [kCounts], zeroed before the kernels
    int64_t* invalid;                  // [1], zeroed before the kernels: what a CPU implementation would refuse
    // Workspace of the CUDA kernels.
    int32_t* prompt_ends;              // [D], column of the first prompt end of each document; -1 where promptless
    int32_t* row_is_cut;               // [B], 1 where the document that holds column S - 1 goes on beyond the row
};

// ---- What differs between a GPU and its emulation --------------------------------------------------------

MS_HOST_DEVICE void atomic_min(int32_t* address, int32_t value) {
#if defined(__CUDA_ARCH__)
    atomicMin(address, value);
#else
    *address = value < *address ? value : *address;
#endif
}

MS_HOST_DEVICE void atomic_add(int64_t* address, int64_t value) {
#if defined(__CUDA_ARCH__)
    atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
#else
    *address += value;
#endif
}

// Adds every thread's value to a counter in shared memory: one atomic per warp. All threads must take part.
MS_HOST_DEVICE void block_add(int32_t* shared_counter, int32_t value) {
#if defined(__CUDA_ARCH__)
    value = __reduce_add_sync(0xffffffffu, value);
    if ((threadIdx.x & 31) == 0) atomicAdd(shared_counter, value);
#else
    *shared_counter += value;
#endif
}

// 16-byte stores of four consecutive elements; the address is 16-byte aligned.
MS_HOST_DEVICE void store4(int32_t* address, const int32_t (&v)[4]) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<int4*>(address) = make_int4(v[0], v[1], v[2], v[3]);
#else
    for (int k = 0; k < 4; ++k) address[k] = v[k];
#endif
}

MS_HOST_DEVICE void store4(float* address, const float (&v)[4]) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<float4*>(address) = make_float4(v[0], v[1], v[2], v[3]);
#else
    for (int k = 0; k < 4; ++k) address[k] = v[k];
#endif
}

MS_HOST_DEVICE void store4(int64_t* address, const int64_t (&v)[4]) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<longlong2*>(address) = make_longlong2(v[0], v[1]);
    *reinterpret_cast<longlong2*>(address + 2) = make_longlong2(v[2], v[3]);
#else
    for (int k = 0; k < 4; ++k) address[k] = v[k];
#endif
}

// ---- Shared by all kernels -------------------------------------------------------------------------------

// The documents of a row. Row pointers that are not monotone or point outside must not lead to a write out of
// bounds: they are clamped here, and counted as invalid by `DocumentKernel`.
struct RowDocuments {
    int32_t begin, end;
    bool clamped;
};

MS_HOST_DEVICE RowDocuments row_documents(const LossMaskProblem& p, int64_t row) {
    const int64_t begin = p.row_pointers[row], end = p.row_pointers[row + 1];
    const int64_t safe_begin = begin < 0 ? 0 : (begin > p.documents ? p.documents : begin);
    const int64_t safe_end = end < safe_begin ? safe_begin : (end > p.documents ? p.documents : end);
    const bool outer = (row == 0 && begin != 0) || (row == p.rows - 1 && end != p.documents);
    return {static_cast<int32_t>(safe_begin), static_cast<int32_t>(safe_end),
            safe_begin != begin || safe_end != end || outer};
}

MS_HOST_DEVICE uint8_t flags_of(const LossMaskProblem& p, int32_t document) {
    return p.document_flags ? p.document_flags[document] : uint8_t{0};
}

MS_HOST_DEVICE int64_t prompt_end_of(const LossMaskProblem& p, uint8_t flags) {
    return flags & kTextTarget ? p.text_prompt_end_id : p.prompt_end_id;
}

// First index in [low, high] whose end lies beyond `position`; the row's end, `ends[padding]`, always does.
// Empty documents are passed over, however many there are.
MS_HOST_DEVICE int32_t segment_of(const int32_t* ends, int32_t low, int32_t high, int32_t position) {
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (ends[middle] > position) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// ---- Kernel 1: one block per row. Document ends by a block-wide scan -> cu_seqlens -------------------------
//
// Each thread sums a run of consecutive documents, the runs are scanned (Hillis & Steele), each thread then
// walks its run again and writes. Sums saturate at S + 1, which keeps them associative and in int32, and still
// tells "ends at the row's edge" (S) from "goes on beyond it" (S + 1).

template <int kThreads>
struct DocumentKernel {
    struct Shared {
        int32_t sums[2][kThreads];
    };

    static MS_HOST_DEVICE int32_t saturating_add(const LossMaskProblem& p, int32_t a, int32_t b) {
        const int64_t sum = static_cast<int64_t>(a) + b;
        return sum > p.seq_length ? static_cast<int32_t>(p.seq_length + 1) : static_cast<int32_t>(sum);
    }

    static MS_HOST_DEVICE int32_t length_of(const LossMaskProblem& p, int32_t document) {
        const int32_t length = p.document_lengths[document];
        return length < 0 ? 0 : length;
    }

    static MS_HOST_DEVICE void run_of(const RowDocuments& row, int thread, int32_t* begin, int32_t* end) {
        const int64_t count = row.end - row.begin, per_thread = (count + kThreads - 1) / kThreads;
        const int64_t first = thread * per_thread, last = first + per_thread;
        *begin = row.begin + static_cast<int32_t>(first < count ? first : count);
        *end = row.begin + static_cast<int32_t>(last < count ? last : count);
    }

    static MS_HOST_DEVICE void sum_runs(const LossMaskProblem& p, Shared& s, int64_t row, int thread) {
        const RowDocuments documents = row_documents(p, row);
        int32_t begin, end, sum = 0;
        run_of(documents, thread, &begin, &end);
        int64_t invalid = thread == 0 && documents.clamped ? 1 : 0;
        for (int32_t d = begin; d < end; ++d) {
            sum = saturating_add(p, sum, length_of(p, d));
            invalid += p.document_lengths[d] < 0 || p.document_groups[d] < 0;
        }
        s.sums[0][thread] = sum;
        if (invalid) atomic_add(p.invalid, invalid);
        if (thread == 0) p.row_is_cut[row] = 0;
    }

    // One step of the inclusive scan, at distances 1, 2, 4, … below kThreads; the buffers change roles each time.
    static MS_HOST_DEVICE void scan(const LossMaskProblem& p, Shared& s, int thread, int distance, int from) {
        const int32_t* sums = s.sums[from];
        s.sums[1 - from][thread] =
            thread >= distance ? saturating_add(p, sums[thread - distance], sums[thread]) : sums[thread];
    }

    static MS_HOST_DEVICE void write(const LossMaskProblem& p, Shared& s, int64_t row, int thread, int from) {
        const int32_t* sums = s.sums[from];
        const RowDocuments documents = row_documents(p, row);
        const int32_t seq_length = static_cast<int32_t>(p.seq_length);
        const int32_t base = static_cast<int32_t>(row * p.seq_length);
        int32_t* row_ends = p.cu_seqlens + 1 + row;  // indexed by document; the row's own end follows its last one
        int32_t begin, end, offset = thread ? sums[thread - 1] : 0;
        run_of(documents, thread, &begin, &end);
        for (int32_t d = begin; d < end; ++d) {
            const int32_t start = offset;
            offset = saturating_add(p, offset, length_of(p, d));
            row_ends[d] = base + (offset < seq_length ? offset : seq_length);
            p.prompt_ends[d] = flags_of(p, d) & kPromptless ? -1 : kNoPromptEnd;
            if (start < seq_length && offset > seq_length) p.row_is_cut[row] = 1;
        }
        if (thread == kThreads - 1) {
            const int32_t used = sums[thread] < seq_length ? sums[thread] : seq_length;
            row_ends[documents.end] = base + seq_length;
            if (row == 0) p.cu_seqlens[0] = 0;
            atomic_add(&p.counts[kDocumentTokens], used);
            atomic_add(&p.counts[kPadTokens], seq_length - used);
        }
    }
};

// ---- Tiles: kernels 2 and 3 give each block a stretch of one row -------------------------------------------
//
// The stretch counts elements: the row's steps for kernel 2, which reads stream 0, and its steps × streams for kernel 3.

constexpr int kPerThread = 4;  // consecutive elements: one 16-byte store of a 4-byte output

template <int kThreads>
struct Tile {
    static constexpr int kElements = kThreads * kPerThread;

    int64_t row;
    int32_t begin, end;        // elements of the row
    int32_t first_document;    // of the row
    int32_t padding;           // segment number of the row's padding; segments are the documents, then the padding
    const int32_t* ends;       // flattened end of each segment of the row; ends[-1] is the row's begin

    // Tiles of a row of `elements`.
    static MS_HOST_DEVICE int64_t per_row(int64_t elements) { return (elements + kElements - 1) / kElements; }

    static MS_HOST_DEVICE Tile of_block(const LossMaskProblem& p, int64_t block, int64_t elements) {
        const int64_t tiles = per_row(elements), row = block / tiles, begin = block % tiles * kElements;
        const int64_t end = begin + kElements < elements ? begin + kElements : elements;
        const RowDocuments documents = row_documents(p, row);
        return {row, static_cast<int32_t>(begin), static_cast<int32_t>(end), documents.begin,
                documents.end - documents.begin, p.cu_seqlens + 1 + row + documents.begin};
    }
};

// ---- Kernel 2, only where documents have prompts: the first prompt end of each document -------------------
//
// A document holds about one prompt end, so the search for its document and the atomic are rare; the kernel
// is one read of stream 0 of the tokens. A promptless document's -1 stays below any column.

template <int kThreads>
struct PromptKernel {
    static MS_HOST_DEVICE void find(const LossMaskProblem& p, int64_t block, int thread) {
        const Tile<kThreads> tile = Tile<kThreads>::of_block(p, block, p.seq_length);
        const int64_t* tokens = p.tokens + tile.row * (p.seq_length + 1) * p.streams;
        const int32_t base = static_cast<int32_t>(tile.row * p.seq_length);
        for (int32_t column = tile.begin + thread; column < tile.end; column += kThreads) {
            const int64_t token = tokens[column * p.streams];
            if (token != p.prompt_end_id && token != p.text_prompt_end_id) continue;
            const int32_t segment = segment_of(tile.ends, 0, tile.padding, base + column);
            if (segment == tile.padding) continue;
            const int32_t document = tile.first_document + segment;
            if (token == prompt_end_of(p, flags_of(p, document))) atomic_min(&p.prompt_ends[document], column);
        }
    }
};

// ---- Kernel 3: everything that has a value per position ----------------------------------------------------
//
// `single` knows at compile time that there is one stream: an element of a row is then its column.

template <int kThreads>
struct PositionKernel {
    struct Shared {
        int32_t first_segment, last_segment;  // that the tile touches: narrows the search of every thread
        int32_t loss_tokens, prompt_tokens, invalid;
    };

    static MS_HOST_DEVICE void begin(const LossMaskProblem& p, Shared& s, int64_t block, int thread) {
        const Tile<kThreads> tile = Tile<kThreads>::of_block(p, block, p.seq_length * p.streams);
        const int32_t base = static_cast<int32_t>(tile.row * p.seq_length);
        const int32_t streams = static_cast<int32_t>(p.streams);
        if (thread == 0) {
            s.first_segment = segment_of(tile.ends, 0, tile.padding, base + tile.begin / streams);
            s.loss_tokens = s.prompt_tokens = s.invalid = 0;
        }
        // Another warp than the above, so that the two searches overlap.
        if (thread == kThreads - 1) {
            s.last_segment = segment_of(tile.ends, 0, tile.padding, base + (tile.end - 1) / streams);
        }
    }

    // `vector`: S is a multiple of 4 and the outputs are 16-byte aligned, so that four elements are one store.
    template <bool vector, bool single>
    static MS_HOST_DEVICE void compute(const LossMaskProblem& p, Shared& s, int64_t block, int thread) {
        const int32_t streams = single ? 1 : static_cast<int32_t>(p.streams);
        const Tile<kThreads> tile = Tile<kThreads>::of_block(p, block, p.seq_length * streams);
        const int64_t* tokens = p.tokens + tile.row * (p.seq_length + 1) * streams;
        const int32_t base = static_cast<int32_t>(tile.row * p.seq_length);
        const int32_t begin = tile.begin + thread * kPerThread;
        const bool has_prompts = p.prompt_end_id >= 0;
        int32_t loss_tokens = 0, prompt_tokens = 0, invalid = 0;

        // Column 0 is nobody's label, so it is checked by itself; all others are checked as labels.
        if (begin == 0) {
            for (int32_t k = 0; k < streams; ++k) invalid += modality_of(p, tokens[k]) >= kModalities;
        }

        if (begin < tile.end) {
            int64_t labels[kPerThread] = {}, position_ids[kPerThread] = {};
            float loss_weights[kPerThread] = {};
            int32_t group_ids[kPerThread] = {};
            int32_t segment = s.first_segment, segment_start = 0, segment_end = -1;  // columns; none entered yet
            int32_t prompt_end = kNoPromptEnd, group = 0;
            bool in_document = false, learnable = false;
#if defined(__CUDA_ARCH__)
#pragma unroll  // keeps the four values of each output in registers
#endif
            for (int k = 0; k < kPerThread; ++k) {
                const int32_t element = begin + k;
                if (element >= tile.end) break;
                const int32_t column = element / streams, stream = element - column * streams;
                if (column >= segment_end) {
                    segment = segment_of(tile.ends, segment, s.last_segment, base + column);
                    segment_start = tile.ends[segment - 1] - base;
                    segment_end = tile.ends[segment] - base;
                    in_document = segment != tile.padding;
                    if (in_document) {
                        group = p.document_groups[tile.first_document + segment];
                        learnable = !(flags_of(p, tile.first_document + segment) & kUnlearned);
                        if (has_prompts) prompt_end = p.prompt_ends[tile.first_document + segment];
                    }
                }
                const int64_t next = tokens[element + streams];
                const int modality = modality_of(p, next);
                const bool valid = modality < kModalities;
                const bool next_in_document =
                    in_document && (column + 1 < segment_end || (column + 1 == p.seq_length && p.row_is_cut[tile.row]));
                const bool in_prompt = has_prompts && column + 1 <= prompt_end;
                const float weight = next_in_document && learnable && valid
                                         ? p.weights[(in_prompt ? kModalities : 0) + modality]
                                         : 0.0f;
                const bool learned = weight != 0.0f;
                invalid += !valid;
                prompt_tokens += stream == 0 && in_document && has_prompts && column <= prompt_end;
                loss_tokens += learned;
                labels[k] = learned ? next : kIgnoreLabel;
                loss_weights[k] = weight;
                position_ids[k] = column - segment_start;
                group_ids[k] = learned ? group * kModalities + modality : kNoGroup;
            }
            const int64_t out = tile.row * p.seq_length * streams + begin;
            if (vector) {
                store4(p.labels + out, labels);
                store4(p.loss_weights + out, loss_weights);
                if (single) store4(p.position_ids + out, position_ids);
                store4(p.group_ids + out, group_ids);
            } else {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
                for (int k = 0; k < kPerThread; ++k) {
                    if (begin + k >= tile.end) break;
                    p.labels[out + k] = labels[k];
                    p.loss_weights[out + k] = loss_weights[k];
                    if (single) p.position_ids[out + k] = position_ids[k];
                    p.group_ids[out + k] = group_ids[k];
                }
            }
            if (!single) {  // one position a step, written with the step's first stream
                for (int k = 0; k < kPerThread; ++k) {
                    if (begin + k >= tile.end || (begin + k) % streams) continue;
                    p.position_ids[tile.row * p.seq_length + (begin + k) / streams] = position_ids[k];
                }
            }
        }
        block_add(&s.loss_tokens, loss_tokens);
        block_add(&s.prompt_tokens, prompt_tokens);
        block_add(&s.invalid, invalid);
    }

    static MS_HOST_DEVICE void end(const LossMaskProblem& p, Shared& s, int thread) {
        if (thread == 0) {
            atomic_add(&p.counts[kLossTokens], s.loss_tokens);
            atomic_add(&p.counts[kPromptTokens], s.prompt_tokens);
            if (s.invalid) atomic_add(p.invalid, s.invalid);
        }
    }

    // Modality of an id, or kModalities for an id outside the table or without a modality.
    static MS_HOST_DEVICE int modality_of(const LossMaskProblem& p, int64_t id) {
        if (id < 0 || id >= p.vocabulary) return kModalities;
        const int modality = p.modality_table[id];
        return modality < kModalities ? modality : kModalities;
    }
};

MS_HOST_DEVICE bool outputs_are_aligned(const LossMaskProblem& p) {
    return p.seq_length % kPerThread == 0 && reinterpret_cast<uintptr_t>(p.labels) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(p.loss_weights) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(p.position_ids) % 16 == 0 && reinterpret_cast<uintptr_t>(p.group_ids) % 16 == 0;
}

}  // namespace megatron_speech
