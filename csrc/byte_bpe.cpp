// Words are found by a hand-written scanner, looked up, and merged only when they are new: text repeats its words.
#include "byte_bpe.h"

#include <algorithm>
#include <cstring>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace megatron_speech {

namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr size_t kLongestRemembered = 64;    // bytes of a word; longer ones hardly ever return
constexpr size_t kMostWords = size_t{1} << 20;  // about 60 MB; what comes later is merged each time
constexpr size_t kScanned = 64;              // symbols up to which looking at all pairs beats a heap
constexpr size_t kWindow = 32;               // words that are looked up side by side

uint64_t mix(uint64_t value) {
    value ^= value >> 32;
    value *= 0x9E3779B97F4A7C15ull;
    return value ^ (value >> 29);
}

template <typename T>
T load(const char* data) {
    T value;
    std::memcpy(&value, data, sizeof(T));
    return value;
}

uint32_t hash_of(std::string_view word) {
    const char* data = word.data();
    const size_t size = word.size();
    uint64_t hash = size * 0x9E3779B97F4A7C15ull, last = 0;
    if (size >= 8) {
        for (size_t at = 0; at + 8 < size; at += 8) hash = mix(hash ^ load<uint64_t>(data + at));
        last = load<uint64_t>(data + size - 8);
    } else if (size >= 4) {
        last = uint64_t{load<uint32_t>(data)} << 32 | load<uint32_t>(data + size - 4);
    } else if (size > 0) {
        const auto byte = [&](size_t at) { return uint64_t{static_cast<unsigned char>(data[at])}; };
        last = byte(0) << 16 | byte(size / 2) << 8 | byte(size - 1);
    }
    return static_cast<uint32_t>(mix(mix(hash ^ last)));
}

uint64_t pair_of(int32_t a, int32_t b) {
    return (uint64_t{static_cast<uint32_t>(a)} << 32) | static_cast<uint32_t>(b);
}

