// What stands between the matrix products of a transformer on a CPU: attention over packed documents (RoPE included),
// RMSNorm, SwiGLU; forward and backward, fp32 inside, fp32 or bf16 outside. Torch's own kernels would need documents
// gathered into rectangles, compute both halves of a causal square, and pass over memory once per elementary step.
//
// Everything is written in vectors of 16 floats (GCC's and Clang's vector extension) and compiled for AVX-512, AVX2
// and the compiler's default target; the machine chooses on first use. Threads are those of the OpenMP runtime that torch
// has loaded already, so that no second pool competes with it; without one there is one thread. Results do not depend
// on the number of threads.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "vectors.h"

namespace py = pybind11;

namespace {

// Raised together with INTERFACE in megatron_speech/ops/cpu_layers.py whenever a signature changes.
constexpr int kInterface = 2;

// ---- attention

// A tensor [tokens, heads, width] of which the last dimension is contiguous; strides in elements.
struct Heads {
    void* data;
    int64_t token_stride, head_stride;

    template <typename T>
    T* at(int64_t token, int64_t head) const {
        return static_cast<T*>(data) + token * token_stride + head * head_stride;
    }
};

struct Attention {
    Heads query, key, value, out, d_out, d_query, d_key, d_value;
    const float *cos, *sin;      // [tokens, width / 2]
    const int64_t* segments;     // [n, 2]: first token, tokens
    int64_t tokens, heads, groups, width;
    float scale;
};

constexpr int kRows = 8;        // queries at a time
constexpr int kKeys = 2 * kLane;  // keys at a time in a tile of scores

INLINE int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Memory of one thread: grows, is never given back.
float* scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats + kLane) memory.resize(floats + kLane);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

// Row [width] → floats, zero up to `padded`.
template <typename T>
INLINE void read_row(const T* from, float* to, int64_t width, int64_t padded) {
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane) store(to + i, load(from + i));
    if (i < padded) store(to + i, load_part(from + i, width - i));
}

template <typename T>
INLINE void write_row(const float* from, T* to, int64_t width) {
    int64_t i = 0;
    for (; i + kLane <= width; i += kLane) store(to + i, load(from + i));
    if (i < width) store_part(to + i, load(from + i), width - i);
}

// Turn a row by the angles of its position; `sign` -1 turns it back.
INLINE void rotate(float* row, const float* cos, const float* sin, int64_t half, float sign) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = row[i], second = row[i + half], s = sign * sin[i];
        row[i] = first * cos[i] - second * s;
        row[i + half] = second * cos[i] + first * s;
    }
}

INLINE void transpose(const float* from, float* to, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < rows; ++i) to[j * stride + i] = from[i * columns + j];
    }
}

// scores[r, j] = a[r]·b[j] for 8 rows a [8, width] and keys j < keys (a multiple of 32), b transposed [width, stride].
INLINE void score_rows(const float* a, const float* b, float* scores, int64_t width, int64_t keys, int64_t stride) {
    for (int64_t j = 0; j < keys; j += kKeys) {
        vf sums[kRows][2] = {};
        for (int64_t d = 0; d < width; ++d) {
            const vf left = load(b + d * stride + j), right = load(b + d * stride + j + kLane);
            for (int r = 0; r < kRows; ++r) {
                const vf x = splat(a[r * width + d]);
                sums[r][0] += x * left;
                sums[r][1] += x * right;
            }
        }
        for (int r = 0; r < kRows; ++r) {
            store(scores + r * stride + j, sums[r][0]);
            store(scores + r * stride + j + kLane, sums[r][1]);
        }
    }
}

