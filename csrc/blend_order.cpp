// The order of documents: what is meant, and a slow equal, is in megatron_speech/data/blend/order.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace megatron_speech {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr int64_t kAhead = 128;  // documents of a stratum looked up at a time

// The mapped columns of a dataset need not be aligned.
template <typename T>
T load(const void* base, int64_t index) {
    T value;
    std::memcpy(&value, static_cast<const char*>(base) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

template <typename T>
void prefetch(const void* base, int64_t index) {
    __builtin_prefetch(static_cast<const char*>(base) + index * static_cast<int64_t>(sizeof(T)));
}

}  // namespace

uint64_t splitmix64(uint64_t x) {
    x += kGolden;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

Permutation::Permutation(int64_t count, uint64_t key) : count_(static_cast<uint64_t>(count)) {
    while (left_ * left_ < count_) ++left_;
    right_ = (count_ + left_ - 1) / left_;
    for (auto& word : keys_) word = splitmix64(key += kGolden);
}

uint64_t Permutation::operator()(uint64_t index) const {
    do {
        uint64_t high = index / right_, low = index % right_;
        for (int round = 0; round < kRounds; round += 2) {
            high += draw(low ^ keys_[round], left_);
            if (high >= left_) high -= left_;
            low += draw(high ^ keys_[round + 1], right_);
            if (low >= right_) low -= right_;
        }
        index = high * right_ + low;
    } while (index >= count_);
    return index;
}

WindowedPermutation::WindowedPermutation(ShardBounds bounds, int64_t shards, uint64_t key)
    : bounds_(bounds), windows_((bounds.runs + shards - 1) / shards), key_(key),
      of_runs_(bounds.runs, splitmix64(key ^ splitmix64(0))) {}

void WindowedPermutation::next_window() {
    ++window_;
    start_ = end_;
    const int64_t first = window_ * bounds_.runs / windows_, last = (window_ + 1) * bounds_.runs / windows_;
    run_.clear();
    before_.assign(1, 0);
    for (int64_t place = first; place < last; ++place) {
        const auto run = static_cast<int64_t>(of_runs_(static_cast<uint64_t>(place)));
        run_.push_back(run);
        before_.push_back(before_.back() + bounds_.at[run + 1] - bounds_.at[run]);
    }
    end_ = start_ + before_.back();
    inside_ = Permutation(before_.back(), splitmix64(key_ ^ splitmix64(static_cast<uint64_t>(window_ + 1))));
}

int64_t WindowedPermutation::operator()(int64_t index) {
    while (index >= end_) next_window();
    const auto element = static_cast<int64_t>(inside_(static_cast<uint64_t>(index - start_)));
    const auto place = std::upper_bound(before_.begin(), before_.end(), element) - before_.begin() - 1;
    return bounds_.at[run_[static_cast<size_t>(place)]] + element - before_[static_cast<size_t>(place)];
}

BlendOrder::BlendOrder(std::vector<StratumDocuments> strata) {
    for (auto& given : strata) {
        Stratum stratum{};
        stratum.given = given;
        stratum.epoch = given.first_epoch;
        begin_epoch(stratum, given.first_count > 0);
        stratum.ahead.resize(static_cast<size_t>(kAhead));
        stratum.taken = kAhead;
        strata_.push_back(std::move(stratum));
    }
    for (size_t k = 0; k < strata_.size(); ++k) waiting_.emplace(0.0, k);
}

void BlendOrder::begin_epoch(Stratum& stratum, bool partly) {
    const auto& given = stratum.given;
    stratum.at = 0;
    stratum.documents = partly ? given.first_documents : given.documents;
    stratum.count = partly ? given.first_count : given.count;
    const uint64_t key = splitmix64(given.key ^ splitmix64(stratum.epoch));
    if (given.window_shards) {
        stratum.local = WindowedPermutation(partly ? given.first_bounds : given.bounds, given.window_shards, key);
    } else {
        stratum.permutation = Permutation(stratum.count, key);
    }
}

void BlendOrder::look_ahead(Stratum& stratum) {
    const auto& given = stratum.given;
    for (auto& next : stratum.ahead) {
        if (stratum.at == stratum.count) {
            ++stratum.epoch;
            begin_epoch(stratum, false);
        }
        // The document itself is read below, when its line has come: until then `document` is where it stands.
        const int64_t at = stratum.at++;
        next.place = stratum.documents + (given.window_shards ? stratum.local(at) : static_cast<int64_t>(stratum.permutation(static_cast<uint64_t>(at))));
        __builtin_prefetch(next.place);
    }
    for (auto& next : stratum.ahead) {
        next.document = *next.place;
        prefetch<int32_t>(given.lengths, next.document);
        if (given.counted != given.lengths) prefetch<int32_t>(given.counted, next.document);
        prefetch<float>(given.seconds, next.document);
    }
    for (auto& next : stratum.ahead) {
        next.length = load<int32_t>(given.lengths, next.document);
        next.counted = load<int32_t>(given.counted, next.document);
        next.seconds = load<float>(given.seconds, next.document);
        if (next.length < 1 || next.counted < 1) {
            throw std::invalid_argument("document " + std::to_string(next.document) + " of stratum " +
                                        std::to_string(&stratum - strata_.data()) + " counts for nothing");
        }
    }
    stratum.taken = 0;
}

void BlendOrder::take(int64_t count, const OrderedDocuments& out) {
    for (int64_t i = 0; i < count; ++i) {
        // `ready_` is only ever empty here by rounding: somebody is always at or behind its share.
        while (!waiting_.empty() && (waiting_.top().first <= static_cast<double>(total_) || ready_.empty())) {
            const size_t k = waiting_.top().second;
            waiting_.pop();
            Stratum& stratum = strata_[k];
            if (stratum.taken == kAhead) look_ahead(stratum);
            const auto through = stratum.served + stratum.ahead[static_cast<size_t>(stratum.taken)].counted;
            ready_.emplace(static_cast<double>(through) / stratum.given.share, k);
        }
        const size_t k = ready_.top().second;
        ready_.pop();
        Stratum& stratum = strata_[k];
        const Document& next = stratum.ahead[static_cast<size_t>(stratum.taken++)];
        out.stratum[i] = static_cast<uint16_t>(k);
        out.document[i] = next.document;
        out.length[i] = next.length;
        out.counted[i] = next.counted;
        out.seconds[i] = next.seconds;
        total_ += next.counted;
        stratum.served += next.counted;
        waiting_.emplace(static_cast<double>(stratum.served) / stratum.given.share, k);
    }
}

}  // namespace megatron_speech
