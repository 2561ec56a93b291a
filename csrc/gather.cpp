// Reading the documents of a batch out of memory-mapped datasets.
#include "gather.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace megatron_speech {
namespace {

template <typename T>
T load(const char* array, int64_t index) {
    T value;
    std::memcpy(&value, array + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

template <typename T>
void widen(const char* from, int64_t count, int64_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int64_t>(load<T>(from, i));
}

void copy_ids(const TokenSource& source, int64_t byte, int64_t count, int64_t* to) {
    const char* from = source.tokens + byte;
    switch (source.itemsize) {
        case 1: return source.is_signed ? widen<int8_t>(from, count, to) : widen<uint8_t>(from, count, to);
        case 2: return source.is_signed ? widen<int16_t>(from, count, to) : widen<uint16_t>(from, count, to);
        case 4: return widen<int32_t>(from, count, to);
        default: return widen<int64_t>(from, count, to);
    }
}

// Where a segment lies. False when there is no such segment.
struct Place {
    const TokenSource* source;
    int64_t byte;   // of its first id
    int64_t whole;  // steps of its document

    bool find(const std::vector<TokenSource>& sources, const SegmentBatch& batch, int64_t k) {
        const int64_t dataset = batch.dataset[k], document = batch.document[k];
        if (dataset < 0 || dataset >= static_cast<int64_t>(sources.size())) return false;
        source = &sources[static_cast<size_t>(dataset)];
        if (document < 0 || document >= source->documents) return false;
        whole = load<int32_t>(source->lengths, document);
        const int64_t start = batch.start[k], length = batch.length[k];
        if (start < 0 || length < 0 || start + length > whole) return false;
        const int64_t pointer = load<int64_t>(source->pointers, document);
        const int64_t step = source->streams * source->itemsize;  // bytes
        if (pointer < 0 || pointer > source->bytes || whole > (source->bytes - pointer) / step) return false;
        byte = pointer + start * step;
        return true;
    }
};

}  // namespace

int64_t gather(const std::vector<TokenSource>& sources, const SegmentBatch& batch, int64_t streams, int64_t pad_id,
               int64_t* tokens, uint8_t* goes_on) {
    for (int64_t row = 0; row < batch.rows; ++row) {
        int64_t* out = tokens + row * (batch.width + 1) * streams;
        int64_t used = 0;
        for (int64_t k = batch.row_pointers[row]; k < batch.row_pointers[row + 1]; ++k) {
            Place place;
            if (!place.find(sources, batch, k)) return k;
            int64_t column = used;
            if (batch.strides) {
                column = (k - batch.row_pointers[row]) * batch.strides[row];
                if (column < used) return k;
                std::fill(out + used * streams, out + std::min(column, batch.width) * streams, pad_id);
            }
            const int64_t length = batch.length[k];
            if (column + length > batch.width) return k;
            const bool unfinished = batch.start[k] + length < place.whole;
            goes_on[k] = column + length == batch.width && unfinished;
            copy_ids(*place.source, place.byte, (length + goes_on[k]) * streams, out + column * streams);
            used = column + length + goes_on[k];
        }
        std::fill(out + used * streams, out + (batch.width + 1) * streams, pad_id);
    }
    return -1;
}

void will_need(const std::vector<TokenSource>& sources, const SegmentBatch& batch) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (int64_t k = 0; k < batch.segments; ++k) {
        Place place;
        // What does not exist is refused where it is read.
        if (!place.find(sources, batch, k) || !place.source->mapped) continue;
        const uintptr_t begin = reinterpret_cast<uintptr_t>(place.source->tokens) + static_cast<uintptr_t>(place.byte);
        const int64_t step = place.source->streams * place.source->itemsize;  // bytes
        const uintptr_t end = begin + static_cast<uintptr_t>((batch.length[k] + 1) * step);
        const uintptr_t first = begin / page * page;
        // Advice: whether it is taken makes no difference to what is read.
        (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_WILLNEED);
    }
}

void drop_pages(const std::vector<TokenSource>& sources) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (const TokenSource& source : sources) {
        if (!source.mapped || !source.bytes) continue;
        const uintptr_t begin = reinterpret_cast<uintptr_t>(source.tokens);
        const uintptr_t first = begin / page * page;
        (void)madvise(reinterpret_cast<void*>(first), begin + static_cast<uintptr_t>(source.bytes) - first,
                      MADV_DONTNEED);
    }
}

}  // namespace megatron_speech