// out[r] += Σ_j weights[r, j]·rows[j] for 8 rows, over j < keys; rows [*, width].
template <int Vectors>
INLINE void weigh_part(const float* weights, const float* rows, float* out, int64_t width, int64_t keys,
                       int64_t stride) {
    vf sums[kRows][Vectors];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < Vectors; ++v) sums[r][v] = load(out + r * width + v * kLane);
    }
    for (int64_t j = 0; j < keys; ++j) {
        vf row[Vectors];
        for (int v = 0; v < Vectors; ++v) row[v] = load(rows + j * width + v * kLane);
        for (int r = 0; r < kRows; ++r) {
            const vf x = splat(weights[r * stride + j]);
            for (int v = 0; v < Vectors; ++v) sums[r][v] += x * row[v];
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < Vectors; ++v) store(out + r * width + v * kLane, sums[r][v]);
    }
}

INLINE void weigh(const float* weights, const float* rows, float* out, int64_t width, int64_t keys, int64_t stride) {
    int64_t d = 0;
    for (; d + 2 * kLane <= width; d += 2 * kLane) weigh_part<2>(weights, rows + d, out + d, width, keys, stride);
    if (d < width) weigh_part<1>(weights, rows + d, out + d, width, keys, stride);
}

// out[j] += Σ_r weights[r, j]·rows[r] for 8 rows, over j < keys; out [*, width].
template <int Vectors>
INLINE void spread_part(const float* weights, const float* rows, float* out, int64_t width, int64_t keys,
                        int64_t stride) {
    vf row[kRows][Vectors];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < Vectors; ++v) row[r][v] = load(rows + r * width + v * kLane);
    }
    for (int64_t j = 0; j < keys; ++j) {
        vf total[Vectors];
        for (int v = 0; v < Vectors; ++v) total[v] = load(out + j * width + v * kLane);
        for (int r = 0; r < kRows; ++r) {
            const vf x = splat(weights[r * stride + j]);
            for (int v = 0; v < Vectors; ++v) total[v] += x * row[r][v];
        }
        for (int v = 0; v < Vectors; ++v) store(out + j * width + v * kLane, total[v]);
    }
}

INLINE void spread(const float* weights, const float* rows, float* out, int64_t width, int64_t keys, int64_t stride) {
    int64_t d = 0;
    for (; d + 2 * kLane <= width; d += 2 * kLane) spread_part<2>(weights, rows + d, out + d, width, keys, stride);
    if (d < width) spread_part<1>(weights, rows + d, out + d, width, keys, stride);
}

// Rows of a head as floats, turned if wanted, zero from `length` on: [padded_rows, padded].
template <typename T>
INLINE void read_head(const Attention& p, const Heads& from, int64_t first, int64_t length, int64_t head, float* to,
                      int64_t padded, int64_t padded_rows, bool turn) {
    const int64_t half = p.width / 2;
    for (int64_t i = 0; i < length; ++i) {
        float* row = to + i * padded;
        read_row(from.at<const T>(first + i, head), row, p.width, padded);
        if (turn) rotate(row, p.cos + (first + i) * half, p.sin + (first + i) * half, half, 1.0f);
    }
    std::memset(to + length * padded, 0, (padded_rows - length) * padded * sizeof(float));
}

// Scores of a query → exp(score − the highest of its `own` first), 0 from there to `wide`; returns their sum. Both passes
// call it: exp(score − log Σ exp) overflows where scores are so large that their rounding errors exceed 88.
INLINE float exponentials(float* row, int64_t own, int64_t wide) {
    for (int64_t j = own; j < wide; ++j) row[j] = -INFINITY;
    vf top = splat(-INFINITY);
    for (int64_t j = 0; j < wide; j += kLane) top = maximum(top, load(row + j));
    const float highest = largest(top);
    vf total{};
    for (int64_t j = 0; j < wide; j += kLane) {
        const vf e = exp16(load(row + j) - highest);
        store(row + j, e);
        total += e;
    }
    return sum(total);
}

