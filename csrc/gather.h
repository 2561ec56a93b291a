// Reading the documents of a batch out of memory-mapped datasets. What is meant, and a slow equal, is in
// megatron_speech/data/loading/gathering.py.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_speech {

// One dataset's ids and where its documents lie in them. The arrays of an .idx are not aligned. A step of a document
// is `streams` ids, one of each stream; starts, lengths and columns count steps, so that no step is ever cut.
struct TokenSource {
    const char* tokens;    // the ids, end to end
    int64_t bytes;         // of all ids
    int itemsize;          // 1, 2, 4 or 8 bytes
    bool is_signed;
    const char* pointers;  // int64 [documents], byte offset of each document
    const char* lengths;   // int32 [documents], steps
    int64_t documents;
    bool mapped;           // `tokens` is a read-only mapping of a file: its pages can be dropped and come back
    int64_t streams;       // ids of a step; the same for all datasets of a batch
};

// The segments of a batch of rows. `strides` is null where segments lie end to end; else segment k of a row begins
// at column k · strides[row].
struct SegmentBatch {
    const int32_t* dataset;
    const int32_t* document;
    const int32_t* start;
    const int32_t* length;
    const int32_t* row_pointers;  // [rows + 1]
    const int32_t* strides;       // [rows] or null
    int64_t segments;
    int64_t rows;
    int64_t width;  // columns of a row without the look-ahead
};

// Fills tokens [rows, width + 1, streams] and goes_on [segments] (1 where a segment ends at the edge of its row inside its
// document, whose next step is then the look-ahead). Returns -1, or the first segment that does not exist.
int64_t gather(const std::vector<TokenSource>& sources, const SegmentBatch& batch, int64_t streams, int64_t pad_id,
               int64_t* tokens, uint8_t* goes_on);

// Asks the kernel to read the segments' bytes from the disk, without waiting for them.
void will_need(const std::vector<TokenSource>& sources, const SegmentBatch& batch);

// Gives the pages of the mapped files back: they stay in the page cache and are mapped again when touched.
void drop_pages(const std::vector<TokenSource>& sources);

}  // namespace megatron_speech
