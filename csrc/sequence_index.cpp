// Packing of documents into sequences: what is meant, and a slow equal, is in
// megatron_speech/data/sequences/packing_kernels.py.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"

namespace megatron_speech {
namespace {

// A set of integers in [0, limit] with "smallest member not below x" in O(log_64 limit).
class IntegerSet {
  public:
    explicit IntegerSet(int64_t limit) {
        for (int64_t words = limit / 64 + 1;; words = (words + 63) / 64) {
            levels_.emplace_back(static_cast<size_t>(words), 0);
            if (words == 1) break;
        }
    }

    void insert(int64_t x) {
        for (auto& level : levels_) {
            level[static_cast<size_t>(x / 64)] |= uint64_t{1} << (x % 64);
            x /= 64;
        }
    }

    void erase(int64_t x) {
        for (auto& level : levels_) {
            uint64_t& word = level[static_cast<size_t>(x / 64)];
            word &= ~(uint64_t{1} << (x % 64));
            if (word) break;
            x /= 64;
        }
    }

    // -1 when there is none.
    int64_t next(int64_t x) const {
        for (size_t depth = 0; depth < levels_.size(); ++depth) {
            const auto& level = levels_[depth];
            if (x / 64 >= static_cast<int64_t>(level.size())) return -1;
            const uint64_t rest = level[static_cast<size_t>(x / 64)] >> (x % 64) << (x % 64);
            if (rest) {
                x = x / 64 * 64 + __builtin_ctzll(rest);
                while (depth-- > 0) x = x * 64 + __builtin_ctzll(levels_[depth][static_cast<size_t>(x)]);
                return x;
            }
            x = x / 64 + 1;  // the next word is the first that may hold it: one step on, one level up
        }
        return -1;
    }

  private:
    std::vector<std::vector<uint64_t>> levels_;
};

// Sequences of one window, found by the room that they have left. Of equal room, first in, first out.
class OpenSequences {
  public:
    explicit OpenSequences(int64_t seq_length)
        : rooms_(seq_length),
          head_(static_cast<size_t>(seq_length) + 1, -1),
          tail_(static_cast<size_t>(seq_length) + 1, -1) {}

    void put(int32_t sequence, int64_t room) {
        if (next_.size() <= static_cast<size_t>(sequence)) next_.resize(static_cast<size_t>(sequence) + 1);
        next_[static_cast<size_t>(sequence)] = -1;
        int32_t& tail = tail_[static_cast<size_t>(room)];
        if (tail < 0) {
            head_[static_cast<size_t>(room)] = sequence;
            rooms_.insert(room);
        } else {
            next_[static_cast<size_t>(tail)] = sequence;
        }
        tail = sequence;
    }

    // Takes out the sequence with the least room of at least `length`; -1 when there is none.
    int32_t take(int64_t length, int64_t* room) {
        *room = rooms_.next(length);
        if (*room < 0) return -1;
        int32_t& head = head_[static_cast<size_t>(*room)];
        const int32_t sequence = head;
        head = next_[static_cast<size_t>(sequence)];
        if (head < 0) clear(*room);
        return sequence;
    }

    void clear_all() {
        for (int64_t room = rooms_.next(0); room >= 0; room = rooms_.next(room)) clear(room);
    }

  private:
    void clear(int64_t room) {
        head_[static_cast<size_t>(room)] = tail_[static_cast<size_t>(room)] = -1;
        rooms_.erase(room);
    }