// A task is one document and one head of keys, with the heads of queries that share it.
template <typename T>
INLINE void attention_forward(void* problem, int64_t task) {
    const Attention& p = *static_cast<const Attention*>(problem);
    const int64_t group = task % p.groups, first = p.segments[task / p.groups * 2];
    const int64_t length = p.segments[task / p.groups * 2 + 1], shared = p.heads / p.groups, half = p.width / 2;
    const int64_t padded = up(p.width, kLane), rows = up(length, kKeys);
    float* keys = scratch(rows * padded * 3 + kRows * (rows + 2 * padded));
    float *keys_t = keys + rows * padded, *values = keys_t + rows * padded, *scores = values + rows * padded;
    float *queries = scores + kRows * rows, *sums = queries + kRows * padded;
    read_head<T>(p, p.key, first, length, group, keys, padded, rows, true);
    transpose(keys, keys_t, rows, padded, rows);
    read_head<T>(p, p.value, first, length, group, values, padded, rows, false);
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
        for (int64_t begin = 0; begin < length; begin += kRows) {
            const int64_t count = std::min<int64_t>(kRows, length - begin), seen = begin + count;
            for (int64_t r = 0; r < kRows; ++r) {
                float* row = queries + r * padded;
                const int64_t token = first + begin + r;
                if (r >= count) {
                    std::memset(row, 0, padded * sizeof(float));
                    continue;
                }
                read_row(p.query.at<const T>(token, head), row, p.width, padded);
                rotate(row, p.cos + token * half, p.sin + token * half, half, 1.0f);
                for (int64_t d = 0; d < padded; d += kLane) store(row + d, load(row + d) * p.scale);
            }
            const int64_t wide = up(seen, kKeys);
            score_rows(queries, keys_t, scores, padded, wide, rows);
            float inverse[kRows];
            for (int64_t r = 0; r < kRows; ++r) {
                const int64_t own = std::min(begin + r, length - 1) + 1;  // keys that this query sees
                inverse[r] = 1.0f / exponentials(scores + r * rows, own, wide);
            }
            std::memset(sums, 0, kRows * padded * sizeof(float));
            weigh(scores, values, sums, padded, seen, rows);
            for (int64_t r = 0; r < count; ++r) {
                float* row = sums + r * padded;
                for (int64_t d = 0; d < padded; d += kLane) store(row + d, load(row + d) * inverse[r]);
                write_row(row, p.out.at<T>(first + begin + r, head), p.width);
            }
        }
    }
}

