// Launches the kernels of loss_mask.h on a stream: no allocation, no synchronisation, fixed output shapes.
// Built by nvcc into a shared library of its own and called through ctypes: nothing of torch is needed.
#include <cuda_runtime.h>

#include "loss_mask.h"

namespace megatron_speech {
namespace {

constexpr int kThreads = 256;
using Documents = DocumentKernel<kThreads>;
using Prompts = PromptKernel<kThreads>;
using Positions = PositionKernel<kThreads>;

__global__ void __launch_bounds__(kThreads) document_kernel(const __grid_constant__ LossMaskProblem p) {
    __shared__ Documents::Shared s;
    const int64_t row = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x);
    int from = 0;
    Documents::sum_runs(p, s, row, thread);
    __syncthreads();
    for (int distance = 1; distance < kThreads; distance *= 2, from = 1 - from) {
        Documents::scan(p, s, thread, distance, from);
        __syncthreads();
    }
    Documents::write(p, s, row, thread, from);
}

__global__ void __launch_bounds__(kThreads) prompt_kernel(const __grid_constant__ LossMaskProblem p) {
    Prompts::find(p, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <bool vector, bool single>
__global__ void __launch_bounds__(kThreads) position_kernel(const __grid_constant__ LossMaskProblem p) {
    __shared__ Positions::Shared s;
    const int thread = static_cast<int>(threadIdx.x);
    Positions::begin(p, s, blockIdx.x, thread);
    __syncthreads();
    Positions::compute<vector, single>(p, s, blockIdx.x, thread);
    __syncthreads();
    Positions::end(p, s, thread);
}

template <bool single>
void launch_positions(const LossMaskProblem& p, cudaStream_t stream) {
    const auto tiles = static_cast<unsigned>(p.rows * Tile<kThreads>::per_row(p.seq_length * p.streams));
    if (outputs_are_aligned(p)) {
        position_kernel<true, single><<<tiles, kThreads, 0, stream>>>(p);
    } else {
        position_kernel<false, single><<<tiles, kThreads, 0, stream>>>(p);
    }
}

cudaError_t launch(const LossMaskProblem& p, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(p.counts, 0, kCounts * sizeof(int64_t), stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(p.invalid, 0, sizeof(int64_t), stream);
    if (error != cudaSuccess) return error;
    if (p.rows == 0) return cudaMemsetAsync(p.cu_seqlens, 0, sizeof(int32_t), stream);
    const auto tiles = static_cast<unsigned>(p.rows * Tile<kThreads>::per_row(p.seq_length));
    document_kernel<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(p);
    if (p.prompt_end_id >= 0) prompt_kernel<<<tiles, kThreads, 0, stream>>>(p);
    p.streams == 1 ? launch_positions<true>(p, stream) : launch_positions<false>(p, stream);
    return cudaGetLastError();
}

}  // namespace
}  // namespace megatron_speech

#if !defined(MS_SOURCE_HASH)
#define MS_SOURCE_HASH ""
#endif

// Of what sources this library was built; compared when it is loaded.
extern "C" __attribute__((visibility("default"))) const char* megatron_speech_cuda_source_hash() { return MS_SOURCE_HASH; }

extern "C" __attribute__((visibility("default"))) const char* megatron_speech_cuda_error(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Pointers are device pointers, except `weights` (6 floats on the host, copied before this returns); `document_flags`
// may be null. Returns a
// cudaError_t: 0 when all kernels were launched.
extern "C" __attribute__((visibility("default"))) int megatron_speech_loss_mask(const int64_t* tokens, const int32_t* document_lengths,
                                         const int32_t* row_pointers, const int32_t* document_groups,
                                         const uint8_t* document_flags, const uint8_t* modality_table, int64_t rows,
                                         int64_t seq_length, int64_t streams, int64_t documents, int64_t vocabulary, int64_t prompt_end_id,
                                         int64_t text_prompt_end_id,
                                         const float* weights, int64_t* labels, float* loss_weights,
                                         int64_t* position_ids, int32_t* group_ids, int32_t* cu_seqlens,
                                         int64_t* counts, int64_t* invalid, int32_t* prompt_ends, int32_t* row_is_cut,
                                         void* stream) {
    using namespace megatron_speech;
    LossMaskProblem p{tokens,     document_lengths, row_pointers, document_groups, document_flags, modality_table,
                      rows,       seq_length,       streams,      documents,       vocabulary,     prompt_end_id,
                      text_prompt_end_id,
                      {},         labels,           loss_weights, position_ids,    group_ids,      cu_seqlens,
                      counts,     invalid,          prompt_ends,  row_is_cut};
    for (int i = 0; i < 2 * kModalities; ++i) p.weights[i] = weights[i];
    return static_cast<int>(launch(p, static_cast<cudaStream_t>(stream)));
}