    IntegerSet rooms_;
    std::vector<int32_t> head_, tail_;  // by room
    std::vector<int32_t> next_;         // by sequence
};

}  // namespace

PackedSegments pack_cut(const int32_t* lengths, int64_t count, int64_t seq_length) {
    int64_t tokens = 0;
    for (int64_t document = 0; document < count; ++document) tokens += lengths[document];
    PackedSegments out;
    out.seq_ptr.reserve(static_cast<size_t>(tokens / seq_length) + 2);
    for (auto* segments : {&out.start, &out.length}) segments->reserve(static_cast<size_t>(count + tokens / seq_length));
    out.position.reserve(static_cast<size_t>(count + tokens / seq_length));
    out.seq_ptr.push_back(0);
    int64_t filled = 0;  // tokens of the current sequence
    for (int64_t document = 0; document < count; ++document) {
        const int64_t length = lengths[document];
        for (int64_t start = 0; start < length;) {
            const int64_t taken = std::min(length - start, seq_length - filled);
            out.position.push_back(document);
            out.start.push_back(static_cast<int32_t>(start));
            out.length.push_back(static_cast<int32_t>(taken));
            start += taken;
            filled += taken;
            if (filled == seq_length) {
                out.seq_ptr.push_back(static_cast<int64_t>(out.position.size()));
                filled = 0;
            }
        }
    }
    if (filled) out.seq_ptr.push_back(static_cast<int64_t>(out.position.size()));
    return out;
}

PackedSegments pack_fit(const int32_t* lengths, int64_t count, int64_t seq_length, int64_t open_bins,
                        std::vector<int64_t>* oversize) {
    PackedSegments out;
    out.position.reserve(static_cast<size_t>(count));
    out.length.reserve(static_cast<size_t>(count));
    out.seq_ptr.push_back(0);
    OpenSequences open(seq_length);
    std::vector<int64_t> window;      // positions of its documents
    std::vector<uint64_t> order;      // (seq_length - length, index in the window), to be sorted
    std::vector<int32_t> sequence_of, rank;
    std::vector<std::pair<int32_t, int32_t>> openers;  // (index in the window, sequence)
    std::vector<int64_t> cursor;

    const auto pack_window = [&] {
        std::sort(order.begin(), order.end());
        sequence_of.resize(window.size());
        openers.clear();
        for (const uint64_t key : order) {
            const auto index = static_cast<int32_t>(key & 0xffffffffu);
            const int64_t length = lengths[window[static_cast<size_t>(index)]];
            int64_t room;
            int32_t sequence = open.take(length, &room);
            if (sequence < 0) {
                room = seq_length;
                sequence = static_cast<int32_t>(openers.size());
                openers.emplace_back(index, sequence);
            }
            sequence_of[static_cast<size_t>(index)] = sequence;
            if (room > length) open.put(sequence, room - length);
        }
        open.clear_all();
        // Sequences in the order of the documents that opened them; a counting sort keeps document order inside.
        std::sort(openers.begin(), openers.end());
        rank.resize(openers.size());
        for (size_t i = 0; i < openers.size(); ++i) rank[static_cast<size_t>(openers[i].second)] = static_cast<int32_t>(i);
        cursor.assign(openers.size() + 1, 0);
        for (int32_t& sequence : sequence_of) {
            sequence = rank[static_cast<size_t>(sequence)];
            ++cursor[static_cast<size_t>(sequence) + 1];
        }
        const auto begin = static_cast<int64_t>(out.position.size());
        for (size_t i = 1; i < cursor.size(); ++i) {
            cursor[i] += cursor[i - 1];
            out.seq_ptr.push_back(begin + cursor[i]);
        }
        out.position.resize(out.position.size() + window.size());
        out.length.resize(out.position.size());
        for (size_t index = 0; index < window.size(); ++index) {
            const auto at = static_cast<size_t>(begin + cursor[static_cast<size_t>(sequence_of[index])]++);
            out.position[at] = window[index];
            out.length[at] = lengths[window[index]];
        }
        window.clear();
        order.clear();
    };

    int64_t tokens = 0;
    for (int64_t document = 0; document < count; ++document) {
        const int64_t length = lengths[document];
        if (length == 0) continue;
        if (length > seq_length) {
            oversize->push_back(document);
            continue;
        }
        if (tokens + length > open_bins * seq_length) {
            pack_window();
            tokens = 0;
        }
        tokens += length;
        order.push_back(static_cast<uint64_t>(seq_length - length) << 32 | window.size());
        window.push_back(document);
    }
    if (!window.empty()) pack_window();
    out.start.assign(out.position.size(), 0);
    return out;
}

}  // namespace megatron_speech