template <typename T>
INLINE void attention_backward(void* problem, int64_t task) {
    const Attention& p = *static_cast<const Attention*>(problem);
    const int64_t group = task % p.groups, first = p.segments[task / p.groups * 2];
    const int64_t length = p.segments[task / p.groups * 2 + 1], shared = p.heads / p.groups, half = p.width / 2;
    const int64_t padded = up(p.width, kLane), rows = up(length, kKeys), area = rows * padded;
    float* keys = scratch(area * 6 + kRows * (2 * rows + 4 * padded));
    float *keys_t = keys + area, *values = keys_t + area, *values_t = values + area;
    float *d_keys = values_t + area, *d_values = d_keys + area, *scores = d_values + area;
    float *d_scores = scores + kRows * rows, *queries = d_scores + kRows * rows, *d_outs = queries + kRows * padded;
    float *outs = d_outs + kRows * padded, *d_queries = outs + kRows * padded;
    read_head<T>(p, p.key, first, length, group, keys, padded, rows, true);
    transpose(keys, keys_t, rows, padded, rows);
    read_head<T>(p, p.value, first, length, group, values, padded, rows, false);
    transpose(values, values_t, rows, padded, rows);
    std::memset(d_keys, 0, 2 * area * sizeof(float));
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
        for (int64_t begin = 0; begin < length; begin += kRows) {
            const int64_t count = std::min<int64_t>(kRows, length - begin), seen = begin + count;
            float correction[kRows] = {};
            std::memset(queries, 0, 2 * kRows * padded * sizeof(float));
            for (int64_t r = 0; r < count; ++r) {
                const int64_t token = first + begin + r;
                read_row(p.query.at<const T>(token, head), queries + r * padded, p.width, padded);
                rotate(queries + r * padded, p.cos + token * half, p.sin + token * half, half, 1.0f);
                read_row(p.d_out.at<const T>(token, head), d_outs + r * padded, p.width, padded);
                read_row(p.out.at<const T>(token, head), outs + r * padded, p.width, padded);
                vf total{};
                for (int64_t d = 0; d < padded; d += kLane) {
                    total += load(d_outs + r * padded + d) * load(outs + r * padded + d);
                }
                correction[r] = sum(total);
                for (int64_t d = 0; d < padded; d += kLane) {
                    store(queries + r * padded + d, load(queries + r * padded + d) * p.scale);
                }
            }
            const int64_t wide = up(seen, kKeys);
            score_rows(queries, keys_t, scores, padded, wide, rows);
            score_rows(d_outs, values_t, d_scores, padded, wide, rows);
            for (int64_t r = 0; r < kRows; ++r) {
                float *row = scores + r * rows, *d_row = d_scores + r * rows;
                if (r >= count) {
                    std::memset(row, 0, wide * sizeof(float));
                    std::memset(d_row, 0, wide * sizeof(float));
                    continue;
                }
                const float inverse = 1.0f / exponentials(row, begin + r + 1, wide);
                for (int64_t j = 0; j < wide; j += kLane) {
                    const vf weight = load(row + j) * inverse;
                    store(d_row + j, weight * (load(d_row + j) - correction[r]));
                    store(row + j, weight);
                }
            }
            std::memset(d_queries, 0, kRows * padded * sizeof(float));
            weigh(d_scores, keys, d_queries, padded, seen, rows);
            spread(d_scores, queries, d_keys, padded, seen, rows);
            spread(scores, d_outs, d_values, padded, seen, rows);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t token = first + begin + r;
                float* row = d_queries + r * padded;  // the scores are of queries times scale
                for (int64_t d = 0; d < padded; d += kLane) store(row + d, load(row + d) * p.scale);
                rotate(d_queries + r * padded, p.cos + token * half, p.sin + token * half, half, -1.0f);
                write_row(d_queries + r * padded, p.d_query.at<T>(token, head), p.width);
            }
        }
    }
    for (int64_t i = 0; i < length; ++i) {
        const int64_t token = first + i;
        rotate(d_keys + i * padded, p.cos + token * half, p.sin + token * half, half, -1.0f);
        write_row(d_keys + i * padded, p.d_key.at<T>(token, group), p.width);
        write_row(d_values + i * padded, p.d_value.at<T>(token, group), p.width);
    }
}

// ---- RMSNorm and SwiGLU

// Rows of a task; sums over rows are made per task and added in order, whoever made them.
constexpr int64_t kTaskRows = 64;

struct Norm {
    const void *x, *weight, *d_out;
    void *out, *d_x;
    float *scale, *d_weight;  // [rows]; [tasks, width]
    int64_t rows, width;
    float epsilon;
};

template <typename T>
INLINE vf take(const T* p, int64_t count) {
    return count == kLane ? load(p) : load_part(p, count);
}
template <typename T>
INLINE void put(T* p, vf x, int64_t count) {
    count == kLane ? store(p, x) : store_part(p, x, count);
}

template <typename T>
INLINE void norm_forward(void* problem, int64_t task) {
    const Norm& p = *static_cast<const Norm*>(problem);
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t row = task * kTaskRows; row < std::min(p.rows, (task + 1) * kTaskRows); ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.width;
        T* out = static_cast<T*>(p.out) + row * p.width;
        vf squares{};
        for (int64_t i = 0; i < p.width; i += kLane) {
            const vf value = take(x + i, std::min<int64_t>(kLane, p.width - i));
            squares += value * value;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(p.width) + p.epsilon);
        p.scale[row] = scale;
        for (int64_t i = 0; i < p.width; i += kLane) {
            const int64_t count = std::min<int64_t>(kLane, p.width - i);
            put(out + i, take(x + i, count) * scale * take(weight + i, count), count);
        }
    }
}

