// The interleaving of strata: what is meant, and a slow equal, is in megatron_speech/data/order.py (`schedule`).
#include <cstdint>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace megatron_speech {

std::vector<int64_t> blend_order(const int32_t* costs, const int64_t* ptr, const double* shares, int64_t strata,
                                 int64_t stop) {
    using Event = std::pair<double, int64_t>;  // (time in tokens, stratum): of equal times the lower stratum
    using Queue = std::priority_queue<Event, std::vector<Event>, std::greater<Event>>;
    std::vector<int64_t> position(ptr, ptr + strata), served(static_cast<size_t>(strata), 0);
    Queue waiting;  // by the time at which the next document may start
    Queue ready;    // by the time at which it would be through
    for (int64_t k = 0; k < strata; ++k) waiting.emplace(0.0, k);
    std::vector<int64_t> order;
    int64_t total = 0;
    while (total < stop) {
        // `ready` is only ever empty here by rounding: somebody is always at or behind its share.
        while (!waiting.empty() && (waiting.top().first <= static_cast<double>(total) || ready.empty())) {
            const int64_t k = waiting.top().second;
            waiting.pop();
            const auto i = static_cast<size_t>(k);
            if (position[i] == ptr[k + 1]) {
                throw std::invalid_argument("stratum " + std::to_string(k) + " ran out of documents after " +
                                            std::to_string(total) + " of " + std::to_string(stop) + " tokens");
            }
            ready.emplace(static_cast<double>(served[i] + costs[position[i]]) / shares[k], k);
        }
        const int64_t k = ready.top().second;
        ready.pop();
        const auto i = static_cast<size_t>(k);
        order.push_back(position[i]);
        total += costs[position[i]];
        served[i] += costs[position[i]++];
        waiting.emplace(static_cast<double>(served[i]) / shares[k], k);
    }
    return order;
}

}  // namespace megatron_speech
