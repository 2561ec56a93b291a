// Byte-level BPE: text to ids, as a Hugging Face tokenizer.json with a known split pattern defines it.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace megatron_speech {

// How text is cut into words before merging. All of them agree on which characters are letters, numbers and spaces;
// a table says so.
enum class SplitPattern : int {
    kGpt2 = 0,      // '(s|t|re|ve|m|ll|d) | ?L+ | ?N+ | ?other+ | spaces
    kDigits3 = 1,   // contractions in any case, one leading other character, numbers by three, line ends apart
    kDigits1 = 2,   // the same, numbers one by one
};

enum CharacterClass : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3 };

class ByteBpe {
  public:
    // byte_ids [256]: id of each single byte. left, right, merged [M]: pairs in the order of their ranks, and the id
    // that a pair becomes. whole: where not empty, words that are a piece as they stand need no merging; pieces are
    // given by add_piece. classes [0x110000].
    ByteBpe(SplitPattern pattern, const int32_t* byte_ids, const int32_t* left, const int32_t* right,
            const int32_t* merged, int64_t merges, const uint8_t* classes, int64_t n_classes);

    // A piece that a whole word may be, whatever the merges say (`ignore_merges`).
    void add_piece(std::string_view bytes, int32_t id);

    // Appends the ids of `text`, valid UTF-8.
    void encode(std::string_view text, std::vector<int32_t>& ids);

  private:
    struct Merge {
        uint64_t pair;  // kEmpty where the slot is free
        int32_t rank;
        int32_t id;
    };
    struct Word {
        uint32_t hash;
        uint32_t at;     // of its ids in store_, its bytes behind them
        uint32_t bytes;  // 0: the slot is free
        uint32_t count;  // ids
    };

    size_t next_word(std::string_view text, size_t begin) const;
    size_t contraction(std::string_view text, size_t begin, bool any_case) const;
    size_t run_of(std::string_view text, size_t begin, uint8_t wanted, int most) const;
    size_t spaces(std::string_view text, size_t begin, bool line_ends) const;
    void append_word(std::string_view word, uint32_t hash, std::vector<int32_t>& ids);
    void merge_word(std::string_view word, std::vector<int32_t>& ids);
    const Merge* find_merge(int32_t a, int32_t b) const;
    const Word* find_word(std::string_view word, uint32_t hash) const;
    void fetch_word(uint32_t hash) const;
    void remember(std::string_view word, uint32_t hash, const int32_t* ids, size_t count);
    void grow();

    SplitPattern pattern_;
    std::vector<int32_t> byte_ids_;
    std::vector<uint8_t> classes_;
    std::vector<Merge> merges_;
    std::vector<Word> words_;
    size_t known_ = 0;
    std::vector<int32_t> store_;
    std::vector<int32_t> symbols_, next_;  // scratch of merge_word
};

}  // namespace megatron_speech