template <typename T>
INLINE void norm_backward(void* problem, int64_t task) {
    const Norm& p = *static_cast<const Norm*>(problem);
    const T* weight = static_cast<const T*>(p.weight);
    float* d_weight = p.d_weight + task * p.width;
    std::memset(d_weight, 0, p.width * sizeof(float));
    for (int64_t row = task * kTaskRows; row < std::min(p.rows, (task + 1) * kTaskRows); ++row) {
        const T *x = static_cast<const T*>(p.x) + row * p.width, *g = static_cast<const T*>(p.d_out) + row * p.width;
        T* d_x = static_cast<T*>(p.d_x) + row * p.width;
        const float scale = p.scale[row];
        vf total{};
        for (int64_t i = 0; i < p.width; i += kLane) {
            const int64_t count = std::min<int64_t>(kLane, p.width - i);
            const vf product = take(g + i, count) * take(x + i, count) * scale;
            put(d_weight + i, take(d_weight + i, count) + product, count);
            total += product * take(weight + i, count);
        }
        // dx = s·(w·g − n·mean(w·g·n)), n = s·x
        const float mean = sum(total) / static_cast<float>(p.width);
        for (int64_t i = 0; i < p.width; i += kLane) {
            const int64_t count = std::min<int64_t>(kLane, p.width - i);
            const vf normed = take(x + i, count) * scale;
            put(d_x + i, (take(g + i, count) * take(weight + i, count) - normed * mean) * scale, count);
        }
    }
}

struct Swiglu {
    const void *x, *d_out;
    void *out, *d_x;
    int64_t rows, width;  // of the output
};

template <typename T>
INLINE void swiglu_forward(void* problem, int64_t task) {
    const Swiglu& p = *static_cast<const Swiglu*>(problem);
    for (int64_t row = task * kTaskRows; row < std::min(p.rows, (task + 1) * kTaskRows); ++row) {
        const T *gate = static_cast<const T*>(p.x) + row * 2 * p.width, *linear = gate + p.width;
        T* out = static_cast<T*>(p.out) + row * p.width;
        for (int64_t i = 0; i < p.width; i += kLane) {
            const int64_t count = std::min<int64_t>(kLane, p.width - i);
            const vf x = take(gate + i, count);
            put(out + i, x / (1.0f + exp16(-x)) * take(linear + i, count), count);
        }
    }
}

template <typename T>
INLINE void swiglu_backward(void* problem, int64_t task) {
    const Swiglu& p = *static_cast<const Swiglu*>(problem);
    for (int64_t row = task * kTaskRows; row < std::min(p.rows, (task + 1) * kTaskRows); ++row) {
        const T *gate = static_cast<const T*>(p.x) + row * 2 * p.width, *linear = gate + p.width;
        const T* g = static_cast<const T*>(p.d_out) + row * p.width;
        T *d_gate = static_cast<T*>(p.d_x) + row * 2 * p.width, *d_linear = d_gate + p.width;
        for (int64_t i = 0; i < p.width; i += kLane) {
            const int64_t count = std::min<int64_t>(kLane, p.width - i);
            const vf x = take(gate + i, count), gradient = take(g + i, count);
            const vf sigmoid = 1.0f / (1.0f + exp16(-x));
            put(d_linear + i, gradient * (x * sigmoid), count);
            // (x·σ)' = σ·(1 + x·(1 − σ))
            put(d_gate + i, gradient * take(linear + i, count) * (sigmoid * (1.0f + x * (1.0f - sigmoid))), count);
        }
    }
}

VARIANTS(attention_forward)
VARIANTS(attention_backward)
VARIANTS(norm_forward)
VARIANTS(norm_backward)
VARIANTS(swiglu_forward)
VARIANTS(swiglu_backward)

// ---- Python's view: addresses of tensors, which megatron_speech/ops/cpu_layers.py has checked

template <typename T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Heads heads_of(const py::tuple& tensor) {
    if (tensor.empty()) return Heads{nullptr, 0, 0};
    return Heads{pointer<void>(tensor[0].cast<uint64_t>()), tensor[1].cast<int64_t>(), tensor[2].cast<int64_t>()};
}