// The character at `at` and its size in bytes.
std::pair<uint32_t, size_t> character(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[at + i])); };
    const uint32_t first = byte(0);
    if (first < 0x80) return {first, 1};
    if (first < 0xE0) return {(first & 0x1F) << 6 | (byte(1) & 0x3F), 2};
    if (first < 0xF0) return {(first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
    return {(first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
}

}  // namespace

ByteBpe::ByteBpe(SplitPattern pattern, const int32_t* byte_ids, const int32_t* left, const int32_t* right,
                 const int32_t* merged, int64_t merges, const uint8_t* classes, int64_t n_classes)
    : pattern_(pattern), byte_ids_(byte_ids, byte_ids + 256), classes_(classes, classes + n_classes) {
    if (n_classes != 0x110000) throw std::invalid_argument("classes do not cover Unicode");
    size_t slots = 64;
    while (slots < static_cast<size_t>(merges) * 2) slots *= 2;
    merges_.assign(slots, {kEmpty, 0, 0});
    for (int64_t rank = 0; rank < merges; ++rank) {
        const uint64_t pair = pair_of(left[rank], right[rank]);
        size_t slot = mix(pair) & (slots - 1);
        while (merges_[slot].pair != kEmpty && merges_[slot].pair != pair) slot = (slot + 1) & (slots - 1);
        merges_[slot] = {pair, static_cast<int32_t>(rank), merged[rank]};  // the last of equal pairs counts
    }
    words_.assign(size_t{1} << 12, {0, 0, 0, 0});
}

void ByteBpe::add_piece(std::string_view bytes, int32_t id) {
    if (!bytes.empty()) remember(bytes, hash_of(bytes), &id, 1);
}

const ByteBpe::Merge* ByteBpe::find_merge(int32_t a, int32_t b) const {
    const uint64_t pair = pair_of(a, b);
    for (size_t slot = mix(pair) & (merges_.size() - 1);; slot = (slot + 1) & (merges_.size() - 1)) {
        if (merges_[slot].pair == pair) return &merges_[slot];
        if (merges_[slot].pair == kEmpty) return nullptr;
    }
}

const ByteBpe::Word* ByteBpe::find_word(std::string_view word, uint32_t hash) const {
    for (size_t slot = hash & (words_.size() - 1);; slot = (slot + 1) & (words_.size() - 1)) {
        const Word& known = words_[slot];
        if (known.bytes == 0) return nullptr;
        if (known.hash == hash && known.bytes == word.size() &&
            std::memcmp(store_.data() + known.at + known.count, word.data(), word.size()) == 0) {
            return &known;
        }
    }
}

// Starts loading what find_word will read of a word whose slot is at hand.
void ByteBpe::fetch_word(uint32_t hash) const {
    const Word& known = words_[hash & (words_.size() - 1)];
    if (known.bytes != 0) __builtin_prefetch(store_.data() + known.at);
}

void ByteBpe::remember(std::string_view word, uint32_t hash, const int32_t* ids, size_t count) {
    if (2 * (known_ + 1) > words_.size()) grow();
    size_t slot = hash & (words_.size() - 1);
    while (words_[slot].bytes != 0) slot = (slot + 1) & (words_.size() - 1);
    const size_t at = store_.size();
    words_[slot] = {hash, static_cast<uint32_t>(at), static_cast<uint32_t>(word.size()), static_cast<uint32_t>(count)};
    store_.resize(at + count + (word.size() + 3) / 4);
    std::copy_n(ids, count, store_.begin() + at);
    std::memcpy(store_.data() + at + count, word.data(), word.size());
    ++known_;
}

void ByteBpe::grow() {
    std::vector<Word> old(words_.size() * 2, {0, 0, 0, 0});
    old.swap(words_);
    for (const Word& word : old) {
        if (word.bytes == 0) continue;
        size_t slot = word.hash & (words_.size() - 1);
        while (words_[slot].bytes != 0) slot = (slot + 1) & (words_.size() - 1);
        words_[slot] = word;
    }
}

// The end of the run of characters of class `wanted` from `begin` on, `most` of them at most (0: all).
size_t ByteBpe::run_of(std::string_view text, size_t begin, uint8_t wanted, int most) const {
    size_t at = begin;
    for (int count = 0; at < text.size() && (most == 0 || count < most); ++count) {
        const auto [code, size] = character(text, at);
        if (classes_[code] != wanted) break;
        at += size;
    }
    return at;
}

// The end of 's 't 're 've 'm 'll 'd at `begin`, or `begin`.
size_t ByteBpe::contraction(std::string_view text, size_t begin, bool any_case) const {
    if (text[begin] != '\'' || begin + 1 >= text.size()) return begin;
    const auto lower = [&](size_t at) -> char {
        if (at >= text.size()) return 0;
        const char letter = text[at];
        return any_case && letter >= 'A' && letter <= 'Z' ? static_cast<char>(letter + 32) : letter;
    };
    const char first = lower(begin + 1), second = lower(begin + 2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return begin + 2;
    // Unicode folds the long s to s.
    if (any_case && text.substr(begin + 1, 2) == "\xC5\xBF") return begin + 3;
    if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l')) {
        return begin + 3;
    }
    return begin;
}

// The end of the word that begins with the whitespace at `begin`: up to the last line end where those stand apart,
// else all of a run at the end of the text, else all but its last character (or that one, if it is alone).
size_t ByteBpe::spaces(std::string_view text, size_t begin, bool line_ends) const {
    size_t at = begin, last = begin, after_line_end = begin;
    while (at < text.size()) {
        const auto [code, size] = character(text, at);
        if (classes_[code] != kSpace) break;
        last = at;
        at += size;
        if (code == '\n' || code == '\r') after_line_end = at;
    }
    if (line_ends && after_line_end > begin) return after_line_end;
    return at == text.size() || last == begin ? at : last;
}

size_t ByteBpe::next_word(std::string_view text, size_t begin) const {
    const bool gpt2 = pattern_ == SplitPattern::kGpt2;
    if (text[begin] == '\'') {
        const size_t end = contraction(text, begin, !gpt2);
        if (end > begin) return end;
    }
    const auto [code, size] = character(text, begin);
    const uint8_t kind = classes_[code];
    const size_t after = begin + size;
    // What follows a character that may lead a word; a space for numbers and others, in kGpt2 for letters too.
    const uint8_t following = after < text.size() ? classes_[character(text, after).first] : uint8_t{kSpace};
    const bool space = code == ' ';
    if (kind == kLetter) return run_of(text, after, kLetter, 0);
    if (gpt2 ? space && following == kLetter
             : (kind == kOther || kind == kSpace) && code != '\n' && code != '\r' && following == kLetter) {
        return run_of(text, after, kLetter, 0);
    }
    if (kind == kNumber) {
        if (gpt2) return run_of(text, after, kNumber, 0);
        return pattern_ == SplitPattern::kDigits1 ? after : run_of(text, begin, kNumber, 3);
    }
    if (gpt2 && space && following == kNumber) return run_of(text, after, kNumber, 0);
    if (kind == kOther || (space && following == kOther && after < text.size())) {
        size_t at = run_of(text, after, kOther, 0);
        if (!gpt2) {
            while (at < text.size() && (text[at] == '\n' || text[at] == '\r')) ++at;
        }
        return at;
    }
    return spaces(text, begin, !gpt2);
}

void ByteBpe::merge_word(std::string_view word, std::vector<int32_t>& ids) {
    const auto n = static_cast<int32_t>(word.size());
    symbols_.resize(n);
    for (int32_t i = 0; i < n; ++i) symbols_[i] = byte_ids_[static_cast<unsigned char>(word[i])];
    if (static_cast<size_t>(n) <= kScanned) {
        // pairs[i]: the merge of symbols i and i + 1. Of a merge only the two pairs beside it are looked up anew.
        const Merge* pairs[kScanned];
        const auto look = [&](int32_t i) { pairs[i] = find_merge(symbols_[i], symbols_[i + 1]); };
        int32_t count = n;
        for (int32_t i = 0; i + 1 < count; ++i) look(i);
        while (count > 1) {
            const Merge* best = nullptr;
            int32_t where = 0;
            for (int32_t i = 0; i + 1 < count; ++i) {
                if (pairs[i] != nullptr && (best == nullptr || pairs[i]->rank < best->rank)) best = pairs[i], where = i;
            }
            if (best == nullptr) break;
            symbols_[where] = best->id;
            --count;
            for (int32_t i = where + 1; i < count; ++i) symbols_[i] = symbols_[i + 1], pairs[i - 1] = pairs[i];
            if (where > 0) look(where - 1);
            if (where + 1 < count) look(where);
        }
        ids.insert(ids.end(), symbols_.begin(), symbols_.begin() + count);
        return;
    }
    // (rank, place, left symbol, right symbol): an entry whose symbols have changed meanwhile is passed over.
    using Entry = std::tuple<int32_t, int32_t, int32_t, int32_t>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> queue;
    std::vector<int32_t> previous(n);
    next_.resize(n);
    for (int32_t i = 0; i < n; ++i) next_[i] = i + 1, previous[i] = i - 1;
    const auto offer = [&](int32_t at) {
        if (at < 0 || next_[at] >= n) return;
        const int32_t a = symbols_[at], b = symbols_[next_[at]];
        if (const Merge* merge = find_merge(a, b)) queue.emplace(merge->rank, at, a, b);
    };
    for (int32_t i = 0; i + 1 < n; ++i) offer(i);
    while (!queue.empty()) {
        const auto [rank, at, a, b] = queue.top();
        queue.pop();
        if (symbols_[at] != a || next_[at] >= n || symbols_[next_[at]] != b) continue;
        const int32_t gone = next_[at];
        symbols_[at] = find_merge(a, b)->id;
        symbols_[gone] = -1;
        next_[at] = next_[gone];
        if (next_[at] < n) previous[next_[at]] = at;
        offer(previous[at]);
        offer(at);
    }
    for (int32_t i = 0; i < n; i = next_[i]) ids.push_back(symbols_[i]);
}

void ByteBpe::append_word(std::string_view word, uint32_t hash, std::vector<int32_t>& ids) {
    if (const Word* known = find_word(word, hash)) {
        const int32_t* first = store_.data() + known->at;
        ids.insert(ids.end(), first, first + known->count);
        return;
    }
    const size_t before = ids.size();
    merge_word(word, ids);
    if (known_ < kMostWords && word.size() <= kLongestRemembered) {
        remember(word, hash, ids.data() + before, ids.size() - before);
    }
}

void ByteBpe::encode(std::string_view text, std::vector<int32_t>& ids) {
    std::string_view words[kWindow];
    uint32_t hashes[kWindow];
    for (size_t at = 0; at < text.size();) {
        // Each step over a whole window, so that its words wait for memory together and not one after the other.
        size_t count = 0;
        for (; count < kWindow && at < text.size(); ++count) {
            const size_t end = next_word(text, at);
            words[count] = text.substr(at, end - at);
            hashes[count] = hash_of(words[count]);
            __builtin_prefetch(&words_[hashes[count] & (words_.size() - 1)]);
            at = end;
        }
        for (size_t i = 0; i < count; ++i) fetch_word(hashes[i]);
        for (size_t i = 0; i < count; ++i) append_word(words[i], hashes[i], ids);
    }
}

}  // namespace megatron_speech