void attention(bool backward, bool bf16, const py::tuple& tensors, uint64_t cos, uint64_t sin,
               uint64_t segments, int64_t n_segments, int64_t tokens, int64_t heads, int64_t groups, int64_t width,
               double scale, int64_t threads) {
    if (tensors.size() != 8) throw std::invalid_argument("attention takes eight tensors");
    if (groups < 1 || heads % groups || width < 2 || width % 2) throw std::invalid_argument("no such heads");
    Attention p{};
    Heads* into[] = {&p.query, &p.key, &p.value, &p.out, &p.d_out, &p.d_query, &p.d_key, &p.d_value};
    for (size_t i = 0; i < 8; ++i) *into[i] = heads_of(tensors[i].cast<py::tuple>());
    p.cos = pointer<const float>(cos), p.sin = pointer<const float>(sin);
    p.segments = pointer<const int64_t>(segments);
    p.tokens = tokens, p.heads = heads, p.groups = groups, p.width = width, p.scale = static_cast<float>(scale);
    for (int64_t i = 0; i < n_segments; ++i) {
        const int64_t first = p.segments[2 * i], length = p.segments[2 * i + 1];
        if (first < 0 || length < 1 || first + length > tokens) throw std::invalid_argument("a segment lies outside");
    }
    auto run = backward ? (bf16 ? best_attention_backward<BFloat16>() : best_attention_backward<float>())
                        : (bf16 ? best_attention_forward<BFloat16>() : best_attention_forward<float>());
    py::gil_scoped_release release;
    run_tasks(run, &p, n_segments * groups, threads);
}

int64_t tasks_of(int64_t rows) { return (rows + kTaskRows - 1) / kTaskRows; }

void rms_norm(bool backward, bool bf16, uint64_t x, uint64_t weight, uint64_t scale, uint64_t out, uint64_t d_out,
              uint64_t d_x, uint64_t d_weight, int64_t rows, int64_t width, double epsilon, int64_t threads) {
    Norm p{pointer<void>(x),     pointer<void>(weight),    pointer<void>(d_out), pointer<void>(out),
           pointer<void>(d_x),   pointer<float>(scale),    nullptr,              rows,
           width,                static_cast<float>(epsilon)};
    py::gil_scoped_release release;
    if (!backward) {
        run_tasks(bf16 ? best_norm_forward<BFloat16>() : best_norm_forward<float>(), &p, tasks_of(rows), threads);
        return;
    }
    std::vector<float> parts(tasks_of(rows) * width);
    p.d_weight = parts.data();
    run_tasks(bf16 ? best_norm_backward<BFloat16>() : best_norm_backward<float>(), &p, tasks_of(rows), threads);
    float* total = pointer<float>(d_weight);
    std::fill(total, total + width, 0.0f);
    for (int64_t task = 0; task < tasks_of(rows); ++task) {
        for (int64_t i = 0; i < width; ++i) total[i] += parts[task * width + i];
    }
}

void swiglu(bool backward, bool bf16, uint64_t x, uint64_t out, uint64_t d_out, uint64_t d_x, int64_t rows,
            int64_t width, int64_t threads) {
    Swiglu p{pointer<void>(x), pointer<void>(d_out), pointer<void>(out), pointer<void>(d_x), rows, width};
    auto run = backward ? (bf16 ? best_swiglu_backward<BFloat16>() : best_swiglu_backward<float>())
                        : (bf16 ? best_swiglu_forward<BFloat16>() : best_swiglu_forward<float>());
    py::gil_scoped_release release;
    run_tasks(run, &p, tasks_of(rows), threads);
}

}  // namespace

PYBIND11_MODULE(_layers, module) {
    module.attr("interface") = kInterface;
    module.attr("task_rows") = kTaskRows;
    module.def("vector_bits", &width);
    module.def("attention", &attention);
    module.def("rms_norm", &rms_norm);
    module.def("swiglu", &swiglu);
}
